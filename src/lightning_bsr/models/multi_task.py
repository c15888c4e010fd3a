"""One backbone for several classification tasks, with a head for each, and mixtures of experts if asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.models._create import create_model
from lightning_bsr.models._optimization import Optimization, check
from lightning_bsr.models.experts import Experts, convert_to_moe_

TaskBatch = Mapping[str, tuple[Tensor, Tensor]]
_STAGES = ("train", "val", "test")
_MOE_OPTIONS = ("blocks", "num_experts", "top_k", "renormalize", "noise_std", "capacity_factor")


class MultiTaskClassifier(LightningModule):
    """Classify images of several tasks with one timm model, ``self.model``, and a linear head for each task.

    A batch is a mapping from the names of tasks to pairs of images ``[B, 3, H, W]`` and class indices ``[B]``, as
    :class:`lightning_bsr.MultiTaskDataModule` gives them. With batches of one task each the tasks are updated in turn,
    each with an optimizer step of its own, as published for BSR (arXiv 2405.10951). With all tasks in a batch
    (``joint``) there is one step for all; the same step in less memory is batches of one task each and
    ``Trainer(accumulate_grad_batches=<number of tasks>)``.

    The loss of a batch is the sum over its tasks of cross-entropy times the task's weight, and of the experts' balance
    loss times ``balance_weight``. Learning rate and weight decay are as in :class:`lightning_bsr.ViTClassifier`.

    Logged are ``train/loss`` and ``train/<task>/loss`` (per step), ``train/<task>/accuracy`` (per epoch); for ``val``
    and ``test`` ``<task>/loss``, ``<task>/accuracy`` and ``accuracy``, the mean over tasks. With experts also
    ``train/balance_loss``, and for ``val`` and ``test`` ``<task>/experts``: how many experts are in effect used, the
    exponential of the entropy of their shares of a task's tokens, mean over blocks, from 1 to ``num_experts``.

    Checkpoints are self-contained, as those of :class:`lightning_bsr.ViTClassifier`.

    Args:
        num_classes: The number of classes of each task, by the tasks' names.
        model_name: Name of a timm model, with or without the tag of its weights.
        pretrained: Start from the published weights. Ignored with ``checkpoint_path``.
        checkpoint_path: Start from the weights of a local file instead.
        model_kwargs: More arguments of the timm model.
        experts: Arguments of :func:`lightning_bsr.models.convert_to_moe_`, such as ``{"blocks": [3, 7, 11],
            "num_experts": 16, "top_k": 4}``, or ``{}`` for its defaults; ``None`` keeps the MLPs.
        gate_per_task: Whether each task has gates of its own.
        balance_weight: Weight of the balance loss.
        loss_weights: Weights of tasks' losses; 1 for those left out.
        optimizer: ``adamw``, or ``sgd`` with momentum.
        lr: Learning rate after the warm-up.
        weight_decay: Weight decay of the matrices.
        momentum: Momentum of ``sgd``.
        betas: Decay rates of the two moments of ``adamw``.
        layer_decay: Factor between the learning rates of a block and of the block after it; the heads have ``lr``.
        warmup_steps: Warm-up in optimizer steps.
        warmup_epochs: Warm-up in epochs; give this or ``warmup_steps``.
        label_smoothing: Share of the training target spread over all classes.

    Attributes:
        tasks: The tasks' names.
        experts: The mixtures of experts, or ``None``.

    Raises:
        ConfigurationError: An argument is out of range, the model or its weights cannot be had, or its blocks cannot
            be converted; and when a batch is of an unknown task.

    Example:
        >>> model = MultiTaskClassifier({"digits": 10, "pets": 37}, experts={"num_experts": 4, "top_k": 2})
        >>> model(torch.zeros(2, 3, 32, 32), "pets").shape
        torch.Size([2, 37])
    """

    def __init__(
        self,
        num_classes: dict[str, int],
        model_name: str = "vit_micro_patch4_32.cifar100",
        pretrained: bool = True,
        checkpoint_path: str | Path | None = None,
        model_kwargs: dict[str, Any] | None = None,
        experts: dict[str, Any] | None = None,
        gate_per_task: bool = True,
        balance_weight: float = 0.01,
        loss_weights: dict[str, float] | None = None,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        layer_decay: float | None = None,
        warmup_steps: int = 0,
        warmup_epochs: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        # A Path among the hyperparameters would not load with weights_only.
        checkpoint_path = None if checkpoint_path is None else str(checkpoint_path)
        self.save_hyperparameters()
        check("num_classes", num_classes, bool(num_classes), "the number of classes of one task or more, by name")
        for task, count in num_classes.items():
            check(f"num_classes[{task!r}]", count, count >= 2, "2 or more")
        self.tasks = tuple(num_classes)
        weights = dict.fromkeys(self.tasks, 1.0) | dict(loss_weights or {})
        for task, weight in weights.items():
            check(f"loss_weights[{task!r}]", weight, weight >= 0, "0 or more")
            self._position(task)
        check("balance_weight", balance_weight, balance_weight >= 0, "0 or more")
        self.optimization = Optimization(
            optimizer, lr, weight_decay, momentum, betas, layer_decay, warmup_steps, warmup_epochs
        )
        self.lr = lr  # where Lightning's tuner looks for it
        check("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "at least 0 and below 1")
        unknown = [name for name in experts or {} if name not in _MOE_OPTIONS]
        check("experts", experts, not unknown, f"a mapping with {', '.join(_MOE_OPTIONS)}, or None")

        self.loss_weights = weights
        self.balance_weight = balance_weight
        self.label_smoothing = label_smoothing
        self.model = create_model(
            model_name,
            0,
            pretrained=pretrained,
            checkpoint_path=None if checkpoint_path is None else Path(checkpoint_path),
            model_kwargs=dict(model_kwargs or {}),
        )
        self.experts: Experts | None = None
        if experts is not None:
            self.experts = convert_to_moe_(self.model, **experts, tasks=self.tasks if gate_per_task else None)
        self.gate_per_task = gate_per_task
        self.heads = nn.ModuleList(_head(self.model, count) for count in num_classes.values())
        for stage in _STAGES:
            metrics = (MulticlassAccuracy(count, average="micro") for count in num_classes.values())
            self.add_module(f"{stage}_accuracies", nn.ModuleList(metrics))

    @override
    def forward(self, images: Tensor, task: str) -> Tensor:
        """Return the logits ``[B, num_classes[task]]`` of images ``[B, 3, H, W]``."""
        position = self._position(task)
        if self.experts is not None and self.gate_per_task:
            self.experts.select_task(position)
        logits: Tensor = self.heads[position](self.model(images))
        return logits

    @override
    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Return the loss, a scalar, of a batch of one task or several."""
        total = torch.zeros((), device=self.device)
        for task, (images, targets) in batch.items():
            logits = self(images, task)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
            total = total + self.loss_weights[task] * loss
            if self.experts is not None:
                balance = self.experts.balance_loss()
                total = total + self.balance_weight * balance
                self.log("train/balance_loss", balance.detach(), batch_size=len(images))
            self.log(f"train/{task}/loss", loss.detach(), batch_size=len(images))
            self._log_accuracy("train", task, logits, targets)
        self.log("train/loss", total.detach(), batch_size=sum(len(images) for images, _ in batch.values()))
        return total

    @override
    def validation_step(self, batch: TaskBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy of a batch of one task or several."""
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: TaskBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy of a batch of one task or several."""
        self._evaluate("test", batch)

    @override
    def predict_step(self, batch: TaskBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return class probabilities ``[B, num_classes[task]]`` for each task in the batch."""
        return {task: self(images, task).float().softmax(dim=-1) for task, (images, _) in batch.items()}

    @override
    def on_validation_epoch_start(self) -> None:
        """Count anew what experts take."""
        self._reset_use()

    @override
    def on_test_epoch_start(self) -> None:
        """Count anew what experts take."""
        self._reset_use()

    @override
    def on_validation_epoch_end(self) -> None:
        """Log what is of all tasks together."""
        self._log_summary("val")

    @override
    def on_test_epoch_end(self) -> None:
        """Log what is of all tasks together."""
        self._log_summary("test")

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over what trains now, and its schedule over the whole run."""
        return self.optimization.configure(self.trainer, self.model, self.heads, lr=self.lr)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint that its own weights are all that loading it takes."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY].update(pretrained=False, checkpoint_path=None)

    def _position(self, task: str) -> int:
        if task not in self.tasks:
            raise ConfigurationError(f"The task is {task!r}, expected one of {', '.join(map(repr, self.tasks))}.")
        return self.tasks.index(task)

    def _accuracies(self, stage: str) -> list[MulticlassAccuracy]:
        return list(getattr(self, f"{stage}_accuracies"))

    def _evaluate(self, stage: str, batch: TaskBatch) -> None:
        for task, (images, targets) in batch.items():
            logits = self(images, task)
            self.log(
                f"{stage}/{task}/loss",
                F.cross_entropy(logits, targets),
                batch_size=len(images),
                sync_dist=True,  # the mean over all processes, as the accuracy is
                add_dataloader_idx=False,
            )
            self._log_accuracy(stage, task, logits, targets)

    def _log_accuracy(self, stage: str, task: str, logits: Tensor, targets: Tensor) -> None:
        accuracy = self._accuracies(stage)[self._position(task)]
        accuracy(logits, targets)
        self.log(
            f"{stage}/{task}/accuracy",
            accuracy,
            on_step=False,
            on_epoch=True,
            batch_size=len(targets),
            add_dataloader_idx=False,
        )

    def _log_summary(self, stage: str) -> None:
        metrics = [metric for metric in self._accuracies(stage) if metric.update_called]
        if metrics:
            mean = torch.stack([metric.compute() for metric in metrics]).mean()
            self.log(f"{stage}/accuracy", mean, prog_bar=stage == "val")
        if self.experts is not None:
            numbers = self.experts.effective_numbers()
            for task, number in zip(self.tasks if self.gate_per_task else ("all",), numbers, strict=True):
                self.log(f"{stage}/{task}/experts", number, sync_dist=True)

    def _reset_use(self) -> None:
        if self.experts is not None:
            self.experts.reset_use()


def _head(model: nn.Module, num_classes: int) -> nn.Linear:
    head = nn.Linear(model.num_features, num_classes)  # type: ignore[arg-type]  # every timm model's width
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
