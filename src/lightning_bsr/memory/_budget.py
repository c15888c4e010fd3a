"""Chooses what to train, where to drop and what backward keeps, so that the step fits in a budget of memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from rich.table import Table
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._select import Part
from lightning_bsr.memory._budget_search import BudgetSearch
from lightning_bsr.memory._bytes import format_bytes, parse_bytes
from lightning_bsr.memory._configuration import Configuration
from lightning_bsr.memory._measure import plan
from lightning_bsr.memory._probe import halves
from lightning_bsr.memory._report import Flops, MemoryReport
from lightning_bsr.memory._search import Found
from lightning_bsr.memory._step import AUTOCAST, Precision
from lightning_bsr.vit import ViTView, find_vit

BudgetKind = Literal["total", "activations"]
_THRIFT = 0.01
_FRONTIER_SHARES = (0.03, 0.06, 0.12, 0.2, 0.35, 0.6, 1.0)
_FRONTIER_THRIFT = 0.3


@dataclass(frozen=True)
class Candidate:
    """A point of the Pareto frontier: nothing else found is better in memory, compute and worth at once.

    Attributes:
        configuration: What to do.
        activations: Bytes kept for backward, at most at one moment.
        peak: Bytes of the whole step.
        flops: Operations of the step.
        worth: 1 for training all blocks on all tokens, 0 for the head alone.
    """

    configuration: Configuration
    activations: int
    peak: int
    flops: Flops
    worth: float


@dataclass(frozen=True)
class BudgetPlan:
    """What :func:`fit_budget` chose, and what it chose from.

    Attributes:
        budget: Bytes.
        kind: What the budget bounds.
        choice: The configuration.
        report: The plan of its step.
        full: The plan of full fine-tuning.
        worth: Of the choice: 1 for training all blocks on all tokens, 0 for the head alone.
        frontier: Pareto frontier over memory, compute and worth, the choice included.
        least: The fewest bytes that any configuration needs.
        gains: Share of what can be gained, by block and half.
        drops: Relative growth of the loss when a block drops, by block and keep rate.
    """

    budget: int
    kind: BudgetKind
    choice: Configuration
    report: MemoryReport
    full: MemoryReport
    worth: float
    frontier: tuple[Candidate, ...]
    least: int
    gains: Mapping[tuple[int, Part], float]
    drops: Mapping[tuple[int, float], float]

    def table(self) -> Table:
        """Draw the frontier as a rich table; print it with ``rich.print``."""
        full = self.full
        assert full.peak is not None
        assert full.flops is not None
        table = Table(
            title=f"What {format_bytes(self.budget)} of {BUDGETED[self.kind]} can buy, beside other budgets",
            caption=f"chosen: {self.choice}\nworth: 1 is full fine-tuning and 0 the head alone, by estimate\n"
            f"full fine-tuning: activations {format_bytes(full.activations)}, peak {format_bytes(full.peak)}; "
            f"the least that any choice needs: {format_bytes(self.least)}",
        )
        table.add_column("configuration", overflow="fold")
        for column in ("activations", "peak", "compute, of full", "worth"):
            table.add_column(column, justify="right")
        for point in self.frontier:
            table.add_row(
                str(point.configuration),
                format_bytes(point.activations),
                format_bytes(point.peak),
                f"{sum(point.flops) / sum(full.flops):.0%}",
                f"{point.worth:.2f}",
                style="bold" if point.configuration == self.choice else None,
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers and names, ready for JSON."""
        return {
            "budget": self.budget,
            "kind": self.kind,
            "choice": self.choice.to_dict(),
            "worth": self.worth,
            "report": self.report.to_dict(),
            "full": self.full.to_dict(),
            "least": self.least,
            "frontier": [
                asdict(replace(point, configuration=None))  # type: ignore[arg-type]  # written below instead
                | {"configuration": point.configuration.to_dict(), "flops": point.flops._asdict()}
                for point in self.frontier
            ],
            "gains": [{"block": block, "part": part, "gain": gain} for (block, part), gain in self.gains.items()],
            "drops": [
                {"block": block, "keep_rate": rate, "loss_growth": loss} for (block, rate), loss in self.drops.items()
            ],
        }


