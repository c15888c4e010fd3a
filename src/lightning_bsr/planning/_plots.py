"""Draws what a step keeps, block by block, and what fits in how much memory. Needs matplotlib (the extra plots)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_bsr.memory import MIB, BudgetPlan, Candidate, MemoryReport, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
_ATTENTION, _MLP, _OTHER = "#0072B2", "#E69F00", "#999999"
_TRAINED, _BUDGET, _FULL = "#009E73", "#D55E00", "#000000"
_FONT: dict[Any, Any] = {"font.size": 11.0, "axes.spines.top": False}
_INCHES = (8.5, 5.2)


def plot_blocks(report: MemoryReport, *, full: MemoryReport | None = None) -> "Figure":
    """Draw what each block keeps for backward, by its halves, with the tokens that leave it and where it trains.

    Args:
        report: A report, measured or planned.
        full: That of full fine-tuning with the same batch, drawn as outlines behind it.

    Returns:
        A figure of one panel, in MiB an image, or a batch where the report does not know its size.

    Example:
        >>> import timm
        >>> from lightning_bsr.memory import plan
        >>> figure = plot_blocks(plan(timm.create_model("test_vit"), (8, 3, 160, 160)))
        >>> figure.axes[0].get_ylabel()
        'kept for backward, MiB an image'
    """
    return _figure([lambda axes: _draw_blocks(axes, report, full)], ["Memory by block"])


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
    return _figure([lambda axes: _draw_frontier(axes, plan)], [_FRONTIER])


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
    panels = [lambda axes: _draw_blocks(axes, report, plan.full), lambda axes: _draw_frontier(axes, plan)]
    return _figure(panels, ["Memory by block of the choice", _FRONTIER])


_FRONTIER = "What fits in how much memory"


def _figure(panels: Sequence[Any], titles: Sequence[str]) -> "Figure":
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_FONT):
        figure = Figure(figsize=(_INCHES[0] * len(panels), _INCHES[1]), layout="constrained")
        for part, draw, title in zip(figure.subfigures(1, len(panels), squeeze=False)[0], panels, titles, strict=True):
            part.suptitle(title, fontweight="bold", fontsize=13)
            handles = draw(part.subplots())
            part.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    return figure


def _draw_blocks(axes: "Axes", report: MemoryReport, full: MemoryReport | None) -> list[Any]:
    lines, positions = report.by_block, range(len(report.by_block))
    scale = MIB * (report.batch_size or 1)
    parts = [
        ("attention half", _ATTENTION, [line.attn / scale for line in lines]),
        ("MLP half", _MLP, [line.mlp / scale for line in lines]),
        ("neither half", _OTHER, [(line.activations - line.attn - line.mlp) / scale for line in lines]),
    ]
    handles: list[Any] = []
    bottoms = [0.0 for _ in lines]
    for label, colour, heights in parts:
        if any(height > 0 for height in heights):
            handles.append(axes.bar(positions, heights, 0.72, bottoms, color=colour, label=label, zorder=2))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    if full is not None:
        heights = [line.activations / (MIB * (full.batch_size or 1)) for line in full.by_block]
        style: dict[str, Any] = {
            "edgecolor": _FULL,
            "linewidth": 1.0,
            "linestyle": ":",
            "label": "full fine-tuning",
            "zorder": 3,
        }
        handles.append(axes.bar(positions, heights, 0.72, fill=False, **style))
        bottoms = [max(both) for both in zip(bottoms, heights, strict=True)]
    trained = [position for position, line in zip(positions, lines, strict=True) if line.trained]
    spans = [axes.axvspan(x - 0.5, x + 0.5, color=_TRAINED, alpha=0.2, lw=0, zorder=0, label="trains") for x in trained]
    axes.set_xticks(positions, [line.name for line in lines], rotation=90 if len(lines) > 20 else 0)
    for position in trained:
        axes.get_xticklabels()[position].set_fontweight("bold")
    axes.set(
        xlabel="block",
        ylabel=f"kept for backward, MiB {'an image' if report.batch_size else 'a batch'}",
        xlim=(-0.5, len(lines) - 0.5),
        ylim=(0, 1.08 * max(bottoms) or 1),
    )
    counted = [(x, line.tokens) for x, line in zip(positions, lines, strict=True) if line.tokens is not None]
    if counted:
        right = axes.twinx()
        xs, tokens = zip(*counted, strict=True)
        handles += right.plot(xs, tokens, "o-", color=_FULL, ms=4, lw=1.3, label="tokens (right)")
        right.set(ylabel="tokens that leave the block", ylim=(0, 1.08 * max(tokens)))
    return handles + spans[:1]


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
    handles.append(axes.axvline(needs(plan.full), color=_FULL, ls=":", lw=2, label="full fine-tuning"))
    what = "peak of the step" if plan.kind == "total" else "activations kept for backward"
    axes.set(
        xlabel=f"{what}, MiB a batch",
        ylabel="estimated worth (0: head only, 1: all trains)",
        xlim=(0, None),
        ylim=(min(0.0, *ys), 1.08),
    )
    return handles
