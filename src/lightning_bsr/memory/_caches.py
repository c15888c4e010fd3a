"""Empties the caches of a model's own code around a step that is planned or measured."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper

from torch import nn


@contextlib.contextmanager
def caches_cleared(module: nn.Module) -> Iterator[None]:
    """Clear, before and after, each :func:`functools.lru_cache` of transformers' files for the parts of ``module``.

    Some of its models keep tables of positions in one. They are alive in every step, but one that was made before the
    step would not be seen in it. Made while a step is planned, they would be tensors without data, and so would be what
    the model gives from then on.
    """
    clears = list(_clear_functions(module))
    for clear in clears:
        clear()
    try:
        yield
    finally:
        for clear in clears:
            clear()


def _clear_functions(module: nn.Module) -> Iterator[Callable[[], None]]:
    classes = {cls for part in module.modules() for cls in type(part).__mro__}
    classes = {cls for cls in classes if cls.__module__.startswith("transformers.")}
    files = {sys.modules[cls.__module__] for cls in classes}
    for holder in (*classes, *files):
        for value in vars(holder).values():
            function = getattr(value, "__func__", value)
            # The cache may be inside a decorator of transformers' own.
            closure = getattr(function, "__closure__", None) or ()
            for candidate in (function, *(cell.cell_contents for cell in closure)):
                if isinstance(candidate, _lru_cache_wrapper):
                    yield candidate.cache_clear
