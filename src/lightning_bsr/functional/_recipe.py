"""How a tensor was made: a call of a torch function that can be repeated."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_PLACE = object()


@dataclass(frozen=True)
class Recipe:
    """A call of a torch function, its tensors apart from the rest.

    Example:
        >>> recipe = Recipe(torch.add, (torch.ones(1), 2), {})
        >>> recipe.without_tensors().compute([torch.full((1,), 5.0)])
        tensor([7.])
    """

    function: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor)]

    def without_tensors(self) -> "Recipe":
        """The same call with places instead of tensors, which autograd then keeps in its own way."""

        def empty(value: Any) -> Any:
            return _PLACE if isinstance(value, torch.Tensor) else value

        return Recipe(self.function, tuple(map(empty, self.args)), {k: empty(v) for k, v in self.kwargs.items()})

    def compute(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Repeat the call with ``tensors`` in the places."""
        rest = iter(tensors)

        def fill(value: Any) -> Any:
            return next(rest) if value is _PLACE else value

        args = [fill(value) for value in self.args]
        return self.function(*args, **{name: fill(value) for name, value in self.kwargs.items()})
