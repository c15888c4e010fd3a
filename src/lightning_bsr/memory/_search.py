"""Searches what to train, where to drop and which half-blocks to compute again, under a bound on memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

import numpy as np

from lightning_bsr.functional import HalfPolicies
from lightning_bsr.functional._forward import Half
from lightning_bsr.functional._select import Part
from lightning_bsr.memory._configuration import Configuration
from lightning_bsr.memory._costs import BlockCost

_PARTS: tuple[tuple[Part, ...], ...] = ((), ("attn",), ("mlp",), ("attn", "mlp"))
_HALVES: tuple[tuple[Half, ...], ...] = _PARTS
_SLOPES = (0.0, 0.2)
_LEVELS = 4096
_START = -1
GAIN_POWER = 6
DROP_WEIGHT = 2.0


def worth_of(gain: float, penalty: float) -> float:
    """What a configuration is worth: 1 for training all blocks on all tokens, 0 for the head alone.

    Training a share ``s`` of what there is to gain is worth ``1 - (1 - s)**6``: three of twelve blocks then reach four
    fifths of what all of them do, as measured with the micro ViT on CIFAR-10. Dropping takes off twice the relative
    growth of the loss that it causes before anything has adapted, measured likewise.

    Args:
        gain: Share of the gains of all half-blocks.
        penalty: Relative growth of the loss by dropping.

    Example:
        >>> round(worth_of(0.25, 0.0), 2), round(worth_of(1.0, 0.1), 2)
        (0.82, 0.8)
    """
    return 1 - (1 - min(1.0, gain)) ** GAIN_POWER - DROP_WEIGHT * penalty


@dataclass(frozen=True)
class DropPattern:
    """Where tokens are dropped, and what follows from it.

    Attributes:
        drop: Keep rate by block.
        tokens: Tokens that enter each block, and that leave the last.
        penalty: Relative growth of the loss.
        costs: What each block costs.
    """

    drop: Mapping[int, float]
    tokens: tuple[int, ...]
    penalty: float
    costs: tuple[BlockCost, ...]


@dataclass(frozen=True)
class Found:
    """A configuration that the search proposes.

    Attributes:
        configuration: What to do.
        activations: Bytes kept for backward, at most at one moment, as far as they add up from single blocks.
        flops: Operations of the step's blocks.
        gain: Share of the gains of all half-blocks.
        worth: See :func:`worth_of`.
    """

    configuration: Configuration
    activations: int
    flops: int
    gain: float
    worth: float


def drop_patterns(
    depth: int,
    keep_rates: Sequence[float],
    max_drops: int,
    tokens: Callable[[Mapping[int, float]], tuple[int, ...]],
    penalty: Callable[[Mapping[int, float]], float],
) -> Iterator[tuple[dict[int, float], tuple[int, ...], float]]:
    """Yield the patterns of up to ``max_drops`` dropping blocks, of one keep rate, that no other one makes needless.

    A pattern is needless if another one has nowhere more tokens and costs no more loss, or if its loss outweighs all
    that training can gain.
    """
    nowhere: dict[int, float] = {}
    found = [(nowhere, tokens(nowhere), 0.0)] + [
        (drop, tokens(drop), penalty(drop))
        for count in range(1, max_drops + 1)
        for blocks in combinations(range(depth), count)
        for rate in keep_rates
        if DROP_WEIGHT * penalty(drop := dict.fromkeys(blocks, rate)) < 1
    ]
    lengths, losses = np.array([t for _, t, _ in found]), np.array([p for _, _, p in found])
    for index, pattern in enumerate(found):
        no_worse = (lengths <= lengths[index]).all(axis=1) & (losses <= losses[index])
        better = (lengths < lengths[index]).any(axis=1) | (losses < losses[index])
        same_before = no_worse & ~better & (np.arange(len(found)) < index)
        if not (no_worse & better).any() and not same_before.any():
            yield pattern


class BlockSearch:
    """Finds, for one drop pattern, what to train and to compute again within a bound on the bytes kept.

    Dynamic programming from the first block to the last: of all ways to treat the blocks so far, those are kept that
    no other one beats in both bytes and value. Exact, but for bytes being rounded up to 1/4096 of the bound.

    Args:
        pattern: Where tokens are dropped.
        gains: By block and half, the share of the gain.
        weights: By block and half, bytes that training it takes beside activations (gradients, optimizer state).
        recompute: Whether half-blocks may be computed again.
        drop_options: More arguments of ``install_token_drop``.
    """

    def __init__(
        self,
        pattern: DropPattern,
        gains: Mapping[tuple[int, Part], float],
        weights: Mapping[tuple[int, Part], int],
        recompute: bool,
        drop_options: Mapping[str, Any],
    ) -> None:
        self.pattern = pattern
        self._drop_options = drop_options if pattern.drop else {}
        self._options = [
            tuple(
                _Options(_treatments(index, cost, gains, weights, after_training=after, recompute=recompute))
                for after in (False, True)
            )
            for index, cost in enumerate(pattern.costs)
        ]
        self._forward = sum(cost.forward for cost in pattern.costs)

    def run(self, bound: int, full_flops: int, thrift: float) -> list[Found]:
        """Return the best found for several exchange rates between gain and operations.

        Args:
            bound: Bytes that may be kept.
            full_flops: Operations of full fine-tuning, the unit of ``thrift``.
            thrift: What saving all operations would be worth.
        """
        return [self._best(bound, (slope + thrift / GAIN_POWER) / full_flops) for slope in _SLOPES]

    def _best(self, bound: int, price: float) -> Found:
        quantum = max(1, bound // _LEVELS)
        # At first nothing trains: one label, which keeps nothing and may go on like that.
        labels, start = _Labels.nothing(0), _Labels.nothing(1)
        stages = []
        for first, later in self._options:
            begun = _grow(start, first, quantum, bound)
            begun = replace(begun, origin=np.full_like(begun.origin, _START))
            labels = _Labels.join(begun, _grow(labels, later, quantum, bound)).undominated(price)
            stages.append(labels)
        values = labels.gain - price * labels.flops
        row = int(values.argmax()) if len(values) and values.max() > 0 else None
        return self._trace(stages, row)

    def _trace(self, stages: list["_Labels"], row: int | None) -> Found:
        parts: dict[int, tuple[Part, ...]] = {}
        lean: dict[int, HalfPolicies] = {}
        peak, flops, gain = 0, 0.0, 0.0
        if row is not None:
            peak, flops, gain = int(stages[-1].peak[row]), float(stages[-1].flops[row]), float(stages[-1].gain[row])
        for index in range(len(stages) - 1, -1, -1):
            if row is None:
                break
            first, later = self._options[index]
            choice, origin = int(stages[index].choice[row]), int(stages[index].origin[row])
            option = (first if origin == _START else later).treatments[choice]
            if option.parts:
                parts[index] = option.parts
            lean[index] = {half: "recompute" if half in option.again else "exact" for half in _HALVES[-1]}
            row = None if origin == _START else origin
        configuration = Configuration(
            dict(sorted(parts.items())), dict(self.pattern.drop), dict(sorted(lean.items())), self._drop_options
        )
        return Found(configuration, peak, int(self._forward + flops), gain, worth_of(gain, self.pattern.penalty))


@dataclass(frozen=True)
class _Treatment:
    """One way to treat a block."""

    parts: tuple[Part, ...]
    again: tuple[Half, ...]
    kept: int
    spike: int
    gain: float
    backward: int


class _Options:
    """The ways to treat a block, as arrays."""

    def __init__(self, treatments: Iterable[_Treatment]) -> None:
        self.treatments = list(treatments)
        self.kept = np.array([t.kept for t in self.treatments], dtype=np.int64)
        self.spike = np.array([max(t.spike, t.kept) for t in self.treatments], dtype=np.int64)
        self.gain = np.array([t.gain for t in self.treatments])
        self.flops = np.array([t.backward for t in self.treatments], dtype=np.float64)


@dataclass(frozen=True)
class _Labels:
    """Ways to treat the blocks so far in which something trains already; one row of each array is one way."""

    kept: np.ndarray
    peak: np.ndarray
    gain: np.ndarray
    flops: np.ndarray
    choice: np.ndarray
    origin: np.ndarray

    @classmethod
    def nothing(cls, rows: int) -> "_Labels":
        """Make ``rows`` ways that keep, gain and cost nothing."""
        whole, real = np.zeros(rows, dtype=np.int64), np.zeros(rows)
        return cls(kept=whole, peak=whole, gain=real, flops=real, choice=whole, origin=whole)

    @classmethod
    def join(cls, one: "_Labels", other: "_Labels") -> "_Labels":
        return cls(*(np.concatenate([getattr(one, f.name), getattr(other, f.name)]) for f in fields(cls)))

    def undominated(self, price: float) -> "_Labels":
        """Keep the rows that no other one beats in both bytes and value."""
        value = self.gain - price * self.flops
        order = np.lexsort((-value, self.kept))
        value = value[order]
        best_before = np.concatenate([[-np.inf], np.maximum.accumulate(value)[:-1]]) if len(value) else value
        rows = order[value > best_before]
        return _Labels(*(getattr(self, f.name)[rows] for f in fields(self)))


def _grow(labels: _Labels, options: _Options, quantum: int, bound: int) -> _Labels:
    """Treat the next block of each way in each of the ways that keep within the bound."""
    peak = np.maximum(labels.peak[:, None], labels.kept[:, None] + options.spike[None])
    rows, choice = np.nonzero(peak <= bound)
    return _Labels(
        kept=labels.kept[rows] + -(-options.kept // quantum)[choice] * quantum,
        peak=peak[rows, choice],
        gain=labels.gain[rows] + options.gain[choice],
        flops=labels.flops[rows] + options.flops[choice],
        choice=choice,
        origin=rows,
    )


def _treatments(
    index: int,
    cost: BlockCost,
    gains: Mapping[tuple[int, Part], float],
    weights: Mapping[tuple[int, Part], int],
    *,
    after_training: bool,
    recompute: bool,
) -> Iterator[_Treatment]:
    for parts in _PARTS:
        if not parts and not after_training:
            continue
        attn, mlp, inputs = _state(cost, parts, after_training)
        backward = inputs + sum(w for w, p in zip(cost.weights, ("attn", "mlp"), strict=True) if p in parts)
        gain = sum(gains[index, part] for part in parts)
        static = sum(weights[index, part] for part in parts)
        for again in _HALVES if recompute else ((),):
            kept_attn = cost.kept_again[0] if "attn" in again else attn
            kept_mlp = cost.kept_again[1] if "mlp" in again else mlp
            if ("attn" in again and kept_attn >= attn) or ("mlp" in again and kept_mlp >= mlp):
                continue
            # One half at a time: when the MLP half is whole the attention half is as it was kept; then the MLP is gone.
            most = max(kept_attn + mlp, attn)
            operations = backward + sum(w for w, h in zip(cost.again, ("attn", "mlp"), strict=True) if h in again)
            yield _Treatment(parts, again, kept_attn + kept_mlp + static, most + static, gain, operations)


def _state(cost: BlockCost, parts: Iterable[Part], after_training: bool) -> tuple[int, int, int]:
    """Bytes of the attention half and of the MLP half, and operations for inputs."""
    frozen, trained, first = 0, 1, 2
    mlp = cost.mlp[trained if "mlp" in parts else frozen]
    if after_training:
        return cost.attn[trained if "attn" in parts else frozen], mlp, cost.inputs
    if "attn" in parts:
        return cost.attn[first], mlp, cost.first_inputs
    return 0, cost.mlp[first], cost.weights[1]
