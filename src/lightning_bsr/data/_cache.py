"""Keeps decoded pictures in memory that all loading processes share."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.memory import format_bytes

_SHARED = Path("/dev/shm")  # where Linux has memory that processes share; in containers it is often small


class PictureCache:
    """The first pictures of a list, as many as fit, as they were decoded: RGB bytes at their own size.

    Which pictures have a place is decided here and now by the sizes in their files' headers; each place is filled when
    its picture is first decoded, by whichever process decodes it. So no process has to wait for another, and the same
    pictures are in the cache in every run.

    Args:
        paths: The pictures' files.
        limit: Bytes.
        shared: Whether loading processes share it.

    Attributes:
        nbytes: The bytes of all places.

    Raises:
        ConfigurationError: The machine has less shared memory left than the places take.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "red.png")
        ...     Image.new("RGB", (4, 2), "red").save(path)
        ...     cache = PictureCache([str(path)], limit=100, shared=False)
        >>> cache.nbytes, cache.get(0)
        (24, None)
        >>> cache.put(0, Image.new("RGB", (4, 2), "red"))
        >>> cache.get(0).size
        (4, 2)
    """

    def __init__(self, paths: Sequence[str], limit: int, *, shared: bool) -> None:
        self._sizes: list[tuple[int, int]] = []
        self._starts: list[int] = []
        self.nbytes = 0
        for path in paths:
            width, height = _size(path)
            if self.nbytes + width * height * 3 > limit:
                break
            self._sizes.append((width, height))
            self._starts.append(self.nbytes)
            self.nbytes += width * height * 3
        self._pixels = torch.empty(self.nbytes, dtype=torch.uint8)
        self._filled = torch.zeros(len(self._sizes), dtype=torch.bool)
        if shared:
            _require_shared(self.nbytes)
            self._pixels.share_memory_()
            self._filled.share_memory_()

    def get(self, index: int) -> Image.Image | None:
        """Return the picture at ``index`` of the list, if it is there."""
        if index >= len(self._sizes) or not self._filled[index]:
            return None
        return Image.fromarray(self._place(index))

    def put(self, index: int, image: Image.Image) -> None:
        """Keep the picture at ``index`` of the list, if it has a place."""
        if index < len(self._sizes):
            self._place(index)[...] = np.asarray(image)
            self._filled[index] = True

    def _place(self, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        (width, height), start = self._sizes[index], self._starts[index]
        return self._pixels[start : start + width * height * 3].numpy().reshape(height, width, 3)


def _size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        return 0, 0  # whoever decodes it will say what is wrong


def _require_shared(nbytes: int) -> None:
    if _SHARED.is_dir() and nbytes > (free := shutil.disk_usage(_SHARED).free):
        raise ConfigurationError(
            f"The cache takes {format_bytes(nbytes)}, but {_SHARED} has {format_bytes(free)} left for what loading "
            "processes share; give a smaller cache or num_workers=0, or enlarge it (docker run --shm-size)."
        )
