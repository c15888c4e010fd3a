"""What a comparison needs to know of the methods: their names, and the callback that applies one."""

from typing import Any

from lightning_bsr.methods import METHODS


def method_names() -> list[str]:
    """Name the methods that can be compared, in the order of their table."""
    return list(METHODS)


def summary_of(method: str) -> str:
    """Say in a line what a method does."""
    return METHODS[method].summary


def callback_entry(method: str, options: dict[str, Any], vit: str | None) -> dict[str, Any]:
    """Write a method as an entry of ``trainer.callbacks``.

    Args:
        method: Its name.
        options: Its options; none gives its own defaults.
        vit: Dotted path of the ViT, for when the module holds several.

    Example:
        >>> callback_entry("head", {}, None)
        {'class_path': 'lightning_bsr.methods.FineTune', 'init_args': {'method': 'head', 'options': None, 'vit': None}}
    """
    return {
        "class_path": "lightning_bsr.methods.FineTune",
        "init_args": {"method": method, "options": options or None, "vit": vit},
    }
