"""The user's own pictures, one folder per class, checked before training starts."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.data._base import ClassificationData, Pictures, TransformedSubset, split_by_class
from lightning_bsr.data._cache import PictureCache
from lightning_bsr.data._checks import are_numbers
from lightning_bsr.data._pictures import (
    PictureFiles,
    list_classes,
    read_folder,
    require_decodable,
    require_folder,
    require_same_classes,
    shorten,
)
from lightning_bsr.memory import parse_bytes

_LAYOUT = "a folder with train/<class>/<images> in it"


class ImageFolderDataModule(ClassificationData):
    """Pictures in ``root/train/<class>/``, and if there are such folders ``root/val`` and ``root/test``.

    Batches are ``(images, labels)`` of shapes [B, 3, img_size, img_size] and [B]; a label is the position
    of the class among the sorted names of the class folders. Without ``root/val`` a part of each training
    class is put aside for validation; those images get the evaluation transforms. ``predict`` goes through
    ``root/test``, or the validation images if there is none. Grey, palette, transparent and CMYK files are
    read as RGB.

    All of it is looked at before training starts: in ``prepare_data`` every file is decoded once (in
    distributed training by one process), and the folders are compared there and in ``setup``.

    The order of the training images depends on ``seed`` and the epoch only, so a run resumed at the end of
    an epoch sees the order of an uninterrupted one. A checkpoint from the middle of an epoch resumes that
    epoch's order from its start, for the batches that were left. Lightning does not store the state of the
    random generators, so a resumed run draws other crops and flips. The global random state is left alone
    by the split.

    Args:
        root: The folder that holds ``train``; ``~`` is understood.
        batch_size: Images in a batch.
        img_size: Height and width of the images.
        val_fraction: The part of each training class put aside for validation if ``root/val`` does not
            exist, above 0 and below 1; at least one image a class.
        seed: Chooses the validation split and the training order.
        num_workers: Processes that load batches; by default as many as Lightning suggests for this machine,
            and no more than 8.
        mean: Subtracted from each channel's values, which go from 0 to 1.
        std: Each channel is divided by it.
        scale: The smallest and largest part of a training picture's area that a random crop takes. The
            default suits photographs; small pictures need more of themselves, such as ``(0.5, 1.0)``.
        hflip: Mirror half of the training images, left to right.
        check_files: Decode every file once before training, to find corrupt and truncated ones.
        cache: Memory for decoded training and validation pictures, such as ``"8GiB"``: as many of them as fit, at
            their own size, are decoded once. Loading processes share it. None decodes each picture each time.

    Raises:
        ConfigurationError: From the constructor when an argument is out of range; from ``prepare_data`` and
            ``setup`` when the folders or files cannot be used.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = tempfile.TemporaryDirectory()
        >>> for name in ("cat", "dog"):
        ...     directory = Path(folder.name, "train", name)
        ...     directory.mkdir(parents=True)
        ...     for number in range(4):
        ...         Image.new("RGB", (40, 30)).save(directory / f"{number}.png")
        >>> data = ImageFolderDataModule(folder.name, batch_size=6, img_size=32, num_workers=0)
        >>> data.class_names
        ['cat', 'dog']
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([6, 3, 32, 32]), torch.Size([6]))
        >>> folder.cleanup()
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 64,
        img_size: int = 224,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int | None = None,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        scale: tuple[float, float] = (0.05, 1.0),
        hflip: bool = True,
        check_files: bool = True,
        cache: int | str | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            img_size=img_size,
            val_fraction=val_fraction,
            seed=seed,
            num_workers=num_workers,
            mean=mean,
            std=std,
        )
        if not are_numbers(scale, 2) or not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigurationError(
                f"scale is {scale!r}, expected two numbers above 0 and at most 1, the smaller one first."
            )
        self.root = Path(root).expanduser()
        self.scale = tuple(scale)
        self.hflip = hflip
        self.check_files = check_files
        self.cache = None if cache is None else parse_bytes(cache, "cache")
        self._files_checked = False
        self._parts: dict[str, Pictures] = {}

    @property
    def class_names(self) -> list[str]:
        """The names of the class folders in ``root/train``, sorted; only folder names are read."""
        self._require_train()
        return list_classes(self.root / "train")

    def prepare_data(self) -> None:
        """Look at all folders and, once in the life of this object, decode all files.

        Raises:
            ConfigurationError: They cannot be used; names what is wrong.
        """
        self._scan(prepare=True)
        if self.check_files and not self._files_checked:
            files = [part for part in self._parts.values() if isinstance(part, PictureFiles)]
            require_decodable([path for part in files for path, _ in part.samples], self.root)
            self._files_checked = True

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets; the stage does not matter, a second call changes nothing.

        Raises:
            ConfigurationError: The folders cannot be used; names what is wrong.
        """
        if self.datasets:
            return
        self._scan()
        train, test = self._parts["train"], self._parts.get("test")
        if "val" in self._parts:
            val = self._parts["val"]
            train_indices: Sequence[int] = range(len(train))
            val_indices: Sequence[int] = range(len(val))
        else:
            val = train
            train_indices, val_indices = split_by_class(train.targets, self.val_fraction, self.seed)
        self._make_cache()

        evaluation = self._evaluation_transform()
        self.datasets = {
            "train": TransformedSubset(train, train_indices, self._train_transform()),
            "val": TransformedSubset(val, val_indices, evaluation),
        }
        if test is not None:
            self.datasets["test"] = TransformedSubset(test, range(len(test)), evaluation)
        self.datasets["predict"] = self.datasets.get("test", self.datasets["val"])

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Test batches, in a fixed order.

        Raises:
            ConfigurationError: There is no ``root/test``.
        """
        self._require_test()
        return super().test_dataloader()

    def _require_test(self) -> None:
        require_folder(self.root / "test", "the test images in one folder per class")

    def _require_train(self) -> None:
        require_folder(self.root, _LAYOUT)
        require_folder(self.root / "train", "the training images in one folder per class")

    def _scan(self, *, prepare: bool = False) -> None:
        if not self._parts:
            self._parts = self._open_parts(prepare=prepare)

    def _open_parts(self, *, prepare: bool) -> dict[str, Pictures]:
        """Find the pictures of ``train`` and, where they are, ``val`` and ``test``.

        Args:
            prepare: Whether this is ``prepare_data``, which one process of a machine does for all.
        """
        self._require_train()
        folders = {
            name: read_folder(self.root / name)
            for name in ("train", "val", "test")
            if name == "train" or (self.root / name).exists()
        }
        train = folders["train"]
        for name, folder in folders.items():
            require_same_classes(self.root / name, folder.classes, self.root / "train")
        if "val" not in folders:
            sizes: Counter[int] = Counter(train.targets)
            lonely = [name for index, name in enumerate(train.classes) if sizes[index] < 2]
            if lonely:
                raise ConfigurationError(
                    f"{self.root / 'train'} has a single image for {shorten(lonely)}, expected at least 2 a "
                    f"class, one to train and one to validate; or add {self.root / 'val'}."
                )
        return dict(folders)

    def _make_cache(self) -> None:
        left = self.cache
        for name in ("train", "val"):
            part = self._parts.get(name)
            if left and isinstance(part, PictureFiles):
                paths = [path for path, _ in part.samples]
                part.cache = PictureCache(paths, left, shared=self._count_workers() > 0)
                left -= part.cache.nbytes

    def _train_transform(self) -> Callable[[Any], Tensor]:
        flip = [v2.RandomHorizontalFlip()] if self.hflip else []
        crop = v2.RandomResizedCrop(self.img_size, scale=self.scale, antialias=True)
        return self._compose([crop, *flip])

    def _evaluation_transform(self) -> Callable[[Any], Tensor]:
        return self._compose([v2.Resize((self.img_size, self.img_size), antialias=True)])

    def _compose(self, geometry: list[torch.nn.Module]) -> Callable[[Any], Tensor]:
        to_float = v2.ToDtype(torch.float32, scale=True)
        normalize = v2.Normalize(self.mean, self.std)
        transform: Callable[[Any], Tensor] = v2.Compose(
            [*geometry, v2.ToImage(), to_float, normalize, v2.ToPureTensor()]
        )
        return transform
