"""Made-up pictures that stand in for a data set which is not there."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

_GRID = 48  # points at which a picture is computed; it is enlarged from there
_NOISE = 12


class SyntheticPictures(Dataset[tuple[Image.Image, int]]):
    """Striped pictures: a class has two colours and an angle of its own, a picture its own width and place of stripes.

    So a model can learn the classes, and what it has learned holds for other pictures. Each is drawn when it is asked
    for, and always the same.

    Args:
        num_classes: How many classes.
        per_class: Pictures of each.
        size: Width and height of a picture.
        part: Number of the part, such as 0 to train and 1 to test; each has other pictures of the same classes.

    Example:
        >>> pictures = SyntheticPictures(num_classes=10, per_class=5, size=(32, 24), part=0)
        >>> len(pictures), pictures[13]
        (50, (<PIL.Image.Image image mode=RGB size=32x24 at ...>, 3))
    """

    def __init__(self, num_classes: int, per_class: int, size: tuple[int, int], part: int) -> None:
        self.classes = [f"class {label}" for label in range(num_classes)]
        self.targets = [*range(num_classes)] * per_class
        self._size = size
        self._part = part

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        label = self.targets[index]
        of_class, own = np.random.default_rng([label]), np.random.default_rng([label, self._part, index])
        colours = of_class.uniform(0, 255, (2, 3))
        angle = of_class.uniform(0, np.pi)

        x, y = np.meshgrid(*[np.linspace(-1, 1, _GRID)] * 2)
        along = x * np.cos(angle) + y * np.sin(angle)
        stripes = 0.5 + 0.5 * np.sin(own.uniform(6, 12) * along + own.uniform(0, 2 * np.pi))
        pixels = colours[0] + stripes[..., None] * (colours[1] - colours[0]) + own.normal(0, _NOISE, (_GRID, _GRID, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        return image.resize(self._size, Image.Resampling.BILINEAR), label

    def __len__(self) -> int:
        return len(self.targets)
