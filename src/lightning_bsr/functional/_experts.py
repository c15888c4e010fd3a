"""Linear layers of many experts, each applied to the tokens that are sent to it, without a copy of the tokens.

Rows are (token, choice) pairs sorted by expert: row ``r`` is choice ``order[r] % k`` of token ``order[r] // k``, and
expert ``e`` has the rows from ``ends[e - 1]`` to ``ends[e]``. Rows after the last end belong to no expert. How many
rows an expert has depends on the data; all shapes, and so what backward keeps and computes, do not.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from lightning_bsr.functional import _expert_kernels as kernels
from lightning_bsr.functional._autocast import autocast, autocast_dtype
from lightning_bsr.functional._recipe import Recipe


class Dispatch(NamedTuple):
    """Which expert sees which tokens.

    Attributes:
        order: ``[T * k]``: which (token, choice) pair each row is.
        inverse: ``[T, k]``: the row of each pair.
        ends: ``[E]``: the row after each expert's last.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    ends: torch.Tensor

    @property
    def top_k(self) -> int:
        """How many experts a token chooses."""
        return self.inverse.shape[1]

    @property
    def rows(self) -> torch.Tensor:
        """The token of each row, ``[T * k]``."""
        return self.order // self.top_k


def dispatch_tokens(experts: torch.Tensor, num_experts: int) -> Dispatch:
    """Sort the choices of tokens by expert.

    Args:
        experts: ``[T, k]``, the experts that each token chose; ``num_experts`` stands for none.
        num_experts: How many experts there are.

    Example:
        >>> dispatch_tokens(torch.tensor([[1, 0], [2, 1]]), num_experts=3)
        Dispatch(order=tensor([1, 0, 3, 2]), inverse=tensor([[1, 0],
                [3, 2]]), ends=tensor([1, 3, 4]))
    """
    chosen, order = experts.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(chosen, torch.arange(num_experts, device=order.device), right=True)
    return Dispatch(order, inverse.view_as(experts), ends)


