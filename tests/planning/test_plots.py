"""The plots of plans: what is in them, and that they can be written."""

import io
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from lightning_bsr.memory import MIB, BlockReport, BudgetPlan, Candidate, Configuration, Flops, MemoryReport
from lightning_bsr.planning._plots import plot_blocks, plot_frontier, plot_plan

BOTH = ("attn", "mlp")


def report_of(kept, batch_size=4, peak=20 * MIB):
    lines = [BlockReport("embed", 65, 10, 0, 0)]
    lines += [
        BlockReport(str(i), 65 - 10 * i, 100, 100 * (i > 0), (attn + mlp) * MIB, attn * MIB, mlp * MIB)
        for i, (attn, mlp) in enumerate(kept)
    ]
    lines.append(BlockReport("head", None, 10, 10, MIB))
    return MemoryReport(
        sum(line.activations for line in lines), 0, 320, 210, tuple(lines), peak=peak, batch_size=batch_size
    )


@pytest.fixture
def report():
    return report_of([(0, 0), (4, 2), (2, 1)])


def plan_of(report, kind="total"):
    frontier = tuple(
        Candidate(Configuration({i: BOTH}), (i + 1) * MIB, (10 + i) * MIB, Flops(10**9 * i, 10**9), i / 4)
        for i in range(4)
    )
    full = report_of([(8, 8)] * 3, peak=60 * MIB)
    return BudgetPlan(
        12 * MIB, kind, Configuration({2: BOTH}), report, full, 0.5, frontier, 10 * MIB, gains={}, drops={}
    )


def bars_of(axes):
    return {bars.get_label(): [round(bar.get_height(), 3) for bar in bars] for bars in axes.containers}


def legend_of(figure):
    return [text.get_text() for part in figure.subfigs for text in part.legends[0].get_texts()]


def test_plot_blocks__stacks_the_halves_of_each_block_per_image(report):
    figure = plot_blocks(report)
    bars, tokens = figure.axes
    assert bars_of(bars) == {
        "attention half": [0, 0, 1.0, 0.5, 0],
        "MLP half": [0, 0, 0.5, 0.25, 0],
        "neither half": [0, 0, 0, 0, 0.25],
    }
    assert [bar.get_y() for bar in bars.containers[1]] == [0, 0, 1.0, 0.5, 0]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["embed", "0", "1", "2", "head"]
    assert bars.get_ylim()[1] > 1.5
    assert bars.get_ylabel() == "kept for backward, MiB per image of a batch of 4"
    assert [*tokens.lines[0].get_ydata()] == [65, 65, 55, 45]
    assert legend_of(figure) == ["attention half", "MLP half", "neither half", "tokens (right)", "trains"]


def test_plot_blocks__marks_what_trains(report):
    axes = plot_blocks(report).axes[0]
    spans = [patch.get_x() for patch in axes.patches if patch.get_label() == "trains"]
    assert spans == [1.5, 2.5, 3.5]
    bold = [label.get_text() for label in axes.get_xticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["1", "2", "head"]


def test_plot_blocks__of_a_batch_of_unknown_size_is_per_batch():
    axes = plot_blocks(report_of([(4, 2)], batch_size=None)).axes[0]
    assert axes.get_ylabel() == "kept for backward, MiB per batch"
    assert bars_of(axes)["attention half"] == [0, 4.0, 0]


def test_plot_blocks__that_keep_nothing_can_be_drawn():
    lines = (BlockReport("0", None, 1, 0, 0), BlockReport("head", None, 1, 0, 0))
    assert len(plot_blocks(MemoryReport(0, 0, 0, 0, lines)).axes) == 1


def test_plot_blocks__with_full_fine_tuning_leaves_room_for_it(report):
    axes = plot_blocks(report, full=report_of([(8, 8)] * 3)).axes[0]
    assert bars_of(axes)["full fine-tuning"] == [0, 4.0, 4.0, 4.0, 0.25]
    assert axes.get_ylim()[1] > 4


@pytest.mark.parametrize(
    ("kind", "xs", "full", "label"),
    [
        ("total", [10, 11, 12, 13], 60, "peak of the step, MiB a batch"),
        ("activations", [1, 2, 3, 4], 49, "activations kept for backward, MiB a batch"),
    ],
)
def test_plot_frontier__shows_candidates_choice_budget_and_full_fine_tuning(report, kind, xs, full, label):
    figure = plot_frontier(plan_of(report, kind))
    axes, colours = figure.axes
    points, ring = axes.collections
    assert [x for x, _ in points.get_offsets().tolist()] == xs
    assert [y for _, y in points.get_offsets().tolist()] == [0, 0.25, 0.5, 0.75]
    assert points.get_array().tolist() == [1, 2, 3, 4]
    assert ring.get_offsets().tolist() == [[xs[2], 0.5]]
    assert [line.get_xdata()[0] for line in axes.lines] == [12, full]
    assert axes.get_xlabel() == label
    assert axes.get_xlim()[0] == 0
    assert colours.get_ylabel() == "compute of a step, GFLOP"
    assert legend_of(figure) == ["configuration", "the choice", "budget, 12.0 MiB", "full fine-tuning"]
    assert to_hex(axes.lines[0].get_color()) != to_hex(axes.lines[1].get_color())


def test_plot_plan__has_both_panels_with_a_budget_only(report):
    assert [part.get_suptitle() for part in plot_plan(report).subfigs] == ["Memory by block"]
    figure = plot_plan(report, plan_of(report))
    assert [part.get_suptitle() for part in figure.subfigs] == [
        "Memory by block of the choice",
        "What fits in how much memory",
    ]


@pytest.mark.parametrize("draw", [plot_blocks, lambda r: plot_plan(r, plan_of(r))])
def test_plots__are_valid_png_and_svg(draw, report):
    png, svg = io.BytesIO(), io.BytesIO()
    draw(report).savefig(png, format="png", dpi=60)
    draw(report).savefig(svg, format="svg")
    assert Image.open(png).size[1] == 312
    root = ElementTree.fromstring(svg.getvalue())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert b"<!-- attention half -->" in svg.getvalue()
