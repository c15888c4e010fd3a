"""The table of block classes, with a row for each that is known, and how users add theirs."""

import inspect
from collections.abc import Sequence
from dataclasses import replace

import timm.models
from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.vit._classes import defines_forward, full_name
from lightning_bsr.vit._named_blocks import NAMED_BLOCKS
from lightning_bsr.vit._spec import BlockSpec, TokenTable

_ROPE = (TokenTable("rope", neutral=(0.0, 1.0)),)  # a sine beside a cosine
_PRE_NORM = BlockSpec(attn=("norm1", "attn", "ls1", "drop_path1"), mlp=("norm2", "mlp", "ls2", "drop_path2"))
_POST_NORM = BlockSpec(attn=("attn", "norm1", "drop_path1"), mlp=("mlp", "norm2", "drop_path2"))
_GAMMAS = BlockSpec(attn=("norm1", "attn", "gamma_1", "drop_path1"), mlp=("norm2", "mlp", "gamma_2", "drop_path2"))
_ONE_BRANCH = BlockSpec(attn=(), mlp=())
_NO_QUERY = "compute the whole attention matrix themselves, so no query and key can be seen to score tokens by"

_TIMM = {
    "vision_transformer.Block": _PRE_NORM,
    "vision_transformer.ResPostBlock": _POST_NORM,
    "vision_transformer.ParallelThingsBlock": BlockSpec(attn=("attns",), mlp=("ffns",), self_attention="attns"),
    "vision_transformer.ParallelScalingBlock": _ONE_BRANCH,
    "vision_transformer.DiffParallelScalingBlock": _ONE_BRANCH,
    "vision_transformer_relpos.RelPosBlock": replace(_PRE_NORM, biases=("shared_rel_pos",)),
    "vision_transformer_relpos.ResPostRelPosBlock": replace(_POST_NORM, biases=("shared_rel_pos",)),
    "beit.Block": replace(_GAMMAS, biases=("shared_rel_pos_bias",)),
    "eva.EvaBlock": replace(_GAMMAS, tables=_ROPE),
    "eva.EvaBlockPostNorm": replace(_POST_NORM, tables=_ROPE),
    "deepseek_vit.DeepseekVitBlock": BlockSpec(
        attn=("norm1", "attn", "drop_path1"), mlp=("norm2", "mlp", "drop_path2"), tables=_ROPE
    ),
    "gemma4_vit.Gemma4Block": BlockSpec(
        attn=("norm1", "attn", "norm2", "drop_path"),
        mlp=("norm3", "mlp", "norm4", "drop_path"),
        tables=(
            TokenTable("rope_cos", neutral=(1.0,), per_head=False),
            TokenTable("rope_sin", neutral=(0.0,), per_head=False),
        ),
    ),
    "cait.LayerScaleBlock": BlockSpec(
        attn=("norm1", "attn", "gamma_1", "drop_path"),
        mlp=("norm2", "mlp", "gamma_2", "drop_path"),
        keeps_tokens=_NO_QUERY,
    ),
    "convit.Block": BlockSpec(
        attn=("norm1", "attn", "drop_path"), mlp=("norm2", "mlp", "drop_path"), keeps_tokens=_NO_QUERY
    ),
}

_TIMM_KEEPS_TOKENS = {
    "attend within windows or between neighbours of the image, so each patch must stay in its place": (
        "swin_transformer.SwinTransformerBlock",
        "swin_transformer_v2.SwinTransformerV2Block",
        "swin_transformer_v2_cr.SwinTransformerV2CrBlock",
        "vision_transformer_sam.Block",
        "hiera.HieraBlock",
        "hieradet_sam2.MultiScaleBlock",
        "nest.TransformerLayer",
        "gcvit.GlobalContextVitBlock",
        "tiny_vit.TinyVitBlock",
        "maxxvit.MaxxVitBlock",
        "maxxvit.ParallelMaxxVitBlock",
        "volo.Outlooker",
        "volo.Transformer",
        "tnt.Block",
    ),
    "shrink or convolve the image between or inside them, so each patch must stay in its place": (
        "pvt_v2.Block",
        "twins.Block",
        "mvitv2.MultiScaleBlock",
        "davit.SpatialBlock",
        "davit.ChannelBlock",
        "coat.SerialBlock",
        "levit.LevitBlock",
        "visformer.Block",
    ),
    "let channels attend to each other, not tokens, so no token has a score": ("xcit.XCABlock",),
}


