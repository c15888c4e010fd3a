"""The memory formula of the published BSR code: what its tables count, for comparing with them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._drop_forward import PositionsForward, TokenDropForward
from lightning_bsr.functional._experts import experts_in
from lightning_bsr.functional._forward import BlockForward, attach_forward, forward_chain
from lightning_bsr.functional._restore import RestoringForward
from lightning_bsr.vit import ViTView, find_vit

_NUMBER = 4  # bytes of an activation, and of a parameter that trains
_FROZEN = 1  # bytes of a frozen parameter
_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
# Each with the position of its weight.
_NORMS = {F.layer_norm: 2, F.rms_norm: 2, F.group_norm: 2, F.batch_norm: 3}
_DROPS = (RestoringForward, PositionsForward, TokenDropForward)
_SMOOTH = (F.gelu, F.silu, torch.sigmoid, torch.tanh)


@dataclass(frozen=True)
class ReferenceReport:
    """The memory of a training step as the published BSR code counts it.

    Attributes:
        activations: Bytes of one image.
        parameters: Bytes of the ViT's parameters.
        total: Bytes of the parameters and of a batch's activations.

    Example:
        >>> ReferenceReport(activations=200, parameters=50, total=450).to_dict()
        {'activations': 200, 'parameters': 50, 'total': 450}
    """

    activations: int
    parameters: int
    total: int

    def to_dict(self) -> dict[str, int]:
        """Give the report as plain numbers, ready for JSON."""
        return asdict(self)


def reference_accounting(
    module: nn.Module,
    *,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    vit: str | None = None,
) -> ReferenceReport:
    """Evaluate the memory formula of the published BSR code (arXiv 2405.10951) on the ViT in ``module``.

    It is for comparing with that paper's figures; :func:`measure` says what a step really keeps. The formula, for one
    image and in numbers of 32 bits whatever the module's type:

    - A linear layer, norm or convolution whose weight trains keeps its input.
    - From the first block on in which anything trains (from the start, if the embedding trains), each GELU (and
      SiLU, sigmoid and tanh) keeps its input, and each self-attention with H heads keeps ``H * N**2 + 3 * C * N`` for
      N tokens of width C, whether it trains or not. Before that block they keep nothing.
    - Passing through a layer needs its input and, if it is linear or a convolution, its output; inside an attention,
      the attention's input too. The activations are the most that is needed and kept by earlier layers at any moment:
      as a rule at the classifier, whose output is therefore part of it.
    - A parameter takes 4 bytes if it trains and 1 byte if not, as if frozen ones were held in 8 bits.
    - The total is the parameters and ``batch_size`` times the activations.

    This leaves out what backward needs of frozen norms, which gradient passes on its way down, and of the fusion of
    tokens; and, of the rest of a step, the gradients and the optimizer's state. It counts too much for fused
    attention, which never keeps the ``N**2`` matrix. It knows no autocast, no checkpointing and no other way of
    keeping less.

    The ViT's own forward runs on tensors without data; token drops installed in its blocks count, other replaced
    forwards of this package stand aside. What ``module`` holds outside the ViT does not count.

    Args:
        module: A module that holds a ViT, with selection and dropping as they would be in training.
        image_size: Side of the images, or height and width; the ViT's own by default.
        batch_size: Images in the batch of the total.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        Bytes.

    Raises:
        ConfigurationError: If the ViT is not found, has mixtures of experts, or does not say its image size or its
            numbers of heads, or ``batch_size`` is not positive.

    Example:
        >>> import timm
        >>> from lightning_bsr.functional import install_token_drop, select_blocks_
        >>> model = timm.create_model("deit_small_patch16_224", num_classes=100)
        >>> _ = select_blocks_(model, [3, 7, 11])
        >>> _ = install_token_drop(model, [3, 6, 9], 0.5)
        >>> report = reference_accounting(model, batch_size=128)
        >>> f"{report.activations / 2**20:.2f} MiB an image, {report.total / 2**20:,.0f} MiB in all"
        '10.92 MiB an image, 1,434 MiB in all'
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}, expected at least 1.")
    view = find_vit(module, vit)
    images = torch.empty(1, *_image_shape(view, image_size), device="meta")
    parameters = {name: _without_data(p).requires_grad_(p.requires_grad) for name, p in view.model.named_parameters()}
    buffers = {name: _without_data(buffer) for name, buffer in view.model.named_buffers()}
    walk = _Walk(view)
    with torch.no_grad(), _only_token_drops(view.blocks), walk.hooks(), walk:
        functional_call(view.model, parameters | buffers, (images,))
    held = sum(p.numel() * (_NUMBER if p.requires_grad else _FROZEN) for p in view.model.parameters())
    activations = walk.peak * _NUMBER
    return ReferenceReport(activations=activations, parameters=held, total=held + batch_size * activations)


