"""Attention on the CPU in low precision, with a backward pass of matrix products instead of PyTorch's kernel."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._forward import BlockForward, Half, Result, forward_chain
from lightning_bsr.functional._installed import BlockForwardsHandle, chosen_blocks
from lightning_bsr.vit import find_vit

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def attention_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, grad: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of softmax attention by matrix products over whole rows, in fp32 or the inputs' precision.

    With ``P = softmax(scale q k^T)`` and ``dS = P (dO v^T - rowsum(dO out))`` they are ``scale dS k``, ``scale dS^T q``
    and ``P^T dO`` (FlashAttention, arXiv 2205.14135, algorithm 4, without tiles). ``P`` is computed again, so the
    N x N matrices live only here.

    Args:
        q: Queries ``[B, H, N, D]``.
        k: Keys ``[B, H, N, D]``.
        v: Values ``[B, H, N, D]``.
        out: The attention's output ``[B, H, N, D]``.
        grad: The gradient of the output ``[B, H, N, D]``.
        scale: The factor on ``q @ k.T``.

    Returns:
        The gradients of ``q``, ``k`` and ``v``, in their type.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
        >>> out = F.scaled_dot_product_attention(q, k, v)
        >>> grads = attention_gradients(q, k, v, out, torch.ones_like(out), 0.5)
        >>> all(map(torch.allclose, grads, torch.autograd.grad(out.sum(), [q, k, v])))
        True
    """
    heads, dtype = q.shape[:2], q.dtype
    exact = torch.promote_types(dtype, torch.float32)
    q, k, v, out, grad = (x.to(exact).flatten(0, 1) for x in (q, k, v, out, grad))
    nothing = q.new_zeros(1)
    p = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=scale).softmax(dim=-1)
    grad_v = p.transpose(1, 2) @ grad
    grad_s = torch.baddbmm((grad * out).sum(dim=-1, keepdim=True), grad, v.transpose(1, 2), beta=-1).mul_(p)
    del p
    grad_q = torch.baddbmm(nothing, grad_s, k, beta=0, alpha=scale)
    grad_k = torch.baddbmm(nothing, grad_s.transpose(1, 2), q, beta=0, alpha=scale)
    first, second, third = (x.to(dtype).unflatten(0, heads) for x in (grad_q, grad_k, grad_v))
    return first, second, third


class _Attention(torch.autograd.Function):
    """Fused attention whose backward pass is :func:`attention_gradients`."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return (*attention_gradients(q, k, v, out, grad, ctx.scale), None)


class AttentionByProducts(TorchFunctionMode):
    """While active, attention on the CPU in bf16 or fp16 has its gradients by matrix products.

    Attention with a mask, dropout or grouped queries, and in other precisions, stays as it is.

    Example:
        >>> q = torch.randn(1, 2, 5, 4, dtype=torch.bfloat16, requires_grad=True)
        >>> with AttentionByProducts():
        ...     type(F.scaled_dot_product_attention(q, q, q).grad_fn).__name__
        '_AttentionBackward'
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not torch.compiler.is_compiling():
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # As autocast itself does, which an autograd function hides the call from.
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    plain = attn_mask is None and not dropout_p and not is_causal and query.shape[:2] == key.shape[:2]
    if needs_gradients and plain and query.device.type == "cpu" and query.dtype in _LOW_PRECISION:
        out: torch.Tensor = _Attention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
        return out
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class AttentionByProductsForward(BlockForward):
    """The forward of a block whose attention has its gradients by matrix products."""

    rank = 5

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mode = AttentionByProducts()
        with mode:
            return self.call_inner(x, *args, **kwargs)

    def run_half(self, half: Half, function: Callable[[torch.Tensor], Result], x: torch.Tensor) -> Result:
        """Run ``function``, which computes one branch of the block on ``x``, with attention's gradients by products."""
        mode = AttentionByProducts()
        with mode:
            return super().run_half(half, function, x)


def install_attention_by_products(module: nn.Module, *, vit: str | None = None) -> BlockForwardsHandle:
    """Compute the gradients of attention on the CPU in bf16 and fp16 by matrix products in fp32.

    PyTorch's own backward kernel for attention on the CPU is several times slower in these precisions than in fp32.
    Outputs are exactly what they were. Gradients differ by rounding: they are nearer to those of fp32. For a moment
    three ``B * H * N * N`` matrices in fp32 are held. On other devices, in other precisions, for attention with a mask
    or dropout, and in compiled code nothing changes.

    Args:
        module: Any module that holds a ViT.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        ConfigurationError: If the ViT is not found, or its attention has gradients by products already. Nothing has
            changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_attention_by_products(model)
        >>> print(handle)
        all 6 blocks of the ViT (VisionTransformer) have attention's gradients by matrix products
        >>> handle.remove()
    """
    view = find_vit(module, vit)
    for index in chosen_blocks(view, "all", ()):
        if any(isinstance(forward, AttentionByProductsForward) for forward in forward_chain(view.blocks[index])):
            raise ConfigurationError(
                f"Block {index} of the {view.name} has attention's gradients by matrix products already; remove that "
                "first."
            )
    forwards = {index: AttentionByProductsForward(block) for index, block in enumerate(view.blocks)}
    return BlockForwardsHandle(view, forwards, "have attention's gradients by matrix products")
