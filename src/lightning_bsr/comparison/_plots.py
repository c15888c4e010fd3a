"""The comparison's plots."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_bsr.comparison._rows import Row, Score
from lightning_bsr.comparison._settings import Settings
from lightning_bsr.memory import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = ("metric_over_activations", "step_time", "activations")
_FORMATS = ("o", "s", "D")  # ten colours go around


def plot(rows: Sequence[Row], settings: Settings) -> str:
    """Draw three plots, each as PNG and SVG, if matplotlib is there.

    Args:
        rows: The table.
        settings: Says where to, and what the metric is called.

    Returns:
        The files' names as the end of an enumeration; or that they are missing, and how to get them.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "; no plots, which need matplotlib: pip install 'lightning-bsr[plots]'"
    for name, draw in zip(_NAMES, (_metric_over_activations, _step_time, _activations), strict=True):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        draw(figure.subplots(), rows, settings)
        for kind in ("png", "svg"):
            figure.savefig(settings.output / f"{name}.{kind}", dpi=150)
    return "".join(f", {name}.png and .svg" for name in _NAMES)


def _metric_over_activations(axes: "Axes", rows: Sequence[Row], settings: Settings) -> None:
    for number, row in enumerate(rows):
        kept = row.planned_activations_peak or row.measured_activations
        if kept is None or row.equal_length is None:
            continue
        at, colour = kept / MIB, f"C{number}"
        _draw_score(axes, at, row.equal_length, fmt=_FORMATS[number // 10], color=colour, label=row.method)
        if row.equal_time is not None:
            _draw_score(axes, at, row.equal_time, fmt="^", color=colour, fillstyle="none")
    count = len(settings.seeds)
    axes.set(
        title=f"{settings.test_metric} over memory, {f'{count} seeds' if count > 1 else 'one seed'}",
        xlabel="activations that backward keeps at most, MiB an image",
        ylabel=settings.test_metric + (", mean ± sample deviation" if count > 1 else ""),
    )
    if any(row.equal_time is not None for row in rows):
        axes.errorbar([], [], fmt="^", color="grey", fillstyle="none", label="at equal time")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_score(axes: "Axes", at: float, score: Score, **style: Any) -> None:
    axes.errorbar(at, score.mean, yerr=score.deviation, capsize=3, **style)


def _step_time(axes: "Axes", rows: Sequence[Row], settings: Settings) -> None:
    timed = [row for row in rows if row.step_seconds is not None]
    bars = axes.barh([row.method for row in timed], [1000 * (row.step_seconds or 0) for row in timed])
    axes.bar_label(bars, ["" if row.step_ratio is None else f"{row.step_ratio:.2f} x" for row in timed], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the labels
    axes.set(title="Time of a training step, and relative to the first method", xlabel="median training step, ms")


def _activations(axes: "Axes", rows: Sequence[Row], settings: Settings) -> None:
    for offset, label, values in (
        (-0.2, "planned", [row.planned_activations for row in rows]),
        (0.2, "measured", [row.measured_activations for row in rows]),
    ):
        if any(value is not None for value in values):
            axes.barh([i + offset for i in range(len(rows))], [(v or 0) / MIB for v in values], height=0.4, label=label)
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.invert_yaxis()
    axes.set(title="Activations kept for backward", xlabel="activations that backward keeps, MiB an image")
    if axes.has_data():
        axes.legend()
