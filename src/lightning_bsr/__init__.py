"""Fine-tune Vision Transformers in a fraction of the memory, by adding callbacks to a Lightning Trainer."""

from lightning_bsr._errors import ConfigurationError
from lightning_bsr._version import __version__
from lightning_bsr.callbacks import (
    ActivationCheckpoint,
    ActivationMemoryMonitor,
    BlockSelect,
    BlockSelectCallback,
    DeltaCheckpoint,
    LeanActivations,
    PrefixCache,
    QuantizeFrozen,
    ReleaseGradients,
    TokenDrop,
    TokenDropCallback,
)
from lightning_bsr.data import DigitsDataModule, ImageFolderDataModule, MultiTaskDataModule
from lightning_bsr.methods import FineTune
from lightning_bsr.models import DrawExpertUse, MultiTaskClassifier, ViTClassifier
from lightning_bsr.vit import register_block

__all__ = [
    "ActivationCheckpoint",
    "ActivationMemoryMonitor",
    "BlockSelect",
    "BlockSelectCallback",
    "ConfigurationError",
    "DeltaCheckpoint",
    "DigitsDataModule",
    "DrawExpertUse",
    "FineTune",
    "ImageFolderDataModule",
    "LeanActivations",
    "MultiTaskClassifier",
    "MultiTaskDataModule",
    "PrefixCache",
    "QuantizeFrozen",
    "ReleaseGradients",
    "TokenDrop",
    "TokenDropCallback",
    "ViTClassifier",
    "__version__",
    "register_block",
]
