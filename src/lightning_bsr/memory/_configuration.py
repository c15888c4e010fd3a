"""A choice of what trains, where tokens are dropped and what is computed again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from lightning_bsr.functional import (
    TokenDropHandle,
    install_checkpointing,
    install_token_drop,
    select_blocks_,
)
from lightning_bsr.functional._select import Part


@dataclass(frozen=True)
class Configuration:
    """Settings of the three levers for one ViT.

    Attributes:
        blocks: The parts that train, by block index.
        drop: Keep rate by index of a dropping block.
        recompute: Indices of the blocks that are computed again in backward.
        drop_options: More arguments of ``install_token_drop``.

    Example:
        >>> print(Configuration({10: ("mlp",), 11: ("attn", "mlp")}, {9: 0.5}, (11,)))
        train 10 (mlp), 11; drop 9 @ 0.5; recompute 11
    """

    blocks: Mapping[int, tuple[Part, ...]]
    drop: Mapping[int, float] = field(default_factory=dict)
    recompute: tuple[int, ...] = ()
    drop_options: Mapping[str, Any] = field(default_factory=dict)

    def install(self, module: nn.Module, vit: str | None = None) -> "InstalledConfiguration":
        """Apply the configuration to the ViT in ``module``; the handle's ``remove()`` undoes it."""
        handles: list[Any] = [select_blocks_(module, self.blocks_argument(), vit=vit)]
        try:
            if self.drop:
                handles.append(self.install_drop(module, vit))
            if self.recompute:
                handles.append(install_checkpointing(module, self.recompute, vit=vit))
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
            "recompute": list(self.recompute),
            "drop_options": dict(self.drop_options),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Configuration":
        """Make the configuration that :meth:`to_dict` gave."""
        blocks = {index: tuple(parts) for index, parts in values["blocks"].items()}
        return cls(blocks, dict(values["drop"]), tuple(values["recompute"]), dict(values["drop_options"]))

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
        if self.recompute:
            found.append({"class_path": "ActivationCheckpoint", "init_args": {"blocks": list(self.recompute)}})
        return found

    def __str__(self) -> str:
        whole = len(get_args(Part))
        trained = ", ".join(str(i) if len(parts) == whole else f"{i} ({parts[0]})" for i, parts in self.blocks.items())
        text = f"train {trained or 'the head only'}"
        if self.drop:
            text += "; drop " + ", ".join(f"{index} @ {rate:g}" for index, rate in self.drop.items())
        if self.recompute:
            text += f"; recompute {', '.join(map(str, self.recompute))}"
        return text


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
