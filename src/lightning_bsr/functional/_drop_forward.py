"""The forwards of a ViT that drops tokens: of the blocks that do, and of those that come after them."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._capture import AttentionCall, AttentionCapture, PositionedMasks
from lightning_bsr.functional._forward import BlockForward, forward_chain
from lightning_bsr.functional._positions import drop_positions, join_positions, split_positions, take_table
from lightning_bsr.functional._scores import cls_scores, mean_scores, random_scores
from lightning_bsr.functional._tokens import drop_in_order, num_kept_tokens, order_tokens, take_tokens
from lightning_bsr.vit import BlockSpec, TokenTable

Score = Literal["auto", "cls", "mean", "random"]
RESTORES, SKIPS = "puts dropped tokens back to their places", "gives the prefix tokens alone"

DROP_OBSERVERS: list[Callable[[nn.Module, torch.Tensor, torch.Tensor, bool], None]] = []
"""Each is called with a block that drops, the scores of its patch tokens ``[B, M]``, which of them are kept ``[B, K]``,
and whether the others are fused."""


class Drop(NamedTuple):
    """What a block did to its tokens.

    Attributes:
        kept: Which of its patch tokens are kept ``[B, K]``, in the order in which they go on.
        fused: Whether the others go on as one.
        masked: Whether its attention had a mask or a bias.
        gone: Which of its patch tokens stand behind those that go on ``[B, M]``, if they are to be put back.
    """

    kept: torch.Tensor
    fused: bool
    masked: bool
    gone: torch.Tensor | None


class TokenDropForward(BlockForward):
    """The forward of a block that drops tokens.

    It holds no state of a step, so that a block may run twice (activation checkpointing) and so that modules that
    carry it can be deep-copied, pickled, compiled and exported.
    """

    rank = 3

    def __init__(
        self,
        block: nn.Module,
        spec: BlockSpec,
        name: str,
        num_prefix_tokens: int,
        keep_rate: float,
        fuse: bool,
        score: Score,
        detach: bool,
        normalize: bool,
        restore: bool,
        gives_hidden_states: bool,
    ) -> None:
        super().__init__(block)
        self.spec = spec
        self.name = name
        self.num_prefix_tokens = num_prefix_tokens
        self.keep_rate = keep_rate
        self.fuse = fuse
        self.score = score
        # Without fusion the scores reach the output only through indices, which carry no gradient.
        self.detach = detach or not fuse or score == "mean"
        self.normalize = normalize
        self.restore = restore
        self.gives_hidden_states = gives_hidden_states

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y, drop = self.run(None, x, *args, **kwargs)
        if drop is not None and drop.masked:
            raise ConfigurationError(
                f"{self.name} has an attention mask or bias, which must be fitted to the tokens that are left; give "
                "the module that owns the blocks an integer embed_dim, by which tokens can carry their positions."
            )
        return y

    def run(
        self, positions: torch.Tensor | None, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Drop | None]:
        """Compute the block on tokens ``[B, N, C]`` and say what was dropped.

        Args:
            positions: Where the tokens came from ``[B, N]``; ``None`` if all are left.
            x: The tokens.
            args: Further arguments of the block.
            kwargs: Further arguments of the block.
        """
        num_patches = x.shape[1] - self.num_prefix_tokens
        num_kept = num_kept_tokens(num_patches, self.keep_rate)
        if num_kept >= num_patches:
            with_masks = PositionedMasks(positions)
            with with_masks:
                return self.call_inner(x, *args, **kwargs), None

        if not self.gives_hidden_states and asks_for_hidden_states(self.block, self.spec, kwargs):
            raise ConfigurationError(
                f"{self.name} drops tokens, so what output_hidden_states=True asks for would miss patches; leave it "
                "out, or remove the token drop."
            )
        whole = self.spec.is_one_branch
        y, scores, masked = self.run_half("attn", partial(self._attend, positions, args, kwargs), x)
        order = order_tokens(scores)
        for observe in DROP_OBSERVERS:
            observe(self.block, scores, order[:, :num_kept], self.fuse)
        x = y if whole else x + y
        gone = order[:, num_kept:] if self.restore else None
        leaving = None if gone is None else take_tokens(x, gone + self.num_prefix_tokens)
        x = drop_in_order(
            x,
            scores,
            order,
            num_kept,
            num_prefix_tokens=self.num_prefix_tokens,
            fuse=self.fuse,
            normalize=self.normalize,
        )
        if not whole:
            x = x + self.run_half("mlp", partial(self.spec.mlp_branch, self.block), x)
        if leaving is not None:
            x = torch.cat([x, leaving], dim=1)
        return x, Drop(order[:, :num_kept], self.fuse, masked, gone)

    def _attend(
        self, positions: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        compute = type(self.block).forward if self.spec.is_one_branch else self.spec.attention_branch
        capture = AttentionCapture(positions)
        with capture:
            y = compute(self.block, x, *args, **kwargs)
        return y, self._scores(x, capture.calls), any(call.mask is not None for call in capture.calls)

    def _scores(self, x: torch.Tensor, calls: list[AttentionCall]) -> torch.Tensor:
        if any(call.is_causal for call in calls):
            raise ConfigurationError(
                f"{self.name} attends causally, by the order of its tokens, which changes where tokens are dropped; "
                "drop tokens only in a model that is called without is_causal."
            )
        if self.score == "random":
            return random_scores(x, self.num_prefix_tokens)
        kinds = ", ".join(sorted({type(attention).__name__ for attention in self.spec.attentions(self.block)}))
        if not calls or any(call.q.shape[2] != x.shape[1] or call.k.shape[2] != x.shape[1] for call in calls):
            raise ConfigurationError(
                f"{self.name} has an attention ({kinds}) that does not call scaled_dot_product_attention with a query "
                "and a key for each token, so it gives no scores to drop tokens by; choose other blocks, or "
                "score='random'."
            )
        scores = [self._call_scores(call) for call in calls]
        return scores[0] if len(scores) == 1 else torch.stack(scores).mean(dim=0)

    def _call_scores(self, call: AttentionCall) -> torch.Tensor:
        q, k, mask = call.q, call.k, call.mask
        if self.detach:
            q, k, mask = q.detach(), k.detach(), None if mask is None else mask.detach()
        scores = cls_scores if self.score == "cls" else mean_scores
        return scores(q, k, call.scale, self.num_prefix_tokens, mask=mask)


class PositionsForward(BlockForward):
    """The forward of a block from the first that drops tokens on: it looks up by position what the block is given.

    Where a block is given nothing that depends on a token's position, it is called as it is.

    Attributes:
        is_end: Whether nobody after it asks for positions.
        seen: Where the positions after this block are also put, for those who run the whole model; or ``None``.
    """

    rank = 1

    def __init__(self, block: nn.Module, spec: BlockSpec, width: int, num_prefix_tokens: int, is_end: bool) -> None:
        super().__init__(block)
        self.spec = spec
        self.width = width
        self.num_prefix_tokens = num_prefix_tokens
        self.is_end = is_end
        self.seen: list[torch.Tensor | None] | None = None
        names = list(inspect.signature(type(block).forward).parameters)[2:]
        # By the name and by the place of an argument, as it may be given either way.
        self._tables: dict[str | int, TokenTable] = {table.name: table for table in spec.tables}
        self._tables |= {names.index(table.name): table for table in spec.tables}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x, positions = split_positions(x, self.width)
        positioned = any(
            value is not None and key in self._tables for key, value in (*enumerate(args), *kwargs.items())
        )
        if positions is not None:
            patches = positions[:, self.num_prefix_tokens :] - self.num_prefix_tokens
            args = tuple(self._take(place, value, patches) for place, value in enumerate(args))
            kwargs = {name: self._take(name, value, patches) for name, value in kwargs.items()}
        if isinstance(self.inner, TokenDropForward):
            y, drop = self.inner.run(positions, x, *args, **kwargs)
        else:
            with_masks = PositionedMasks(positions)
            with with_masks:
                y, drop = self.call_inner(x, *args, **kwargs), None
        if drop is not None and (positions is not None or positioned or drop.masked or drop.gone is not None):
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
            positions = drop_positions(positions, drop.kept, self.num_prefix_tokens, fused=drop.fused, gone=drop.gone)
        if self.seen is not None:
            self.seen.append(positions)
        return y if self.is_end or positions is None else join_positions(y, positions)

    def _take(self, key: str | int, value: Any, patches: torch.Tensor) -> Any:
        return take_table(value, self._tables[key], patches) if key in self._tables and value is not None else value


def drops_tokens(block: nn.Module) -> bool:
    """Whether ``block`` has a forward that drops tokens."""
    return any(isinstance(forward, TokenDropForward) for forward in forward_chain(block))


def asks_for_hidden_states(block: nn.Module, spec: BlockSpec, kwargs: Mapping[str, Any]) -> bool:
    """Whether a model of transformers that calls ``block`` is going to give what comes out of every block."""
    configs = [getattr(attention, "config", None) for attention in spec.attentions(block)]
    return bool(kwargs.get("output_hidden_states")) or any(
        getattr(config, "output_hidden_states", False) for config in configs
    )
