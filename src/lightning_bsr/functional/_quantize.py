"""Holds frozen weights of a ViT's linear layers as 8-bit integers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._quantized_linear import dequantize_rows, quantize_rows, quantized_linear
from lightning_bsr.vit import ViTView, find_vit

_SCALE = "weight_scale"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MIB = 2**20


class QuantizedForward:
    """The forward of a linear layer with codes for a weight, set on the layer as an instance attribute.

    A class at module level rather than a closure, so that modules that carry it can be deep-copied and pickled.

    Attributes:
        layer: The layer whose forward it is.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """Compute the layer on floats ``[..., in]``; the argument has the name that it has in torch."""
        return quantized_linear(input, self.layer.weight, self.layer.get_buffer(_SCALE), self.layer.bias)


class QuantizedHandle:
    """What :func:`quantize_frozen_` did to a ViT, and the way back.

    Attributes:
        view: The ViT.
        layers: The layers whose weights are held in 8 bits, by their dotted paths in the module that was given.
        bytes_before: Bytes of these weights as they were.
        bytes_after: Bytes of their codes and scales.
    """

    def __init__(self, view: ViTView, layers: dict[str, nn.Linear]) -> None:
        self.view = view
        self.layers = layers
        self.bytes_before = sum(layer.weight.nbytes for layer in layers.values())
        self._hooks: list[RemovableHandle] = []
        for layer in layers.values():
            self._quantize(layer)
        self.bytes_after = sum(layer.weight.nbytes + layer.get_buffer(_SCALE).nbytes for layer in layers.values())

    def remove(self) -> None:
        """Give the layers float weights again: the rounded ones, as the originals are gone.

        What the model computes does not change. A second call does nothing.
        """
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for layer in self.layers.values():
            layer.weight.data = dequantize_rows(layer.weight.data, layer.get_buffer(_SCALE))
            del layer.forward
            delattr(layer, _SCALE)

    def _quantize(self, layer: nn.Linear) -> None:
        codes, scale = quantize_rows(layer.weight.detach())
        layer.weight.grad = None
        # The parameter stays the same object, so that the float weight lives on in no optimizer.
        layer.weight.data = codes
        layer.register_buffer(_SCALE, scale, persistent=False)
        layer.forward = QuantizedForward(layer)  # type: ignore[method-assign]  # on this instance only
        self._hooks.append(layer.register_state_dict_post_hook(_save_floats))
        self._hooks.append(layer.register_load_state_dict_pre_hook(_load_floats))

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} frozen weights in blocks of the {self.view.name} are held in 8 bits: "
            f"{self.bytes_before / _MIB:.2f} -> {self.bytes_after / _MIB:.2f} MiB; they stay rounded afterwards"
        )


def quantize_frozen_(module: nn.Module, *, vit: str | None = None) -> QuantizedHandle:
    """Hold the frozen weights of the linear layers in the blocks of the ViT in ``module`` as 8-bit integers.

    The originals are gone: the model computes with the weights rounded to codes ``-127..127`` times one scale for each
    output (see :func:`quantize_rows`), and ``remove()`` leaves it these rounded weights. Given them, it computes
    exactly what a linear layer computes, and so do gradients.

    ``state_dict()`` has the same keys as before and the rounded weights in the dtype they had; ``load_state_dict()``
    takes ordinary weights and rounds them. Only ``weight`` itself is an int8 parameter meanwhile: code that reads it
    instead of calling its layer must not run. Undo first what was done last: a weight in 8 bits cannot train.

    Layers of a subclass of :class:`torch.nn.Linear`, biases and norms, and all that lies outside the blocks, stay as
    they are. A gradient that a frozen weight has left from before is dropped.

    Args:
        module: Any module that holds a ViT.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` makes floats of the codes again.

    Raises:
        ConfigurationError: If the ViT is not found, no linear layer of its blocks is frozen, or one that is cannot be
            quantised: it is already, has its forward replaced, shares its memory with something else, or has a weight
            that is no plain parameter or has NaN or infinite values. Nothing has changed then.

    Example:
        >>> import timm
        >>> from lightning_bsr.functional import select_blocks_
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> selection = select_blocks_(model, [1, 3, -1])
        >>> handle = quantize_frozen_(model)
        >>> print(handle)
        12 frozen weights in blocks of the ViT (VisionTransformer) are held in 8 bits: 0.47 -> 0.12 MiB; they stay
        rounded afterwards
        >>> handle.remove()
        >>> selection.remove()
    """
    view = find_vit(module, vit)
    layers = _frozen_layers(module, view)
    _check(module, view, layers)
    return QuantizedHandle(view, layers)


