"""Lets blocks hold less for backward: the same gradients from fewer bytes, computed again, or in 8 bits."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._checkpoint import needs_backward, recompute
from lightning_bsr.functional._forward import HALF_OBSERVERS, PACKS, RECOMPUTES, BlockForward, Half, Result
from lightning_bsr.functional._installed import BlockForwardsHandle, chosen_blocks
from lightning_bsr.functional._pack import Int8Compression, run_packed
from lightning_bsr.functional._rebuild import RebuildLinearInputs
from lightning_bsr.vit import BlockSpec, ViTView, find_vit

LeanPolicy = Literal["exact", "recompute", "int8"]
HalfPolicies = Mapping[Half, LeanPolicy]

_LEAN = "keeps lean activations"
_EFFECTS = {"exact": (_LEAN,), "recompute": (_LEAN, RECOMPUTES), "int8": (_LEAN, PACKS)}


class LeanForward(BlockForward):
    """The forward of a block of which backward keeps less; each half has a policy of its own, or none."""

    rank = 4

    def __init__(self, block: nn.Module, spec: BlockSpec, policies: HalfPolicies, fold_norms: bool = False) -> None:
        super().__init__(block)
        self.spec = spec
        self.policies = dict(policies)
        self.fold_norms = fold_norms
        self.effects = tuple(sorted({effect for policy in policies.values() for effect in _EFFECTS[policy]}))

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        def attend(x: torch.Tensor) -> torch.Tensor:
            return self.spec.attention_branch(self.block, x, *args, **kwargs)

        if self.spec.is_one_branch:
            return self.run_half("attn", lambda x: self.call_inner(x, *args, **kwargs), x)
        x = x + self.run_half("attn", attend, x)
        return x + self.run_half("mlp", partial(self.spec.mlp_branch, self.block), x)

    def run_half(self, half: Half, function: Callable[[torch.Tensor], Result], x: torch.Tensor) -> Result:
        """Run ``function``, which computes one branch of the block on ``x``, by the policy for that half."""
        inner = partial(super().run_half, half, function)
        policy = self.policies.get(half)
        if policy is None or not needs_backward(x, self.spec.part_parameters(self.block, half)):
            return inner(x)
        # What it makes of a norm or an activation function it computes again without being told.
        lean = inner if torch.compiler.is_compiling() else partial(_rebuilding, inner, self.fold_norms)
        if policy == "recompute":
            if not torch.compiler.is_compiling():
                for observer in HALF_OBSERVERS:
                    observer(self.block, half)
            return recompute(self.block, lean, x)
        if policy == "int8":
            return run_packed(self.block, Int8Compression(), partial(lean, x))  # type: ignore[no-any-return]  # what the function returns
        return lean(x)


def _rebuilding(function: Callable[[torch.Tensor], Result], fold_norms: bool, x: torch.Tensor) -> Result:
    with RebuildLinearInputs(fold_norms=fold_norms):
        return function(x)


def install_lean_activations(
    module: nn.Module,
    policy: LeanPolicy | Mapping[int, LeanPolicy | HalfPolicies] = "exact",
    *,
    fold_norms: bool = False,
    vit: str | None = None,
) -> BlockForwardsHandle:
    """Let blocks of the ViT in ``module`` keep less for backward. The outputs are exactly what they were.

    - ``"exact"``: a trained linear layer behind a norm or an activation function keeps no input of its own; that is
      made again, without a matrix product, from what the norm or the activation function keeps. Under autocast no
      copies of weights are kept. Gradients are the same to the last bit.
    - ``"recompute"``: a half of a block, its attention or its MLP, keeps its input alone and is computed again in
      backward (arXiv 1604.06174), one half at a time. Gradients are the same.
    - ``"int8"``: what ``"exact"`` keeps is held as 8-bit integers, one scale for each row: an error of at most 1/510 of
      a row's range in each value, and approximate gradients.

    Blocks of which backward needs nothing run as they are. Under ``torch.compile`` the compiler chooses what
    ``"exact"`` keeps, and blocks with ``"int8"`` run uncompiled. May be combined with :func:`select_blocks_` and
    :func:`install_token_drop`, in any order.

    Args:
        module: Any module that holds a ViT.
        policy: One for all blocks, or by block index, negative ones from the end: one for the block, or one for each
            half, such as ``{-1: {"attn": "exact", "mlp": "recompute"}}``.
        fold_norms: Whether the first trained norm gets its gradient out of that of the linear layer behind it, without
            the matrix product that would carry it further down, where nothing trains: fewer operations, and gradients
            of this layer and its norm that differ by rounding. Of no effect in compiled code.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        ConfigurationError: If the ViT is not found, ``policy`` does not fit it, or a block has lean activations
            already or, unless its policy is ``"exact"``, packs its activations or is recomputed by another installer.
            Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_lean_activations(model)
        >>> print(handle)
        all 6 blocks of the ViT (VisionTransformer) keep lean activations (exact)
        >>> handle.remove()
    """
    view = find_vit(module, vit)
    policies = _policies(view, policy)
    for index, halves in policies.items():
        exact = set(halves.values()) <= {"exact"}
        chosen_blocks(view, [index], (_LEAN,) if exact else (_LEAN, PACKS, RECOMPUTES))
    forwards = {i: LeanForward(view.blocks[i], view.specs[i], halves, fold_norms) for i, halves in policies.items()}
    return BlockForwardsHandle(view, forwards, f"keep lean activations ({_summary(policies)})")


def _policies(view: ViTView, policy: object) -> dict[int, dict[Half, LeanPolicy]]:
    if not isinstance(policy, Mapping):
        return {index: _halves(policy, "policy") for index in range(len(view.blocks))}
    indices = view.block_indices(policy, "policy")
    given = {index % len(view.blocks): value for index, value in policy.items()}
    return {index: _halves(given[index], f"policy of block {index}") for index in indices}


def _halves(policy: Any, name: str) -> dict[Half, LeanPolicy]:
    known = ", ".join(map(repr, get_args(LeanPolicy)))
    halves = policy if isinstance(policy, Mapping) else dict.fromkeys(get_args(Half), policy)
    for half, one in halves.items():
        if half not in get_args(Half):
            raise ConfigurationError(f"{name} has a half {half!r}, expected 'attn' or 'mlp'.")
        if one not in get_args(LeanPolicy):
            raise ConfigurationError(f"{name} is {one!r}, expected one of {known}.")
    return {half: halves[half] for half in get_args(Half) if half in halves}


def _summary(policies: Mapping[int, HalfPolicies]) -> str:
    used: dict[LeanPolicy, list[str]] = {policy: [] for policy in get_args(LeanPolicy)}
    for index, halves in policies.items():
        for policy in dict.fromkeys(halves.values()):
            parts = [half for half, one in halves.items() if one == policy]
            used[policy].append(str(index) if len(parts) == len(get_args(Half)) else f"{index} ({parts[0]})")
    texts = [f"{policy}: {', '.join(where)}" for policy, where in used.items() if where]
    everywhere = {tuple(halves.items()) for halves in policies.values()}
    if len(texts) == len(everywhere) == 1 and "(" not in texts[0]:
        return texts[0].partition(":")[0]
    return "; ".join(texts)
