"""The optimizer of a classifier, its parameter groups and its learning rate schedule."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import (  # type: ignore[attr-defined]  # timm exports them without saying so
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from lightning_bsr._errors import ConfigurationError


@dataclass(frozen=True)
class Optimization:
    """How a classifier trains: AdamW or SGD, a linear warm-up, then a cosine to zero at the end of the run.

    Attributes:
        optimizer: ``adamw``, or ``sgd`` with momentum.
        lr: Learning rate after the warm-up.
        weight_decay: Weight decay of the matrices.
        momentum: Momentum of ``sgd``.
        betas: Decay rates of the two moments of ``adamw``.
        layer_decay: Factor between the learning rates of a block and of the block after it, or ``None``.
        warmup_steps: Warm-up in optimizer steps.
        warmup_epochs: Warm-up in epochs, instead of steps.

    Raises:
        ConfigurationError: A value is out of range.

    Example:
        >>> Optimization(optimizer="sgd", lr=-1.0)
        Traceback (most recent call last):
        ...
        lightning_bsr._errors.ConfigurationError: lr is -1.0, expected a number above 0.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float | None = None
    warmup_steps: int = 0
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        check("optimizer", self.optimizer, self.optimizer in ("adamw", "sgd"), "'adamw' or 'sgd'")
        check("lr", self.lr, self.lr > 0, "a number above 0")
        check("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        check("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1")
        check(
            "betas",
            self.betas,
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "two numbers, each at least 0 and below 1",
        )
        check(
            "layer_decay",
            self.layer_decay,
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            "a number above 0 and at most 1, or None",
        )
        check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        check("warmup_epochs", self.warmup_epochs, self.warmup_epochs >= 0, "0 or more")
        if self.warmup_steps and self.warmup_epochs:
            raise ConfigurationError(
                f"warmup_steps is {self.warmup_steps} and warmup_epochs is {self.warmup_epochs}, expected only one of "
                "them."
            )

    def configure(self, trainer: Trainer, model: nn.Module, *heads: nn.Module, lr: float) -> OptimizerLRScheduler:
        """Build the optimizer over what trains, and its schedule over the whole run.

        Args:
            trainer: The run.
            model: A timm model; only its layers have different learning rates with ``layer_decay``.
            *heads: What else may train.
            lr: The learning rate to use: that of the module, which a tuner may have changed.

        Raises:
            ConfigurationError: There is nothing to train, or the length of the schedule is unknown.
        """
        groups = parameter_groups(model, lr, self.weight_decay, self.layer_decay)
        for head in heads:
            groups += parameter_groups(head, lr, self.weight_decay, None)
        if not groups:
            raise ConfigurationError(
                "No parameter of the model requires gradients, expected at least one to train; unfreeze a part of it."
            )
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, betas=self.betas)
        else:
            optimizer = torch.optim.SGD(groups, momentum=self.momentum)
        total_steps = trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise ConfigurationError(
                "The Trainer has no last step, expected one for the cosine schedule to end at; give it "
                "max_epochs or max_steps."
            )
        factor = functools.partial(
            warmup_cosine, warmup_steps=self._count_warmup_steps(trainer), total_steps=int(total_steps)
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _count_warmup_steps(self, trainer: Trainer) -> int:
        if not self.warmup_epochs:
            return self.warmup_steps
        batches = trainer.num_training_batches
        if math.isinf(batches):
            raise ConfigurationError(
                f"warmup_epochs is {self.warmup_epochs}, but the training data have no length to count "
                "epochs by; give warmup_steps instead."
            )
        return round(self.warmup_epochs * math.ceil(batches / trainer.accumulate_grad_batches))


def check(name: str, value: object, holds: bool, expected: str) -> None:
    """Fail unless an argument is as expected.

    Raises:
        ConfigurationError: It is not; the message names the argument.
    """
    if not holds:
        raise ConfigurationError(f"{name} is {value!r}, expected {expected}.")


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float | None
) -> list[dict[str, Any]]:
    """Group the parameters that train by weight decay and learning rate.

    Biases, norms and what the model names in ``no_weight_decay`` do not decay.

    Args:
        model: Its parameters with ``requires_grad`` are grouped, the others left out.
        lr: Learning rate of the head, and of every layer without ``layer_decay``.
        weight_decay: Weight decay of the groups that decay.
        layer_decay: Factor between the learning rates of a layer and of the layer above it.

    Returns:
        Groups for a ``torch.optim.Optimizer``, none of them empty.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)).requires_grad_(False)
        >>> _ = model[0].requires_grad_(True)
        >>> groups = parameter_groups(model, lr=0.1, weight_decay=0.5, layer_decay=None)
        >>> [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
        [(0.1, 0.0, 1), (0.1, 0.5, 1)]
    """
    no_decay: set[str] = getattr(model, "no_weight_decay", set)()
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay)
    else:
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=no_decay, layer_decay=layer_decay)
    # timm leaves lr_scale to its own schedulers; torch's start from each group's lr.
    return [{**group, "lr": lr * group.get("lr_scale", 1.0)} for group in groups if group["params"]]


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate's factor at an optimizer step: linear warm-up, then cosine to zero.

    The first step already moves: step ``s`` of ``w`` warm-up steps has the factor ``(s + 1) / (w + 1)``, and
    the step after the warm-up is the first with the full learning rate.

    Example:
        >>> [round(warmup_cosine(step, warmup_steps=3, total_steps=7), 3) for step in range(8)]
        [0.25, 0.5, 0.75, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1.0 + math.cos(math.pi * progress))
