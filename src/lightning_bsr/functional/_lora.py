"""Trains low-rank adapters beside the linear layers of a frozen ViT, by the library of their own authors."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._installed import refuse_sharded, trained_share
from lightning_bsr.functional._select import BlockSelection, select_blocks_
from lightning_bsr.vit import ViTView, find_vit

_ADAPTER = "lora"


class LoraHandle:
    """What :func:`install_lora` put into a ViT, and the way back.

    Attributes:
        view: The ViT.
        targets: Dotted paths, inside the ViT, of the layers that have an adapter.
        rank: The rank of the adapters.
    """

    def __init__(self, selection: BlockSelection, targets: list[str], rank: int) -> None:
        self.view = selection.view
        self.targets = targets
        self.rank = rank
        self._selection = selection
        self._installed = True

    def eval_frozen(self) -> None:
        """Set to eval mode the parts of the ViT that have parameters of which none trains."""
        for part in self._selection._frozen:
            if part.training and not any(p.requires_grad for p in part.parameters()):
                part.eval()

    def remove(self) -> None:
        """Merge the adapters into the weights and restore layers, flags and modes; a second call does nothing.

        The model computes what it computed with them, and its state dict has its own keys again.
        """
        if not self._installed:
            return
        self._installed = False
        for path in self.targets:
            parent, _, name = path.rpartition(".")
            adapted: Any = self.view.model.get_submodule(path)
            adapted.merge()
            setattr(self.view.model.get_submodule(parent), name, adapted.get_base_layer())
        del self.view.model.peft_config
        self._selection.remove()

    def __str__(self) -> str:
        return (
            f"adapters of rank {self.rank} train beside {len(self.targets)} layers of the {self.view.name}: "
            f"{trained_share(self.view.model)}"
        )


def install_lora(
    module: nn.Module,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    head: bool = True,
    vit: str | None = None,
) -> LoraHandle:
    """Freeze the ViT in ``module`` and train low-rank adapters in its blocks (LoRA, arXiv 2106.09685).

    The adapters are peft's. While they are installed, the adapted layers' keys in the state dict have peft's names.

    Args:
        module: Any module that holds a ViT.
        rank: Rank of the adapters.
        alpha: The adapters' output is scaled by ``alpha / rank``.
        dropout: Dropout on the adapters' input.
        targets: Which linear layers of a block get an adapter: their names, or the ends of their dotted paths in the
            block, such as ``["qkv", "mlp.fc1"]``; ``None`` for all linear layers of the self-attention.
        head: Whether what follows the last norm trains too: the classifiers and the attention pooling.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` merges the adapters into the weights.

    Raises:
        ConfigurationError: If peft is not installed, the ViT is not found, the arguments do not fit it, it has
            adapters already, or it is divided among processes. Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_lora(model, rank=4)
        >>> print(handle)
        adapters of rank 4 train beside 12 layers of the ViT (VisionTransformer): 9,866 of 316,106 parameters (3.1 %)
        >>> handle.remove()
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigurationError(
            'LoRA is computed by peft, which is not installed; pip install "lightning-bsr[compare]" brings it.'
        ) from error
    view = find_vit(module, vit)
    _check(rank, dropout)
    if hasattr(view.model, "peft_config"):
        raise ConfigurationError(f"The {view.name} has adapters of peft already; remove them first.")
    refuse_sharded(view, "each process would train adapters of its own", "install LoRA before it is divided")
    paths = _target_paths(view, targets)
    selection = select_blocks_(module, [], head=head, norm=False, vit=vit)
    trained = [p for p in view.model.parameters() if p.requires_grad]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=paths)
    inject_adapter_in_model(config, view.model, adapter_name=_ADAPTER)
    # peft freezes all but its adapters.
    for parameter in trained:
        parameter.requires_grad_(True)
    return LoraHandle(selection, paths, rank)


def _check(rank: int, dropout: float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigurationError(f"rank is {rank!r}, expected a whole number of at least 1.")
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"dropout is {dropout!r}, expected a number of at least 0 and below 1.")


def _target_paths(view: ViTView, targets: Sequence[str] | None) -> list[str]:
    if isinstance(targets, str):
        raise ConfigurationError(f"targets is {targets!r}, expected a list of names, such as [{targets!r}].")
    names = {id(module): name for name, module in view.model.named_modules()}
    paths: list[str] = []
    available, missing = set(), set(targets or ())
    for block, spec in zip(view.blocks, view.specs, strict=True):
        layers = {name: layer for name, layer in block.named_modules() if _is_called(layer)}
        available |= set(layers)
        for name, layer in layers.items():
            if targets is None:
                inside = spec.is_one_branch or name.startswith(f"{spec.self_attention}.")
                matches = {spec.self_attention} if inside else set()
            else:
                matches = {target for target in targets if f".{name}".endswith(f".{target}")}
            missing -= matches
            if matches:
                paths.append(names[id(layer)])
    if missing or not paths:
        given = f"has {min(missing)!r}" if missing else f"is {targets!r}"
        raise ConfigurationError(
            f"targets {given}, which names no linear layer in the blocks of the {view.name}; there are "
            f"{', '.join(sorted(available))}."
        )
    return paths


def _is_called(layer: nn.Module) -> bool:
    # torch's MultiheadAttention uses only the weights of its output layer.
    return isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear)
