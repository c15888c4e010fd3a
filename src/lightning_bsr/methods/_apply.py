"""Applies one of the methods to any module that holds a ViT, and takes it back."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import Handle
from lightning_bsr.methods._table import METHODS, Method


class MethodHandle:
    """What :func:`apply_method_` did to a module, and the way back.

    Attributes:
        method: The method.
        parts: The handles of what was installed, in order.
    """

    def __init__(self, method: Method, parts: Sequence[Handle]) -> None:
        self.method = method
        self.parts = tuple(parts)

    def eval_frozen(self) -> None:
        """Set to eval mode what the method froze, where it froze whole parts of the ViT."""
        for part in self.parts:
            if hasattr(part, "eval_frozen"):
                part.eval_frozen()

    def remove(self) -> None:
        """Undo all parts, the last first; a second call does nothing."""
        for part in reversed(self.parts):
            part.remove()

    def __str__(self) -> str:
        return f"{self.method.name}: {'; '.join(map(str, self.parts))}"


def apply_method_(
    module: nn.Module, method: str, *, vit: str | None = None, evaluation: bool = False, **options: Any
) -> MethodHandle:
    """Make the ViT in ``module`` train by one of :data:`METHODS`.

    Args:
        module: Any module that holds a ViT.
        method: Its name.
        vit: Dotted path of the ViT, for when ``module`` holds several.
        evaluation: Install only what changes the function that the model computes.
        **options: The method's own, see :attr:`Method.options`.

    Returns:
        A handle; its ``remove()`` undoes everything, but for what was trained.

    Raises:
        ConfigurationError: If there is no such method or option, or a part of the method does not fit the module.
            Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = apply_method_(model, "last_blocks", count=2)
        >>> print(handle)
        last_blocks: blocks 4, 5 of 6 train in the ViT (VisionTransformer): 84,234 of 306,890 parameters (27.4 %)
        >>> handle.remove()
    """
    chosen = chosen_method(method, options)
    build = chosen.build_evaluation if evaluation else chosen.build
    parts: list[Handle] = []
    with ExitStack() as undo:
        for part in build(module, vit, **options) if build else ():
            undo.callback(part.remove)
            parts.append(part)
        undo.pop_all()
    return MethodHandle(chosen, parts)


def chosen_method(method: str, options: Mapping[str, Any]) -> Method:
    """Look up a method, and refuse options that it does not have."""
    if method not in METHODS:
        raise ConfigurationError(f"method is {method!r}, expected one of {', '.join(METHODS)}.")
    known = METHODS[method].options
    for option in options:
        if option not in known:
            raise ConfigurationError(
                f"The method {method!r} has no option {option!r}; its options are {', '.join(known) or 'none'}."
            )
    return METHODS[method]
