"""Runs a training step under observation."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_bsr.functional._checkpoint import RECOMPUTE_OBSERVERS
from lightning_bsr.functional._release import releases_suspended
from lightning_bsr.memory._kernels import KernelWatch
from lightning_bsr.memory._live import Peak, StepTracker
from lightning_bsr.memory._optimizer import OptimizerCost, optimizers_cost
from lightning_bsr.memory._position import EMBED, HEAD
from lightning_bsr.memory._recorder import ActivationRecorder
from lightning_bsr.memory._report import Flops, MemoryReport
from lightning_bsr.vit import ViTView

Precision = Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]

AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
"""Type for autocast, by precision."""


@dataclass(frozen=True)
class Step:
    """What a step runs; the same on real and on fake tensors.

    Attributes:
        module: Holds the ViT.
        view: The ViT.
        forward: What is called with the inputs.
        loss: From the output to a scalar.
        optimizers: Whose state and temporaries are counted.
        precision: As the Trainer's.
        accumulate: Whether gradients are alive all the time.
        released: By name, the parameters that are stepped as soon as their gradients are there, and the bytes that this
            needs for each.
    """

    module: nn.Module
    view: ViTView
    forward: Callable[..., Any]
    loss: Callable[[Any], torch.Tensor]
    optimizers: Sequence[torch.optim.Optimizer]
    precision: Precision
    accumulate: bool
    released: Mapping[str, int]

    @property
    def dtype(self) -> torch.dtype:
        """What most is computed in."""
        return {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}[self.precision.split("-")[0]]

    def batch_size(self, inputs: Any) -> int | None:
        """The number of images: the first dimension of the first tensor."""
        return next((t.shape[0] for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.ndim), None)

    def run(self, inputs: tuple[Any, ...], watch: KernelWatch) -> MemoryReport:
        """Run forward, loss and backward, and report."""
        tracker = StepTracker()
        recorder = ActivationRecorder(self.module, self.view, tracker=tracker)
        tracker.position = recorder.position
        trained = [p for p in self.module.parameters() if p.requires_grad]
        released = {id(p): self.released[name] for name, p in self.module.named_parameters() if name in self.released}
        gradients = sum(p.nbytes for p in trained if id(p) not in released)
        most_gradients = gradients
        optimizer = optimizers_cost(self.optimizers, self.weight_dtype)

        def note_gradient(parameter: torch.Tensor) -> None:
            nonlocal most_gradients
            assert parameter.grad is not None
            tracker.hold([parameter.grad], "gradients")
            if id(parameter) in released:
                most_gradients = max(most_gradients, tracker.bytes["gradients"])
                tracker.hold_phantom(released[id(parameter)], "temporaries")
                tracker.hold_phantom(-released[id(parameter)], "temporaries")
                parameter.grad = None

        hooks = [p.register_post_accumulate_grad_hook(note_gradient) for p in trained]
        RECOMPUTE_OBSERVERS.append(tracker.recompute)
        try:
            with releases_suspended(), tracker, recorder:
                tracker.hold(self.module.parameters(), "parameters")
                tracker.hold(self.module.buffers(), "buffers")
                tracker.hold((t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)), "inputs")
                tracker.hold_phantom(optimizer.state if optimizer else 0, "optimizer_state")
                if self.accumulate:
                    for parameter in trained:
                        parameter.grad = torch.zeros_like(parameter)
                        note_gradient(parameter)
                else:
                    # Lightning clears the gradients of the step before only when the forward pass is over.
                    tracker.hold_phantom(gradients, "gradients")
                with watch, self._autocast():
                    value = self.loss(self.forward(*inputs))
                report = recorder.report()
                if not self.accumulate:
                    tracker.hold_phantom(-gradients, "gradients")
                tracker.phase = "backward"
                if value.requires_grad:
                    value.backward()
        finally:
            RECOMPUTE_OBSERVERS.remove(tracker.recompute)
            for hook in hooks:
                hook.remove()
        inputs_bytes = sum(t.nbytes for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))
        peak = tracker.peak if released else _with_optimizer(tracker, gradients, inputs_bytes, optimizer)
        report = replace(report, gradients=most_gradients)
        return self._complete(report, tracker, peak, optimizer, watch, inputs)

    def _complete(
        self,
        report: MemoryReport,
        tracker: StepTracker,
        peak: Peak,
        optimizer: OptimizerCost | None,
        watch: KernelWatch,
        inputs: Any,
    ) -> MemoryReport:
        lines = tuple(
            replace(line, flops=Flops(tracker.flops["forward", line.name], tracker.flops["backward", line.name]))
            for line in report.by_block
        )
        notes = []
        if self.optimizers and optimizer is None:
            names = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
            notes.append(f"The state of {names} is not counted: the step cannot be run without values.")
        return replace(
            report,
            by_block=lines,
            flops=Flops(*(sum(line.flops[phase] for line in lines if line.flops) for phase in (0, 1))),
            activations_peak=max(report.activations, tracker.activations_peak),
            optimizer_state=optimizer.state if optimizer else None,
            peak=peak.bytes,
            peak_parts={part: count for part, count in peak.parts.items() if count},
            peak_moment=_moment(peak),
            parameter_dtypes=_by_dtype(self.module),
            batch_size=self.batch_size(inputs),
            attention_kernels=tuple(sorted(set(watch.kernels.values()))),
            notes=tuple(notes),
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.precision)
        device = next(self.module.parameters()).device
        # Lightning's autocast makes the copy of a weight anew for each use.
        return torch.autocast(device.type, dtype, cache_enabled=False) if dtype else contextlib.nullcontext()

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """The dtype of all weights, if the precision gives them one."""
        return self.dtype if self.precision in ("16-true", "bf16-true") else None


def _with_optimizer(tracker: StepTracker, gradients: int, inputs: int, optimizer: OptimizerCost | None) -> Peak:
    if optimizer is None:
        return tracker.peak
    parts = {
        "parameters": tracker.bytes["parameters"],
        "buffers": tracker.bytes["buffers"],
        "inputs": inputs,
        "gradients": gradients,
        "optimizer_state": optimizer.state,
        "temporaries": optimizer.temporaries,
    }
    total = sum(parts.values())
    return Peak(total, parts, "optimizer", "") if total > tracker.peak.bytes else tracker.peak


def _moment(peak: Peak) -> str:
    where = {EMBED: "embedding", HEAD: "head", "": ""}.get(peak.line, f"block {peak.line}")
    return f"{peak.phase}, {where}" if where else peak.phase


def _by_dtype(module: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for parameter in module.parameters():
        key = f"{'trained' if parameter.requires_grad else 'frozen'} {str(parameter.dtype).removeprefix('torch.')}"
        found[key] = found.get(key, 0) + parameter.nbytes
    return found
