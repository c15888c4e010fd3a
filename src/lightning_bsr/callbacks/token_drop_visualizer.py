"""The callback that draws what a ViT drops of pictures, and what that does to memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._conflicts import has_whole_weights
from lightning_bsr.callbacks._figures import figure_folder, publish_figure
from lightning_bsr.callbacks._training_step import quiet_training_step
from lightning_bsr.callbacks.release_gradients import releases_gradients
from lightning_bsr.drawing import draw_classes, draw_scores, draw_survivors, plot_blocks, undo_normalization
from lightning_bsr.drawing._figure import require_matplotlib
from lightning_bsr.functional import DropWatch, SurvivorCounts, Survivors, install_drop_watch
from lightning_bsr.functional._drop_forward import drops_tokens
from lightning_bsr.memory import plan
from lightning_bsr.vit import find_vit

Stage = Literal["val", "test", "predict"]


class TokenDropVisualizer(Callback):
    """Draw which patches of a few pictures survive each drop, by what scores, and where patches survive in each class.

    Whenever a validation, a test or a prediction has gone through its pictures, these are written, with ``val``,
    ``test`` or ``predict`` for the stage; a later validation replaces the files of an earlier one:

    - ``survivors-<stage>.png``: pictures, and what is left of each after each block that drops;
    - ``scores-<stage>.png``: the scores by which patches were kept;
    - ``classes-<stage>.png``: at which places patches survive, by class, over all pictures of the stage, if there are
      more than those that are drawn.

    When ``fit`` begins, ``memory-by-block.png`` shows what its first step keeps for backward by block, and the tokens
    that leave each block. It is planned, see :func:`lightning_bsr.memory.plan`; strategies that divide weights have no
    such picture.

    The pictures also go to a TensorBoard, W&B or MLflow logger of the Trainer, under the files' names.

    Pictures and their classes are found in the batches: floating-point images ``[B, C, H, W]``, and whole numbers
    ``[B]`` beside them. One picture of each class is drawn before a second one of any. Nothing is computed for it that
    validation does not compute, except that a :class:`PrefixCache` rests meanwhile. With several processes, the figures
    are of the first one's share of the pictures. The first validation, which checks that all runs, is not drawn, nor is
    an epoch in which no block drops, such as the first of a warm-up.

    Args:
        folder: Where to write; the Trainer's log folder by default.
        num_images: How many pictures to draw.
        mean: What was subtracted from the channels' values to normalise the pictures. By default ``mean`` and ``std``
            are looked for in the data module, then in the ``pretrained_cfg`` of a timm model; without any, a picture's
            darkest value is shown black and its brightest white.
        std: What they were divided by then.
        vit: Dotted path of the ViT, for when the module holds several.

    Attributes:
        files: What was written last, in this order.

    Raises:
        ConfigurationError: In the constructor if ``num_images`` is below 1, or one of ``mean`` and ``std`` is given
            alone; at the start of a run if matplotlib is not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import TokenDrop
        >>> callbacks = [TokenDrop(blocks=[3, 6, 9], keep_rate=0.5), TokenDropVisualizer("figures")]
        >>> trainer = Trainer(callbacks=callbacks, accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        num_images: int = 4,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        vit: str | None = None,
    ) -> None:
        if num_images < 1:
            raise ConfigurationError(f"num_images is {num_images}, expected 1 or more.")
        if (mean is None) != (std is None):
            raise ConfigurationError(f"mean is {mean!r} and std is {std!r}, expected both or neither.")
        self.folder = folder
        self.num_images = num_images
        self.mean = mean
        self.std = std
        self.vit = vit
        self.files: list[Path] = []
        self._watch: DropWatch | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        require_matplotlib()
        self._memory_is_drawn = False

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not when it starts: some callbacks set modes and keep rates then.
        if self._memory_is_drawn:
            return
        self._memory_is_drawn = True
        folder = figure_folder(trainer, self.folder)
        if not has_whole_weights(trainer) or not trainer.is_global_zero:
            return
        precision: Any = trainer.precision  # a plan refuses those that it does not know
        try:
            with isolate_rng(), quiet_training_step(pl_module) as training_step:
                report = plan(
                    pl_module,
                    batch,
                    forward=training_step,
                    optimizer=trainer.optimizers,
                    precision=precision,
                    accumulate=trainer.accumulate_grad_batches > 1,
                    release_gradients=releases_gradients(trainer),
                    vit=self.vit,
                )
        except ConfigurationError as error:
            rank_zero_info(f"TokenDropVisualizer: the memory of a step is not drawn. {error}")
            return
        self.files = [publish_figure(trainer, folder, "memory-by-block", plot_blocks(report))]

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    def _begin(self, pl_module: LightningModule) -> None:
        self._pictures: list[_Picture] = []
        self._occurrences: dict[str, int] = {}
        self._counts = SurvivorCounts()
        if any(map(drops_tokens, find_vit(pl_module, self.vit).blocks)):
            self._watch = install_drop_watch(pl_module, vit=self.vit)
        else:
            rank_zero_info("TokenDropVisualizer: no block drops tokens, so there is nothing to draw.")

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._look(trainer, batch)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def _look(self, trainer: Trainer, batch: Any) -> None:
        if self._watch is None:
            return
        data = getattr(trainer, "datamodule", None)
        for (images, labels), survivors in zip(_images_of(batch, data), self._watch.take(), strict=False):
            if survivors:
                self._remember(images, labels, survivors)

    def _remember(self, images: torch.Tensor, labels: Sequence[str], survivors: Mapping[int, Survivors]) -> None:
        first = self._pictures[0] if self._pictures else None
        if len(next(iter(survivors.values())).kept) != len(images) or (
            first is not None and (first.image.shape != images.shape[1:] or first.survivors.keys() != survivors.keys())
        ):
            return  # such as crops of several sizes: these go into no common figure
        self._counts.add(survivors, labels)
        for row, label in enumerate(labels):
            occurrence = self._occurrences.get(label, 0)
            self._occurrences[label] = occurrence + 1
            if len(self._pictures) == self.num_images and occurrence >= self._pictures[-1].occurrence:
                continue
            own = {block: Survivors(*(t[row].cpu().clone() for t in both)) for block, both in survivors.items()}
            self._pictures.append(_Picture(occurrence, label, images[row].cpu().clone(), own))
            self._pictures = sorted(self._pictures, key=lambda picture: picture.occurrence)[: self.num_images]

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "predict")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.remove()
        folder = figure_folder(trainer, self.folder)
        if not trainer.is_global_zero or not self._pictures:
            return
        images = torch.stack([picture.image for picture in self._pictures])
        survivors = {
            block: Survivors(*map(torch.stack, zip(*(p.survivors[block] for p in self._pictures), strict=True)))
            for block in self._pictures[0].survivors
        }
        grid = watch.view.patch_grid(self._pictures[0].num_patches, *images.shape[-2:])
        shown = undo_normalization(images, *self._normalization(trainer, watch.view.model))
        labels = [picture.label for picture in self._pictures]
        figures = {
            "survivors": draw_survivors(shown, survivors, grid, labels=labels),
            "scores": draw_scores(shown, survivors, grid, labels=labels, scored_by=watch.scored_by),
        }
        if sum(self._counts.pictures.values()) > len(self._pictures):
            figures["classes"] = draw_classes(self._counts, grid)
        written = [publish_figure(trainer, folder, f"{name}-{stage}", figure) for name, figure in figures.items()]
        self.files = [file for file in self.files if file not in written] + written

    def _normalization(
        self, trainer: Trainer, model: torch.nn.Module
    ) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        data = getattr(trainer, "datamodule", None)
        known = [
            (self.mean, self.std),
            *((getattr(each, "mean", None), getattr(each, "std", None)) for each in (data, *_tasks(data).values())),
        ]
        pretrained_cfg = getattr(model, "pretrained_cfg", None) or {}
        known.append((pretrained_cfg.get("mean"), pretrained_cfg.get("std")))
        return next(((mean, std) for mean, std in known if mean is not None and std is not None), (None, None))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None


