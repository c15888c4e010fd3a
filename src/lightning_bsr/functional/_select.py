"""Chooses which blocks of a ViT train, and freezes the rest of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, cast, get_args

from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.vit import ViTView, find_vit

Part = Literal["attn", "mlp"]
_MARK = "_lightning_bsr_selected"
Blocks = int | Sequence[int] | Mapping[int, str | Sequence[str]]


class BlockSelection:
    """What :func:`select_blocks_` did to a module, and the way back.

    Attributes:
        view: The ViT.
        parts: The trained parts of each selected block, by block index.
    """

    def __init__(self, view: ViTView, parts: dict[int, tuple[Part, ...]]) -> None:
        self.view = view
        self.parts = parts
        self._frozen: list[nn.Module] = []
        self._requires_grad = {name: p.requires_grad for name, p in view.model.named_parameters()}
        self._training = {name: module.training for name, module in view.model.named_modules()}

    def eval_frozen(self) -> None:
        """Set to eval mode the blocks, and the other parts of the ViT, that have parameters of which none trains.

        Their dropout, stochastic depth and batch statistics then rest. ``module.train()`` wakes them, so call this
        after it.
        """
        for part in self._frozen:
            if part.training:
                part.eval()

    def remove(self) -> None:
        """Put back each parameter's ``requires_grad`` and each module's mode; a second call does nothing."""
        if _MARK not in vars(self.view.model):
            return
        _check_floats(self.view, (name for name, trains in self._requires_grad.items() if trains))
        delattr(self.view.model, _MARK)
        for name, parameter in self.view.model.named_parameters():
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        for name, module in self.view.model.named_modules():
            module.training = self._training.get(name, module.training)

    def __str__(self) -> str:
        numels = [(p.numel(), p.requires_grad) for p in self.view.model.parameters()]
        total, trained = sum(n for n, _ in numels), sum(n for n, trains in numels if trains)
        blocks = ", ".join(
            str(index) if len(parts) == len(get_args(Part)) else f"{index} ({parts[0]} only)"
            for index, parts in self.parts.items()
        )
        some = f"blocks {blocks}" if len(self.parts) > 1 else f"block {blocks}" if blocks else "no block"
        return (
            f"{some} of {len(self.view.blocks)} train{'' if len(self.parts) > 1 else 's'} in the {self.view.name}: "
            f"{trained:,} of {total:,} parameters ({100 * trained / total:.1f} %)"
        )


def select_blocks_(
    module: nn.Module,
    blocks: Blocks,
    *,
    head: bool = True,
    norm: bool = True,
    vit: str | None = None,
) -> BlockSelection:
    """Train some blocks of the ViT in ``module`` and freeze the rest of the ViT.

    Only the ViT is touched: parameters of ``module`` outside of it, such as a head of your own, stay as they are.
    What is selected trains even if it was frozen before. Modes are not touched, see
    :meth:`BlockSelection.eval_frozen`.

    Args:
        module: Any module that holds a ViT.
        blocks: Block indices (negative ones count from the end); or a number of blocks, evenly spaced and ending
            with the last; or a mapping from block index to the parts that train: ``"attn"``, ``"mlp"``, a list of
            them, or ``"all"``.
        head: Whether what follows the last norm trains: the ViT's classifiers and its attention pooling.
        norm: Whether the norms after the blocks train.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` restores every flag and mode.

    Raises:
        ConfigurationError: If the ViT is not found, ``blocks`` does not fit it, or its blocks are selected already.
            Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> selection = select_blocks_(model, [1, 3, -1])
        >>> print(selection)
        blocks 1, 3, 5 of 6 train in the ViT (VisionTransformer): 125,962 of 306,890 parameters (41.0 %)
        >>> selection.remove()
    """
    view = find_vit(module, vit)
    if _MARK in vars(view.model):
        raise ConfigurationError(f"The {view.name} has its blocks selected already; remove that selection first.")
    selection = BlockSelection(view, _resolve(view, blocks))
    trained = {
        id(p)
        for index, parts in selection.parts.items()
        for part in parts
        for p in view.specs[index].part_parameters(view.blocks[index], part)
    }
    for after in (*(view.norms if norm else ()), *(view.heads if head else ())):
        trained.update(map(id, after.parameters()))
    _check_floats(view, (name for name, p in view.model.named_parameters() if id(p) in trained))
    for parameter in view.model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for part in (*view.parts, *view.blocks):
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            selection._frozen.append(part)
    setattr(view.model, _MARK, True)
    return selection


def _resolve(view: ViTView, blocks: Blocks) -> dict[int, tuple[Part, ...]]:
    if isinstance(blocks, bool) or not isinstance(blocks, (int, Sequence, Mapping)) or isinstance(blocks, str):
        raise ConfigurationError(
            f"blocks is {blocks!r}, expected a list of block indices, a number of blocks, or a mapping from block "
            "index to the parts that train."
        )
    if isinstance(blocks, int):
        return dict.fromkeys(_evenly_spaced(view, blocks), get_args(Part))
    if isinstance(blocks, Mapping):
        indices = {index: view.block_indices([index])[0] for index in blocks}
        view.block_indices(blocks)
        parts = {indices[index]: _parts(index, blocks[index]) for index in sorted(blocks, key=indices.__getitem__)}
        for index, wanted in parts.items():
            if view.specs[index].is_one_branch and len(wanted) < len(get_args(Part)):
                raise ConfigurationError(
                    f"blocks[{index}] is {wanted[0]!r}, but block {index} of the {view.name} "
                    f"({type(view.blocks[index]).__name__}) is known only as a whole; expected 'all'."
                )
        return parts
    return dict.fromkeys(view.block_indices(blocks), get_args(Part))


def _check_floats(view: ViTView, to_train: Iterable[str]) -> None:
    parameters = dict(view.model.named_parameters())
    for name in to_train:
        if name in parameters and not parameters[name].is_floating_point():
            raise ConfigurationError(
                f"{name!r} of the {view.name} is to train, but holds {parameters[name].dtype}; undo first what made "
                "it so."
            )


def _evenly_spaced(view: ViTView, count: int) -> list[int]:
    depth = len(view.blocks)
    if not 0 <= count <= depth:
        raise ConfigurationError(
            f"blocks is the number {count}, expected 0 to {depth}, as the {view.name} has {depth} blocks; "
            f"to select block {count} write blocks=[{count}]."
        )
    return [(i + 1) * depth // count - 1 for i in range(count)]


def _parts(index: int, parts: str | Sequence[str]) -> tuple[Part, ...]:
    valid = get_args(Part)
    wanted = valid if parts == "all" else (parts,) if isinstance(parts, str) else tuple(parts)
    unknown = [part for part in wanted if part not in valid]
    if unknown or not wanted:
        raise ConfigurationError(
            f"blocks[{index}] is {parts!r}, expected 'all', 'attn', 'mlp', or a list of the last two."
        )
    return cast("tuple[Part, ...]", tuple(part for part in valid if part in wanted))
