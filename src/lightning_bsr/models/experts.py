"""Puts mixtures of experts in place of the MLPs of a ViT's blocks, finds them again, and reports their use."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.models.moe import EXPECTED_MLP, MoEMlp, why_not_plain
from lightning_bsr.vit import ViTView, find_vit


class Experts:
    """The mixtures of experts in a module: what :func:`convert_to_moe_` made, or :func:`find_experts` found.

    Attributes:
        layers: The mixtures, by the block's position in the ViT.
    """

    def __init__(self, view: ViTView, layers: Mapping[int, MoEMlp]) -> None:
        self._view = view
        self.layers = dict(layers)

    def select_task(self, task: str | int) -> None:
        """Use the gates of a task from now on, by its name or position.

        Raises:
            ConfigurationError: There is no such task.
        """
        for layer in self.layers.values():
            layer.select_task(task)

    def balance_loss(self) -> Tensor:
        """The mean over the mixtures of how unevenly the last forward pass used experts; add it to the loss.

        Each pass can be asked once, see :meth:`MoEMlp.pop_balance_loss`. Zero if no gate trains.
        """
        losses = [loss for layer in self.layers.values() if (loss := layer.pop_balance_loss()) is not None]
        if not losses:
            return torch.zeros((), device=next(iter(self.layers.values())).use.device)
        return torch.stack(losses).mean()

    def use(self) -> dict[int, Tensor]:
        """The share of tokens that each expert took since :meth:`reset_use`, ``[tasks, E]`` for each block.

        A task's shares sum to 1; they are zeros for a task that had no tokens.
        """
        return {index: layer.use / layer.use.sum(-1, keepdim=True).clamp(min=1) for index, layer in self.layers.items()}

    def effective_numbers(self) -> Tensor:
        """How many experts each task in effect uses, mean over blocks, ``[tasks]``.

        The exponential of the entropy of :meth:`use`: 1 if all tokens went to one expert, ``num_experts`` if all
        experts took as many. It is 1 for a task that had no tokens.
        """
        return torch.stack([torch.special.entr(shares).sum(-1).exp() for shares in self.use().values()]).mean(0)

    def passed(self) -> dict[int, Tensor]:
        """How many tokens no expert took since :meth:`reset_use`, ``[tasks]`` for each block."""
        return {index: layer.passed.clone() for index, layer in self.layers.items()}

    def reset_use(self) -> None:
        """Count from zero again."""
        for layer in self.layers.values():
            layer.reset_use()

    def __str__(self) -> str:
        first = next(iter(self.layers.values()))
        gates = f"a gate for each of {len(first.tasks)} tasks" if first.tasks else "one gate"
        blocks = ", ".join(map(str, self.layers))
        return (
            f"the MLPs of blocks {blocks} of the {self._view.name} are {first.num_experts} experts each, {first.top_k} "
            f"for each token, with {gates}"
        )


def convert_to_moe_(
    module: nn.Module,
    blocks: Sequence[int] = (3, 7, 11),
    num_experts: int = 16,
    top_k: int = 4,
    *,
    tasks: int | Sequence[str] | None = None,
    renormalize: bool = True,
    noise_std: float = 0.0,
    capacity_factor: float | None = None,
    vit: str | None = None,
) -> Experts:
    """Make the MLPs of some blocks of the ViT in ``module`` mixtures of experts, each expert a copy of the MLP.

    With the default ``renormalize`` the module computes exactly what it did, until training tells the experts apart.
    Convert before optimizers are made. What trains stays as it is: experts and gate train if the MLP did. Selecting
    blocks, dropping tokens, lean activations, measuring and planning work as before; the blocks remain what they are.

    Args:
        module: Any module that holds a ViT.
        blocks: Indices of the blocks; negative ones count from the end.
        num_experts: How many experts there are.
        top_k: How many experts a token is sent to.
        tasks: Names of tasks, or how many there are, for a gate of its own for each; ``None`` for one gate.
        renormalize: Whether the weights of a token's experts are scaled to sum to 1; without, as published, the
            module starts as less than it was.
        noise_std: Standard deviation of noise on the gates' scores while training.
        capacity_factor: The most tokens that an expert takes, as a multiple of its even share; ``None``: no limit.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        The mixtures of experts; :class:`MoEMlp` says what they compute, and their keys in the state dict.

    Raises:
        ConfigurationError: The ViT is not found, an argument does not fit it, or the MLP of a block is no plain
            :class:`timm.layers.Mlp`. Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> experts = convert_to_moe_(model, [1, 5], num_experts=8, top_k=2, tasks=["digits", "pets"])
        >>> print(experts)
        the MLPs of blocks 1, 5 of the ViT (VisionTransformer) are 8 experts each, 2 for each token, with ...
        >>> experts.select_task("pets")
        >>> model(torch.zeros(2, 3, 160, 160)).shape
        torch.Size([2, 10])
    """
    view = find_vit(module, vit)
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or not blocks:
        raise ConfigurationError(f"blocks is {blocks!r}, expected a list of one block index or more.")
    places = {index: _place_of_mlp(view, index) for index in view.block_indices(blocks)}
    layers = {
        index: MoEMlp(
            getattr(view.blocks[index], name),
            num_experts,
            top_k,
            tasks=tasks,
            renormalize=renormalize,
            noise_std=noise_std,
            capacity_factor=capacity_factor,
        )
        for index, name in places.items()
    }
    for index, name in places.items():
        setattr(view.blocks[index], name, layers[index])
    return Experts(view, layers)


def find_experts(module: nn.Module, *, vit: str | None = None) -> Experts:
    """Find the mixtures of experts of the ViT in ``module``, such as a copy or a loaded model.

    Args:
        module: Any module that holds a ViT.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Raises:
        ConfigurationError: The ViT is not found, or has no mixtures of experts.
    """
    view = find_vit(module, vit)
    layers = {
        index: part for index, block in enumerate(view.blocks) for part in block.children() if isinstance(part, MoEMlp)
    }
    if not layers:
        raise ConfigurationError(f"The {view.name} has no mixtures of experts; make some with convert_to_moe_.")
    return Experts(view, layers)


def _place_of_mlp(view: ViTView, index: int) -> str:
    """The attribute of a block that holds its MLP."""
    block = view.blocks[index]
    found = {name: getattr(block, name) for name in view.specs[index].mlp}
    if any(isinstance(part, MoEMlp) for part in found.values()):
        raise ConfigurationError(f"The MLP of block {index} of the {view.name} is a mixture of experts already.")
    plain = [name for name, part in found.items() if why_not_plain(part) is None]
    if len(plain) != 1:
        parts = ", ".join(f"{name} ({why_not_plain(part) or 'Mlp'})" for name, part in found.items())
        raise ConfigurationError(
            f"The MLP branch of block {index} of the {view.name} has {parts}, expected {EXPECTED_MLP}."
        )
    return plain[0]
