"""What the data modules share: checked arguments, stratified splits and data loaders."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from lightning.fabric.utilities import suggested_max_num_workers
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.data._checks import are_numbers, is_number, require_whole
from lightning_bsr.data.sampler import EpochSampler

_MAX_DEFAULT_WORKERS = 8


class Pictures(Protocol):
    """Pictures with their class indices and the classes' names, not yet transformed."""

    @property
    def targets(self) -> Sequence[int]:
        """The class index of each picture."""

    @property
    def classes(self) -> Sequence[str]:
        """The classes' names, in the order of their indices."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...

    def __len__(self) -> int: ...


class TransformedSubset(Dataset[tuple[Tensor, int]]):
    """Some samples of a dataset, each image passed through ``transform`` and paired with its class index."""

    def __init__(
        self, dataset: Pictures | Dataset[Any], indices: Sequence[int], transform: Callable[[Any], Tensor]
    ) -> None:
        self.dataset = dataset
        self.indices = list(indices)
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[self.indices[index]]
        return self.transform(image), int(label)

    def __len__(self) -> int:
        return len(self.indices)


class _TrainLoader(DataLoader[tuple[Tensor, int]]):
    """A loader whose workers ask the sampler for indices at the first batch, not when iteration is prepared.

    Lightning creates the first iterator of a run before it tells the sampler the epoch. Worker processes
    would at once be given the indices of epoch 0, also in a run that resumes later.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # the loader's own iterator type is narrower
        yield from super().__iter__()


class ClassificationData(LightningDataModule, ABC):
    """Loaders of ``(images, labels)`` batches of shapes [B, 3, H, W] and [B].

    A subclass says where the images come from: its ``setup`` fills ``datasets`` under the keys ``train``,
    ``val``, ``test`` and ``predict``.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        img_size: int,
        val_fraction: float,
        seed: int,
        num_workers: int | None,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        require_whole("batch_size", batch_size, least=1)
        require_whole("img_size", img_size, least=1)
        require_whole("seed", seed, least=0)
        if num_workers is not None:
            require_whole("num_workers", num_workers, least=0)
        if not is_number(val_fraction) or not 0 < val_fraction < 1:
            raise ConfigurationError(f"val_fraction is {val_fraction!r}, expected a number above 0 and below 1.")
        if not are_numbers(mean, 3):
            raise ConfigurationError(f"mean is {mean!r}, expected three numbers, one per colour channel.")
        if not are_numbers(std, 3) or min(std) <= 0:
            raise ConfigurationError(f"std is {std!r}, expected three numbers above 0, one per colour channel.")
        self.batch_size = batch_size
        self.img_size = img_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.datasets: dict[str, Dataset[tuple[Tensor, int]]] = {}

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Fill ``datasets``, unless that is done."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """The classes' names, in the order of their indices."""

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Training batches, shuffled by :class:`~lightning_bsr.data.EpochSampler`."""
        dataset = self._dataset("train")
        return _TrainLoader(dataset, sampler=EpochSampler(dataset, self.seed), **self._loader_options())  # type: ignore[arg-type]  # any dataset has a length here

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Validation batches, in a fixed order."""
        return DataLoader(self._dataset("val"), **self._loader_options())

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Test batches, in a fixed order."""
        return DataLoader(self._dataset("test"), **self._loader_options())

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Batches to predict, in a fixed order."""
        return DataLoader(self._dataset("predict"), **self._loader_options())

    def _dataset(self, name: str) -> Dataset[tuple[Tensor, int]]:
        self.setup()
        return self.datasets[name]

    def _loader_options(self) -> dict[str, Any]:
        workers = self._count_workers()
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _count_workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        processes = self.trainer.num_devices if self.trainer else 1
        return min(_MAX_DEFAULT_WORKERS, suggested_max_num_workers(processes))


def split_by_class(targets: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the positions in ``targets`` in two parts with the same proportions of the classes.

    Each class gives the rounded ``fraction`` of its members to the second part, but at least one, and keeps
    at least one in the first: every class must have two members or more.
    """
    labels = np.asarray(targets)
    rng = np.random.default_rng(seed)
    first: list[int] = []
    second: list[int] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label)).tolist()
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        second += members[:count]
        first += members[count:]
    return sorted(first), sorted(second)
