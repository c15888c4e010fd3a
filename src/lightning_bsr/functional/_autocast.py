"""Autocast as it is now, to be the same again in backward."""

import contextlib
from typing import Any

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type that autocast gives to matrix products now, or ``None`` if it is off.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_dtype("cpu")
        torch.bfloat16
    """
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def autocast(device_type: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype``, or not at all for ``None``."""
    # Without the cache: a copy that is made while no gradient is recorded would serve other users of the weight too.
    return torch.autocast(device_type, dtype, enabled=dtype is not None, cache_enabled=False)
