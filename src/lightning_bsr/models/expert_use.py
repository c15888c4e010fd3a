"""Draws which experts the tasks use. Needs matplotlib (the extra plots)."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_bsr.callbacks._figures import figure_folder, publish_figure
from lightning_bsr.drawing._figure import styled_figure
from lightning_bsr.models.experts import Experts, find_experts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_expert_use(experts: Experts) -> "Figure":
    """Draw the share of each task's tokens that each expert took: a heat map, tasks by experts, for each block.

    Args:
        experts: Mixtures of experts that have counted, see :meth:`lightning_bsr.models.Experts.use`.

    Returns:
        A figure; ``figure.savefig("experts.png")`` writes it.

    Raises:
        ConfigurationError: matplotlib is not installed.

    Example:
        >>> import timm, torch
        >>> from lightning_bsr.models import convert_to_moe_
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> experts = convert_to_moe_(model, [1, 5], 8, 2)
        >>> _ = model(torch.zeros(1, 3, 160, 160))
        >>> [axes.get_title() for axes in draw_expert_use(experts).axes][:2]
        ['block 1', 'block 5']
    """
    use = experts.use()
    names = next(iter(experts.layers.values())).tasks or ("all tasks",)
    num_experts = next(iter(use.values())).shape[1]
    size = (1.5 + 0.35 * num_experts, 0.6 + len(use) * (0.9 + 0.35 * len(names)))
    with styled_figure(*size) as figure:
        highest = max(float(shares.max()) for shares in use.values())
        panels = figure.subplots(len(use), squeeze=False)[:, 0]
        for axes, (index, shares) in zip(panels, use.items(), strict=True):
            image = axes.imshow(
                shares.numpy(force=True), aspect="auto", cmap="viridis", vmin=0, vmax=max(highest, 1 / num_experts)
            )
            axes.set_title(f"block {index}")
            axes.set_yticks(range(len(names)), names)
            axes.set_xticks(range(num_experts))
        panels[-1].set_xlabel("expert")
        figure.colorbar(image, ax=list(panels), label=f"share of a task's tokens (even: {1 / num_experts:.3f})")
    return figure


class DrawExpertUse(Callback):
    """Draws which experts the tasks use, when a validation or a test ends, as ``experts-<val or test>.png``.

    The module counts anew when a validation or test begins, as :class:`lightning_bsr.MultiTaskClassifier` does; else
    all passes since the last are in the figure. A later validation replaces the figure of an earlier one. It also goes
    to a TensorBoard, W&B or MLflow logger of the Trainer.

    Args:
        folder: Where to write; the Trainer's log folder by default.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: When a validation or test ends, if the module has no mixtures of experts, or matplotlib is
            not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DrawExpertUse("figures")], accelerator="cpu", logger=False)
    """

    def __init__(self, folder: str | Path | None = None, *, vit: str | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.vit = vit

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = figure_folder(trainer, self.folder)
        if trainer.is_global_zero:
            figure = draw_expert_use(find_experts(pl_module, vit=self.vit))
            publish_figure(trainer, folder, f"experts-{stage}", figure)
