"""Looks whether the training data are the same each time, or makes them so: a fixed number of variants a sample."""

import random
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_bsr._errors import ConfigurationError

_SAMPLES, _TIMES = 4, 4
ADVICE = (
    "so what the first blocks of the ViT give for it cannot be read again. Turn the random augmentation off, ask for a "
    "fixed number of variants of each image with PrefixCache(variants=4), or leave PrefixCache out."
)


class FixedVariants:
    """Gives each sample of a dataset in one of so many variants, the next one in each epoch.

    It is set on the dataset as ``__getitems__``, by which data loaders fetch the samples of a batch, also in worker
    processes. While a sample is loaded, the random generators of torch, NumPy and Python have a seed made of ``seed``,
    the sample's index and the variant; afterwards they go on where they were.

    Args:
        dataset: The dataset.
        variants: How many variants of each sample there are.
        seed: Chooses the variants.

    Example:
        >>> noise = FixedVariants(_Noise(), variants=2, seed=0)
        >>> forms = []
        >>> for epoch in range(4):
        ...     _ = noise.epoch.fill_(epoch)
        ...     forms += noise([3])
        >>> forms[:2] == forms[2:], forms[0] == forms[1]
        (True, False)
    """

    def __init__(self, dataset: Any, variants: int, seed: int) -> None:
        self.dataset = dataset
        self.variants = variants
        self.seed = seed
        # Shared, so that workers that live longer than an epoch see the next one.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __call__(self, indices: list[Any]) -> list[Any]:
        variant = int(self.epoch) % self.variants
        with isolate_rng(include_cuda=False):
            return [self._load(index, variant) for index in indices]

    def _load(self, index: Any, variant: int) -> Any:
        words = [self.seed, zlib.crc32(repr(index).encode()), variant]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        np.random.seed(seed)
        random.seed(seed)
        return self.dataset[index]


class _Noise:
    def __getitem__(self, index: int) -> float:
        return random.random()


class WatchedData:
    """Stands in for the method by which a Trainer's fit gets its training data loaders.

    Args:
        trainer: At the start of ``fit``.
        variants: How many variants of each sample there are to be; ``None`` if each is to be the same each time.
        seed: Chooses the variants.
    """

    def __init__(self, trainer: Trainer, variants: int | None, seed: int) -> None:
        self._trainer = trainer
        self._source = trainer.fit_loop._data_source
        self._variants = variants
        self._seed = seed
        self._fixed: list[FixedVariants] = []
        self._refusal: ConfigurationError | None = None
        self._source.dataloader = self  # type: ignore[method-assign]  # on this instance only

    def __call__(self) -> Any:
        """Get the data loaders, and look at their datasets."""
        loaders = type(self._source).dataloader(self._source)
        try:
            for loader in _loaders(loaders):
                if self._variants is None:
                    _refuse_random(loader)
                else:
                    self._fix(loader, self._variants)
        except ConfigurationError as error:
            # Lightning has the class DataLoader changed meanwhile, and an error would leave it so.
            self._refusal = error
            return loaders
        self._tell_epoch()
        return loaders

    def begin(self) -> None:
        """Choose the variants of the epoch that begins.

        Raises:
            ConfigurationError: If a sample is another one each time, or variants of it cannot be made.
        """
        if self._refusal is not None:
            raise self._refusal
        self._tell_epoch()

    def _tell_epoch(self) -> None:
        for fixed in self._fixed:
            fixed.epoch.fill_(self._trainer.current_epoch)

    def remove(self) -> None:
        """Give the source and the datasets their own methods again; a second call does nothing."""
        vars(self._source).pop("dataloader", None)
        for fixed in self._fixed:
            vars(fixed.dataset).pop("__getitems__", None)
        self._fixed.clear()

    def _fix(self, loader: DataLoader[Any], variants: int) -> None:
        dataset = loader.dataset
        name = type(dataset).__name__
        if isinstance(dataset, IterableDataset) or loader.batch_sampler is None:
            raise ConfigurationError(
                f"variants is {variants}, but the training data ({name}) are not fetched in batches by index, which "
                "choosing a variant takes; use a dataset with __getitem__ and a batch_size."
            )
        if not hasattr(dataset, "__dict__"):
            raise ConfigurationError(
                f"variants is {variants}, but the training dataset is a {name}, on which no attribute can be set; wrap "
                "it in a torch.utils.data.Dataset."
            )
        if not isinstance(vars(dataset).get("__getitems__"), FixedVariants):
            fixed = FixedVariants(dataset, variants, self._seed)
            dataset.__getitems__ = fixed  # type: ignore[attr-defined]  # looked up on the instance
            self._fixed.append(fixed)


def _loaders(loaders: Any) -> Iterator[DataLoader[Any]]:
    flat = loaders.flattened if isinstance(loaders, CombinedLoader) else tree_leaves(loaders)
    yield from (loader for loader in flat if isinstance(loader, DataLoader))


def _refuse_random(loader: DataLoader[Any]) -> None:
    """Load a few samples several times and compare; the random generators and the workers of the run see nothing."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return
    indices = [index for index in range(min(_SAMPLES, len(dataset))) for _ in range(_TIMES)]
    # In a worker if the run has some: a file that the dataset opens must not be shared by them.
    again = DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=min(loader.num_workers, 1),
        collate_fn=_same,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )
    with isolate_rng():
        try:
            images = [_images(sample) for sample in again]
        except (KeyError, IndexError, TypeError):  # a dataset that its sampler alone knows how to index
            return
    for position, index in enumerate(indices):
        first = images[position - position % _TIMES]
        if not _equal(images[position], first):
            raise ConfigurationError(
                f"The training dataset ({type(dataset).__name__}) gives sample {index} another image each time, "
                f"{ADVICE}"
            )


def _same(sample: Any) -> Any:
    return sample


def _equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _images(sample: Any) -> list[torch.Tensor]:
    leaves = [torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in tree_leaves(sample)]
    return [leaf.nan_to_num() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2]
