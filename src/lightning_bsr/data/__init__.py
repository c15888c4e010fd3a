"""LightningDataModules: bundled digits to try things on, and folders of the user's own pictures."""

from lightning_bsr.data.digits import DigitsDataModule
from lightning_bsr.data.image_folder import ImageFolderDataModule
from lightning_bsr.data.sampler import EpochSampler

__all__ = ["DigitsDataModule", "EpochSampler", "ImageFolderDataModule"]
