"""Plain models to fine-tune: classifiers around any timm model, a small ViT with its weights, mixtures of experts."""

from lightning_bsr.models.classifier import ViTClassifier
from lightning_bsr.models.expert_use import DrawExpertUse, draw_expert_use
from lightning_bsr.models.experts import Experts, convert_to_moe_, find_experts
from lightning_bsr.models.micro import vit_micro_patch4_32
from lightning_bsr.models.moe import MoEMlp
from lightning_bsr.models.multi_task import MultiTaskClassifier

__all__ = [
    "DrawExpertUse",
    "Experts",
    "MoEMlp",
    "MultiTaskClassifier",
    "ViTClassifier",
    "convert_to_moe_",
    "draw_expert_use",
    "find_experts",
    "vit_micro_patch4_32",
]
