"""The callback that computes the frozen first blocks of a ViT once for each image."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks._attach import AttachingCallback
from lightning_bsr.callbacks._conflicts import has_whole_weights, refuse_unfreezing
from lightning_bsr.callbacks._prefix_data import ADVICE, WatchedData
from lightning_bsr.functional._prefix import PrefixCacheHandle, StoredDtype, install_prefix_cache
from lightning_bsr.functional._prefix_pass import PrefixCounts
from lightning_bsr.memory import MIB, parse_bytes
from lightning_bsr.memory._bytes import format_bytes
from lightning_bsr.vit import find_vit

_ENOUGH = 64  # images, to judge by whether images come again
_FEW = 0.05


class PrefixCache(AttachingCallback):
    """Compute the frozen first blocks of the module's ViT once for each image, and read their output from then on.

    During ``fit`` only, in training and in its validation. The blocks before the first one that trains are stored,
    wherever in the list of callbacks ``BlockSelect`` and ``TokenDrop`` are. Losses are those of a run without the
    cache, bit for bit. See :func:`lightning_bsr.functional.install_prefix_cache` for the details.

    The images must be the same in each epoch. Before training a few samples are loaded several times; if they differ,
    or if after the first epoch fewer than one in twenty images was seen before, ``fit`` ends with an error that says
    so. With ``variants`` random augmentation is kept, but each image has that many fixed forms, one an epoch in turn,
    so all is stored after as many epochs. What is random outside of the dataset, such as in a collate function, is not
    fixed by it.

    Logged at the end of each training epoch: ``prefix_cache/hit_rate``, the share of its images that were read, and
    ``prefix_cache/stored_mib``, what is stored (MiB of 2**20 bytes).

    Args:
        blocks: How many blocks to store the output of; by default all before the first that trains.
        place: ``"memory"``, or a folder for a file, with which a later run with the same weights and settings goes on.
        max_bytes: Bytes to store at most, or a number and a unit such as ``"8GiB"``. What does not fit is computed each
            time, and with it the batch that it is in.
        dtype: ``"bfloat16"`` or ``"float16"`` to store half of float32's bytes, rounded; ``"float32"`` to accept mere
            rounding where kernels depend on an image's place in its batch. Losses then differ.
        variants: How many forms of each image there are; ``None`` for data that are the same in each epoch.
        seed: Chooses the forms.
        offload: Whether the weights of the stored blocks go to the CPU while batch after batch is read.
        vit: Dotted path of the ViT, for when the module holds several.

    Raises:
        ConfigurationError: In the constructor if ``max_bytes``, ``variants`` or ``seed`` is out of range. At the start
            of ``fit`` if there is no ViT, its first block trains, an argument does not fit it, the strategy shards the
            module, a callback unfreezes the ViT, or the training data are random; later if what the blocks give turns
            out not to depend on the image
            alone.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsr import BlockSelect
        >>> callbacks = [BlockSelect(blocks=[3, 7, 11]), PrefixCache(max_bytes="2GiB")]
        >>> trainer = Trainer(callbacks=callbacks, accelerator="cpu", logger=False)
    """

    # Not in setup, when other callbacks may not have attached yet, but when fit starts.
    stages = ()

    def __init__(
        self,
        *,
        blocks: int | None = None,
        place: str | Path = "memory",
        max_bytes: int | str = "1GiB",
        dtype: StoredDtype | None = None,
        variants: int | None = None,
        seed: int = 0,
        offload: bool = False,
        vit: str | None = None,
    ) -> None:
        super().__init__()
        parse_bytes(max_bytes, "max_bytes")
        if variants is not None and (isinstance(variants, bool) or not isinstance(variants, int) or variants < 1):
            raise ConfigurationError(f"variants is {variants!r}, expected None or a whole number of at least 1.")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigurationError(f"seed is {seed!r}, expected a whole number of at least 0.")
        self.blocks = blocks
        self.place = place
        self.max_bytes = max_bytes
        self.dtype = dtype
        self.variants = variants
        self.seed = seed
        self.offload = offload
        self.vit = vit
        self._data: WatchedData | None = None

    @override
    def attach(self, trainer: Trainer, pl_module: LightningModule) -> PrefixCacheHandle:
        if not has_whole_weights(trainer):
            raise ConfigurationError(
                f"The strategy is {type(trainer.strategy).__name__}, expected a single device or DDP, as PrefixCache "
                "needs the whole weights of the blocks whose output it stores."
            )
        refuse_unfreezing(trainer, pl_module, find_vit(pl_module, self.vit), "PrefixCache")
        ranked = self.place != "memory" and trainer.world_size > 1
        return install_prefix_cache(
            pl_module,
            blocks=self.blocks,
            place=Path(self.place) / f"rank-{trainer.global_rank}" if ranked else self.place,
            max_bytes=parse_bytes(self.max_bytes, "max_bytes"),
            dtype=self.dtype,
            offload=self.offload,
            vit=self.vit,
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handle = self.attach(trainer, pl_module)
        self._data = WatchedData(trainer, self.variants, self.seed)
        self._epochs, self._epoch, self._full = 0, PrefixCounts(), False
        self._fingerprint = b""
        rank_zero_info(f"PrefixCache: {self._handle}.")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not for validation alone, which attaches nothing.
        if self._handle is not None:
            self._installed.verify()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resume within an epoch does not start it.
        assert self._data is not None
        self._data.begin()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._data is not None
        self._data.begin()
        self._installed.verify()
        self._epoch = PrefixCounts()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._before = self._installed.counts

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch += self._installed.counts - self._before
        if self._fingerprint != self._installed.fingerprint:
            # Such as by another keep rate: nothing can have been seen before.
            self._fingerprint, self._epochs = self._installed.fingerprint, 0
        self._say_if_full()
        limit = trainer.limit_train_batches
        if isinstance(limit, float) and limit == 1:  # a part of shuffled data is another one in each epoch
            self._refuse_if_all_is_new(last=trainer.is_last_batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs += 1
        images = self._epoch.hits + self._epoch.misses
        values = {
            "prefix_cache/hit_rate": self._epoch.hits / max(images, 1),
            "prefix_cache/stored_mib": self._installed.num_bytes / MIB,
        }
        pl_module.log_dict(values)

    @property
    def _installed(self) -> PrefixCacheHandle:
        assert isinstance(self._handle, PrefixCacheHandle)
        return self._handle

    def _say_if_full(self) -> None:
        if self._full or not self._installed.counts.rejected:
            return
        self._full = True
        rank_zero_warn(
            f"PrefixCache has no room for all images in {format_bytes(parse_bytes(self.max_bytes))}: what does not "
            "fit is computed each time, and with it the batch that it is in. Raise max_bytes, choose a folder as the "
            "place, or store in dtype='bfloat16'."
        )

    def _refuse_if_all_is_new(self, last: bool) -> None:
        images = self._epoch.hits + self._epoch.misses
        if self._full or self._epochs < (self.variants or 1) or not (images >= _ENOUGH or (last and images)):
            return
        seen = self._epoch.hits + self._epoch.known
        if seen < _FEW * images:
            raise ConfigurationError(
                f"PrefixCache saw {seen} of the first {images} images of epoch {self._epochs} before: "
                f"an image reaches the ViT in another form each time, {ADVICE}"
            )

    @override
    def _detach(self, pl_module: LightningModule) -> None:
        if self._data is not None:
            self._data.remove()
            self._data = None
        super()._detach(pl_module)
