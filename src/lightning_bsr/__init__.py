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
    TokenDropVisualizer,
)
from lightning_bsr.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    Flowers102DataModule,
    Food101DataModule,
    ImageFolderDataModule,
    MultiTaskDataModule,
    OxfordIIITPetDataModule,
)
from lightning_bsr.methods import FineTune
from lightning_bsr.models import DrawExpertUse, MultiTaskClassifier, ViTClassifier
from lightning_bsr.vit import register_block

__all__ = [
    "ActivationCheckpoint",
    "ActivationMemoryMonitor",
    "BlockSelect",
    "BlockSelectCallback",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "ConfigurationError",
    "DeltaCheckpoint",
    "DigitsDataModule",
    "DrawExpertUse",
    "FineTune",
    "Flowers102DataModule",
    "Food101DataModule",
    "ImageFolderDataModule",
    "LeanActivations",
    "MultiTaskClassifier",
    "MultiTaskDataModule",
    "OxfordIIITPetDataModule",
    "PrefixCache",
    "QuantizeFrozen",
    "ReleaseGradients",
    "TokenDrop",
    "TokenDropCallback",
    "TokenDropVisualizer",
    "ViTClassifier",
    "__version__",
    "register_block",
]
