"""How one forward pass through the stored first blocks of a ViT goes: read, or compute and store."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from operator import add, sub
from typing import Any

import torch
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._forward import BlockForward, forward_chain
from lightning_bsr.functional._prefix_given import Given
from lightning_bsr.functional._prefix_key import fingerprint, key_samples, signature
from lightning_bsr.functional._prefix_store import TokenStore
from lightning_bsr.vit import ViTView

PATIENCE = 16  # batches
_CHECKS = 8  # batches of each shape


@dataclass(frozen=True)
class PrefixCounts:
    """What a prefix cache did so far, in samples.

    Attributes:
        hits: Read instead of computed.
        misses: Computed.
        known: Of these, those that were stored, but in a batch with others that were not.
        rejected: Of these, those for which there was no room.
    """

    hits: int = 0
    misses: int = 0
    known: int = 0
    rejected: int = 0

    def __add__(self, other: "PrefixCounts") -> "PrefixCounts":
        return PrefixCounts(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: "PrefixCounts") -> "PrefixCounts":
        return PrefixCounts(*map(sub, astuple(self), astuple(other)))


class CachedPrefix:
    """The first blocks of a ViT, what is stored of them, and the forward pass that runs now.

    Attributes:
        view: The ViT.
        name: Its name.
        blocks: The blocks.
        store: What they gave.
        counts: What was done so far.
        fingerprint: What the stored tokens belong to; empty before the first use.
        suspended: Whether the blocks run as if there was no cache.
        skips: Whether the pass that runs now skips the blocks.
    """

    def __init__(
        self,
        view: ViTView,
        blocks: Sequence[nn.Module],
        forward_class: type[BlockForward],
        store: TokenStore,
        dtype: torch.dtype | None,
        offload: bool,
    ) -> None:
        self.view = view
        self.name = view.name
        self.blocks = blocks
        self.store = store
        self.counts = PrefixCounts()
        self.fingerprint = b""
        self.suspended = False
        self.skips = False
        self._keys: list[bytes] = []
        self._arguments: list[tuple[Sequence[Any], Mapping[str, Any]]] = []
        self._given: set[object] = set()
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._random_state: torch.Tensor | None = None
        self._forward_class = forward_class
        self._dtype = dtype
        self._offload = offload
        self._home: torch.device | None = None
        self._hits_in_a_row = 0
        self._signature: object = None
        self._checks: Counter[torch.Size] = Counter()
        self._device: torch.device | None = None
        self._forget_pass()

    def begin(self, x: torch.Tensor, given: Sequence[Given] | None) -> None:
        """Decide, at the first block, whether the pass of ``x`` ``[B, N, C]`` skips the blocks.

        Args:
            x: The tokens.
            given: What the block is given beside them, the same for all samples; ``None`` for what cannot be stored.

        Raises:
            ConfigurationError: If ``x`` or what is given needs gradients, a parameter of the blocks trains, or
                positions are random.
        """
        self._forget_pass()
        if given is None:
            self.bring_back()
            return
        self._refuse_change(x, given)
        self._device = x.device
        if self._signature != (now := self._sign()):
            self.verify()
            self._signature = now
        self._keys = key_samples(x, self.blocks, given)
        self._given = _parts(given)
        self._known = sum(key in self.store for key in self._keys)
        if self._known == len(x):
            self._output = self._read(x.device)
        self.skips = self._output is not None
        if self.skips:
            self._count_hits(len(x))
        else:
            self.bring_back()
            self._input, self._random_state = x, _random_state(x.device)

    def enter(self, given: Sequence[Given] | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note, at each block, what it is given beside tokens.

        Only what the first block is given, or what lies in the same storages, is part of a key; blocks that are given
        something else run uncached.

        Raises:
            ConfigurationError: If that happens where blocks before this one have been skipped.
        """
        if not self._keys:
            return
        self._arguments.append((args, kwargs))
        if given is not None and _parts(given) <= self._given:
            return
        if self.skips:
            raise ConfigurationError(
                f"Block {len(self._arguments) - 1} of the {self.name} is given another mask or table of positions than "
                "when its output was stored; give all blocks the same ones, or remove the prefix cache."
            )
        self._forget_pass()

    def end(self, computed: torch.Tensor) -> torch.Tensor:
        """Give the output of the last block ``[B, N, C]``: what was read, or ``computed``, which is stored.

        Raises:
            ConfigurationError: If the blocks drew random numbers, or an image's tokens depend on its batch.
        """
        output = computed if self._output is None else self._output
        if self._input is not None:
            self._check(self._input, computed)
            self._write(computed)
        self._forget_pass()
        return output

    def verify(self) -> None:
        """Compare the blocks with those that gave what is stored, and forget it if they differ."""
        if self._device is None:
            return
        now = fingerprint(self.blocks, self._forward_class, self._device)
        if now != self.fingerprint:
            self.store.begin(now)
            self.fingerprint = now
            self._checks.clear()

    def bring_back(self) -> None:
        """Put the weights where they were, if they were sent to the CPU, for the blocks will be computed."""
        self._hits_in_a_row = 0
        if self._home is not None:
            self._move(self._home)
            self._home = None

    def close(self) -> None:
        """Bring the weights back and let go of what is stored."""
        self.bring_back()
        self._forget_pass()
        self.store.close()

    def _forget_pass(self) -> None:
        self.skips = False
        self._keys = []
        self._known = 0
        self._arguments = []
        self._given = set()
        self._input = self._output = self._random_state = None

    def _sign(self) -> object:
        return signature(self.blocks, self._forward_class)

    def _refuse_change(self, x: torch.Tensor, given: Sequence[Given]) -> None:
        if given and (part := self.view.draws_positions):
            raise ConfigurationError(
                f"The {part} of the {self.name} moves positions at random in training mode, so what its first blocks "
                "give cannot be stored; turn this augmentation off where the model is built, set the "
                f"{part} to eval mode, or remove the prefix cache."
            )
        tensors = [x, *(one for one in given if isinstance(one, torch.Tensor))]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            what = "The tokens that enter" if x.requires_grad else "The positions given to"
            raise ConfigurationError(
                f"{what} block 0 of the {self.name} require gradients, so something before it trains, and what its "
                "first blocks give cannot be stored; freeze that, or remove the prefix cache."
            )
        for index, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters():
                if parameter.requires_grad:
                    raise ConfigurationError(
                        f"{name} of block {index} of the {self.name} trains, but what the block gave is stored; remove "
                        "the prefix cache before unfreezing it."
                    )

    def _read(self, device: torch.device) -> torch.Tensor | None:
        rows = [self.store.get(key) for key in self._keys]
        good = [row for row in rows if row is not None]
        if len(good) < len(rows):
            self._known = len(good)
            return None
        return torch.stack([tokens for tokens, _ in good]).to(device, good[0][1])

    def _write(self, output: torch.Tensor) -> None:
        tokens = output.detach().to("cpu", self._dtype or output.dtype)
        rejected = 0
        for key, row in zip(self._keys, tokens, strict=True):
            # A clone, as the rows share one storage with each other, and with what goes on to the next block.
            rejected += key not in self.store and not self.store.put(key, (row.clone(), output.dtype))
        self.counts += PrefixCounts(misses=len(output), known=self._known, rejected=rejected)

    def _count_hits(self, count: int) -> None:
        self.counts += PrefixCounts(hits=count)
        self._hits_in_a_row += 1
        if self._offload and self._hits_in_a_row == PATIENCE:
            self._send_away()

    def _check(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Check that what is going to be stored is a function of each sample alone."""
        if not _same_state(self._random_state, _random_state(x.device)):
            raise ConfigurationError(
                f"The first blocks of the {self.name} draw random numbers, as dropout and stochastic depth do in "
                "training mode, so what they give cannot be stored; set these blocks to eval mode, as BlockSelect does."
            )
        if len(x) == 1 or self._checks[x.shape] == _CHECKS:
            return
        # Each image moves, another time further, and others are gone.
        shift = 1 + self._checks[x.shape] % (len(x) // 2)
        self._checks[x.shape] += 1
        moved = torch.cat([x[shift:], x[-1:].expand(shift, *x.shape[1:])])
        for block, (args, kwargs) in zip(self.blocks, self._arguments, strict=True):
            forward = next(f for f in forward_chain(block) if isinstance(f, self._forward_class))
            moved = forward.call_inner(moved, *args, **kwargs)
        # What is no number is the same as itself here.
        error = (moved[:-shift].nan_to_num() - output[shift:].nan_to_num()).abs().max().item()
        # A dtype was asked for: rounding is accepted.
        relative = 0.0 if self._dtype is None else max(torch.finfo(self._dtype).eps, 1e-5)
        tolerance = relative * output.abs().max().item()
        if error > tolerance:
            raise ConfigurationError(
                f"The first blocks of the {self.name} give an image other tokens in another batch, by up to "
                f"{error:.1e}, so what they give cannot be stored exactly; if that is mere rounding, accept it with "
                "dtype='float32'."
            )

    def _send_away(self) -> None:
        home = next((p.device for block in self.blocks for p in block.parameters()), None)
        if home is not None and home.type != "cpu":
            self._move(torch.device("cpu"))
            self._home = home

    def _move(self, device: torch.device) -> None:
        # Not as inference tensors: the weights may train in a later run.
        with torch.inference_mode(False):
            for block in self.blocks:
                for parameter in block.parameters():
                    parameter.data = parameter.data.to(device)
        self._signature = self._sign()


def _parts(given: Sequence[Given]) -> set[object]:
    return {one.untyped_storage().data_ptr() if isinstance(one, torch.Tensor) else one for one in given}


def _random_state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _same_state(before: torch.Tensor | None, after: torch.Tensor) -> bool:
    return before is not None and torch.equal(before, after)