BUDGETED: dict[BudgetKind, str] = {"total": "memory", "activations": "activations"}


def fit_budget(
    module: nn.Module,
    batches: Sequence[Any],
    budget: int | str | Configuration,
    *,
    kind: BudgetKind = "total",
    batch_size: int | None = None,
    forward: Callable[[Any], Any] | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    precision: Precision = "32-true",
    accumulate: bool = False,
    vit: str | None = None,
    keep_rates: Sequence[float] = (0.7, 0.5),
    max_drops: int = 3,
    recompute: bool = True,
    on_progress: Callable[[str], Any] | None = None,
) -> BudgetPlan:
    """Choose the blocks to train, the drops and the half-blocks to compute again, for the most worth within a budget.

    What is not computed again is lean exactly, see :func:`lightning_bsr.functional.install_lean_activations`: gradients
    are the same to the last bit, whatever is chosen. Costs are exact: they are put together from single blocks run on
    fake tensors, and the choice is planned as a whole before it is returned. The worth comes from the batches:
    gradients of the loss tell what training each half of a block is worth, and the loss tells what dropping tokens in a
    block takes. Tokens that blocks of ``module`` drop already stay dropped there, and no others are.

    Args:
        module: A module that holds a ViT with pretrained weights; it is left as it was.
        batches: Probe batches with their targets, as ``forward`` takes them; two images or more in all.
        budget: Bytes, or a number and a unit such as ``"512MiB"``; or a configuration, for as many as it needs.
        kind: What is bounded: ``"total"``, the peak of the whole step; or ``"activations"``, the bytes kept for
            backward, at most at one moment.
        batch_size: Images in a training batch; as in ``batches`` by default.
        forward: What to call with a batch instead of ``module``.
        loss: From the output to the training loss; by default the output is the loss.
        optimizer: The optimizer over all parameters, for its state.
        precision: As the Trainer's.
        accumulate: Whether gradients are accumulated over several batches.
        vit: Dotted path of the ViT, for when ``module`` holds several.
        keep_rates: Keep rates that may be chosen; none to drop nowhere.
        max_drops: In how many blocks tokens may be dropped.
        recompute: Whether half-blocks may be computed again in backward: less memory, the same gradients, more compute.
        on_progress: Is called with a line for each stage of the work, which takes minutes for a large ViT: ``print``.

    Returns:
        The choice, its plan, and the frontier it is taken from.

    Raises:
        ConfigurationError: If nothing fits in the budget (the message says what the least is), there are fewer than two
            images, the loss is not finite, or an argument is out of range.

    Example:
        >>> import timm
        >>> from torch.nn.functional import cross_entropy
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> batches = [(torch.randn(4, 3, 160, 160), torch.arange(4)) for _ in range(2)]
        >>> found = fit_budget(model, batches, "8MiB", kind="activations",
        ...                    forward=lambda batch: cross_entropy(model(batch[0]), batch[1]))
        >>> found.report.activations_peak <= 8 * 2**20
        True
    """
    limit = None if isinstance(budget, Configuration) else parse_bytes(budget, "budget")
    if kind not in get_args(BudgetKind):
        raise ConfigurationError(f"kind is {kind!r}, expected one of {', '.join(map(repr, get_args(BudgetKind)))}.")
    if max_drops < 0:
        raise ConfigurationError(f"max_drops is {max_drops}, expected 0 or more.")
    seen = halves(batches[0]) if len(batches) == 1 else list(batches)
    if len(seen) < 2:
        raise ConfigurationError(
            f"batches has {len(batches)} batches, expected two images or more to probe the model with."
        )
    view = find_vit(module, vit)
    call, to_loss = forward or module, loss or _output_is_loss
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)

    def plan_step() -> MemoryReport:
        return plan(
            module,
            batches[0],
            batch_size=batch_size,
            forward=call,
            loss=to_loss,
            optimizer=optimizers,
            precision=precision,
            accumulate=accumulate,
            vit=vit,
        )

    bytes_of = _peak if kind == "total" else _activations
    search = BudgetSearch(
        module,
        view,
        plan_step,
        bytes_of,
        optimizers=optimizers,
        weights_count=kind == "total",
        autocast=AUTOCAST.get(precision),
        keep_rates=keep_rates,
        max_drops=max_drops,
        recompute=recompute,
    )
    if isinstance(budget, Configuration):
        limit = bytes_of(search.plan(budget))
    assert limit is not None
    if bytes_of(search.head_only) > limit:
        # Where nothing fits, that is known before the batches are looked at, which takes far longer.
        floor = search.floor()
        floor_bytes = bytes_of(search.plan(floor))
        if floor_bytes > limit:
            bound = f"takes more than {format_bytes(floor_bytes)}, whatever is chosen"
            raise _too_small(limit, kind, view, bound if floor.drop else _least(floor_bytes, floor))
    say = on_progress or _say_nothing
    probed = search.look_at(seen, lambda batch: to_loss(call(batch)), say)
    least = search.least()
    least_bytes = bytes_of(search.plan(least))
    if least_bytes > limit:
        raise _too_small(limit, kind, view, _least(least_bytes, least))
    say(f"Searching what to train and to compute again; ways to drop tokens: {search.num_patterns:,}.")
    found = search.best_that_fits(limit, _THRIFT)
    choice, worth = (found.configuration, found.worth) if found else (least, 0.0)
    say("Searching what other budgets would buy.")
    return BudgetPlan(
        budget=limit,
        kind=kind,
        choice=choice,
        report=search.plan(choice),
        full=search.full,
        worth=worth,
        frontier=_frontier(search, choice, worth),
        least=least_bytes,
        gains=probed.gains,
        drops=probed.drops,
    )


