"""Plain models to fine-tune: a classifier around any timm model, a small ViT with its weights, mixtures of experts."""

from lightning_bsr.models.classifier import ViTClassifier
from lightning_bsr.models.micro import vit_micro_patch4_32
from lightning_bsr.models.moe import Experts, MoEMlp, convert_to_moe_, find_experts

__all__ = ["Experts", "MoEMlp", "ViTClassifier", "convert_to_moe_", "find_experts", "vit_micro_patch4_32"]
