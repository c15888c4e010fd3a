"""A plain classifier around any timm model, for when you bring no LightningModule of your own."""

from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_bsr.models._create import create_model, zero_head_
from lightning_bsr.models._optimization import Optimization, check

Batch = tuple[Tensor, Tensor]


class ViTClassifier(LightningModule):
    """Classify images with a timm model, ``self.model``; fine-tune it or train it from scratch.

    Batches are pairs of images [B, 3, H, W] and class indices [B]. The loss is cross-entropy. The learning
    rate warms up linearly, then follows a cosine to zero at the end of the run, optimizer step by optimizer
    step. Parameters that do not require gradients when the run starts are left out of the optimizer; biases,
    norms and embeddings are spared the weight decay.

    Logged are ``train/loss`` (per step), ``train/accuracy``, ``val/loss``, ``val/accuracy``, ``test/loss``
    and ``test/accuracy`` (per epoch).

    Checkpoints are self-contained: ``ViTClassifier.load_from_checkpoint`` needs neither the network nor the
    file that training started from.

    Args:
        model_name: Name of a timm model, with or without the tag of its weights.
        num_classes: Number of classes. Weights for another number keep all but their head, which starts anew.
        pretrained: Start from the published weights, downloaded once by timm. Those of the default model are
            part of this package. Ignored with ``checkpoint_path``.
        checkpoint_path: Start from the weights of a local file instead: ``.safetensors``, a torch file with a
            state dict (also under ``state_dict`` or ``model``), or a Lightning checkpoint of this class.
            Nothing is downloaded then.
        model_kwargs: More arguments of the timm model: ``img_size``, ``drop_path_rate``, ``patch_drop_rate``,
            ...
        optimizer: ``adamw``, or ``sgd`` with momentum.
        lr: Learning rate after the warm-up.
        weight_decay: Weight decay of the matrices.
        momentum: Momentum of ``sgd``.
        betas: Decay rates of the two moments of ``adamw``.
        layer_decay: Factor between the learning rates of a block and of the block after it, such as 0.75; the
            head has ``lr`` itself. None gives all of them ``lr``.
        warmup_steps: Warm-up in optimizer steps.
        warmup_epochs: Warm-up in epochs; give this or ``warmup_steps``.
        label_smoothing: Share of the training target spread over all classes; the validation loss has none.
        zero_head: Start with a head of zeros, also where the weights would bring one.

    Raises:
        ConfigurationError: An argument is out of range, the model or its weights cannot be had; or, when a
            run starts, no parameter requires gradients or the length of the schedule is unknown.

    Example:
        >>> import torch
        >>> model = ViTClassifier("vit_micro_patch4_32.cifar100", num_classes=10, lr=5e-4, layer_decay=0.75)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        model_name: str = "vit_micro_patch4_32.cifar100",
        num_classes: int = 10,
        pretrained: bool = True,
        checkpoint_path: str | Path | None = None,
        model_kwargs: dict[str, Any] | None = None,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        layer_decay: float | None = None,
        warmup_steps: int = 0,
        warmup_epochs: float = 0.0,
        label_smoothing: float = 0.0,
        zero_head: bool = False,
    ) -> None:
        super().__init__()
        # A Path among the hyperparameters would not load with weights_only.
        checkpoint_path = None if checkpoint_path is None else str(checkpoint_path)
        self.save_hyperparameters()
        check("num_classes", num_classes, num_classes >= 2, "2 or more")
        self.optimization = Optimization(
            optimizer, lr, weight_decay, momentum, betas, layer_decay, warmup_steps, warmup_epochs
        )
        self.lr = lr  # where Lightning's tuner looks for it
        check("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "at least 0 and below 1")
        self.label_smoothing = label_smoothing
        self.model = create_model(
            model_name,
            num_classes,
            pretrained=pretrained,
            checkpoint_path=None if checkpoint_path is None else Path(checkpoint_path),
            model_kwargs=dict(model_kwargs or {}),
        )
        if zero_head:
            zero_head_(self.model)
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, 3, H, W]."""
        logits: Tensor = self.model(images)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss, a scalar, of a batch of images [B, 3, H, W] and class indices [B]."""
        images, targets = batch
        logits = self(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        self.train_accuracy(logits, targets)
        self.log("train/loss", loss, batch_size=len(images))
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of a batch of images [B, 3, H, W] and class indices [B]."""
        self._evaluate("val", self.val_accuracy, batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of a batch of images [B, 3, H, W] and class indices [B]."""
        self._evaluate("test", self.test_accuracy, batch)

    @override
    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Return class probabilities [B, num_classes] of images [B, 3, H, W], alone or with targets."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        logits: Tensor = self(images)
        return logits.float().softmax(dim=-1)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over what trains now, and its schedule over the whole run."""
        return self.optimization.configure(self.trainer, self.model, lr=self.lr)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint that its own weights are all that loading it takes."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY].update(pretrained=False, checkpoint_path=None)

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: Batch) -> None:
        images, targets = batch
        logits = self(images)
        accuracy(logits, targets)
        # sync_dist: the mean over all processes, as the accuracy is.
        self.log(f"{stage}/loss", F.cross_entropy(logits, targets), batch_size=len(images), sync_dist=True)
        self.log(
            f"{stage}/accuracy",
            accuracy,
            on_step=False,
            on_epoch=True,
            prog_bar=stage == "val",
            batch_size=len(images),
        )
