"""Folders of pictures: what is in them, what is wrong with them, how one file becomes an RGB image."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.data._cache import PictureCache

_NAMED_AT_MOST = 5


def load_rgb(path: str | Path) -> Image.Image:
    """Decode a whole file; grey, palette, transparent and CMYK pictures become RGB.

    Raises:
        OSError: It cannot be read or decoded; names it.
    """
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:
            # Pillow warns when transparency that a palette holds is dropped in one step.
            opaque = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
            return opaque.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever their format's parser stumbles over
        raise OSError(
            f"The image file {path} cannot be decoded ({type(error).__name__}: {error}); repair or remove it."
        ) from error


class PictureFiles(Dataset[tuple[Image.Image, int]]):
    """Picture files and their class indices; each is decoded when it is asked for, or comes from a cache.

    Args:
        samples: Path and class index of each picture.
        classes: The classes' names.

    Attributes:
        cache: Keeps decoded pictures, if there is one.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], classes: Sequence[str]) -> None:
        self.samples = list(samples)
        self.classes = list(classes)
        self.targets = [label for _, label in self.samples]
        self.cache: PictureCache | None = None

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        image = None if self.cache is None else self.cache.get(index)
        if image is None:
            image = load_rgb(path)
            if self.cache is not None:
                self.cache.put(index, image)
        return image, label

    def __len__(self) -> int:
        return len(self.samples)


def read_folder(folder: Path) -> PictureFiles:
    """List the pictures in a folder of class folders.

    Raises:
        ConfigurationError: The folder or a class folder in it cannot be read, or a class has no image.
    """
    for name in list_classes(folder):
        _list_folder(folder / name)
    found = _VisibleFolder(str(folder), allow_empty=True)
    labels = set(found.targets)
    empty = [name for name, index in found.class_to_idx.items() if index not in labels]
    if empty:
        raise ConfigurationError(
            f"{folder} has no image for {len(empty)} of its {len(found.classes)} classes: {shorten(empty)}"
            f"; expected files that end in {', '.join(IMG_EXTENSIONS)}."
        )
    return PictureFiles(found.samples, found.classes)


class _VisibleFolder(ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ImageFolder with hidden folders left out."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = list_classes(Path(directory))
        return classes, {name: index for index, name in enumerate(classes)}


def list_classes(folder: Path) -> list[str]:
    """The sorted names of a folder's subfolders, less hidden ones such as ``.ipynb_checkpoints``.

    Raises:
        ConfigurationError: The folder cannot be read or has no subfolder.
    """
    classes = sorted(entry.name for entry in _list_folder(folder) if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise ConfigurationError(
            f"{folder} holds no class folders, expected one folder of images per class, such as {folder / 'cat'}."
        )
    return classes


def require_folder(folder: Path, expected: str) -> None:
    """Fail unless ``folder`` exists.

    Raises:
        ConfigurationError: It does not, or is a file; the message says what lies beside it.
    """
    if folder.is_dir():
        return
    problem = "is not a folder" if folder.exists() else "does not exist"
    beside = ""
    if folder.parent.is_dir():
        names = sorted(entry.name for entry in _list_folder(folder.parent))
        beside = f"; {folder.parent} holds {shorten(names) or 'nothing'}"
    raise ConfigurationError(f"{folder} {problem}, expected {expected}{beside}.")


def require_same_classes(folder: Path, classes: Sequence[str], reference: Path) -> None:
    """Fail unless ``folder`` has the classes of the folder ``reference``.

    Raises:
        ConfigurationError: Names what is missing and what is extra.
    """
    known, found = set(list_classes(reference)), set(classes)
    differences = []
    if known - found:
        differences.append(f"missing are {shorten(sorted(known - found))}")
    if found - known:
        differences.append(f"unknown are {shorten(sorted(found - known))}")
    if differences:
        raise ConfigurationError(
            f"The class folders in {folder} differ from those in {reference}: {'; '.join(differences)}."
        )


def require_decodable(paths: Sequence[str], root: Path) -> None:
    """Decode every file once, in threads, and fail if any is corrupt or truncated.

    Raises:
        ConfigurationError: Names the first of those files, and says how many there are.
    """
    with ThreadPoolExecutor() as pool:
        sound = pool.map(_is_decodable, paths)
        corrupt = [os.path.relpath(path, root) for path, good in zip(paths, sound, strict=True) if not good]
    if corrupt:
        raise ConfigurationError(
            f"{len(corrupt)} of the {len(paths)} image files under {root} cannot be decoded: "
            f"{shorten(corrupt)}; repair or remove them."
        )


def shorten(names: Iterable[str]) -> str:
    """The first few names, separated by commas, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _NAMED_AT_MOST} more" if len(every) > _NAMED_AT_MOST else ""
    return ", ".join(every[:_NAMED_AT_MOST]) + more


def _list_folder(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ConfigurationError(
            f"{folder} cannot be read ({error.strerror}), expected a folder that this user may list."
        ) from error


def _is_decodable(path: str) -> bool:
    try:
        load_rgb(path)
    except OSError:
        return False
    return True
