"""LightningDataModules: bundled digits to try things on, folders of the user's own pictures, several as one."""

from lightning_bsr.data.digits import DigitsDataModule
from lightning_bsr.data.image_folder import ImageFolderDataModule
from lightning_bsr.data.multi_task import MultiTaskDataModule, TaskRounds
from lightning_bsr.data.sampler import EpochSampler

__all__ = ["DigitsDataModule", "EpochSampler", "ImageFolderDataModule", "MultiTaskDataModule", "TaskRounds"]
