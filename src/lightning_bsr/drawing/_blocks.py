"""Draws what a training step keeps, block by block."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_bsr.drawing._figure import styled_figure
from lightning_bsr.memory import MIB, MemoryReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
_ATTENTION, _MLP, _OTHER = "#0072B2", "#E69F00", "#999999"
_TRAINED, FULL = "#009E73", "#000000"
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
        'kept for backward, MiB per image of a batch of 8'
    """
    return draw_panels([lambda axes: draw_blocks(axes, report, full)], ["Memory by block"])


def draw_panels(panels: Sequence[Any], titles: Sequence[str]) -> "Figure":
    """Draw panels side by side, each with its title above and its legend below.

    Args:
        panels: Each draws into axes and returns what its legend names.
        titles: Theirs.
    """
    with styled_figure(_INCHES[0] * len(panels), _INCHES[1], axes__spines__top=False) as figure:
        parts = figure.subfigures(1, len(panels), squeeze=False)[0]
        for part, draw, title in zip(parts, panels, titles, strict=True):
            part.suptitle(title, fontweight="bold", fontsize=13)
            handles = draw(part.subplots())
            part.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    return figure


def draw_blocks(axes: "Axes", report: MemoryReport, full: MemoryReport | None) -> list[Any]:
    """Draw a report into axes and return what a legend names."""
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
            "edgecolor": FULL,
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
    unit = f"MiB per image of a batch of {report.batch_size}" if report.batch_size else "MiB per batch"
    axes.set(
        xlabel="block",
        ylabel=f"kept for backward, {unit}",
        xlim=(-0.5, len(lines) - 0.5),
        ylim=(0, 1.08 * max(bottoms) or 1),
    )
    counted = [(x, line.tokens) for x, line in zip(positions, lines, strict=True) if line.tokens is not None]
    if counted:
        right = axes.twinx()
        xs, tokens = zip(*counted, strict=True)
        handles += right.plot(xs, tokens, "o-", color=FULL, ms=4, lw=1.3, label="tokens (right)")
        right.set(ylabel="tokens that leave the block", ylim=(0, 1.08 * max(tokens)))
    return handles + spans[:1]
