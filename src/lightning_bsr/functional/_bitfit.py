"""Trains the biases of a ViT and freezes the rest of it."""

from torch import nn

from lightning_bsr.functional._installed import trained_share
from lightning_bsr.functional._select import BlockSelection, select_blocks_


class BiasSelection:
    """What :func:`train_biases_` did to a module, and the way back.

    Attributes:
        view: The ViT.
    """

    def __init__(self, selection: BlockSelection) -> None:
        self.view = selection.view
        self._selection = selection

    def remove(self) -> None:
        """Put back each parameter's ``requires_grad``; a second call does nothing."""
        self._selection.remove()

    def __str__(self) -> str:
        return f"biases train in the {self.view.name}: {trained_share(self.view.model)}"


def train_biases_(module: nn.Module, *, head: bool = True, vit: str | None = None) -> BiasSelection:
    """Train the biases of the ViT in ``module``, those of its norms too, and freeze the rest of it (BitFit).

    A bias is added, so its gradient needs no input of its layer: of linear layers backward keeps nothing for it
    (arXiv 2106.10199). Activations that backward needs on its way to earlier biases are still kept. Only the ViT is
    touched.

    Args:
        module: Any module that holds a ViT.
        head: Whether the weights of what follows the last norm train too: the classifiers and the attention pooling.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A handle; its ``remove()`` restores every flag.

    Raises:
        ConfigurationError: If the ViT is not found, or what trains in it was chosen already. Nothing has changed then.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> biases = train_biases_(model)
        >>> print(biases)
        biases train in the ViT (VisionTransformer): 4,618 of 306,890 parameters (1.5 %)
        >>> biases.remove()
    """
    selection = select_blocks_(module, [], head=head, norm=False, vit=vit)
    heads = {id(p) for part in selection.view.heads for p in part.parameters()}
    for name, parameter in selection.view.model.named_parameters():
        last = name.rpartition(".")[2]
        # Some attentions hold their biases themselves, as q_bias and v_bias.
        if (last == "bias" or last.endswith("_bias")) and id(parameter) not in heads:
            parameter.requires_grad_(True)
    return BiasSelection(selection)