def experts_in(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dispatch: Dispatch,
    *,
    recipe: Recipe | None = None,
) -> torch.Tensor:
    """Send tokens through their experts' linear layers: one row for each choice.

    Weights that do not have the type that is computed in, as under autocast, are cast expert by expert, and no cast
    copy is kept.

    Args:
        x: Tokens ``[..., C]``, T in all.
        weight: ``[E, H, C]``.
        bias: ``[E, H]``, or ``None``.
        dispatch: Which expert sees which tokens.
        recipe: How ``x`` is made, for backward to make it again instead of keeping it.

    Returns:
        Rows ``[T * k, H]``, zero where there is no expert.

    Example:
        >>> dispatch = dispatch_tokens(torch.tensor([[1], [0]]), num_experts=2)
        >>> experts_in(torch.tensor([[3.0], [5.0]]), torch.tensor([[[1.0]], [[10.0]]]), None, dispatch)
        tensor([[ 5.],
                [30.]])
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(experts_in, (x, weight), x, weight, bias, dispatch, recipe=recipe)
    out: torch.Tensor = _ExpertsIn.apply(x, weight, bias, dispatch, recipe)
    return out


def experts_out(
    h: torch.Tensor,
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dispatch: Dispatch,
    *,
    recipe: Recipe | None = None,
) -> torch.Tensor:
    """Send rows through their experts' linear layers, and add up what a token's experts say, weighted by its gates.

    Args:
        h: Rows ``[T * k, H]``.
        gates: ``[T, k]``, the weight of each choice.
        weight: ``[E, C, H]``.
        bias: ``[E, C]``, or ``None``.
        dispatch: Which expert has which rows.
        recipe: How ``h`` is made, for backward to make it again instead of keeping it.

    Returns:
        Tokens ``[T, C]``; choices without an expert add nothing.

    Example:
        >>> dispatch = dispatch_tokens(torch.tensor([[1, 0]]), num_experts=2)
        >>> weight = torch.tensor([[[1.0]], [[10.0]]])
        >>> experts_out(torch.tensor([[2.0], [2.0]]), torch.tensor([[0.5, 0.5]]), weight, None, dispatch)
        tensor([[11.]])
    """
    if has_torch_function((h, gates, weight)):
        return handle_torch_function(experts_out, (h, gates, weight), h, gates, weight, bias, dispatch, recipe=recipe)
    out: torch.Tensor = _ExpertsOut.apply(h, gates, weight, bias, dispatch, recipe)
    return out


class _ExpertsIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dispatch: Dispatch,
        recipe: Recipe | None,
    ) -> torch.Tensor:
        ctx.call = _Call.of(x, weight, recipe)
        ctx.save_for_backward(weight, *dispatch, *ctx.call.keep(x, recipe, needed=any(ctx.needs_input_grad[1:3])))
        x = x.flatten(0, -2).to(ctx.call.dtype)
        return kernels.experts_in(  # type: ignore[no-any-return]  # an operator
            x, dispatch.rows, weight, bias, dispatch.ends
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, order, inverse, ends, *kept = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            x = ctx.call.input(kept).flatten(0, -2).to(ctx.call.dtype)
            grad_weight, grad_bias = kernels.weight_gradients(
                grad, None, None, x, order // inverse.shape[1], ends, weight.dtype
            )
            del x
        if ctx.needs_input_grad[0]:
            grad_x = kernels.experts_out(grad, None, inverse, weight.mT, None, ends)
            grad_x = grad_x.to(ctx.call.input_dtype).view(ctx.call.shape)
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None, None


class _ExpertsOut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        gates: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dispatch: Dispatch,
        recipe: Recipe | None,
    ) -> torch.Tensor:
        ctx.call = _Call.of(h, weight, recipe)
        kept = ctx.call.keep(h, recipe, needed=any(ctx.needs_input_grad[1:4]))
        ctx.save_for_backward(weight, bias, gates, *dispatch, *kept)
        return kernels.experts_out(  # type: ignore[no-any-return]  # an operator
            h.to(ctx.call.dtype), gates, dispatch.inverse, weight, bias, dispatch.ends
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, bias, gates, order, inverse, ends, *kept = ctx.saved_tensors
        grad_h = grad_gates = grad_weight = grad_bias = None
        rows, row_gates = order // inverse.shape[1], gates.flatten()[order]
        h = ctx.call.input(kept).to(ctx.call.dtype) if kept else None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_weight, grad_bias = kernels.weight_gradients(grad, rows, row_gates, h, None, ends, weight.dtype)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_h, row_grads = kernels.experts_out_backward(grad, h, row_gates, rows, weight, bias, ends)
            grad_h = grad_h.to(ctx.call.input_dtype)
            grad_gates = row_grads[inverse] if ctx.needs_input_grad[1] else None
        return grad_h, grad_gates, grad_weight, grad_bias if ctx.needs_input_grad[3] else None, None, None


class _Call(NamedTuple):
    """What backward has to know of a call, beside tensors.

    Attributes:
        dtype: What is computed in.
        input_dtype: Type of the input.
        shape: Shape of the input.
        device_type: Where the input is.
        autocast_dtype: Type of autocast, if it is on.
        recipe: How the input is made again.
    """

    dtype: torch.dtype
    input_dtype: torch.dtype
    shape: torch.Size
    device_type: str
    autocast_dtype: torch.dtype | None
    recipe: Recipe | None

    @classmethod
    def of(cls, input: torch.Tensor, weight: torch.Tensor, recipe: Recipe | None) -> "_Call":
        lower = autocast_dtype(input.device.type)
        recipe = recipe.without_tensors() if recipe else None
        return cls(lower or weight.dtype, input.dtype, input.shape, input.device.type, lower, recipe)

    @staticmethod
    def keep(input: torch.Tensor, recipe: Recipe | None, *, needed: bool) -> list[torch.Tensor]:
        """List what to keep of the input."""
        return [] if not needed else recipe.tensors if recipe else [input]

    def input(self, kept: list[torch.Tensor]) -> torch.Tensor:
        """Give the input back."""
        if self.recipe is None:
            return kept[0]
        with autocast(self.device_type, self.autocast_dtype):
            return self.recipe.compute(kept)
