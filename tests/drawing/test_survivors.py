"""The figures of what is dropped: what is in them, pixel by pixel."""

import builtins
import io

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bsr import ConfigurationError
from lightning_bsr.drawing import draw_classes, draw_scores, draw_survivors, undo_normalization
from lightning_bsr.functional import SurvivorCounts, Survivors

GRID, PATCH = (2, 3), 4  # pictures of 8 x 12 pixels
NAN = float("nan")


@pytest.fixture
def pictures():
    return torch.rand(2, GRID[0] * PATCH, GRID[1] * PATCH, 3)


@pytest.fixture
def survivors():
    """Two pictures of six patches, of which a fused token takes the place of one in the second drop of the second."""
    first = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1]]).bool()
    second = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0]]).bool()
    scores = torch.tensor([[0.3, 0.2, NAN, NAN, 0.4, NAN], [NAN, NAN, NAN, 0.1, 0.5, 0.2]])
    return {3: Survivors(first, torch.full((2, 6), 0.1)), 7: Survivors(second, scores)}


def shown(axes):
    (image,) = axes.images
    return np.ma.filled(image.get_array(), np.nan)


def panels(figure, columns):
    return np.array(figure.axes[: 2 * columns]).reshape(2, columns)


def test_draw_survivors__shows_what_is_kept_and_greys_what_is_gone(pictures, survivors):
    figure = draw_survivors(pictures, survivors, GRID, labels=["cat", "dog"])
    axes = panels(figure, 3)
    assert figure.get_suptitle() == "Patches that survive each drop"
    assert [a.get_title() for a in axes[0]] == ["picture", "block 3\n3 of 6 left", "block 7\nup to 2 of 6 left"]
    assert [a.get_ylabel() for a in axes[:, 0]] == ["cat", "dog"]
    for row in range(2):
        assert np.array_equal(shown(axes[row, 0]), pictures[row])
        for column, block in ((1, 3), (2, 7)):
            pixels = shown(axes[row, column])
            for patch, kept in enumerate(survivors[block].kept[row].tolist()):
                top, left = PATCH * (patch // GRID[1]), PATCH * (patch % GRID[1])
                part = (slice(top, top + PATCH), slice(left, left + PATCH))
                if kept:
                    assert np.array_equal(pixels[part], pictures[row][part])
                else:
                    assert np.ptp(pixels[part], axis=-1).max() == 0  # no colour is left
                    assert pixels[part].min() > 0.7


def test_draw_scores__has_a_heat_map_for_each_drop_with_gaps_where_patches_are_gone(pictures, survivors):
    figure = draw_scores(pictures, survivors, GRID, scored_by={3: "cls", 7: "random"})
    axes = panels(figure, 3)
    assert [a.get_title() for a in axes[0]] == ["picture", "block 3", "block 7"]
    for row in range(2):
        np.testing.assert_array_equal(shown(axes[row, 2]), survivors[7].scores[row].view(GRID))
        # The heat map lies over the very place of the picture.
        assert axes[row, 1].images[0].get_extent() == [0, 12, 8, 0]
    bars = figure.axes[6:]
    assert [bar.get_xlabel() for bar in bars] == ["class token's attention", "random score"]
    for row in range(2):
        assert axes[row, 2].images[0].get_clim() == pytest.approx((0, float(survivors[7].scores.nanquantile(0.98))))


def test_draw_classes__is_the_share_of_pictures_by_place(survivors):
    counts = SurvivorCounts()
    counts.add(survivors, ["cat", "dog"])
    counts.add(survivors, ["dog", "dog"])
    figure = draw_classes(counts, GRID)
    axes = np.array(figure.axes[:6]).reshape(2, 3)
    assert figure.get_suptitle() == "Where patches survive: share of the pictures"
    assert [a.get_title() for a in axes[0]] == ["all\nn = 4", "cat\nn = 1", "dog\nn = 3"]
    assert [a.get_ylabel() for a in axes[:, 0]] == ["block 3", "block 7"]
    kept = survivors[7].kept.float()
    for panel, expected in zip(axes[1], (kept.mean(0), kept[0], (kept[0] + 2 * kept[1]) / 3), strict=True):
        np.testing.assert_allclose(shown(panel), expected.view(GRID), rtol=1e-6)
    assert {a.images[0].get_clim() for a in axes.flat} == {(0, 1)}
    assert len(figure.axes) == 6 + 1  # one colour bar


def test_draw_classes__of_many_classes_has_those_with_the_most_pictures(survivors):
    counts = SurvivorCounts()
    for number in range(20):
        for _ in range(2 if number % 2 else 1):
            counts.add({3: Survivors(survivors[3].kept[:1], survivors[3].scores[:1])}, [f"class {number}"])
    figure = draw_classes(counts, GRID)
    assert figure.get_suptitle() == "Where patches survive: share of the pictures, 11 of 20 classes"
    titles = [a.get_title().partition("\n")[0] for a in figure.axes[:12]]
    assert titles == ["all", "class 0", *(f"class {number}" for number in range(1, 20, 2))]


def test_draw_classes__of_pictures_without_a_class_is_of_all_together(survivors):
    counts = SurvivorCounts()
    counts.add(survivors, ["", ""])
    assert [a.get_title() for a in draw_classes(counts, GRID).axes[:2]] == ["all\nn = 2", ""]


def test_undo_normalization__gives_back_what_was_normalised():
    pictures = torch.rand(2, 3, 4, 6)
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    images = (pictures - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(undo_normalization(images, mean, std), pictures.permute(0, 2, 3, 1))
    assert undo_normalization(images.bfloat16(), mean, std).dtype == torch.float32


@pytest.mark.parametrize(
    ("channels", "mean", "message"),
    [
        (4, None, "images have 4 channels, expected 1 or 3."),
        (3, [0.5], "mean is [0.5], expected one number for each of 3 channels."),
    ],
)
def test_undo_normalization__refuses_what_does_not_fit(channels, mean, message):
    with pytest.raises(ConfigurationError) as error:
        undo_normalization(torch.zeros(1, channels, 2, 2), mean, mean)
    assert str(error.value) == message


def test_figures__are_png_files_in_which_nothing_is_cut_off(pictures, survivors):
    counts = SurvivorCounts()
    counts.add(survivors, ["a class with a very long name", "dog"])
    for figure in (
        draw_survivors(pictures, survivors, GRID, labels=["cat", "dog"]),
        draw_scores(pictures, survivors, GRID),
        draw_classes(counts, GRID),
    ):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=60)
        assert Image.open(file).size == tuple(int(60 * inches) for inches in figure.get_size_inches())
        whole, inside = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
        assert whole.x0 <= inside.x0
        assert whole.y0 <= inside.y0
        assert inside.x1 <= whole.x1
        assert inside.y1 <= whole.y1


def test_figures__without_matplotlib_say_how_to_get_it(pictures, survivors, monkeypatch):
    found = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ConfigurationError) as error:
        draw_survivors(pictures, survivors, GRID)
    assert str(error.value) == 'Drawing needs matplotlib, which is not installed: pip install "lightning-bsr[plots]".'
