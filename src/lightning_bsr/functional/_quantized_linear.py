"""Weights as 8-bit integers with one scale for each row, and the linear layer that multiplies with them."""

from typing import Any

import torch
import torch.nn.functional as F


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of a weight to 255 evenly spaced values around zero.

    The scale of a row is its largest magnitude over 127, rounded to eight significant bits. So a code times its scale
    has at most fifteen, which float32 holds exactly; what comes of it in another dtype is rounded once; and a weight
    that was quantised before gets the same codes and scales again. No value moves by more than half its row's scale.

    Args:
        weight: Finite floats ``[out, in]``.

    Returns:
        The codes, int8 ``[out, in]``, and the scales, ``[out, 1]`` in the dtype of ``weight``.

    Example:
        >>> quantize_rows(torch.tensor([[-254.0, 1.5, 100.0], [0.0, 0.0, 0.0]]))[0]
        tensor([[-127,    1,   50],
                [   0,    0,    0]], dtype=torch.int8)
    """
    largest = torch.linalg.vector_norm(weight, torch.inf, dim=1, keepdim=True)
    # Rows of zeros, or nearly so, have a scale too: the smallest number that is a normal one in each type on the way.
    tiny = max(torch.finfo(weight.dtype).tiny, torch.finfo(torch.bfloat16).tiny)
    scale = (largest.float() / 127).clamp(min=tiny).to(torch.bfloat16).to(weight.dtype)
    ratio = weight.to(torch.promote_types(weight.dtype, torch.float32)) / scale
    return ratio.round_().to(torch.int8), scale


def dequantize_rows(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Make a weight of codes and scales.

    Args:
        codes: int8 ``[out, in]``.
        scale: Floats ``[out, 1]``.
        dtype: Of the weight; that of ``scale`` by default.

    Returns:
        The weight ``[out, in]``.

    Example:
        >>> dequantize_rows(torch.tensor([[-127, 50]], dtype=torch.int8), torch.tensor([[2.0]]))
        tensor([[-254.,  100.]])
    """
    weight = codes.to(dtype or scale.dtype)
    # In place, so that one copy of the weight is made; the product is computed in the wider of the two types. A
    # compiler sees to that itself, and an exporter of torch 2.6 cannot write into what is made of a constant.
    return (weight * scale).to(weight.dtype) if torch.compiler.is_compiling() else weight.mul_(scale)


class _Linear(torch.autograd.Function):
    """A linear layer that keeps nothing for backward but the codes of its weight, which are there anyway."""

    @staticmethod
    def forward(
        x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return F.linear(x, dequantize_rows(codes, scale, dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, codes, scale, _, ctx.dtype = inputs
        ctx.save_for_backward(codes, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
        codes, scale = ctx.saved_tensors
        grad_x = grad @ dequantize_rows(codes, scale, ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_bias, None


def quantized_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute what a linear layer with the weight ``codes * scale`` computes, bit for bit, also under autocast.

    The weight exists in floats only while forward or backward multiplies with it. Gradients go to ``x`` and ``bias``.

    Args:
        x: Floats ``[..., in]``.
        codes: int8 ``[out, in]``.
        scale: Floats ``[out, 1]``.
        bias: Floats ``[out]``.

    Returns:
        Floats ``[..., out]``.

    Example:
        >>> codes, scale = quantize_rows(torch.tensor([[-254.0, 1.5, 100.0]]))
        >>> quantized_linear(torch.ones(3), codes, scale)
        tensor([-152.])
    """
    dtype = scale.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, codes, scale, bias, dtype)  # type: ignore[no-any-return]  # torch's
