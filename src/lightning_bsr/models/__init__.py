"""Plain models to fine-tune: a classifier around any timm model, a small ViT with its weights."""

from lightning_bsr.models.classifier import ViTClassifier
from lightning_bsr.models.micro import vit_micro_patch4_32

__all__ = ["ViTClassifier", "vit_micro_patch4_32"]