def _frozen_layers(module: nn.Module, view: ViTView) -> dict[str, nn.Linear]:
    inside = {part for block in view.blocks for part in block.modules()}
    return {
        name: part
        for name, part in module.named_modules()
        # Subclasses may do other things with their weight than multiply by it.
        if type(part) is nn.Linear and part in inside and not part.weight.requires_grad
    }


def _check(module: nn.Module, view: ViTView, layers: dict[str, nn.Linear]) -> None:
    if not layers:
        raise ConfigurationError(
            f"No linear layer in the blocks of the {view.name} has a frozen weight to hold in 8 bits; freeze some "
            "before, for example with BlockSelect or select_blocks_."
        )
    holders = _holders(module)
    for name, layer in layers.items():
        if _is_quantized(layer):
            raise ConfigurationError(f"The weight of {name!r} is held in 8 bits already; remove that first.")
        if (forward := vars(layer).get("forward")) is not None:
            raise ConfigurationError(
                f"{name!r} has its forward replaced by {type(forward).__name__}; undo that before its weight is held "
                "in 8 bits."
            )
        weight = layer.weight
        if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
            raise ConfigurationError(
                f"The weight of {name!r} is a {type(weight).__name__} of {weight.dtype}, expected a plain Parameter of "
                f"{', '.join(map(str, _FLOATS))}."
            )
        others = [other for other in holders[weight.untyped_storage()._cdata] if other != f"{name}.weight"]
        if others:
            raise ConfigurationError(
                f"The weight of {name!r} shares its memory with {others[0]!r}, so it cannot be held in 8 bits; give "
                "one of them a copy."
            )
        if not torch.linalg.vector_norm(weight.detach(), torch.inf).isfinite():
            raise ConfigurationError(
                f"The weight of {name!r} has NaN or infinite values, which cannot be held in 8 bits."
            )


def _holders(module: nn.Module) -> dict[int, list[str]]:
    """Name the parameters and buffers that lie on each storage, each module once."""
    found: dict[int, list[str]] = {}
    for path, part in module.named_modules():
        for name, tensor in _own_tensors(part):
            found.setdefault(tensor.untyped_storage()._cdata, []).append(f"{path}.{name}" if path else name)
    return found


def _own_tensors(part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from part.named_parameters(recurse=False, remove_duplicate=False)
    yield from part.named_buffers(recurse=False, remove_duplicate=False)


def quantized_weights(module: nn.Module) -> list[str]:
    """Name the weights in ``module`` that are held in 8 bits now."""
    return [f"{name}.weight" for name, part in module.named_modules() if _is_quantized(part)]


def _is_quantized(layer: nn.Module) -> bool:
    return isinstance(vars(layer).get("forward"), QuantizedForward)


def _save_floats(layer: nn.Linear, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    state_dict[f"{prefix}weight"] = dequantize_rows(layer.weight.detach(), layer.get_buffer(_SCALE))


def _load_floats(
    layer: nn.Linear,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: object,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    key, scale = f"{prefix}weight", layer.get_buffer(_SCALE)
    loaded = state_dict.get(key)
    # What is missing or does not fit is torch's to report.
    if loaded is None or loaded.shape != layer.weight.shape:
        return
    floats = loaded.detach().to(scale)
    if not torch.linalg.vector_norm(floats, torch.inf).isfinite():
        error_msgs.append(f"{key} has NaN or infinite values, which cannot be held in 8 bits.")
        state_dict[key] = layer.weight.detach()
        return
    codes, new_scale = quantize_rows(floats)
    state_dict[key] = codes
    scale.copy_(new_scale)
