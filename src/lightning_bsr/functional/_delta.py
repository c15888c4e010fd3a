"""Saves only what was trained of a module, merges it into the frozen base again, and loads it."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._delta_file import Delta, describe, fingerprint, read_delta, some_of, write_delta
from lightning_bsr.functional._drop_forward import RESTORES, TokenDropForward
from lightning_bsr.functional._forward import forward_chain
from lightning_bsr.functional._quantize import quantized_weights
from lightning_bsr.functional._quantized_linear import dequantize_rows, quantize_rows
from lightning_bsr.functional._token_drop import TokenDropHandle, install_token_drop
from lightning_bsr.vit._find import iter_vits

_DROP_OPTIONS = ("fuse", "score", "detach", "normalize")


def frozen_fingerprints(module: nn.Module) -> dict[str, str]:
    """Return the fingerprint of each parameter that requires no gradient, as the state dict has it."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: fingerprint(tensor) for name, tensor in module.state_dict().items() if name in frozen}


def trained_tensors(module: nn.Module, base: Collection[str]) -> dict[str, torch.Tensor]:
    """Return all tensors of the state dict but those of the frozen base.

    Persistent buffers are among them: training changes batch statistics and the like whatever is frozen.
    """
    state = module.state_dict()
    return {name: t for name, t in state.items() if name not in base and isinstance(t, torch.Tensor)}


def what_it_computes(module: nn.Module) -> dict[str, Any]:
    """Describe what was installed that changes the function of the module, in plain values.

    Returns:
        ``token_drop``: arguments of :func:`install_token_drop`, one mapping for each ViT and set of options;
        ``rounded``: names of the weights that :func:`quantize_frozen_` rounded.
    """
    drops: dict[tuple[Any, ...], dict[str, Any]] = {}
    for view in iter_vits(module):
        for index, block in enumerate(view.blocks):
            for forward in forward_chain(block):
                if isinstance(forward, TokenDropForward):
                    options = {name: getattr(forward, name) for name in _DROP_OPTIONS}
                    options["restore"] = any(RESTORES in each.effects for each in forward_chain(block))
                    key = (view.blocks_path, *options.values())
                    drop = drops.setdefault(key, {"vit": view.blocks_path, "blocks": [], "keep_rate": [], **options})
                    drop["blocks"].append(index)
                    drop["keep_rate"].append(forward.keep_rate)
    return {"token_drop": list(drops.values()), "rounded": quantized_weights(module)}


def save_delta(
    module: nn.Module,
    path: str | Path,
    *,
    base: Mapping[str, str] | None = None,
    configuration: Mapping[str, Any] | None = None,
) -> None:
    """Save what trains in ``module`` to a safetensors file, with a hash of what is frozen.

    Saved is the state dict without the parameters that require no gradient now; buffers are in it. Where tokens are
    dropped now, and which weights are held in 8 bits, is saved too. The file is written whole or not at all.

    Args:
        module: The module that trains.
        path: A file name that ends in ``.safetensors``.
        base: Fingerprints of the frozen parameters, computed here by default.
        configuration: More to write into the file: plain values.

    Raises:
        ConfigurationError: If a tensor has NaN or infinite values, or the file has another ending.
        OSError: If the file cannot be written; what was there before is there still.

    Example:
        >>> import tempfile, timm
        >>> from lightning_bsr.functional import merge_delta, select_blocks_
        >>> model, base = (timm.create_model("test_vit", num_classes=10) for _ in range(2))
        >>> _ = base.load_state_dict(model.state_dict())
        >>> selection = select_blocks_(model, [5])
        >>> _ = nn.init.ones_(model.head.bias)  # stands for training
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_delta(model, f"{folder}/delta.safetensors")
        ...     merged = merge_delta(base, f"{folder}/delta.safetensors")
        >>> all(torch.equal(merged[name], tensor) for name, tensor in model.state_dict().items())
        True
    """
    frozen = frozen_fingerprints(module) if base is None else base
    write_delta(
        path, Delta(trained_tensors(module, frozen), frozen, {**(configuration or {}), **what_it_computes(module)})
    )


