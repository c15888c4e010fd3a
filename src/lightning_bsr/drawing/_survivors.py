"""Draws which patches of pictures survive each drop, their scores, and what survives by class."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import torch

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.drawing._figure import styled_figure
from lightning_bsr.functional import SurvivorCounts, Survivors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = "viridis"  # evenly stepped, and told apart by colour-blind readers
_GONE = 0.88  # a light grey
_SHINES_THROUGH = 0.15
_BRIGHTEST = 0.98  # the quantile of scores that the colours end at, so that one outlier does not darken the rest
_CELL, _CLASS_CELL = 1.7, 1.05  # inches
_TITLE = 6.0  # inches that the longest title takes
_LETTERS = 9  # of a title, to the inch
_MOST_CLASSES = 11
_SCORES = {"cls": "class token's attention", "mean": "attention received", "random": "random score"}


def undo_normalization(
    images: torch.Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> torch.Tensor:
    """Turn the input of a model into pictures that can be looked at.

    Args:
        images: ``[B, C, H, W]``, as the model is given them; 1 channel for grey, 3 for colours.
        mean: What was subtracted from each channel's values, which went from 0 to 1. Without it each picture's darkest
            value becomes black and its brightest white.
        std: What each channel was divided by then.

    Returns:
        ``[B, H, W, 3]`` on the CPU, from 0 to 1.

    Raises:
        ConfigurationError: If there are not 1 or 3 channels, or another number of means or deviations.

    Example:
        >>> grey = torch.tensor([[[[-1.0, 0.0, 1.0]]]])
        >>> undo_normalization(grey, [0.5], [0.25])[0, :, :, 0]
        tensor([[0.2500, 0.5000, 0.7500]])
        >>> undo_normalization(grey)[0, :, :, 0]
        tensor([[0.0000, 0.5000, 1.0000]])
    """
    images = images.detach().float().cpu()
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ConfigurationError(f"images have {channels} channels, expected 1 or 3.")
    if mean is None or std is None:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=torch.finfo(images.dtype).tiny)
    else:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ConfigurationError(f"{name} is {values!r}, expected one number for each of {channels} channels.")
        images = images * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
    return images.clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def draw_survivors(
    pictures: torch.Tensor, survivors: Mapping[int, Survivors], grid: tuple[int, int], *, labels: Sequence[str] = ()
) -> "Figure":
    r"""Draw pictures, a row each, and beside each what is left of it after each block that drops.

    Args:
        pictures: ``[B, H, W, 3]`` from 0 to 1, see :func:`undo_normalization`.
        survivors: What became of their patches, by block, see :func:`lightning_bsr.functional.install_drop_watch`.
        grid: Rows and columns of the patches.
        labels: What to write beside each picture.

    Returns:
        A figure; ``figure.savefig("survivors.png")`` writes it.

    Raises:
        ConfigurationError: matplotlib is not installed.

    Example:
        >>> kept = torch.tensor([[True, False], [False, True]])
        >>> figure = draw_survivors(torch.rand(2, 8, 16, 3), {3: Survivors(kept, torch.zeros(2, 2))}, (1, 2))
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['picture', 'block 3\n1 of 2 left']
    """
    with _rows_of_pictures(pictures, survivors, labels, "Patches that survive each drop") as (figure, axes):
        grey = _GONE + _SHINES_THROUGH * (pictures.mean(dim=-1, keepdim=True) - 1)
        for column, (block, (kept, _)) in enumerate(survivors.items(), start=1):
            axes[0, column].set_title(
                f"block {block}\n{_at_most(kept.sum(dim=1))} of {kept.shape[1]} left", fontsize=10
            )
            masks = _enlarge(kept, grid, pictures.shape[1:3]).cpu().unsqueeze(-1)
            for row, shown in enumerate(torch.where(masks, pictures, grey)):
                axes[row, column].imshow(shown.numpy(), interpolation="nearest")
    return figure


def draw_scores(
    pictures: torch.Tensor,
    survivors: Mapping[int, Survivors],
    grid: tuple[int, int],
    *,
    labels: Sequence[str] = (),
    scored_by: Mapping[int, str] | None = None,
) -> "Figure":
    """Draw pictures, a row each, and beside each the scores that its patches have when blocks drop some, as heat maps.

    Args:
        pictures: ``[B, H, W, 3]`` from 0 to 1, see :func:`undo_normalization`.
        survivors: What became of their patches, by block, see :func:`lightning_bsr.functional.install_drop_watch`.
        grid: Rows and columns of the patches.
        labels: What to write beside each picture.
        scored_by: The kind of score of each block, ``"cls"``, ``"mean"`` or ``"random"``.

    Returns:
        A figure.

    Raises:
        ConfigurationError: matplotlib is not installed.

    Example:
        >>> survivors = Survivors(torch.tensor([[True, False]]), torch.tensor([[0.3, 0.1]]))
        >>> figure = draw_scores(torch.rand(1, 8, 16, 3), {3: survivors}, (1, 2), scored_by={3: "cls"})
        >>> figure.axes[1].get_title(), figure.axes[-1].get_xlabel()
        ('block 3', "class token's attention")
    """
    with _rows_of_pictures(pictures, survivors, labels, "Scores by which patches are kept (grey: gone before)") as (
        figure,
        axes,
    ):
        for column, (block, (_, scores)) in enumerate(survivors.items(), start=1):
            axes[0, column].set_title(f"block {block}", fontsize=10)
            scores = scores.detach().float().cpu()
            highest = float(scores.nanquantile(_BRIGHTEST))
            for row, values in enumerate(scores.unflatten(1, grid)):
                axes[row, column].set_facecolor(str(_GONE))
                extent = (0, pictures.shape[2], pictures.shape[1], 0)
                image = axes[row, column].imshow(values.numpy(), cmap=_COLOURS, vmin=0, vmax=highest, extent=extent)
            kind = (scored_by or {}).get(block, "score")
            bar = figure.colorbar(image, ax=axes[:, column].tolist(), location="bottom", extend="max", pad=0.02)
            bar.set_label(_SCORES.get(kind, kind), fontsize=9)
            bar.ax.locator_params(nbins=3)
            bar.ax.tick_params(labelsize=8)
        for panel in axes.flat:
            panel.set_anchor("C")  # the colour bars have changed it in their columns
    return figure


def draw_classes(counts: SurvivorCounts, grid: tuple[int, int]) -> "Figure":
    r"""Draw at which places patches survive, as the share of a class's pictures: blocks that drop by classes.

    The first column is of all pictures; of many classes those are drawn that have the most pictures. All maps have one
    scale of colours.

    Args:
        counts: Pictures that were counted.
        grid: Rows and columns of the patches.

    Returns:
        A figure.

    Raises:
        ConfigurationError: matplotlib is not installed.

    Example:
        >>> counts = SurvivorCounts()
        >>> kept = torch.tensor([[True, False], [True, True], [False, True]])
        >>> counts.add({3: Survivors(kept, torch.zeros(3, 2))}, ["cat", "cat", "dog"])
        >>> [axes.get_title() for axes in draw_classes(counts, (1, 2)).axes[:3]]
        ['all\nn = 3', 'cat\nn = 2', 'dog\nn = 1']
    """
    known = list(counts.pictures)
    most = sorted(known, key=lambda name: counts.pictures[name], reverse=True)[:_MOST_CLASSES]
    names = [name for name in known if name in most] if len(known) > 1 else []
    maps = [counts.shares(), *map(counts.shares, names)]
    blocks = list(maps[0])
    titles = [f"all\nn = {sum(counts.pictures.values())}"]
    titles += [f"{shorten(name, 13, placeholder='…')}\nn = {counts.pictures[name]}" for name in names]
    cell = max(_CLASS_CELL, min(_CELL, (_TITLE - 1.9) / len(maps)))
    height = cell * grid[0] / grid[1]
    left_out = f", {len(names)} of {len(known)} classes" if len(names) < len(known) > 1 else ""

    width = 1.9 + cell * len(maps)
    title = fill(f"Where patches survive: share of the pictures{left_out}", int(_LETTERS * width))
    with styled_figure(width, 1.0 + 0.2 * title.count("\n") + (height + 0.1) * len(blocks)) as figure:
        figure.suptitle(title, fontweight="bold", fontsize=13)
        axes = figure.subplots(len(blocks), len(maps), squeeze=False)
        for row, block in enumerate(blocks):
            for panel, each in zip(axes[row], maps, strict=True):
                image = panel.imshow(each[block].unflatten(0, grid).numpy(), cmap=_COLOURS, vmin=0, vmax=1)
                _hide_ticks(panel)
            axes[row, 0].set_ylabel(f"block {block}", fontsize=10)
        bar = figure.colorbar(image, ax=axes.ravel().tolist(), format=lambda share, _: f"{share:.0%}", pad=0.01)
        bar.ax.locator_params(nbins=4)
        bar.ax.tick_params(labelsize=8)
        for panel, title in zip(axes[0], titles, strict=True):
            panel.set_title(title, fontsize=9)
    return figure


@contextlib.contextmanager
def _rows_of_pictures(
    pictures: torch.Tensor, survivors: Mapping[int, Survivors], labels: Sequence[str], title: str
) -> Iterator[tuple["Figure", Any]]:
    """Draw pictures one below the other, with an empty panel for each block beside them."""
    count, height, width = pictures.shape[:3]
    columns = 1 + len(survivors)
    cell = max(_CELL, (_TITLE - 0.5) / columns)
    with styled_figure(0.5 + cell * columns, 1.0 + (cell * height / width + 0.05) * count) as figure:
        figure.suptitle(title, fontweight="bold", fontsize=13)
        axes = figure.subplots(count, columns, squeeze=False)
        for panel in axes.flat:
            _hide_ticks(panel)
        axes[0, 0].set_title("picture", fontsize=10)
        for panel, picture in zip(axes[:, 0], pictures, strict=True):
            panel.imshow(picture.numpy(), interpolation="nearest")
        for panel, label in zip(axes[:, 0], labels, strict=False):
            panel.set_ylabel(shorten(label, 20, placeholder="…"))
        yield figure, axes


def _hide_ticks(axes: "Axes") -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _enlarge(values: torch.Tensor, grid: tuple[int, int], size: Sequence[int]) -> torch.Tensor:
    """Give each pixel of ``[B, H, W]`` what its patch has of ``[B, N]``."""
    rows, columns = (torch.arange(n, device=values.device) * cells // n for n, cells in zip(size, grid, strict=True))
    enlarged: torch.Tensor = values.unflatten(1, grid)[:, rows][:, :, columns]
    return enlarged


def _at_most(counts: torch.Tensor) -> str:
    """Say in one number how many patches are left: where a fused token outlives one, that picture has one fewer."""
    low, high = int(counts.min()), int(counts.max())
    return f"{high}" if low == high else f"up to {high}"
