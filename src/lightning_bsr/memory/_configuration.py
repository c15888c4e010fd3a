"""A choice of what trains, where tokens are dropped and what backward keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from lightning_bsr.functional import (
    HalfPolicies,
    LeanPolicy,
    TokenDropHandle,
    install_lean_activations,
    install_token_drop,
    select_blocks_,
)
from lightning_bsr.functional._forward import Half
from lightning_bsr.functional._select import Part


@dataclass(frozen=True)
class Configuration:
    """Settings of the three levers for one ViT.

    Attributes:
        blocks: The parts that train, by block index.
        drop: Keep rate by index of a dropping block.
        lean: What backward keeps of each half of a block, as ``install_lean_activations`` takes it.
        drop_options: More arguments of ``install_token_drop``.

    Example:
        >>> lean = {10: {"attn": "exact", "mlp": "recompute"}, 11: {"attn": "recompute", "mlp": "recompute"}}
        >>> print(Configuration({10: ("mlp",), 11: ("attn", "mlp")}, {9: 0.5}, lean))
        train 10 (mlp), 11; drop 9 @ 0.5; recompute 10 (mlp), 11; exact 10 (attn)
    """

    blocks: Mapping[int, tuple[Part, ...]]
    drop: Mapping[int, float] = field(default_factory=dict)
    lean: Mapping[int, HalfPolicies] = field(default_factory=dict)
    drop_options: Mapping[str, Any] = field(default_factory=dict)

    def install(self, module: nn.Module, vit: str | None = None) -> "InstalledConfiguration":
        """Apply the configuration to the ViT in ``module``; the handle's ``remove()`` undoes it."""
        handles: list[Any] = [select_blocks_(module, self.blocks_argument(), vit=vit)]
        try:
            if self.drop:
                handles.append(self.install_drop(module, vit))
            if self.lean:
                handles.append(install_lean_activations(module, self.lean, vit=vit))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        return InstalledConfiguration(self, handles)

    def install_drop(self, module: nn.Module, vit: str | None = None) -> TokenDropHandle:
        """Apply only what changes the function that the ViT computes: where it drops tokens."""
        return install_token_drop(module, list(self.drop), list(self.drop.values()), vit=vit, **self.drop_options)

    def to_dict(self) -> dict[str, Any]:
        """Give the configuration as plain values; :meth:`from_dict` takes them."""
        return {
            "blocks": {index: list(parts) for index, parts in self.blocks.items()},
            "drop": dict(self.drop),
            "lean": {index: dict(policies) for index, policies in self.lean.items()},
            "drop_options": dict(self.drop_options),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Configuration":
        """Make the configuration that :meth:`to_dict` gave."""
        blocks = {index: tuple(parts) for index, parts in values["blocks"].items()}
        return cls(blocks, dict(values["drop"]), dict(values["lean"]), dict(values["drop_options"]))

    def blocks_argument(self) -> list[int] | dict[int, str | list[str]]:
        """Give ``blocks`` as :class:`lightning_bsr.BlockSelect` takes it."""
        whole = get_args(Part)
        if all(len(parts) == len(whole) for parts in self.blocks.values()):
            return list(self.blocks)
        return {i: "all" if len(parts) == len(whole) else list(parts) for i, parts in self.blocks.items()}

    def callbacks(self) -> list[dict[str, Any]]:
        """Give the callbacks that apply the configuration, as a LightningCLI configuration names them."""
        found = [{"class_path": "BlockSelect", "init_args": {"blocks": self.blocks_argument()}}]
        if self.drop:
            arguments = {"blocks": list(self.drop), "keep_rate": list(self.drop.values()), **self.drop_options}
            found.append({"class_path": "TokenDrop", "init_args": arguments})
        if self.lean:
            policies = {index: _shortest(policies) for index, policies in self.lean.items()}
            found.append({"class_path": "LeanActivations", "init_args": {"policy": policies}})
        return found

    def __str__(self) -> str:
        text = f"train {_listing(self.blocks) or 'the head only'}"
        if self.drop:
            text += "; drop " + ", ".join(f"{index} @ {rate:g}" for index, rate in self.drop.items())
        for policy in reversed(get_args(LeanPolicy)):
            text += f"; {policy} {listed}" if (listed := _listing(self._halves(policy))) else ""
        return text

    def _halves(self, policy: LeanPolicy) -> dict[int, tuple[Half, ...]]:
        halves = {i: tuple(half for half, one in each.items() if one == policy) for i, each in self.lean.items()}
        return {index: each for index, each in halves.items() if each}


def _listing(parts: Mapping[int, tuple[str, ...]]) -> str:
    whole = len(get_args(Part))
    return ", ".join(str(i) if len(some) == whole else f"{i} ({some[0]})" for i, some in parts.items())


def _shortest(policies: HalfPolicies) -> LeanPolicy | dict[Half, LeanPolicy]:
    """One policy for both halves, if they have the same."""
    different = set(policies.values())
    return different.pop() if len(different) == 1 and len(policies) == len(get_args(Half)) else dict(policies)


class InstalledConfiguration:
    """What :meth:`Configuration.install` did, and the way back."""

    def __init__(self, configuration: Configuration, handles: list[Any]) -> None:
        self.configuration = configuration
        self.selection = handles[0]
        self._handles = handles

    def eval_frozen(self) -> None:
        """Set the frozen parts to eval mode, see :meth:`lightning_bsr.functional.BlockSelection.eval_frozen`."""
        self.selection.eval_frozen()

    def remove(self) -> None:
        """Undo everything, last first; a second call does nothing."""
        for handle in reversed(self._handles):
            handle.remove()

    def __str__(self) -> str:
        return "; ".join(map(str, self._handles))
