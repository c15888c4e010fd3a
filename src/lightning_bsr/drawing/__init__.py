"""Pictures of what a ViT drops and keeps, as matplotlib figures. Needs matplotlib (the extra plots)."""

from lightning_bsr.drawing._blocks import plot_blocks
from lightning_bsr.drawing._survivors import draw_classes, draw_scores, draw_survivors, undo_normalization

__all__ = ["draw_classes", "draw_scores", "draw_survivors", "plot_blocks", "undo_normalization"]