def merge_delta(base: nn.Module | Mapping[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """Put what was trained into the weights that it was trained from.

    Args:
        base: The module or state dict that training started from; it is not changed. If all names in the file begin
            with the same path, such as ``model.``, it may also be what lies there.
        path: The delta file.

    Returns:
        The state dict of the trained module, with the names that ``base`` has. Frozen tensors are those of ``base``,
        not copies; or, where ``QuantizeFrozen`` rounded them in training, rounded ones.

    Raises:
        ConfigurationError: If the file is damaged, of a newer format, or of another base: other weights, names,
            shapes or dtypes.

    Example:
        See :func:`save_delta`.
    """
    return merge(base.state_dict() if isinstance(base, nn.Module) else base, read_delta(path), f"'{path}'")


class LoadedDelta:
    """What :func:`load_delta` loaded and installed, and the way back for the latter.

    Attributes:
        delta: The content of the file.
        drops: The token drops that were installed.
    """

    def __init__(self, delta: Delta, drops: list[TokenDropHandle]) -> None:
        self.delta = delta
        self.drops = drops

    def remove(self) -> None:
        """Drop no tokens any more; the weights stay. A second call does nothing."""
        for drop in reversed(self.drops):
            drop.remove()

    def __str__(self) -> str:
        numel = sum(t.numel() for t in self.delta.tensors.values())
        loaded = f"{len(self.delta.tensors)} tensors of {numel:,} values loaded"
        return "; ".join([loaded, *map(str, self.drops)])


def load_delta(model: nn.Module, path: str | Path) -> LoadedDelta:
    """Load what was trained into the model that it was trained from, and drop tokens as training did.

    Args:
        model: The module as it was before training; or what lies at the path that all names in the file begin with,
            such as the timm model of a LightningModule.
        path: The delta file.

    Returns:
        A handle; its ``remove()`` takes the token drop out again.

    Raises:
        ConfigurationError: As :func:`merge_delta`; or if tokens cannot be dropped in this model as they were. Nothing
            has changed then.

    Example:
        >>> import tempfile, timm
        >>> from lightning_bsr.functional import save_delta, select_blocks_
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> selection = select_blocks_(model, [5])
        >>> drop = install_token_drop(model, [1, 3], 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_delta(model, f"{folder}/delta.safetensors")
        ...     drop.remove()
        ...     print(load_delta(model, f"{folder}/delta.safetensors"))
        16 tensors of 42,506 values loaded; blocks 1, 3 of the ViT (VisionTransformer) keep 0.5 of the patch tokens:
        101 -> 52 -> 28 tokens
    """
    state, delta = model.state_dict(), read_delta(path)
    merged = merge(state, delta, f"'{path}'")
    prefix = _prefix(state, delta)
    drops: list[TokenDropHandle] = []
    try:
        for drop in delta.configuration.get("token_drop", ()):
            vit = drop["vit"].removeprefix(prefix)
            drops.append(install_token_drop(model, **{**drop, "vit": vit}))
        model.load_state_dict(merged)
    except BaseException:
        for installed in drops:
            installed.remove()
        raise
    return LoadedDelta(delta, drops)


def merge(base: Mapping[str, torch.Tensor], delta: Delta, title: str) -> dict[str, torch.Tensor]:
    """Put what was trained into a state dict, after all checks.

    Args:
        base: The state dict; it is not changed.
        delta: What was trained.
        title: What messages call it.

    Raises:
        ConfigurationError: If ``base`` is another one.
    """
    prefix = _prefix(base, delta)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in delta.tensors.items()}
    expected = {name.removeprefix(prefix): described for name, described in delta.base.items()}
    rounded = {name.removeprefix(prefix) for name in delta.configuration.get("rounded", ())}
    _check_names(base, tensors.keys() | expected.keys(), delta, title)
    for name, tensor in tensors.items():
        if describe(tensor) != describe(base[name]):
            raise ConfigurationError(
                f"{name!r} is {describe(tensor)} in {title}, but {describe(base[name])} in the base; expected the "
                "module that it was trained from."
            )
    merged = dict(base) | tensors
    found = {}
    for name in expected:
        if name in rounded and base[name].ndim == 2 and base[name].is_floating_point():
            merged[name] = dequantize_rows(*quantize_rows(base[name].detach()))
        found[name] = fingerprint(merged[name])
    if others := sorted(name for name in expected if found[name] != expected[name]):
        raise ConfigurationError(
            f"The base is another one than {title} was trained from: {len(others)} of its {len(expected)} frozen "
            f"tensors differ, such as {others[0]!r}, which is {found[others[0]]}, expected {expected[others[0]]}."
        )
    return merged


def _prefix(base: Mapping[str, Any], delta: Delta) -> str:
    """The path in the file of what ``base`` holds: empty, or what all names in the file have in common."""
    names = [*delta.tensors, *delta.base]
    prefix = ""
    for part in names[0].split(".") if names else ():
        if any(name.removeprefix(prefix) in base for name in names):
            return prefix
        prefix += f"{part}."
        if not all(name.startswith(prefix) for name in names):
            break
    return ""


def _check_names(base: Mapping[str, Any], names: set[str], delta: Delta, title: str) -> None:
    given = {name for name, value in base.items() if isinstance(value, torch.Tensor)}
    lacking, unknown = sorted(names - given), sorted(given - names)
    if not lacking and not unknown:
        return
    differences = []
    if lacking:
        differences.append(f"the base lacks {len(lacking)} tensors ({some_of(lacking)})")
    if unknown:
        differences.append(f"the base has {len(unknown)} that it does not know ({some_of(unknown)})")
    described = delta.configuration.get("callbacks", ())
    methods = [callback["arguments"]["method"] for callback in described if callback["class"] == "FineTune"]
    hint = f", with the method {methods[0]!r} applied to it" if methods else ""
    raise ConfigurationError(
        f"The names in {title} and in the base differ: {' and '.join(differences)}; expected the module that it was "
        f"trained from{hint}."
    )
