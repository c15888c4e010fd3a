"""What one block keeps and computes in each state it may be in, from runs of single blocks on fake tensors."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_bsr.functional import LeanPolicy, install_lean_activations, install_token_drop
from lightning_bsr.memory._caches import caches_cleared
from lightning_bsr.memory._kernels import LayerNormStatistics
from lightning_bsr.memory._live import StepTracker
from lightning_bsr.memory._recorder import ActivationRecorder
from lightning_bsr.vit import ViTView

_SOME = 0.5  # a keep rate, where it does not matter which


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


class BlockInput(NamedTuple):
    """What a block was called with; of the tensors only shape and type matter.

    Attributes:
        x: The tokens ``[B, N, C]``, with positions in two more channels if tokens before it were dropped.
        args: Further arguments.
        kwargs: Further arguments by name, such as a table of positions.
    """

    x: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class InputWatch:
    """While active, remembers what each block of a ViT is called with, the first time.

    Attributes:
        inputs: By block.

    Example:
        >>> import timm
        >>> from lightning_bsr.vit import find_vit
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> with InputWatch(find_vit(model)) as watch:
        ...     _ = model(torch.zeros(1, 3, 160, 160))
        >>> len(watch.inputs), watch.inputs[0].x.shape
        (6, torch.Size([1, 101, 64]))
    """

    def __init__(self, view: ViTView) -> None:
        self._view = view
        self.inputs: dict[int, BlockInput] = {}

    def __enter__(self) -> "InputWatch":
        self._handles = [
            block.register_forward_pre_hook(_Remember(self.inputs, index), with_kwargs=True)
            for index, block in enumerate(self._view.blocks)
        ]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass
class _Remember:
    inputs: dict[int, BlockInput]
    index: int

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, *rest = args
        without_graph = tree_map_only(torch.Tensor, torch.Tensor.detach, BlockInput(x, tuple(rest), kwargs))
        self.inputs.setdefault(self.index, without_graph)


class BlockCosts:
    """Costs of the blocks of a ViT; blocks of the same make share them.

    What blocks are given beside tokens, such as tables of positions, is no block's own and not counted; the rows of it
    that each block looks up for the tokens that are left are.

    Args:
        view: The ViT.
        inputs: What each block is called with, of the whole batch, without the drops whose costs are asked for.
        autocast: Type for autocast, or ``None``.
        drop_options: More arguments of ``install_token_drop``.
    """

    def __init__(
        self,
        view: ViTView,
        inputs: Mapping[int, BlockInput],
        autocast: torch.dtype | None,
        drop_options: Mapping[str, Any],
    ) -> None:
        self._view = view
        self._inputs = inputs
        self._autocast = autocast
        self._drop_options = drop_options
        self._known: dict[Any, BlockCost] = {}

    def __call__(self, index: int, tokens: int, keep_rate: float | None, *, after_drop: bool = False) -> BlockCost:
        """Give the cost of a block.

        Args:
            index: Which block.
            tokens: How many tokens enter it.
            keep_rate: At which rate it drops, if it does.
            after_drop: Whether a block before it drops.
        """
        block = self._view.blocks[index]
        make = (type(block), tuple((name, p.shape) for name, p in block.named_parameters()), vars(block).get("forward"))
        given = str(tree_map_only(torch.Tensor, lambda t: (t.dtype, t.shape, t.stride()), self._inputs[index][1:]))
        key = (make, given, tokens, keep_rate, after_drop)
        if key not in self._known:
            width = self._inputs[index].x.shape[-1] + (self._carried if after_drop else 0)
            with self._dropping({**({0: _SOME} if after_drop else {}), **({index: keep_rate} if keep_rate else {})}):
                self._known[key] = self._cost(index, tokens, width)
        return self._known[key]

    @cached_property
    def _carried(self) -> int:
        """How many channels say where the tokens came from that are left after a drop."""
        x = self._inputs[0].x
        with self._dropping({0: _SOME}):
            return self._run(0, x.shape[1], x.shape[-1], False, ()).width - x.shape[-1]

    @contextlib.contextmanager
    def _dropping(self, rates: Mapping[int, float]) -> Iterator[None]:
        if not rates:
            yield
            return
        drop = install_token_drop(self._view.model, list(rates), list(rates.values()), **self._drop_options)
        try:
            yield
        finally:
            drop.remove()

    def _cost(self, index: int, tokens: int, width: int) -> BlockCost:
        both = self._run(index, tokens, width, True, ("attn", "mlp"))
        again = self._run(index, tokens, width, True, ("attn", "mlp"), "recompute")
        frozen = self._run(index, tokens, width, True, ())
        first = self._run(index, tokens, width, False, ("attn", "mlp"))
        first_mlp = self._run(index, tokens, width, False, ("mlp",))
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
        width: int,
        needs_input_gradient: bool,
        trained: tuple[str, ...],
        policy: LeanPolicy = "exact",
    ) -> "_Run":
        lean = install_lean_activations(self._view.model, {index: policy})
        try:
            return self._run_alone(index, tokens, width, needs_input_gradient, trained)
        finally:
            lean.remove()

    def _run_alone(
        self, index: int, tokens: int, width: int, needs_input_gradient: bool, trained: tuple[str, ...]
    ) -> "_Run":
        block, spec = self._view.blocks[index], self._view.specs[index]
        seen = self._inputs[index]
        trains = {id(p) for part in trained for p in spec.part_parameters(block, part)}  # type: ignore[arg-type]  # part names as above
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        weights: dict[str, torch.Tensor] = {}
        for name, parameter in block.named_parameters():
            fake = mode.from_tensor(parameter).detach()
            weights[f"block.{name}"] = nn.Parameter(fake, requires_grad=id(parameter) in trains)
        weights |= {f"block.{name}": mode.from_tensor(buffer) for name, buffer in block.named_buffers()}
        alone = replace(self._view, model=block, blocks=(block,), specs=(spec,), norms=(), heads=())
        with caches_cleared(block), mode, LayerNormStatistics():  # type: ignore[no-untyped-call]  # torch has no annotation there
            x = torch.empty(
                len(seen.x),
                tokens,
                width,
                dtype=seen.x.dtype,
                device=seen.x.device,
                requires_grad=needs_input_gradient,
            )
            args, kwargs = tree_map_only(torch.Tensor, _empty_like, (seen.args, seen.kwargs))
            return torch.func.functional_call(_Alone(block, alone, self._autocast), weights, (x, *args), kwargs)  # type: ignore[no-any-return]  # what forward returns


@dataclass(frozen=True)
class _Run:
    attn: int
    mlp: int
    forward: int
    backward: int
    width: int


class _Alone(nn.Module):
    """Runs one block forward and backward, and counts."""

    def __init__(self, block: nn.Module, view: ViTView, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.block = block
        self._view = view
        self._autocast = autocast

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> _Run:
        tracker = StepTracker()
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        recorder = ActivationRecorder(self.block, self._view, tracker=tracker, ignored=given)
        tracker.position = recorder.position
        cast = torch.autocast(x.device.type, self._autocast) if self._autocast else contextlib.nullcontext()
        with tracker, recorder:
            tracker.hold(self.block.parameters(), "parameters")
            with cast:
                out = self.block(x, *args, **kwargs)
            line = recorder.report().by_block[1]
            forward = sum(tracker.flops.values())
            if out.requires_grad:
                out.sum().backward()
        return _Run(line.attn, line.mlp, forward, sum(tracker.flops.values()) - forward, out.shape[-1])


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    # One that is broadcast takes no more bytes than it did.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
