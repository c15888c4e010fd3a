"""Measures one real training step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_bsr.memory._recorder import ActivationRecorder
from lightning_bsr.memory._report import Flops, MemoryReport
from lightning_bsr.vit import find_vit


def measure(
    module: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], torch.Tensor] = torch.sum,
    vit: str | None = None,
) -> MemoryReport:
    """Run one forward and backward pass of ``module`` and report what it kept and computed.

    Gradients that the parameters held before are put back, and the state of the random generators too. Buffers are not:
    batch norms in train mode update their running statistics.

    Args:
        module: A module that holds a ViT, with selection and dropping as they would be in training.
        *inputs: What its forward takes, such as images ``[B, 3, H, W]``.
        loss: From the output to a scalar; the sum by default.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        Bytes and floating-point operations of the whole batch.

    Raises:
        ConfigurationError: If the ViT is not found.

    Example:
        >>> import timm
        >>> report = measure(timm.create_model("test_vit", num_classes=10), torch.zeros(2, 3, 160, 160))
        >>> [line.tokens for line in report.by_block]
        [101, 101, 101, 101, 101, 101, 101, None]
        >>> report.flops.backward > report.flops.forward
        True
    """
    view = find_vit(module, vit)
    gradients = [(p, p.grad) for p in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with (
            torch.random.fork_rng(),
            FlopCounterMode(display=False) as flops,
            ActivationRecorder(module, view) as kept,
        ):
            value = loss(module(*inputs))
            report, forward = kept.report(), flops.get_total_flops()
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return replace(report, flops=Flops(forward, flops.get_total_flops() - forward))
