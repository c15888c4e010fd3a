"""Reads a local checkpoint and builds the timm model that it holds, or says how the two differ."""

import pickle
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from lightning_bsr._errors import ConfigurationError

_TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


def create_from_checkpoint(model_name: str, num_classes: int, path: Path, model_kwargs: dict[str, Any]) -> nn.Module:
    """Build a timm model with the weights of a local file.

    The head starts anew when the file's has another number of classes or none; all else must match. Position
    and patch embeddings are resampled as timm does for its own weights.

    Args:
        model_name: Name of a timm model.
        num_classes: Outputs of its head.
        path: The file, as ``read_state_dict`` takes it.
        model_kwargs: More arguments for ``timm.create_model``.

    Raises:
        ConfigurationError: The file cannot be read, or does not fit the model.
    """
    weights = read_state_dict(path)
    model = timm.create_model(model_name, num_classes=num_classes, **model_kwargs)
    names = cast("dict[str, Any]", model.pretrained_cfg).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    file_classes = next((len(weights[f"{head}weight"]) for head in heads if f"{head}weight" in weights), 0)

    # With the file's own number of classes timm loads strictly, through the filter of the model's family.
    overlay = {"source": None, "state_dict": weights, "num_classes": file_classes}
    try:
        source = timm.create_model(
            model_name,
            pretrained=True,
            num_classes=file_classes,
            **{**model_kwargs, "pretrained_cfg_overlay": overlay},
        )
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
        expected = {key: value for key, value in model.state_dict().items() if not key.startswith(heads)}
        given = {key: value for key, value in weights.items() if not key.startswith(heads)}
        difference = _difference(expected, given) or f"{error}".splitlines()[0]
        raise ConfigurationError(
            f"checkpoint_path is '{path}', whose weights do not fit {model_name}: {difference}."
        ) from error

    loaded = source.state_dict()
    if file_classes != num_classes:
        loaded = {key: value for key, value in loaded.items() if not key.startswith(heads)}
        loaded |= {key: value for key, value in model.state_dict().items() if key.startswith(heads)}
    model.load_state_dict(loaded)
    return model


def read_state_dict(path: Path, argument: str = "checkpoint_path") -> dict[str, Tensor]:
    """Read the state dict of a timm model from a file, without running any code that the file may hold.

    Args:
        path: A ``.safetensors`` file, or a torch file whose state dict may lie under ``state_dict`` or
            ``model`` and whose keys may all begin with ``model.``, as in a Lightning checkpoint of
            ``ViTClassifier``.
        argument: What the user's argument is called.

    Raises:
        ConfigurationError: There is no such file, its suffix is not one of those, or it holds no state dict.
    """
    if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        available = ", ".join((".safetensors", *_TORCH_SUFFIXES))
        raise ConfigurationError(f"{argument} is '{path}', expected a file ending in one of {available}.")
    if not path.is_file():
        raise ConfigurationError(f"{argument} is '{path}', expected an existing file.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        raise ConfigurationError(
            f"{argument} is '{path}', which cannot be read ({type(error).__name__}); expected a "
            "safetensors file or a torch file of tensors that loads with weights_only=True."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise ConfigurationError(
            f"{argument} is '{path}', which holds no state dict; expected one at the top, under "
            "'state_dict' or under 'model'."
        )
    weights: dict[str, Tensor] = clean_state_dict(content)
    if all(key.startswith("model.") for key in weights):
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
    return weights


def _difference(expected: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """Say which keys are missing, unexpected or of another shape, three of each."""
    kinds = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": [key for key in expected if key in given and expected[key].shape != given[key].shape],
    }
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    )