class _Walk(TorchFunctionMode):
    """While active, follows what the formula keeps and needs, in numbers.

    Attributes:
        peak: The most that was needed and kept at any moment so far.
    """

    def __init__(self, view: ViTView) -> None:
        super().__init__()
        self._view = view
        attentions = [a for block, spec in zip(view.blocks, view.specs, strict=True) for a in spec.attentions(block)]
        self._heads = {attention: _num_heads(view, attention) for attention in attentions}
        after = {id(p) for part in (*view.blocks, *view.norms, *view.heads) for p in part.parameters()}
        self._backward_reaches = any(p.requires_grad and id(p) not in after for p in view.model.parameters())
        self._kept = 0
        self._residual = 0
        self.peak = 0

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch for the first block that trains and for the attentions."""
        with ExitStack() as stack:
            trained = [block for block in self._view.blocks if any(p.requires_grad for p in block.parameters())]
            if trained:
                stack.callback(trained[0].register_forward_pre_hook(self._reached).remove)
            else:
                stack.callback(self._view.blocks[-1].register_forward_hook(self._reached).remove)
            for attention in self._heads:
                stack.callback(attention.register_forward_pre_hook(self._enter_attention, with_kwargs=True).remove)
                stack.callback(attention.register_forward_hook(self._leave_attention).remove)
            yield

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is experts_in:
            raise ConfigurationError(f"The {self._view.name} has mixtures of experts, which the formula does not know.")
        out = func(*args, **kwargs)
        if func in _PRODUCTS:
            self._layer(args[0], _argument(args, kwargs, 1), out.numel())
        elif func in _NORMS:
            self._layer(args[0], _argument(args, kwargs, _NORMS[func]), 0)
        elif func in _SMOOTH:
            self._pass(args[0].numel(), 0, keeps=self._backward_reaches)
        return out

    def _layer(self, x: torch.Tensor, weight: torch.Tensor | None, num_out: int) -> None:
        self._pass(x.numel(), num_out, keeps=weight is not None and weight.requires_grad)

    def _pass(self, num_in: int, num_out: int, *, keeps: bool) -> None:
        self.peak = max(self.peak, self._kept + self._residual + num_in + num_out)
        self._kept += keeps * num_in

    def _reached(self, *_: Any) -> None:
        self._backward_reaches = True

    def _enter_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        if self._backward_reaches:
            self._kept += self._heads[attention] * x.shape[1] ** 2 + 3 * x.numel()
        self._residual = x.numel()

    def _leave_attention(self, *_: Any) -> None:
        self._residual = 0


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int) -> torch.Tensor | None:
    """The weight of a layer, however it was passed."""
    weight = args[position] if len(args) > position else kwargs.get("weight")
    return weight if isinstance(weight, torch.Tensor) else None


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    # All of one type, so that images fit whatever the parameters are kept in.
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


@contextmanager
def _only_token_drops(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Leave blocks no other replaced forward than their token drop, for as long as the context lasts."""
    with ExitStack() as stack:
        for block in blocks:
            forward = vars(block).get("forward")
            if not isinstance(forward, BlockForward):
                continue
            links = [copy(link) for link in forward_chain(block) if isinstance(link, _DROPS)]
            stack.callback(setattr, block, "forward", forward)
            del block.forward
            for link in reversed(links):
                link.inner = None
                attach_forward(link)
            if links:
                stack.callback(delattr, block, "forward")
        yield


def _image_shape(view: ViTView, image_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    embed = getattr(view.model, "patch_embed", None)
    size = getattr(embed, "img_size", None) if image_size is None else image_size
    if size is None:
        raise ConfigurationError(f"The {view.name} does not say the size of its images; give image_size.")
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(getattr(embed, "proj", None), "in_channels", 3)
    return channels, height, width


def _num_heads(view: ViTView, attention: nn.Module) -> int:
    if isinstance(attention, nn.MultiheadAttention):
        raise ConfigurationError(
            f"The attention of the {view.name} is torch's MultiheadAttention, of which the formula sees no layers."
        )
    for name in ("num_heads", "num_attention_heads"):
        count = getattr(attention, name, None)
        if isinstance(count, int):
            return count
    raise ConfigurationError(
        f"The attention of the {view.name} ({type(attention).__name__}) has no num_heads, by which the formula counts."
    )
