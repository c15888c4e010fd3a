"""Linear layers that keep for backward what their input was made of, instead of the input itself."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lightning_bsr.functional._autocast import autocast, autocast_dtype
from lightning_bsr.functional._experts import experts_in, experts_out
from lightning_bsr.functional._recipe import Recipe

# Backward keeps the first argument of each, and computing one again takes no matrix product.
_MADE_BY = frozenset({F.layer_norm, F.rms_norm, F.gelu, F.silu, F.relu})
_LAYER_NORM = inspect.signature(F.layer_norm)
_LAYERS_OF_EXPERTS = frozenset({experts_in, experts_out})


class RebuildLinearInputs(TorchFunctionMode):
    """While active, a trained linear layer behind a norm or an activation function keeps no input of its own.

    The norm and the activation function keep their inputs anyway, and backward computes their outputs from these again,
    with the same kernels: gradients are the same to the last bit. Under autocast no linear layer keeps the copy of its
    weight in the lower precision either; the weight is cast again.

    Args:
        fold_norms: Whether a linear layer behind a LayerNorm whose input needs no gradient gives the norm's weight and
            bias their gradients too, out of that of its own weight: the product that would give the gradient of its
            input is left out, and gradients differ by rounding.

    Example:
        >>> x = torch.randn(8, 4, requires_grad=True)
        >>> linear = torch.nn.Linear(4, 2)
        >>> with RebuildLinearInputs():
        ...     y = linear(F.gelu(x))
        >>> gradients = torch.autograd.grad(y.sum(), [x, linear.weight])
        >>> expected = torch.autograd.grad(linear(F.gelu(x)).sum(), [x, linear.weight])
        >>> all(map(torch.equal, gradients, expected))
        True
    """

    def __init__(self, *, fold_norms: bool = False) -> None:
        super().__init__()
        self.fold_norms = fold_norms
        self._made: dict[int, _Made] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func in _LAYERS_OF_EXPERTS:
            return func(*args, **{**kwargs, "recipe": self._recipe_of(args[0])})
        out = func(*args, **kwargs)
        if func in _MADE_BY and out.requires_grad:
            self._made[id(out)] = _Made.by(out, func, args, kwargs)
        return out

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        trains = weight.requires_grad
        if not torch.is_grad_enabled() or not (trains or input.requires_grad) or input.ndim < 2:
            return F.linear(input, weight, bias)
        lower = autocast_dtype(input.device.type)
        casts = lower is not None and weight.dtype != lower
        recipe = self._recipe_of(input) if trains else None
        if recipe is None and not casts:
            return F.linear(input, weight, bias)
        if recipe is None:
            input = input.to(lower)
        elif self.fold_norms and (norm := _Norm.of(recipe)):
            return norm.linear(input, weight, bias)
        out: torch.Tensor = _RebuildingLinear.apply(input, weight, bias, recipe)
        return out

    def _recipe_of(self, tensor: torch.Tensor) -> Recipe | None:
        made = self._made.get(id(tensor))
        return made.recipe if made is not None and made.is_still(tensor) else None


@dataclass(frozen=True)
class _Made:
    """How a tensor was made, as long as neither it nor what it was made of has changed since."""

    output: "weakref.ref[torch.Tensor]"
    recipe: Recipe
    versions: tuple[int, ...]

    @classmethod
    def by(
        cls, output: torch.Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "_Made":
        recipe = Recipe(func, args, kwargs)
        return cls(weakref.ref(output), recipe, _versions(output, recipe))

    def is_still(self, tensor: torch.Tensor) -> bool:
        return self.output() is tensor and _versions(tensor, self.recipe) == self.versions


def _versions(output: torch.Tensor, recipe: Recipe) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in (output, *recipe.tensors))


class _RebuildingLinear(torch.autograd.Function):
    """``F.linear`` whose backward takes the weight as it is, and its input from a recipe if there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        recipe: Recipe | None,
    ) -> torch.Tensor:
        ctx.recipe = recipe.without_tensors() if recipe else None
        ctx.autocast_dtype = autocast_dtype(input.device.type)
        own = [input] if weight.requires_grad else []
        ctx.save_for_backward(weight, *(recipe.tensors if recipe else own))
        with autocast(input.device.type, ctx.autocast_dtype):
            return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grad_input = grad_weight = None
        with autocast(grad.device.type, ctx.autocast_dtype):
            if needs_weight:
                input = ctx.recipe.compute(kept) if ctx.recipe else kept[0]
                grad_weight = rows.t() @ input.flatten(0, -2)
                del input
            if needs_input:
                grad_input = (rows @ weight).view(*grad.shape[:-1], -1)
        grad_bias = rows.sum(0) if needs_bias else None
        return grad_input, grad_weight, grad_bias, None


@dataclass(frozen=True)
class _Norm:
    """A LayerNorm whose input needs no gradient, with a weight and a bias of which one does."""

    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @classmethod
    def of(cls, recipe: Recipe) -> "_Norm | None":
        if recipe.function is not F.layer_norm:
            return None
        call = _LAYER_NORM.bind(*recipe.args, **recipe.kwargs)
        call.apply_defaults()
        x, _, weight, bias, eps = call.arguments.values()
        over_channels = weight is not None and bias is not None and weight.shape == x.shape[-1:]
        return cls(x, weight, bias, eps) if over_channels and not x.requires_grad else None

    def linear(self, normed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = _FoldedNormLinear.apply(
            normed.detach(), weight, bias, self.weight, self.bias, self.input, self.eps
        )
        return out


class _FoldedNormLinear(torch.autograd.Function):
    """``F.linear`` on the output of a LayerNorm, with gradients for the norm's weight and bias, none for its input.

    With x the normalised input, g and b the norm's weight and bias and W that of the linear layer, y = W (g x + b).
    One product over all tokens, D = dy^T x, gives the gradients dW = D g + (sum of dy) b, dg = sum over rows of W D
    (element by element) and db = (sum of dy) W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        normed: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        x: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        ctx.eps = eps
        ctx.autocast_dtype = autocast_dtype(x.device.type)
        ctx.save_for_backward(weight, norm_weight, norm_bias, x)
        with autocast(x.device.type, ctx.autocast_dtype):
            return F.linear(normed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, norm_weight, norm_bias, x = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        with autocast(grad.device.type, ctx.autocast_dtype):
            product = rows.t() @ F.layer_norm(x, norm_weight.shape, eps=ctx.eps).flatten(0, -2)
        sums = rows.sum(0).to(weight.dtype)
        grad_norm_weight = (weight * product).sum(0)
        grad_weight = product.to(weight.dtype).mul_(norm_weight).addr_(sums, norm_bias.to(weight.dtype))
        grad_bias = sums if ctx.needs_input_grad[2] else None
        return None, grad_weight, grad_bias, grad_norm_weight, sums @ weight, None, None
