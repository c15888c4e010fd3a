"""What the published data sets share: where they are looked for, downloaded from, and what stands in for them."""

import os
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlparse

from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.data._base import Pictures
from lightning_bsr.data._pictures import PictureFiles, shorten
from lightning_bsr.data._synthetic import SyntheticPictures
from lightning_bsr.data.image_folder import ImageFolderDataModule

Part = Literal["train", "val", "test"]
_SYNTHETIC_PER_CLASS = {"train": 10, "val": 5, "test": 5}


@dataclass(frozen=True)
class Source:
    """Where a published data set is from, and what it looks like.

    Attributes:
        name: What it is called.
        urls: Files that torchvision downloads.
        folder: Where in ``root`` torchvision keeps it.
        content: What is in there.
        num_classes: How many classes it has.
        picture_size: Width and height of a typical picture.
        parts: Its own parts.
    """

    name: str
    urls: tuple[str, ...]
    folder: str
    content: str
    num_classes: int
    picture_size: tuple[int, int]
    parts: tuple[Part, ...] = ("train", "test")


class PublishedData(ImageFolderDataModule):
    """A data set that torchvision can download, read and check, or a copy of it in one folder per class.

    In ``root`` is either ``train/<class>/<images>``, then all is as with :class:`ImageFolderDataModule`; or what
    torchvision's class of the same name keeps there. If neither is, ``prepare_data`` downloads it.

    Batches are ``(images, labels)`` of shapes [B, 3, img_size, img_size] and [B]. A set that has no validation part of
    its own gives ``val_fraction`` of each training class; the test part is not touched. Training images are random
    crops, evaluation images are resized whole.

    Args:
        root: The folder that holds the data set or will hold it; ``~`` is understood.
        batch_size: Images in a batch.
        img_size: Height and width of the images.
        val_fraction: The part of each training class put aside for validation, above 0 and below 1; of no effect for a
            set with a validation part.
        seed: Chooses the validation split and the training order.
        num_workers: Processes that load batches; by default as many as Lightning suggests for this machine, and no
            more than 8.
        mean: Subtracted from each channel's values, which go from 0 to 1.
        std: Each channel is divided by it.
        scale: The smallest and largest part of a training picture's area that a random crop takes.
        hflip: Mirror half of the training images, left to right.
        check_files: Decode every picture file once before training, to find corrupt and truncated ones. That no file
            is missing is seen to in any case.
        cache: Memory for decoded training and validation pictures, such as ``"8GiB"``: as many of them as fit, at
            their own size, are decoded once. Loading processes share it. None decodes each picture each time.
        download: Whether to download what is not there.
        synthetic: Train on a few made-up pictures with as many classes instead, of the same size as the real ones: for
            a dry run. ``root`` is not looked at.

    Raises:
        ConfigurationError: From the constructor when an argument is out of range; from ``prepare_data`` and ``setup``
            when the data set is not there, incomplete, or cannot be downloaded.
    """

    source: ClassVar[Source]

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 64,
        img_size: int = 224,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int | None = None,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        scale: tuple[float, float] = (0.05, 1.0),
        hflip: bool = False,
        check_files: bool = False,
        cache: int | str | None = None,
        download: bool = True,
        synthetic: bool = False,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            img_size=img_size,
            val_fraction=val_fraction,
            seed=seed,
            num_workers=num_workers,
            mean=mean,
            std=std,
            scale=scale,
            hflip=hflip,
            check_files=check_files,
            cache=cache,
        )
        self.download = download
        self.synthetic = synthetic

    @property
    @override
    def num_classes(self) -> int:
        """How many classes the data set has; nothing is read or downloaded for it."""
        return self.source.num_classes

    @property
    @override
    def class_names(self) -> list[str]:
        """The classes' names, in the order of their indices; the data set must be there."""
        self._scan()
        return list(self._parts["train"].classes)

    @staticmethod
    @abstractmethod
    def read(root: Path, part: Part, download: bool) -> Pictures:
        """Read a part of the data set as torchvision keeps it.

        Args:
            root: The folder that holds it.
            part: Which of ``source.parts``.
            download: Whether to download what is not there.
        """

    @override
    def _open_parts(self, *, prepare: bool) -> dict[str, Pictures]:
        source = self.source
        if self.synthetic:
            return {
                part: SyntheticPictures(source.num_classes, _SYNTHETIC_PER_CLASS[part], source.picture_size, number)
                for number, part in enumerate(source.parts)
            }
        if self._has_class_folders():
            parts = super()._open_parts(prepare=prepare)
            found = len(parts["train"].classes)
            if found != source.num_classes:
                raise ConfigurationError(
                    f"{self.root / 'train'} has {found} class folders, but {source.name} has {source.num_classes} "
                    "classes; ImageFolderDataModule takes any number."
                )
            return parts
        return {part: self._read(part, download=prepare and self.download) for part in source.parts}

    @override
    def _require_test(self) -> None:
        if self._has_class_folders() and not self.synthetic:
            super()._require_test()

    def _has_class_folders(self) -> bool:
        return (self.root / "train").is_dir()

    def _read(self, part: Part, *, download: bool) -> Pictures:
        try:
            pictures = self.read(self.root, part, download)
        except Exception as error:  # torchvision's readers raise whatever they stumble over
            raise ConfigurationError(self._explain(error, download=download)) from error
        if isinstance(pictures, PictureFiles):
            paths = [path for path, _ in pictures.samples]
            missing = [os.path.relpath(path, self.root) for path in paths if not Path(path).is_file()]
            if missing:
                raise ConfigurationError(
                    f"{len(missing)} of the {len(paths)} pictures of {self.source.name} ({part}) are missing in "
                    f"{self.root}: {shorten(missing)}; remove {self.root / self.source.folder} to have it downloaded "
                    "again."
                )
        return pictures

    def _explain(self, error: Exception, *, download: bool) -> str:
        source, cause = self.source, f"{error}".strip().rstrip(".") or type(error).__name__
        folder, hosts = self.root / source.folder, dict.fromkeys(str(urlparse(url).hostname) for url in source.urls)
        # torchvision makes the folder before it downloads.
        state = "incomplete or damaged" if folder.is_dir() and any(folder.iterdir()) else "not there"
        tried = f" and could not be downloaded from {_join(hosts)}" if download else ""
        return (
            f"{source.name} in {folder} is {state}{tried} ({cause}). Expected are {source.content}, unpacked from "
            f"{_join(source.urls)}; or your own copy as {self.root / 'train' / '<class>' / '<images>'} and "
            f"{self.root / 'test' / '<class>' / '<images>'}; or synthetic=True for a dry run on made-up pictures."
        )


def _join(words: Iterable[str]) -> str:
    return ", ".join(words)
