"""Custom operators for layers of experts: loops over experts on contiguous rows, opaque to whoever traces or plans.

Operators rather than plain functions because the loops read how many rows each expert has, which fake tensors do not
know; an operator's shapes and floating-point operations depend on shapes alone. Operations are counted as if every row
had an expert. ``ends`` ``[E]`` is the row after each expert's last; rows beyond the last end have no expert and give
zeros. Everything is computed in the type of the rows, and weights of another type are cast expert by expert.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


def _slices(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The rows of each expert that has any."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def _rows_of(x: torch.Tensor, rows: torch.Tensor | None, part: slice) -> torch.Tensor:
    return x[part] if rows is None else x.index_select(0, rows[part])


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write ``x @ weight.T + bias`` into ``out``."""
    if out.dtype is not x.dtype:
        out.copy_(F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)))
    elif bias is None:
        torch.mm(x, weight.to(x.dtype).t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.to(x.dtype).t(), out=out)


@torch.library.custom_op(
    "lightning_bsr::experts_in",
    mutates_args=(),
    schema="(Tensor x, Tensor rows, Tensor weight, Tensor? bias, Tensor ends) -> Tensor",
)
def experts_in(
    x: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor
) -> torch.Tensor:
    """Row ``r`` of expert ``e`` is ``x[rows[r]] @ weight[e].T + bias[e]``; tokens ``[T, C]`` to rows ``[R, H]``."""
    out = x.new_empty(len(rows), weight.shape[1])
    last = 0
    for expert, part in _slices(ends):
        _multiply(_rows_of(x, rows, part), weight[expert], None if bias is None else bias[expert], out[part])
        last = part.stop
    out[last:] = 0
    return out


@experts_in.register_fake
def _(x: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(len(rows), weight.shape[1])


@torch.library.custom_op(
    "lightning_bsr::experts_out",
    mutates_args=(),
    schema="(Tensor h, Tensor? gates, Tensor inverse, Tensor weight, Tensor? bias, Tensor ends) -> Tensor",
)
def experts_out(
    h: torch.Tensor,
    gates: torch.Tensor | None,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Token ``t`` is the sum of ``gates[t, j] * (h[r] @ weight[e].T + bias[e])`` over its rows ``r = inverse[t, j]``.

    Rows ``[R, H]`` to tokens ``[T, C]``; without ``gates`` each counts once.
    """
    # A token's few terms are summed in 32 bits: gates in a lower precision would not sum to 1.
    each = h.new_empty(len(h), weight.shape[1], dtype=torch.promote_types(h.dtype, torch.float32))
    last = 0
    for expert, part in _slices(ends):
        _multiply(h[part], weight[expert], None if bias is None else bias[expert], each[part])
        last = part.stop
    each[last:] = 0
    weights = None if gates is None else gates.to(each.dtype)
    return F.embedding_bag(inverse, each, per_sample_weights=weights, mode="sum").to(h.dtype)


@experts_out.register_fake
def _(h: torch.Tensor, gates: Any, inverse: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return h.new_empty(len(inverse), weight.shape[1])


@torch.library.custom_op(
    "lightning_bsr::experts_out_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? h, Tensor row_gates, Tensor rows, Tensor weight, Tensor? bias, Tensor ends) "
        "-> (Tensor, Tensor)"
    ),
)
def experts_out_backward(
    grad: torch.Tensor,
    h: torch.Tensor | None,
    row_gates: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of :func:`experts_out` for its rows ``[R, H]`` and for their gates ``[R]``.

    Both come from one product: what a row is to be scaled by its gate for the one is multiplied with ``h`` for the
    other. Without ``h`` the second are zeros.
    """
    grad_h = grad.new_empty(len(rows), weight.shape[2])
    grad_gates = torch.zeros_like(row_gates)
    last = 0
    for expert, part in _slices(ends):
        given, unscaled = _rows_of(grad, rows, part), grad_h[part]
        _multiply(given, weight[expert].t(), None, unscaled)
        if h is not None:
            grad_gates[part] = (unscaled * h[part]).sum(-1, dtype=row_gates.dtype)
            if bias is not None:
                grad_gates[part] += given @ bias[expert].to(given.dtype)
        unscaled *= row_gates[part].to(unscaled.dtype)[:, None]
        last = part.stop
    grad_h[last:] = 0
    return grad_h, grad_gates


@experts_out_backward.register_fake
def _(
    grad: torch.Tensor, h: Any, row_gates: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return grad.new_empty(len(rows), weight.shape[2]), torch.empty_like(row_gates)


@torch.library.custom_op(
    "lightning_bsr::expert_weight_gradients",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? grad_rows, Tensor? row_gates, Tensor x, Tensor? x_rows, Tensor ends, "
        "ScalarType dtype) -> (Tensor, Tensor)"
    ),
)
def weight_gradients(
    grad: torch.Tensor,
    grad_rows: torch.Tensor | None,
    row_gates: torch.Tensor | None,
    x: torch.Tensor,
    x_rows: torch.Tensor | None,
    ends: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of weights ``[E, H, C]`` and biases ``[E, H]`` from those of outputs ``[., H]``, inputs ``[., C]``.

    Either is given row by row, or token by token with the token of each row.
    """
    # Not zeros: the gradients of many experts are large, and nearly all of it is written below.
    weight = x.new_empty(len(ends), grad.shape[1], x.shape[1], dtype=dtype)
    bias = x.new_empty(len(ends), grad.shape[1], dtype=dtype)
    idle = set(range(len(ends)))
    for expert, part in _slices(ends):
        given = _rows_of(grad, grad_rows, part)
        if row_gates is not None:
            given = given * row_gates[part].to(given.dtype)[:, None]
        _multiply(given.t(), _rows_of(x, x_rows, part).t(), None, weight[expert])
        bias[expert] = given.sum(0)
        idle.remove(expert)
    for expert in idle:
        weight[expert] = bias[expert] = 0
    return weight, bias


@weight_gradients.register_fake
def _(
    grad: torch.Tensor, grad_rows: Any, row_gates: Any, x: torch.Tensor, x_rows: Any, ends: torch.Tensor, dtype: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = len(ends), grad.shape[1], x.shape[1]
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape[:2], dtype=dtype)


@register_flop_formula(torch.ops.lightning_bsr.experts_in)
def _(x: Shape, rows: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.lightning_bsr.experts_out)
def _(h: Shape, gates: Any, inverse: Any, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * h[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.lightning_bsr.experts_out_backward)
def _(grad: Any, h: Any, row_gates: Any, rows: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.lightning_bsr.expert_weight_gradients)
def _(grad: Shape, grad_rows: Shape | None, row_gates: Any, x: Shape, x_rows: Any, *_: Any, **__: Any) -> int:
    return 2 * (grad_rows or grad)[0] * grad[1] * x[1]