def _too_small(limit: int, kind: BudgetKind, view: ViTView, takes: str) -> ConfigurationError:
    return ConfigurationError(
        f"budget is {format_bytes(limit)} of {BUDGETED[kind]}, but fine-tuning the {view.name} {takes}; give more, "
        "or a smaller batch."
    )


def _least(num_bytes: int, configuration: Configuration) -> str:
    return f"takes {format_bytes(num_bytes)} at least ({configuration})"


def _frontier(search: BudgetSearch, choice: Configuration, worth: float) -> tuple[Candidate, ...]:
    found = [
        best
        for share in _FRONTIER_SHARES
        for thrift in (_THRIFT, _FRONTIER_THRIFT)
        if (best := search.best(round(share * search.full.activations), thrift)) and best.configuration.blocks
    ]
    unbeaten = [one for one in found if not any(_beats(_figures(other), _figures(one)) for other in found)]
    worths = {str(one.configuration): (one.configuration, one.worth) for one in unbeaten}
    worths[str(choice)] = choice, worth
    candidates = [_candidate(configuration, search.plan(configuration), w) for configuration, w in worths.values()]
    return tuple(
        sorted(
            (
                one
                for one in candidates
                if one.configuration == choice
                or not any(_beats(_planned_figures(other), _planned_figures(one)) for other in candidates)
            ),
            key=lambda one: (one.activations, sum(one.flops)),
        )
    )


def _candidate(configuration: Configuration, report: MemoryReport, worth: float) -> Candidate:
    assert report.flops is not None
    return Candidate(configuration, _activations(report), _peak(report), report.flops, worth)


def _beats(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def _figures(found: Found) -> tuple[float, ...]:
    return found.activations, found.flops, -found.worth


def _planned_figures(candidate: Candidate) -> tuple[float, ...]:
    return candidate.activations, sum(candidate.flops), -round(candidate.worth, 3)


def _peak(report: MemoryReport) -> int:
    return report.peak or 0


def _activations(report: MemoryReport) -> int:
    return report.activations_peak or report.activations


def _say_nothing(line: str) -> None:
    pass


def _output_is_loss(output: Any) -> torch.Tensor:
    if not isinstance(output, torch.Tensor) or output.numel() != 1:
        raise ConfigurationError("The module's output is no scalar; give loss, from the output to the training loss.")
    return output
