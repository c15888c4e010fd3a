"""A small trained network beside a frozen ViT, fed by the outputs of its blocks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._drop_forward import drops_tokens
from lightning_bsr.functional._installed import refuse_sharded, trained_share
from lightning_bsr.functional._select import BlockSelection, select_blocks_
from lightning_bsr.vit import ViTView, find_vit

_NAME = "side_network"


class SideBlock(nn.Module):
    """One step of the side network: takes in what a block of the ViT gave, then a residual MLP.

    Args:
        width: Channels C of the ViT.
        side_width: Channels S of the side network.
        mlp_ratio: Hidden channels of the MLP, as a multiple of S.
    """

    def __init__(self, width: int, side_width: int, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.down = nn.Linear(width, side_width)
        self.gate = nn.Parameter(torch.zeros(()))
        self.norm = nn.LayerNorm(side_width)
        self.fc1 = nn.Linear(side_width, mlp_ratio * side_width)
        self.fc2 = nn.Linear(mlp_ratio * side_width, side_width)

    def forward(self, state: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """Mix the state ``[B, N, S]``, or none yet, with the block's output ``[B, N, C]``."""
        taken = self.down(x)
        state = taken if state is None else torch.lerp(state, taken, self.gate.sigmoid().to(taken.dtype))
        hidden: torch.Tensor = self.fc2(F.gelu(self.fc1(self.norm(state))))
        return state + hidden


