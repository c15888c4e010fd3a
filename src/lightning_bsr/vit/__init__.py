"""Finding a Vision Transformer inside any module, and what is known of its blocks."""

from lightning_bsr.vit._blocks import register_block, registered_blocks
from lightning_bsr.vit._find import find_vit
from lightning_bsr.vit._spec import BlockSpec, TokenTable
from lightning_bsr.vit._view import ViTView

__all__ = ["BlockSpec", "TokenTable", "ViTView", "find_vit", "register_block", "registered_blocks"]
