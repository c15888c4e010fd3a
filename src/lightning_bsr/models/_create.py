"""Creates a timm model by name, with published weights, those of a local file, or none."""

import difflib
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs, is_model, is_model_pretrained
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.models._checkpoint import create_from_checkpoint

_ARGUMENTS_OF_OURS = ("model_name", "num_classes", "pretrained", "checkpoint_path")


def create_model(
    model_name: str,
    num_classes: int,
    *,
    pretrained: bool,
    checkpoint_path: Path | None,
    model_kwargs: dict[str, Any],
) -> nn.Module:
    """Create a timm model from images [B, 3, H, W] to logits [B, num_classes].

    Args:
        model_name: Name of a timm model, with or without the tag of its weights.
        num_classes: Outputs of its head.
        pretrained: Load the published weights, downloading them if need be; ignored with ``checkpoint_path``.
        checkpoint_path: A local file with weights of this architecture.
        model_kwargs: More arguments for ``timm.create_model``.

    Raises:
        ConfigurationError: timm has no such model or weights, the weights cannot be had, or an argument does
            not fit.

    Example:
        >>> create_model("vit_tinny", 10, pretrained=False, checkpoint_path=None, model_kwargs={})
        Traceback (most recent call last):
        ...
        lightning_bsr._errors.ConfigurationError: model_name is 'vit_tinny', expected the name of ...
    """
    _check_name(model_name)
    taken = [name for name in _ARGUMENTS_OF_OURS if name in model_kwargs]
    if taken:
        raise ConfigurationError(
            f"model_kwargs has {', '.join(taken)}, expected only further arguments of the timm model; those "
            "are arguments of ViTClassifier itself."
        )
    if checkpoint_path is None and pretrained and not _has_weights(model_name):
        raise ConfigurationError(
            f"pretrained is True, but no weights are published for {model_name}; give checkpoint_path=..., "
            "pretrained=False, or one of the names in timm.list_pretrained()."
        )
    try:
        if checkpoint_path is not None:
            return create_from_checkpoint(model_name, num_classes, checkpoint_path, model_kwargs)
        return timm.create_model(model_name, pretrained=pretrained, num_classes=num_classes, **model_kwargs)
    except (OSError, RuntimeError, TypeError, AssertionError) as error:
        if isinstance(error, OSError) or "Hugging Face hub" in f"{error}":
            raise ConfigurationError(
                f"The weights of {model_name} could not be downloaded ({_cause(error)}); give "
                "checkpoint_path=... "
                'of a local file, pretrained=False, or the bundled model_name="vit_micro_patch4_32.cifar100".'
            ) from error
        raise ConfigurationError(
            f"model_kwargs is {model_kwargs}, which does not fit {model_name}: {_cause(error)}."
        ) from error


def zero_head_(model: nn.Module) -> None:
    """Set the head of a timm model to zeros, so that it first gives every class the same probability.

    Args:
        model: A timm model.

    Raises:
        ConfigurationError: Its head is not one linear layer.

    Example:
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> zero_head_(model)
        >>> int(model.head.weight.count_nonzero())
        0
    """
    head = model.get_classifier()  # type: ignore[operator]  # every timm model has it
    if not isinstance(head, nn.Linear):
        raise ConfigurationError(
            f"zero_head is True, expected a head that is one linear layer; that of {type(model).__name__} is "
            f"{type(head).__name__}."
        )
    for parameter in head.parameters():
        nn.init.zeros_(parameter)


def _check_name(model_name: str) -> None:
    if ":" in model_name:  # timm's "hf-hub:owner/name" and "local-dir:path" are not in its registry
        return
    architecture, _, tag = model_name.partition(".")
    if not is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        available = f"close matches are {', '.join(close)}" if close else "timm.list_models() has them all"
        raise ConfigurationError(f"model_name is '{model_name}', expected the name of a timm model; {available}.")
    names = get_arch_pretrained_cfgs(architecture)
    if tag and model_name not in names:
        raise ConfigurationError(
            f"model_name is '{model_name}', but {architecture} has no weights with the tag '{tag}'; "
            f"available are {', '.join(names)}."
        )


def _has_weights(model_name: str) -> bool:
    return ":" in model_name or is_model_pretrained(model_name)


def _cause(error: BaseException) -> str:
    """Return the first line of what lies at the root of an error, without its full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    first_line = f"{error}".strip().partition("\n")[0].rstrip(".:")
    return first_line or type(error).__name__
