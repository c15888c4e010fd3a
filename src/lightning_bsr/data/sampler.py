"""A shuffle that depends on the seed and the epoch alone, so that resuming does not change it."""

from collections.abc import Iterator, Sized

import numpy as np
from torch.utils.data import RandomSampler

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.data._checks import require_whole


class EpochSampler(RandomSampler):
    """Shuffles the samples of an epoch in an order given by ``(seed, epoch)``.

    A plain ``RandomSampler`` draws from PyTorch's global generator, whose state is not in a Lightning
    checkpoint: a run resumed at epoch 3 would see another order than one that was never interrupted. This one
    neither reads nor advances that generator. Lightning calls :meth:`set_epoch` before each training epoch.

    In distributed training Lightning 2.6 replaces every ``RandomSampler``, this subclass included, by a
    ``DistributedSampler`` whose order depends on the epoch and on the seed of ``seed_everything`` (0
    without it); ``seed`` then has no effect, and resuming is still exact. Being a subclass matters: an
    unrelated sampler would be wrapped instead, and the wrapper of Lightning 2.6.0 does not pass the epoch
    on, so that every epoch would repeat the first one's order.

    Args:
        data_source: What is sampled; only its length is used.
        seed: A whole number, 0 or above.

    Raises:
        ConfigurationError: ``seed`` is not such a number, or ``data_source`` is empty.

    Example:
        >>> sampler = EpochSampler(range(5), seed=0)
        >>> sampler.set_epoch(3)
        >>> third = list(sampler)
        >>> sorted(third)
        [0, 1, 2, 3, 4]
        >>> resumed = EpochSampler(range(5), seed=0)
        >>> resumed.set_epoch(3)
        >>> list(resumed) == third
        True
    """

    def __init__(self, data_source: Sized, seed: int = 0) -> None:
        require_whole("seed", seed, least=0)
        if len(data_source) == 0:
            raise ConfigurationError("data_source is empty, expected at least one sample to shuffle.")
        super().__init__(data_source)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # NumPy mixes both numbers. With their sum, epoch 1 of seed 0 would equal epoch 0 of seed 1; and
        # torch's CPU generator looks at the low 32 bits of a seed only.
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self))
        return iter(order.tolist())
