"""The comparison's plots: what is in them, and that it is inside of them."""

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from lightning_bsr.comparison import Settings
from lightning_bsr.comparison._plots import _activations, _metric_over_activations, _step_time
from lightning_bsr.comparison._rows import Row, Score
from lightning_bsr.memory import MIB


def drawn(draw, seeds=(0, 1)):
    settings = Settings(methods=("full", "head"), lrs=(1e-3,), seeds=seeds)
    rows = [
        Row(
            method,
            "",
            planned_activations=kept * MIB,
            measured_activations=kept * MIB,
            step_seconds=seconds,
            step_ratio=seconds / 0.3,
            equal_length=Score(20, tuple(0.9 + 0.01 * seed for seed in seeds)),
            equal_time=Score(30, tuple(0.8 + 0.01 * seed for seed in seeds)),
        )
        for method, kept, seconds in (("full", 12, 0.3), ("head", 1, 0.1))
    ]
    axes = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    draw(axes, rows, settings)
    return axes


def test_step_time__labels_are_inside_of_the_frame():
    axes = drawn(_step_time)
    axes.figure.draw_without_rendering()
    assert [label.get_text() for label in axes.texts] == ["1.00 x", "0.33 x"]
    frame = axes.get_window_extent()
    assert all(label.get_window_extent().x1 < frame.x1 for label in axes.texts)


@pytest.mark.parametrize(
    ("seeds", "title", "ylabel", "bars"),
    [
        ((0,), "test/accuracy over memory, one seed", "test/accuracy", 0),
        ((0, 1), "test/accuracy over memory, 2 seeds", "test/accuracy, mean ± sample deviation", 4),
    ],
)
def test_metric_over_activations__has_bars_where_there_are_several_seeds(seeds, title, ylabel, bars):
    axes = drawn(_metric_over_activations, seeds)
    assert (axes.get_title(), axes.get_ylabel()) == (title, ylabel)
    assert sum(c.has_yerr for c in axes.containers if isinstance(c, ErrorbarContainer)) == bars
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["full", "head", "at equal time"]


@pytest.mark.parametrize(
    ("draw", "title"),
    [
        (_step_time, "Time of a training step, and relative to the first method"),
        (_activations, "Activations kept for backward"),
    ],
)
def test_plots__have_titles(draw, title):
    assert drawn(draw).get_title() == title
