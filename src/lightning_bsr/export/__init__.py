"""Writes a ViT with its token drop to a file for inference, and checks what the file computes."""

from lightning_bsr.export._export import Exported, export_model
from lightning_bsr.export._formats import Format

__all__ = ["Exported", "Format", "export_model"]
