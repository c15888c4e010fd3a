"""Which attention kernel runs, and whether planning chose the one that training will."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class AttentionCall(NamedTuple):
    """What decides the kernel of one call of ``scaled_dot_product_attention``."""

    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    masked: bool
    mask_requires_grad: bool
    causal: bool
    dropout: bool


class KernelWatch(TorchFunctionMode):
    """While active, notes the kernel of each kind of attention call.

    Attributes:
        kernels: Kernel by kind of call.

    Example:
        >>> q = torch.zeros(1, 1, 4, 8, requires_grad=True)
        >>> with KernelWatch() as watch:
        ...     _ = F.scaled_dot_product_attention(q, q, q)
        >>> sorted(watch.kernels.values())
        ['flash_attention_for_cpu']
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[AttentionCall, str] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _describe(*args, **kwargs)
        if call in self.kernels:
            return func(*args, **kwargs)
        with _FirstKernel() as first:
            out = func(*args, **kwargs)
        self.kernels[call] = first.name
        return out

    def differences(self) -> list[str]:
        """Try each kind of call on real tensors of one image, and say where another kernel runs."""
        found = []
        for call, planned in self.kernels.items():
            q = torch.zeros(1, *call.shape[1:], dtype=call.dtype, device=call.device, requires_grad=call.requires_grad)
            k = torch.zeros(1, *call.key_shape[1:], dtype=call.dtype, device=call.device)
            mask = torch.zeros(call.shape[-2], call.key_shape[-2], dtype=call.dtype, device=call.device)
            mask.requires_grad_(call.mask_requires_grad)
            with _FirstKernel() as first:
                F.scaled_dot_product_attention(
                    q,
                    k,
                    k,
                    attn_mask=mask if call.masked else None,
                    dropout_p=0.1 if call.dropout else 0.0,
                    is_causal=call.causal,
                    enable_gqa=call.shape[1] != call.key_shape[1],
                )
            if first.name != planned:
                found.append(
                    f"Planned with the attention kernel {planned} for {list(call.shape)} {call.dtype}, but "
                    f"{first.name} runs here: the bytes of these attentions differ."
                )
        return found


def _describe(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return AttentionCall(
        tuple(query.shape),
        tuple(key.shape),
        dtype,
        query.device,
        grad,
        attn_mask is not None,
        attn_mask is not None and torch.is_grad_enabled() and attn_mask.requires_grad,
        is_causal,
        dropout_p > 0,
    )


class _FirstKernel(TorchDispatchMode):
    """Notes the first fused attention operation; without one, attention was computed by matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation there
        self.name = "math"

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        operation = str(getattr(func, "_overloadpacket", func)).removeprefix("aten.")
        if self.name == "math" and operation.startswith("_scaled_dot_product_"):
            self.name = operation.removeprefix("_scaled_dot_product_")
        return func(*args, **(kwargs or {}))


class LayerNormStatistics(TorchDispatchMode):
    """While active, gives the statistics of a layer norm the type that the CPU's kernel gives them.

    For a low-precision input and 32-bit weights, as under autocast, the kernel keeps them in 32 bits; the fake one does
    not know.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.native_layer_norm.default or args[0].device.type != "cpu":
            return out
        weight = args[2] if args[2] is not None else args[3]
        if weight is None or weight.dtype is args[0].dtype:
            return out
        return out[0], out[1].to(weight.dtype), out[2].to(weight.dtype)
