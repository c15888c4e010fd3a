"""Puts together probe, costs and search: the best configurations of one ViT for any budget."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional import num_kept_tokens
from lightning_bsr.functional._drop_forward import drops_tokens
from lightning_bsr.functional._select import Part
from lightning_bsr.memory._configuration import Configuration
from lightning_bsr.memory._costs import BlockCosts, InputWatch
from lightning_bsr.memory._optimizer import optimizers_cost
from lightning_bsr.memory._probe import Probe, count_images, limit_images, probe
from lightning_bsr.memory._report import MemoryReport
from lightning_bsr.memory._search import DROP_WEIGHT, BlockSearch, DropPattern, Found, drop_patterns
from lightning_bsr.vit import ViTView

_PROBE_IMAGES = 128
_PROBE_FLOPS = 3e12
_PROBE_PASSES = 13  # forward passes an image that a probe takes, about
_ATTEMPTS = 12


class BudgetSearch:
    """All that is known of one ViT, and the best configuration for any number of bytes.

    Args:
        module: Holds the ViT.
        view: The ViT.
        plan_step: Plans the training step of the module as it is.
        bytes_of: The bytes of a plan that the budget bounds.
        optimizers: Those over all parameters.
        weights_count: Whether gradients and optimizer state are bounded too.
        autocast: Type for autocast, or ``None``.
        keep_rates: Keep rates that may be chosen.
        max_drops: In how many blocks tokens may be dropped.
        recompute: Whether half-blocks may be computed again.
    """

    def __init__(
        self,
        module: nn.Module,
        view: ViTView,
        plan_step: Callable[[], MemoryReport],
        bytes_of: Callable[[MemoryReport], int],
        *,
        optimizers: Sequence[torch.optim.Optimizer],
        weights_count: bool,
        autocast: torch.dtype | None,
        keep_rates: Sequence[float],
        max_drops: int,
        recompute: bool,
    ) -> None:
        if view.keeps_tokens:
            kind = type(view.blocks[0]).__name__
            raise ConfigurationError(
                f"A budget cannot choose for the {view.name}: its blocks ({kind}) cannot be planned one by one, "
                "from the number of their tokens; choose blocks yourself, and ask plan what they take."
            )
        self._module = module
        self.view = view
        self._plan_step = plan_step
        self._bytes_of = bytes_of
        self._optimizers = optimizers
        self._weights_count = weights_count
        self._autocast = autocast
        self._recompute = recompute
        self._plans: dict[str, MemoryReport] = {}
        # Tokens that are dropped already stay dropped.
        self._drops_already = any(map(drops_tokens, view.blocks))
        self._keep_rates = () if self._drops_already else tuple(keep_rates)
        self._max_drops = max_drops
        self._drop_options: dict[str, Any] = {} if view.has_class_token else {"score": "mean"}
        self.head_only = self.plan(Configuration({}))
        with InputWatch(view) as watch:
            plan_step()  # for the watch alone, as what it remembers stays alive, which would count
        self._inputs = watch.inputs
        self.tokens = tuple(line.tokens or 0 for line in self.head_only.by_block[:-1])

    @cached_property
    def full(self) -> MemoryReport:
        """The plan of full fine-tuning."""
        flags = [(p, p.requires_grad) for p in self.view.model.parameters() if p.is_floating_point()]
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        try:
            return self._plan_step()
        finally:
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)

    @property
    def full_flops(self) -> int:
        """Operations of full fine-tuning."""
        assert self.full.flops is not None
        return sum(self.full.flops)

    def value(self, found: Found, thrift: float) -> float:
        """What a configuration is worth, less the price of its operations."""
        return found.worth - thrift * found.flops / self.full_flops

    def plan(self, configuration: Configuration) -> MemoryReport:
        """Plan the step of ``configuration``."""
        key = str(configuration)
        if key not in self._plans:
            installed = configuration.install(self.view.model)
            try:
                self._plans[key] = self._plan_step()
            finally:
                installed.remove()
        return self._plans[key]

    def look_at(
        self, batches: Sequence[Any], training_loss: Callable[[Any], torch.Tensor], say: Callable[[str], Any]
    ) -> Probe:
        """Probe the worth of training and of dropping, and be ready to search; ``say`` takes a line for each."""
        assert self.head_only.flops is not None
        an_image = self.head_only.flops.forward / len(self._inputs[0].x) * _PROBE_PASSES
        seen = limit_images(batches, min(_PROBE_IMAGES, int(_PROBE_FLOPS / max(an_image, 1))))
        depth = len(self.view.blocks)
        tries = f", and of {depth * len(self._keep_rates)} single drops" if self._keep_rates else ""
        say(f"Probing the worth of training each half of {depth} blocks{tries}, with {count_images(seen)} images.")
        self.probed = probe(
            self._module,
            self.view,
            seen,
            training_loss=training_loss,
            drop_blocks=range(len(self.view.blocks)) if self._keep_rates else (),
            keep_rates=self._keep_rates,
            drop_options=self._drop_options,
        )
        say("Planning single blocks.")
        self._searches = sorted(self._make_searches(), key=lambda search: search.pattern.penalty)
        return self.probed

    def best(self, bound: int, thrift: float) -> Found | None:
        """Find the best configuration whose blocks keep at most ``bound`` bytes.

        Args:
            bound: Bytes.
            thrift: What saving all operations of full fine-tuning would be worth.
        """
        best, most = None, float("-inf")
        for search in self._searches:
            if 1 - DROP_WEIGHT * search.pattern.penalty <= most:
                break
            for found in search.run(bound, self.full_flops, thrift):
                value = self.value(found, thrift)
                if value > most:
                    best, most = found, value
        return best

    def best_that_fits(self, limit: int, thrift: float) -> Found | None:
        """Find the best configuration whose plan needs at most ``limit`` bytes; ``None`` if only the head fits.

        What single blocks do not tell (head, temporaries) is taken from the plans of what was found so far.
        """
        bound = limit - self._bytes_of(self.head_only)
        too_much: int | None = None
        best: Found | None = None
        for _ in range(_ATTEMPTS):
            within = bound if too_much is None else min(bound, too_much - 1)
            found = self.best(within, thrift) if within > 0 else None
            if found is None or not found.configuration.blocks:
                break
            needs = self._bytes_of(self.plan(found.configuration))
            if needs > limit:
                too_much = found.activations if too_much is None else min(too_much, found.activations)
            else:
                if best is not None and self.value(found, thrift) <= self.value(best, thrift):
                    break
                best = found
                if limit - needs < limit // 100:
                    break
            bound = limit - (needs - found.activations)
        return best

    def floor(self) -> Configuration:
        """The head alone, with the drops that leave the fewest tokens if that takes less: no choice needs less than it.

        Whichever blocks drop, the first of them looks at all tokens; with the first blocks of the ViT, none has fewer
        tokens anywhere. Whether the loss allows these drops is not known before :meth:`look_at`.
        """
        first_blocks = range(min(self._max_drops, len(self.view.blocks)))
        drops: list[dict[int, float]] = [{}, *(dict.fromkeys(first_blocks, rate) for rate in self._keep_rates)]
        options = [Configuration({}, drop, drop_options=self._drop_options if drop else {}) for drop in drops]
        return min(options, key=lambda configuration: self._bytes_of(self.plan(configuration)))

    def least(self) -> Configuration:
        """The configuration that needs the fewest bytes."""
        fewest = min((search.pattern for search in self._searches), key=lambda pattern: sum(pattern.tokens))
        options = [Configuration({}), Configuration({}, dict(fewest.drop), drop_options=self._drop_options)]
        return min(options, key=lambda configuration: self._bytes_of(self.plan(configuration)))

    @property
    def num_patterns(self) -> int:
        """In how many ways tokens may be dropped, nowhere being one."""
        return len(self._searches)

    def _make_searches(self) -> list[BlockSearch]:
        costs = BlockCosts(self.view, self._inputs, self._autocast, self._drop_options)
        weights = self._weights()
        patterns = drop_patterns(
            len(self.view.blocks), self._keep_rates, self._max_drops, self._tokens_after, self._penalty
        )
        return [
            BlockSearch(
                DropPattern(
                    drop,
                    tokens,
                    penalty,
                    tuple(
                        costs(i, n, drop.get(i), after_drop=any(block < i for block in drop))
                        for i, (n, _) in enumerate(pairwise(tokens))
                    ),
                ),
                self.probed.gains,
                weights,
                self._recompute,
                self._drop_options,
            )
            for drop, tokens, penalty in patterns
        ]

    def _weights(self) -> dict[tuple[int, Part], int]:
        ratio = 1.0
        if self._weights_count and (cost := optimizers_cost(self._optimizers)):
            stepped = {id(p): p.nbytes for o in self._optimizers for g in o.param_groups for p in g["params"]}
            ratio += cost.state / sum(stepped.values())
        parts: tuple[Part, ...] = get_args(Part)
        return {
            (index, part): round(sum(p.nbytes for p in spec.part_parameters(block, part)) * ratio)
            if self._weights_count
            else 0
            for index, (block, spec) in enumerate(zip(self.view.blocks, self.view.specs, strict=True))
            for part in parts
        }

    def _tokens_after(self, drop: Mapping[int, float]) -> tuple[int, ...]:
        if not drop:
            return self.tokens
        prefix = self.view.num_prefix_tokens
        patches, counts = self.tokens[0] - prefix, [self.tokens[0]]
        for index in range(len(self.view.blocks)):
            if index in drop and (kept := num_kept_tokens(patches, drop[index])) < patches:
                patches = kept + 1
            counts.append(prefix + patches)
        return tuple(counts)

    def _penalty(self, drop: Mapping[int, float]) -> float:
        return sum(max(0.0, self.probed.drops[index, rate]) for index, rate in drop.items())
