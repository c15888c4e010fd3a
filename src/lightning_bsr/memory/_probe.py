"""What training each half of a block is worth, and what dropping tokens costs, as a few batches tell."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional import install_checkpointing, install_token_drop
from lightning_bsr.functional._forward import BlockForward, attach_forward, unwrap_forward
from lightning_bsr.functional._select import Part
from lightning_bsr.vit import ViTView

_HEAD_STEPS = 60
_HEAD_LR = 1e-2
_CHUNK = 8
_LEAST_LOSS = 1e-6


@dataclass(frozen=True)
class Probe:
    """What the probe batches say.

    Attributes:
        gains: By block and half, its share of what training all halves would gain; they sum to 1.
        drops: By block and keep rate, how much the loss grows, relative to the loss, when only that block drops tokens
            and nothing has adapted to it.
        loss: The loss with a fitted head, before any block trains.
        num_images: Images that were looked at.
    """

    gains: dict[tuple[int, Part], float]
    drops: dict[tuple[int, float], float]
    loss: float
    num_images: int


def probe(
    module: nn.Module,
    view: ViTView,
    batches: Sequence[Any],
    *,
    training_loss: Callable[[Any], torch.Tensor],
    drop_blocks: Sequence[int],
    keep_rates: Sequence[float],
    drop_options: dict[str, Any],
) -> Probe:
    """Look at ``batches`` with the pretrained blocks and a fitted head.

    The head is fitted on one half of the images, and all is measured on the other half; then the halves change places.
    The gain of a half-block is the L1 norm of its gradient: to first order, what a step of equal length in every
    parameter (Adam's, nearly) takes off the loss. The module is left as it was. Meanwhile it takes the memory of all
    gradients, of the blocks' outputs for all images, and of a few images' step with recomputation.

    Args:
        module: A module that holds the ViT.
        view: The ViT.
        batches: Two batches or more, as ``training_loss`` takes them.
        training_loss: From a batch to the loss; it must call the ViT, and the same number of times each time.
        drop_blocks: Blocks in which dropping is tried.
        keep_rates: Keep rates to try.
        drop_options: More arguments of ``install_token_drop``.

    Raises:
        ConfigurationError: If the loss is not finite.
    """
    gains: dict[tuple[int, Part], float] = {}
    drops: dict[tuple[int, float], float] = {}
    losses, images = [], 0
    half = len(batches) // 2
    head = _head_of(module, view)
    with _as_it_was(module, head), torch.random.fork_rng():
        for fitting, testing in ((batches[:half], batches[half:]), (batches[half:], batches[:half])):
            replay = _Replay(module, view, batches, training_loss)
            with replay:
                loss = replay.fit_head(head, fitting, testing)
                if not math.isfinite(loss):
                    raise ConfigurationError(
                        f"The loss of the training batches is {loss}, expected a finite number to tell what is worth "
                        "training."
                    )
                losses.append(loss)
                for block in drop_blocks:
                    for rate in keep_rates:
                        handle = install_token_drop(view.model, [block], rate, **drop_options)
                        try:
                            dropped = replay.loss(testing, start=block)
                        finally:
                            handle.remove()
                        drops[block, rate] = (
                            drops.get((block, rate), 0.0) + (dropped - loss) / max(abs(loss), _LEAST_LOSS) / 2
                        )
            for key, gain in _gradient_norms(module, view, testing, training_loss).items():
                gains[key] = gains.get(key, 0.0) + gain
            images += count_images(testing)
    total = sum(gains.values())
    gains = {key: gain / total for key, gain in gains.items()} if total else gains
    return Probe(gains, drops, sum(losses) / len(losses), images)


class _Replay:
    """Runs the module from any block on, with the inputs that the blocks had in one pass over the batches."""

    def __init__(
        self, module: nn.Module, view: ViTView, batches: Sequence[Any], training_loss: Callable[[Any], torch.Tensor]
    ) -> None:
        self._module = module
        self._view = view
        self._training_loss = training_loss
        self._batches = batches
        self._depth = len(view.blocks)
        self.start = 0
        self.inputs: dict[int, list[torch.Tensor]] = {}

    def __enter__(self) -> "_Replay":
        self._cache: dict[int, dict[int, list[torch.Tensor]]] = {}
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for index, block in enumerate(self._view.blocks):
                hooks.callback(block.register_forward_pre_hook(self._remember(index)).remove)
            hooks.callback(self._view.blocks[-1].register_forward_hook(self._remember(self._depth)).remove)
            for batch in self._batches:
                self.inputs = self._cache[id(batch)] = defaultdict(list)
                _seeded(self._training_loss, batch)
        self._forwards = [_ReplayForward(block, index, self) for index, block in enumerate(self._view.blocks)]
        for forward in self._forwards:
            attach_forward(forward)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for forward in self._forwards:
            unwrap_forward(forward)

    def loss(self, batches: Sequence[Any], start: int) -> float:
        """The mean loss when the blocks before ``start`` give what they gave."""
        with torch.no_grad():
            return sum(float(self._run(batch, start)) for batch in batches) / len(batches)

    def fit_head(self, head: Sequence[nn.Parameter], fitting: Sequence[Any], testing: Sequence[Any]) -> float:
        """Train what comes after the ViT's norm on the last block's outputs; keep what tests best, return its loss."""
        for parameter in head:
            parameter.requires_grad_(True)
        best, weights = self.loss(testing, self._depth), [p.detach().clone() for p in head]
        if not head:
            return best
        optimizer = torch.optim.AdamW(head, lr=_HEAD_LR)
        for step in range(_HEAD_STEPS):
            self._module.zero_grad()
            self._run(fitting[step % len(fitting)], self._depth).backward()
            optimizer.step()
            if step % 4 == 3 and (loss := self.loss(testing, self._depth)) < best:
                best, weights = loss, [p.detach().clone() for p in head]
        with torch.no_grad():
            for parameter, weight in zip(head, weights, strict=True):
                parameter.copy_(weight)
        return best

    def _run(self, batch: Any, start: int) -> torch.Tensor:
        # A step may call the ViT several times: the inputs are given out in the order in which they came.
        self.start, self.inputs = start, {index: list(each) for index, each in self._cache[id(batch)].items()}
        return _seeded(self._training_loss, batch)

    def next_input(self) -> torch.Tensor:
        """The input of the block that starts, in the call of the ViT that runs now."""
        return self.inputs[self.start].pop(0)

    def _remember(self, index: int) -> Callable[..., None]:
        def remember(block: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
            self.inputs[index].append(inputs[0] if output is None else output)

        return remember


class _ReplayForward(BlockForward):
    """Skips the blocks before the start of a replay, and hands the first block that runs its input."""

    def __init__(self, block: nn.Module, index: int, replay: _Replay) -> None:
        super().__init__(block)
        self.index = index
        self.replay = replay

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        start = self.replay.start
        if self.index < start:
            ends_here = start == len(self.replay._view.blocks) == self.index + 1
            return self.replay.next_input() if ends_here else x
        return self.call_inner(self.replay.next_input() if self.index == start else x, *args, **kwargs)


def _seeded(training_loss: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
    """Draw the same random numbers each time: a replay must see the batch that the inputs came from."""
    torch.manual_seed(0)
    return training_loss(batch)


def _gradient_norms(
    module: nn.Module, view: ViTView, batches: Sequence[Any], training_loss: Callable[[Any], torch.Tensor]
) -> dict[tuple[int, Part], float]:
    for parameter in view.model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    module.zero_grad()
    handle = install_checkpointing(view.model)
    try:
        for batch in batches:
            for chunk in _chunks(batch):
                _seeded(training_loss, chunk).backward()
    finally:
        handle.remove()
    norms: dict[tuple[int, Part], float] = {}
    parts: tuple[Part, ...] = ("attn", "mlp")
    for index, (block, spec) in enumerate(zip(view.blocks, view.specs, strict=True)):
        for part in parts:
            gradients = [p.grad for p in spec.part_parameters(block, part) if p.grad is not None]
            norms[index, part] = sum(float(gradient.abs().sum()) for gradient in gradients)
    return norms


def _chunks(batch: Any) -> Iterator[Any]:
    count = _num_images(batch)
    for start in range(0, count, _CHUNK):
        yield _images(batch, start, min(start + _CHUNK, count))


def halves(batch: Any) -> list[Any]:
    """Split a batch in two; one image stays whole."""
    count = _num_images(batch)
    return [_images(batch, 0, count // 2), _images(batch, count // 2, count)] if count > 1 else [batch]


def limit_images(batches: Sequence[Any], num_images: int) -> list[Any]:
    """Take the first images of each batch, so that there are ``num_images`` in all, and at least one of each."""
    each = max(1, math.ceil(num_images / len(batches)))
    return [_images(batch, 0, min(each, _num_images(batch))) for batch in batches]


def count_images(batches: Sequence[Any]) -> int:
    """Count the images of several batches."""
    return sum(map(_num_images, batches))


def _images(batch: Any, start: int, stop: int) -> Any:
    count = _num_images(batch)
    return tree_map_only(torch.Tensor, lambda t: t[start:stop] if t.ndim and t.shape[0] == count else t, batch)


def _num_images(batch: Any) -> int:
    return next((t.shape[0] for t in tree_leaves(batch) if isinstance(t, torch.Tensor) and t.ndim), 0)


@contextlib.contextmanager
def _as_it_was(module: nn.Module, head: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put back the weights of ``head``, and all flags, gradients and modes of ``module``, in eval mode meanwhile."""
    weights = [p.detach().clone() for p in head]
    flags = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(head, weights, strict=True):
                parameter.copy_(weight)
        for parameter, requires_grad, gradient in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for child, training in modes:
            child.training = training


def _head_of(module: nn.Module, view: ViTView) -> list[nn.Parameter]:
    """What is fitted: the ViT's heads, and what is outside of the ViT and trains."""
    inside = {id(p) for p in view.model.parameters()}
    heads = [p for head in view.heads for p in head.parameters()]
    return heads + [p for p in module.parameters() if id(p) not in inside and p.requires_grad]
