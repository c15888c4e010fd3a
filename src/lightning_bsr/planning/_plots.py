"""Draws what a step keeps, block by block, and what fits in how much memory. Needs matplotlib (the extra plots)."""

from typing import TYPE_CHECKING, Any

from lightning_bsr.drawing import plot_blocks
from lightning_bsr.drawing._blocks import FULL, draw_blocks, draw_panels
from lightning_bsr.memory import MIB, BudgetPlan, Candidate, MemoryReport, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BUDGET = "#D55E00"


def plot_frontier(plan: BudgetPlan) -> "Figure":
    """Draw the configurations that no other beats: what they are worth over what they need.

    Args:
        plan: What :func:`lightning_bsr.memory.fit_budget` returned.

    Returns:
        A figure of one panel, in MiB a batch.

    Example:
        >>> from lightning_bsr.memory import BlockReport, Candidate, Configuration, Flops
        >>> report = MemoryReport(4 * MIB, 0, 0, 0, (BlockReport("0", 65, 9, 9, 4 * MIB),), peak=6 * MIB)
        >>> one = Candidate(Configuration({0: ("attn", "mlp")}), 4 * MIB, 6 * MIB, Flops(1, 2), 1.0)
        >>> plan = BudgetPlan(8 * MIB, "total", one.configuration, report, report, 1.0, (one,), MIB, {}, {})
        >>> plot_frontier(plan).axes[0].get_xlabel()
        'peak of the step, MiB a batch'
    """
    return draw_panels([lambda axes: _draw_frontier(axes, plan)], [_FRONTIER])


def plot_plan(report: MemoryReport, plan: BudgetPlan | None = None) -> "Figure":
    """Draw a plan: its memory by block and, where a budget was given, what there was to choose from.

    Args:
        report: The plan's report.
        plan: What :func:`lightning_bsr.memory.fit_budget` returned, if it was asked.

    Returns:
        A figure of one or two panels.

    Example:
        >>> from lightning_bsr.memory import BlockReport
        >>> len(plot_plan(MemoryReport(MIB, 0, 0, 0, (BlockReport("0", None, 9, 9, MIB),))).axes)
        1
    """
    if plan is None:
        return plot_blocks(report)
    panels = [lambda axes: draw_blocks(axes, report, plan.full), lambda axes: _draw_frontier(axes, plan)]
    return draw_panels(panels, ["Memory by block of the choice", _FRONTIER])


_FRONTIER = "What fits in how much memory"


def _draw_frontier(axes: "Axes", plan: BudgetPlan) -> list[Any]:
    def needs(what: MemoryReport | Candidate) -> float:
        activations = what.activations if isinstance(what, Candidate) else what.activations_peak or what.activations
        return ((what.peak or 0) if plan.kind == "total" else activations) / MIB

    budget, candidates = plan.budget, sorted(plan.frontier, key=needs)
    xs, ys = [needs(candidate) for candidate in candidates], [candidate.worth for candidate in candidates]
    compute = [sum(candidate.flops) / 1e9 for candidate in candidates]
    points = axes.scatter(xs, ys, c=compute, cmap="viridis", s=42, zorder=3, label="configuration")
    axes.figure.colorbar(points, ax=axes, label="compute of a step, GFLOP", pad=0.02)
    handles: list[Any] = [
        points,
        axes.axvline(budget / MIB, color=_BUDGET, lw=2, label=f"budget, {format_bytes(budget)}"),
    ]
    chosen = [(x, y) for x, y, c in zip(xs, ys, candidates, strict=True) if c.configuration == plan.choice]
    if chosen:
        ring: dict[str, Any] = {"s": 260, "marker": "o", "facecolors": "none", "edgecolors": _BUDGET, "linewidths": 2.2}
        handles.insert(1, axes.scatter(*chosen[0], zorder=4, label="the choice", **ring))
    handles.append(axes.axvline(needs(plan.full), color=FULL, ls=":", lw=2, label="full fine-tuning"))
    what = "peak of the step" if plan.kind == "total" else "activations kept for backward"
    axes.set(
        xlabel=f"{what}, MiB a batch",
        ylabel="estimated worth (0: head only, 1: all trains)",
        xlim=(0, None),
        ylim=(min(0.0, *ys), 1.08),
    )
    return handles
