"""What one block keeps and computes in each state it may be in, from runs of single blocks on fake tensors."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_bsr.functional import LeanPolicy, install_lean_activations, install_token_drop
from lightning_bsr.memory._kernels import LayerNormStatistics
from lightning_bsr.memory._live import StepTracker
from lightning_bsr.memory._recorder import ActivationRecorder
from lightning_bsr.vit import ViTView


@dataclass(frozen=True)
class BlockCost:
    """Bytes that a block keeps and operations that it takes, by state; of the whole batch.

    A half-block is *frozen* (something below it trains), *trained* (the same, and it trains) or *first* (it trains,
    nothing below it does). Bytes are those of the policy ``"exact"``, unless it is said that a half is computed again.
    Backward operations are those for inputs and those for weights.

    Attributes:
        attn: Bytes kept by the attention half: frozen, trained, first.
        mlp: Bytes kept by the MLP half: frozen, trained, first.
        kept_again: Bytes kept by the attention half and the MLP half, if the half is computed again.
        again: Operations of computing the attention half and the MLP half again.
        forward: Operations of the forward pass.
        inputs: Backward operations for inputs, if something below trains.
        first_inputs: Backward operations for inputs if the attention half is the first that trains.
        weights: Backward operations for the weights of the attention and of the MLP.
    """

    attn: tuple[int, int, int]
    mlp: tuple[int, int, int]
    kept_again: tuple[int, int]
    again: tuple[int, int]
    forward: int
    inputs: int
    first_inputs: int
    weights: tuple[int, int]


class BlockCosts:
    """Costs of the blocks of a ViT; blocks of the same make share them.

    Args:
        view: The ViT.
        batch_size: Images.
        width: Numbers per token.
        dtype: Type of the residual stream.
        autocast: Type for autocast, or ``None``.
        drop_options: More arguments of ``install_token_drop``.
    """

    def __init__(
        self,
        view: ViTView,
        batch_size: int,
        width: int,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
        drop_options: Mapping[str, Any],
    ) -> None:
        self._view = view
        self._shape = (batch_size, width)
        self._dtype = dtype
        self._autocast = autocast
        self._drop_options = drop_options
        self._known: dict[Any, BlockCost] = {}

    def __call__(self, index: int, tokens: int, keep_rate: float | None) -> BlockCost:
        """Give the cost of block ``index`` for ``tokens`` tokens, dropping at ``keep_rate`` if it is not ``None``."""
        block = self._view.blocks[index]
        make = (type(block), tuple((name, p.shape) for name, p in block.named_parameters()), vars(block).get("forward"))
        key = (make, tokens, keep_rate)
        if key not in self._known:
            drop = install_token_drop(self._view.model, [index], keep_rate, **self._drop_options) if keep_rate else None
            try:
                self._known[key] = self._cost(index, tokens)
            finally:
                if drop is not None:
                    drop.remove()
        return self._known[key]

    def _cost(self, index: int, tokens: int) -> BlockCost:
        both = self._run(index, tokens, True, ("attn", "mlp"))
        again = self._run(index, tokens, True, ("attn", "mlp"), "recompute")
        frozen = self._run(index, tokens, True, ())
        first = self._run(index, tokens, False, ("attn", "mlp"))
        first_mlp = self._run(index, tokens, False, ("mlp",))
        # All operations of an MLP are matrix products: as many for its weights as for its inputs.
        weights_mlp = first_mlp.backward // 2
        weights_attn = both.backward - frozen.backward - weights_mlp
        return BlockCost(
            attn=(frozen.attn, both.attn, first.attn),
            mlp=(frozen.mlp, both.mlp, first_mlp.mlp),
            kept_again=(again.attn, again.mlp),
            # As many operations forward as for its weights, again.
            again=(again.backward - both.backward - weights_mlp, weights_mlp),
            forward=both.forward,
            inputs=frozen.backward,
            first_inputs=first.backward - weights_attn - weights_mlp,
            weights=(weights_attn, weights_mlp),
        )

    def _run(
        self,
        index: int,
        tokens: int,
        needs_input_gradient: bool,
        trained: tuple[str, ...],
        policy: LeanPolicy = "exact",
    ) -> "_Run":
        lean = install_lean_activations(self._view.model, {index: policy})
        try:
            return self._run_alone(index, tokens, needs_input_gradient, trained)
        finally:
            lean.remove()

    def _run_alone(self, index: int, tokens: int, needs_input_gradient: bool, trained: tuple[str, ...]) -> "_Run":
        block, spec = self._view.blocks[index], self._view.specs[index]
        trains = {id(p) for part in trained for p in spec.part_parameters(block, part)}  # type: ignore[arg-type]  # part names as above
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        weights: dict[str, torch.Tensor] = {}
        for name, parameter in block.named_parameters():
            fake = mode.from_tensor(parameter).detach()
            weights[f"block.{name}"] = nn.Parameter(fake, requires_grad=id(parameter) in trains)
        device = next(block.parameters()).device
        alone = replace(self._view, model=block, blocks=(block,), specs=(spec,), norms=(), heads=())
        with mode, LayerNormStatistics():  # type: ignore[no-untyped-call]  # torch has no annotation there
            x = torch.empty(
                self._shape[0],
                tokens,
                self._shape[1],
                dtype=self._dtype,
                device=device,
                requires_grad=needs_input_gradient,
            )
            return torch.func.functional_call(_Alone(block, alone, self._autocast), weights, (x,))  # type: ignore[no-any-return]  # what forward returns


@dataclass(frozen=True)
class _Run:
    attn: int
    mlp: int
    forward: int
    backward: int


class _Alone(nn.Module):
    """Runs one block forward and backward, and counts."""

    def __init__(self, block: nn.Module, view: ViTView, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.block = block
        self._view = view
        self._autocast = autocast

    def forward(self, x: torch.Tensor) -> _Run:
        tracker = StepTracker()
        recorder = ActivationRecorder(self.block, self._view, tracker=tracker)
        tracker.position = recorder.position
        cast = torch.autocast(x.device.type, self._autocast) if self._autocast else contextlib.nullcontext()
        with tracker, recorder:
            tracker.hold(self.block.parameters(), "parameters")
            with cast:
                out = self.block(x)
            line = recorder.report().by_block[1]
            forward = sum(tracker.flops.values())
            if out.requires_grad:
                out.sum().backward()
        return _Run(line.attn, line.mlp, forward, sum(tracker.flops.values()) - forward)