def _registry() -> dict[type[nn.Module], BlockSpec]:
    """Look up the classes by name, as other versions of timm lack some."""
    rows = {name: BlockSpec((), (), keeps_tokens=why) for why, names in _TIMM_KEEPS_TOKENS.items() for name in names}
    found = {}
    for name, spec in {**_TIMM, **rows}.items():
        module_name, class_name = name.split(".")
        module = getattr(timm.models, module_name, None)
        if hasattr(module, class_name):
            found[getattr(module, class_name)] = spec
    return found


_REGISTRY = _registry()


def register_block(
    block_class: type[nn.Module],
    *,
    attn: Sequence[str],
    mlp: Sequence[str],
    self_attention: str = "attn",
    tables: Sequence[TokenTable] = (),
) -> None:
    """Teach the package a block class of your own.

    The block must compute ``x = x + attn(x)``, then ``x = x + mlp(x)``, on tokens ``[B, N, C]``, with its
    self-attention done by :func:`torch.nn.functional.scaled_dot_product_attention`. The module that owns the list of
    blocks must have an integer ``num_prefix_tokens`` (class, distillation and register tokens, which come first)
    and, if the first of them is a class token, a ``cls_token`` that is not ``None``.

    A block that computes something else, such as both branches in one, is registered with ``attn=[]`` and ``mlp=[]``:
    it is only ever run whole, and drops tokens at its output.

    Args:
        block_class: The class whose ``forward`` the row describes; a subclass that overrides ``forward`` needs a
            row of its own.
        attn: Attribute names of the attention branch, in the order they are applied. A module is called, a parameter or
            a number multiplied, ``None`` skipped; of a ``ModuleList`` the results are added.
        mlp: Attribute names of the MLP branch, in the order they are applied.
        self_attention: The name in ``attn`` that holds the self-attention. If it is a ``ModuleList``, the child
            ``attn`` of each of its modules is the self-attention.
        tables: The arguments of the block's forward that have a row for each patch token, such as rotary embeddings:
            :class:`lightning_bsr.vit.TokenTable`. Masks and biases that reach the attention need no mention.

    Raises:
        ConfigurationError: If ``self_attention`` is not in ``attn``, only one branch is empty, ``block_class`` has no
            ``forward``, or that has no argument of a table's name.

    Example:
        >>> from timm.models.vision_transformer import Block
        >>> class MyBlock(Block):
        ...     def forward(self, x):
        ...         x = x + self.attn(self.norm1(x))
        ...         return x + self.mlp(self.norm2(x))
        >>> register_block(MyBlock, attn=["norm1", "attn"], mlp=["norm2", "mlp"])
    """
    name = block_class.__qualname__
    if "forward" not in vars(block_class):
        raise ConfigurationError(
            f"register_block was given {name}, which defines no forward of its own; register the class that does."
        )
    if bool(attn) != bool(mlp):
        raise ConfigurationError(
            f"register_block was given attn={list(attn)} and mlp={list(mlp)}; name the attributes of both branches, or "
            "of none for a block that is only run whole."
        )
    if attn and self_attention not in attn:
        raise ConfigurationError(
            f"register_block was given self_attention={self_attention!r}, which is not in attn="
            f"{list(attn)}; name the attribute of the attention branch that holds the self-attention."
        )
    arguments = list(inspect.signature(block_class.forward).parameters)[2:]
    for table in tables:
        if table.name not in arguments:
            raise ConfigurationError(
                f"register_block was given a table {table.name!r}, but after the tokens the forward of {name} takes "
                f"{', '.join(arguments) or 'nothing'}."
            )
    _REGISTRY[block_class] = BlockSpec(tuple(attn), tuple(mlp), self_attention, tuple(tables))


def registered_blocks() -> list[str]:
    """List the full names of the block classes that are known.

    Example:
        >>> "timm.models.vision_transformer.Block" in registered_blocks()
        True
    """
    return [*map(full_name, _REGISTRY), *NAMED_BLOCKS]


def spec_of(block: nn.Module) -> BlockSpec | None:
    """Return the row for ``block``, or ``None`` if the class that defines its forward is not registered."""
    cls = defines_forward(block)
    if cls in _REGISTRY:
        return _REGISTRY[cls]
    spec = NAMED_BLOCKS.get(full_name(cls))
    # Another version of the library may have a class of that name with other parts.
    return spec if spec and all(hasattr(block, name) for name in (*spec.attn, *spec.mlp)) else None
