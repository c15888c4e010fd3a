"""The optimizer's parameter groups and the learning rate schedule of a classifier."""

import math
from typing import Any

from timm.optim import (  # type: ignore[attr-defined]  # timm exports them without saying so
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn


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