@dataclass(frozen=True)
class _Picture:
    """One picture to draw: the how manieth of its class, its input ``[C, H, W]``, what survives of it ``[N]``."""

    occurrence: int
    label: str
    image: torch.Tensor
    survivors: dict[int, Survivors]

    @property
    def num_patches(self) -> int:
        return len(next(iter(self.survivors.values())).kept)


def _images_of(batch: Any, data: LightningDataModule | None) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Yield the images in a batch with the names of their classes, empty where there are none; tasks one by one."""
    if isinstance(batch, Mapping) and batch.keys() <= _tasks(data).keys():
        for task, own in batch.items():
            yield from _images_of(own, _tasks(data)[task])
        return
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    names = getattr(data, "class_names", None)
    for images in leaves:
        if images.ndim != 4 or not images.is_floating_point():
            continue
        found = (leaf for leaf in leaves if leaf.shape == images.shape[:1] and not leaf.is_floating_point())
        labels = next(found, images.new_empty(0)).tolist()
        named = [
            names[label] if isinstance(names, Sequence) and 0 <= label < len(names) else f"{label}" for label in labels
        ]
        yield images, named or [""] * len(images)


def _tasks(data: LightningDataModule | None) -> dict[str, LightningDataModule]:
    return getattr(data, "tasks", {})
