"""What a comparison is asked to do, checked before anything runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.comparison._methods import method_names


@dataclass(frozen=True)
class Settings:
    """What ``lightning-bsr compare`` was asked for; see :class:`CompareCommand` for the meaning of each.

    Raises:
        ConfigurationError: A value is out of range, listed twice, or an unknown method.

    Example:
        >>> settings = Settings(methods=("full", "head"), lrs=(1e-3, 1e-2), seeds=(0, 1))
        >>> settings.better(0.9, 0.8)
        True
    """

    methods: tuple[str, ...]
    lrs: tuple[float, ...] | Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    output: Path = Path("runs/compare")
    lr_key: str = "model.init_args.lr"
    monitor: str = "val/accuracy"
    mode: str = "max"
    test_metric: str = "test/accuracy"
    method_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    vit: str | None = None
    equal_time: bool = True
    max_epoch_factor: float = 4.0
    jobs: int = 1
    timing_steps: int = 5

    def __post_init__(self) -> None:
        known = method_names()
        _check_list("methods", self.methods, f"one or more of {', '.join(known)}")
        _check_list("seeds", self.seeds, "one or more whole numbers, such as 0,1,2")
        for name in (*self.methods, *self.method_options):
            if name not in known:
                raise ConfigurationError(f"There is no method {name!r}; the methods are {', '.join(known)}.")
        for name in self.method_options:
            if name not in self.methods:
                raise ConfigurationError(
                    f"method_options has {name!r}, which is not compared; the methods are {', '.join(self.methods)}."
                )
        self._check_lrs()
        _check("seeds", list(self.seeds), all(seed >= 0 for seed in self.seeds), "whole numbers of 0 or more")
        _check("mode", self.mode, self.mode in ("max", "min"), "'max' or 'min'")
        _check("max_epoch_factor", self.max_epoch_factor, self.max_epoch_factor >= 1, "1 or more")
        _check("jobs", self.jobs, self.jobs >= 1, "1 or more")
        _check("timing_steps", self.timing_steps, self.timing_steps >= 1, "1 or more")

    def _check_lrs(self) -> None:
        if isinstance(self.lrs, Mapping):
            _check("lrs", list(self.lrs), {*self.lrs} == {*self.methods}, f"those of {', '.join(self.methods)}")
        for method in self.methods:
            lrs, name = self.lrs_of(method), f"lrs.{method}" if isinstance(self.lrs, Mapping) else "lrs"
            _check_list(name, lrs, "one or more learning rates, such as 5e-4,1.5e-3")
            _check(name, list(lrs), all(lr > 0 and math.isfinite(lr) for lr in lrs), "numbers above 0")

    def lrs_of(self, method: str) -> tuple[float, ...]:
        """Return the learning rates that a method chooses from."""
        return self.lrs[method] if isinstance(self.lrs, Mapping) else self.lrs

    def better(self, a: float, b: float) -> bool:
        """Whether the metric's value ``a`` is better than ``b``."""
        return a > b if self.mode == "max" else a < b

    def options_of(self, method: str) -> dict[str, Any]:
        """Return the options that the user gave a method."""
        return dict(self.method_options.get(method, {}))


def numbers(name: str, given: str | Sequence[Any], kind: type[int] | type[float]) -> tuple[Any, ...]:
    """Read ``"1,2"`` or a list as numbers.

    Args:
        name: The option's name, for the message.
        given: What was given.
        kind: ``int`` or ``float``.

    Raises:
        ConfigurationError: Something is no such number.

    Example:
        >>> numbers("lrs", "5e-4,1.5e-3", float)
        (0.0005, 0.0015)
    """
    try:
        return tuple(kind(word) for word in words(given))
    except ValueError:
        expected = "whole numbers" if kind is int else "numbers"
        raise ConfigurationError(f"{name} is {given!r}, expected {expected} separated by commas.") from None


def words(given: str | Sequence[Any]) -> tuple[str, ...]:
    """Read ``"a,b"`` or a list as words.

    Args:
        given: What was given; brackets and spaces do not matter.

    Example:
        >>> words("full, head")
        ('full', 'head')
    """
    parts = given.strip("[] ").split(",") if isinstance(given, str) else [str(part) for part in given]
    return tuple(part.strip() for part in parts if part.strip())


def _check_list(name: str, values: Sequence[object], expected: str) -> None:
    _check(name, list(values), len(values) > 0, expected)
    _check(name, list(values), len(set(values)) == len(values), "each of them once")


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigurationError(f"{name} is {value!r}, expected {expected}.")