class SideNetwork(nn.Module):
    """The side branch of a whole ViT, of which :func:`install_side_network` runs one step after each block.

    It starts as the identity: what it adds to the last block's output is zero until it has trained.

    Args:
        depth: Number of blocks of the ViT.
        width: Channels C of the ViT.
        side_width: Channels S of the side network.

    Example:
        >>> side = SideNetwork(depth=2, width=8, side_width=4)
        >>> x = torch.ones(1, 3, 8)
        >>> side.step(0, x) is x, torch.equal(side.step(1, x), x)
        (True, True)
    """

    def __init__(self, depth: int, width: int, side_width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SideBlock(width, side_width) for _ in range(depth))
        # The first block has no state to mix with.
        self.blocks[0].gate.requires_grad_(False)
        self.up = nn.Linear(side_width, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        # What the hooks of two blocks hand over; only while a forward pass runs.
        self._state: torch.Tensor | None = None

    def step(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Take in the output ``[B, N, C]`` of block ``index`` and return what goes on from that block.

        Raises:
            ConfigurationError: If the number of tokens changed since the block before.
        """
        state = None if index == 0 else self._state
        if state is not None and state.shape[:2] != x.shape[:2]:
            raise ConfigurationError(
                f"The side network has {state.shape[1]} tokens and block {index} gives {x.shape[1]}; do not drop "
                "tokens in a ViT with a side network."
            )
        state = self.blocks[index](state, x.detach())
        if index + 1 < len(self.blocks):
            self._state = state
            return x
        self._state = None
        added: torch.Tensor = self.up(state)
        return x + added


class SideStep:
    """The forward hook of a block that runs one step of the side network."""

    def __init__(self, network: SideNetwork, index: int) -> None:
        self.network = network
        self.index = index

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return self.network.step(self.index, output)


class SideNetworkHandle:
    """What :func:`install_side_network` added to a ViT, and the way back.

    Attributes:
        view: The ViT.
        network: The side network.
    """

    def __init__(self, selection: BlockSelection, network: SideNetwork) -> None:
        self.view = selection.view
        self.network = network
        self._selection = selection
        self.view.model.add_module(_NAME, network)
        self._hooks: list[RemovableHandle] = [
            block.register_forward_hook(SideStep(network, index)) for index, block in enumerate(self.view.blocks)
        ]

    def eval_frozen(self) -> None:
        """Set the frozen parts of the ViT to eval mode, see :meth:`BlockSelection.eval_frozen`."""
        self._selection.eval_frozen()

    def remove(self) -> None:
        """Take the side network out and restore every flag and mode; a second call does nothing.

        What is left is the backbone as it was, with the trained head. Give :attr:`network` to
        :func:`install_side_network` to have the trained function back.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if getattr(self.view.model, _NAME, None) is self.network:
            delattr(self.view.model, _NAME)
        self._selection.remove()

    def __str__(self) -> str:
        share = trained_share(self.view.model)
        side_width = self.network.up.in_features
        return f"a side network of width {side_width} trains beside the {self.view.name}: {share}"


def install_side_network(
    module: nn.Module,
    *,
    reduction: int = 8,
    network: SideNetwork | None = None,
    vit: str | None = None,
) -> SideNetworkHandle:
    """Freeze the ViT in ``module`` and train a small network beside it (ladder side tuning, arXiv 2206.06522).

    After each block the side network takes in that block's output, projected to ``1 / reduction`` of its width and
    cut off from the graph, mixes it with its state and runs a small residual MLP; at the end its state is projected up
    and added to the last block's output. Backward never enters the backbone, so nothing of it is kept. The model
    starts as exactly what it was.

    The last norm, the head and the side network train; the latter is ``side_network`` of the ViT, so its weights are
    among the parameters and in the state dict as long as it is installed. To evaluate what was trained, it must be
    installed.

    Args:
        module: Any module that holds a ViT.
        reduction: How many times narrower the side network is than the ViT.
        network: A side network that was trained before, instead of a new one.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` takes the side network out again.

    Raises:
        ConfigurationError: If the ViT is not found, has no known width, has a side network or drops tokens already, is
            divided among processes or computes its blocks again in backward, or the arguments do not fit it. Nothing
            has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_side_network(model)
        >>> print(handle)
        a side network of width 8 trains beside the ViT (VisionTransformer): 6,255 of 312,368 parameters (2.0 %)
        >>> handle.remove()
    """
    view = find_vit(module, vit)
    if view.keeps_tokens:
        raise ConfigurationError(
            f"The {view.name} takes no side network, which needs the same tokens after every block: its blocks "
            f"({type(view.blocks[0]).__name__}) {view.keeps_tokens}."
        )
    width = _width(view)
    if isinstance(reduction, bool) or not isinstance(reduction, int) or not 1 <= reduction <= width:
        raise ConfigurationError(f"reduction is {reduction!r}, expected 1 to {width}, the width of the {view.name}.")
    if hasattr(view.model, _NAME):
        raise ConfigurationError(f"The {view.name} has a {_NAME} already; remove that first.")
    refuse_sharded(view, "each process would train a side network of its own", "do not divide it")
    if getattr(view.model, "grad_checkpointing", False):
        raise ConfigurationError(
            f"The {view.name} computes its blocks again in backward (grad_checkpointing), but a side network may step "
            "after each block only once; turn it off with set_grad_checkpointing(False): backward never enters the "
            "blocks."
        )
    for index, block in enumerate(view.blocks):
        if drops_tokens(block):
            raise ConfigurationError(
                f"Block {index} of the {view.name} drops tokens, but a side network needs the same tokens after every "
                "block; remove the token drop first."
            )
    if network is None:
        network = SideNetwork(len(view.blocks), width, width // reduction)
    elif (len(network.blocks), network.up.out_features) != (len(view.blocks), width):
        raise ConfigurationError(
            f"network is for {len(network.blocks)} blocks of width {network.up.out_features}, expected "
            f"{len(view.blocks)} of width {width} for the {view.name}."
        )
    selection = select_blocks_(module, [], vit=vit)
    like = next(view.blocks[-1].parameters())
    return SideNetworkHandle(selection, network.to(like.device, like.dtype))


def _width(view: ViTView) -> int:
    if view.width is None:
        raise ConfigurationError(
            f"The {view.name} has no integer embed_dim, which says how wide a side network beside it must be; add one."
        )
    return view.width
