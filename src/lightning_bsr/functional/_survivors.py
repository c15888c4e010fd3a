"""Which patches of a picture survive each drop, and with what scores: worked out, and watched while a model runs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._drop_forward import DROP_OBSERVERS, TokenDropForward, drops_tokens
from lightning_bsr.functional._forward import forward_chain
from lightning_bsr.functional._positions import drop_positions
from lightning_bsr.functional._prefix import PrefixForward
from lightning_bsr.vit import ViTView, find_vit


class SeenDrop(NamedTuple):
    """What one block did to the patch tokens that it was given.

    Attributes:
        scores: Their scores ``[B, M]``.
        kept: Which of them are kept ``[B, K]``, as indices of ``scores``, in the order in which they go on.
        fused: Whether the others go on as one token more, after these.
    """

    scores: torch.Tensor
    kept: torch.Tensor
    fused: bool


class Survivors(NamedTuple):
    """What one drop did to the patches of the pictures, in their places.

    Attributes:
        kept: Whether a patch's own token goes on ``[B, N]``; what it gave to a fused token does not count.
        scores: The score of each patch's token ``[B, N]``; NaN where it was gone already.
    """

    kept: torch.Tensor
    scores: torch.Tensor


def find_survivors(drops: Sequence[SeenDrop]) -> list[Survivors]:
    """Follow the patches of pictures through drops.

    Args:
        drops: What the blocks did, from the first that dropped, each as ``(scores, kept, fused)``.

    Returns:
        What became of the N patches at each drop.

    Example:
        >>> first = (torch.tensor([[0.1, 0.4, 0.2, 0.3]]), torch.tensor([[1, 3]]), True)
        >>> second = (torch.tensor([[0.1, 0.2, 0.5]]), torch.tensor([[2, 1]]), False)  # the fused token is the best
        >>> for kept, scores in find_survivors([first, second]):
        ...     print(kept, scores)
        tensor([[False,  True, False,  True]]) tensor([[0.1000, 0.4000, 0.2000, 0.3000]])
        tensor([[False, False, False,  True]]) tensor([[   nan, 0.1000,    nan, 0.2000]])
    """
    survivors: list[Survivors] = []
    if not drops:
        return survivors
    shape = drops[0][0].shape
    positions = torch.arange(shape[1], device=drops[0][0].device).expand(shape)
    for scores, kept, fused in drops:
        placed = _in_places(scores, positions, shape, torch.nan)
        positions = drop_positions(positions, kept, 0, fused=fused)
        left = _in_places(torch.ones_like(positions, dtype=torch.bool), positions, shape, False)
        survivors.append(Survivors(left, placed))
    return survivors


def _in_places(values: torch.Tensor, positions: torch.Tensor, shape: torch.Size, empty: float) -> torch.Tensor:
    """Write the values ``[B, M]`` of tokens to their patches' places; those of fused tokens have none."""
    whole = values.new_full((shape[0], shape[1] + 1), empty)
    return whole.scatter(1, positions.clamp(max=shape[1]), values)[:, :-1]


class SurvivorCounts:
    """Counts by class, at each place of the patches' grid, for how many pictures the patch there survives each drop.

    Attributes:
        pictures: How many pictures of each class were counted.

    Example:
        >>> counts = SurvivorCounts()
        >>> kept = torch.tensor([[True, False], [True, True], [False, True]])
        >>> counts.add({3: Survivors(kept, torch.zeros(3, 2))}, ["cat", "cat", "dog"])
        >>> counts.pictures, counts.shares("cat"), counts.shares()[3]
        ({'cat': 2, 'dog': 1}, {3: tensor([1.0000, 0.5000])}, tensor([0.6667, 0.6667]))
    """

    def __init__(self) -> None:
        self.pictures: dict[str, int] = {}
        self._survived: dict[str, dict[int, torch.Tensor]] = {}

    def add(self, survivors: Mapping[int, Survivors], classes: Sequence[str]) -> None:
        """Count pictures.

        Args:
            survivors: What became of their patches ``[B, N]``, by block; the same blocks and N each time.
            classes: The class of each picture.
        """
        for name in sorted(set(classes)):
            rows = [row for row, other in enumerate(classes) if other == name]
            self.pictures[name] = self.pictures.get(name, 0) + len(rows)
            survived = self._survived.setdefault(name, {})
            for block, (kept, _) in survivors.items():
                here = kept[rows].sum(dim=0).cpu()
                survived[block] = here + survived[block] if block in survived else here

    def shares(self, name: str | None = None) -> dict[int, torch.Tensor]:
        """Return the share of the pictures whose patch survives ``[N]``, by block.

        Args:
            name: The class; all pictures by default.
        """
        names = [*self.pictures] if name is None else [name]
        total = sum(self.pictures[name] for name in names)
        blocks = self._survived[names[0]]
        return {block: torch.stack([self._survived[n][block] for n in names]).sum(dim=0) / total for block in blocks}


