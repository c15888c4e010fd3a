"""LightningDataModules: bundled digits, published data sets, folders of the user's own pictures, several as one."""

from lightning_bsr.data._published import PublishedData
from lightning_bsr.data.digits import DigitsDataModule
from lightning_bsr.data.image_folder import ImageFolderDataModule
from lightning_bsr.data.multi_task import MultiTaskDataModule, TaskRounds
from lightning_bsr.data.published import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    Flowers102DataModule,
    Food101DataModule,
    OxfordIIITPetDataModule,
)
from lightning_bsr.data.sampler import EpochSampler

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "EpochSampler",
    "Flowers102DataModule",
    "Food101DataModule",
    "ImageFolderDataModule",
    "MultiTaskDataModule",
    "OxfordIIITPetDataModule",
    "PublishedData",
    "TaskRounds",
]