class DropWatch:
    """What :func:`install_drop_watch` put in place: it remembers what blocks dropped since it was last asked.

    Attributes:
        view: The ViT.
    """

    def __init__(self, view: ViTView) -> None:
        self.view = view
        self._indices = {id(block): index for index, block in enumerate(view.blocks)}
        self._passes: list[dict[int, SeenDrop]] = []
        chains = (link for block in view.blocks for link in forward_chain(block))
        self._prefixes = [link.prefix for link in chains if isinstance(link, PrefixForward)]
        for prefix in self._prefixes:
            prefix.bring_back()
            prefix.suspended = True
        DROP_OBSERVERS.append(self._observe)

    @property
    def scored_by(self) -> dict[int, str]:
        """The kind of score of each block that drops: ``"cls"``, ``"mean"`` or ``"random"``."""
        chains = ((index, link) for index, block in enumerate(self.view.blocks) for link in forward_chain(block))
        return {index: link.score for index, link in chains if isinstance(link, TokenDropForward)}

    def take(self) -> list[dict[int, Survivors]]:
        """Return what became of the patches, by block, for each pass through the ViT since the last call.

        A block that kept all its tokens is not in it.
        """
        passes, self._passes = self._passes, []
        return [dict(zip(drops, find_survivors([*drops.values()]), strict=True)) for drops in passes]

    def remove(self) -> None:
        """Stop watching; a second call does nothing."""
        if self._observe in DROP_OBSERVERS:
            DROP_OBSERVERS.remove(self._observe)
            for prefix in self._prefixes:
                prefix.suspended = False

    def _observe(self, block: nn.Module, scores: torch.Tensor, kept: torch.Tensor, fused: bool) -> None:
        index = self._indices.get(id(block))
        if index is None:
            return
        if not self._passes or index <= max(self._passes[-1]):
            self._passes.append({})
        self._passes[-1][index] = SeenDrop(scores.detach(), kept, fused)


def install_drop_watch(module: nn.Module, *, vit: str | None = None) -> DropWatch:
    """Remember which patches survive the drops in the ViT in ``module``, pass by pass, until it is removed.

    Nothing is computed that the model would not compute. A prefix cache rests meanwhile, for blocks that are skipped
    drop nothing that could be seen; what the model gives is the same.

    Args:
        module: Any module that holds a ViT, in which tokens are dropped.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle: ``take()`` gives what was seen, ``remove()`` ends it.

    Raises:
        ConfigurationError: If the ViT is not found, or no block drops tokens.

    Example:
        >>> import timm
        >>> from lightning_bsr.functional import install_token_drop
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> drop = install_token_drop(model, [1, 3], 0.5)
        >>> watch = install_drop_watch(model)
        >>> _ = model(torch.rand(2, 3, 160, 160))
        >>> (survivors,) = watch.take()
        >>> {block: tuple(kept.shape) for block, (kept, scores) in survivors.items()}
        {1: (2, 100), 3: (2, 100)}
        >>> survivors[1].kept.sum(dim=1)
        tensor([50, 50])
        >>> watch.remove()
    """
    view = find_vit(module, vit)
    if not any(map(drops_tokens, view.blocks)):
        raise ConfigurationError(
            f"No block of the {view.name} drops tokens; install_token_drop, or the callback TokenDrop, lets some do so."
        )
    return DropWatch(view)
