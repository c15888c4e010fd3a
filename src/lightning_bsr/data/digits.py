"""Handwritten digits that come with scikit-learn: real images, no download, seconds per epoch."""

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from lightning_bsr.data._base import ClassificationData, TransformedSubset, split_by_class

_TEST_IMAGES = 360
_DARKEST = 16  # the scans count the inked pixels in cells of 4 by 4


class DigitsDataModule(ClassificationData):
    """scikit-learn's 1,797 scanned digits, enlarged from 8x8 to ``img_size`` and given three equal channels.

    Batches are ``(images, labels)`` of shapes [B, 3, img_size, img_size] and [B]. The test part (360
    images) is the same for every seed; the rest is split into training and validation, about 1,200 and 237
    images with the default ``val_fraction``. Both splits keep the proportions of the classes and leave the
    global random state alone.

    The order of the training images depends on ``seed`` and the epoch only, so a run resumed at the end of
    an epoch sees the order of an uninterrupted one. A checkpoint from the middle of an epoch resumes that
    epoch's order from its start, for the batches that were left. Lightning does not store the state of the
    random generators: resumed runs draw other augmentations unless ``augment=False``.

    Args:
        batch_size: Images in a batch.
        img_size: Height and width of the images.
        val_fraction: The part of the non-test images used for validation, above 0 and below 1.
        seed: Chooses the validation split and the training order.
        num_workers: Processes that load batches. The images are in memory, so 0 is fine, although Lightning
            suggests more on a machine with more than two CPUs.
        mean: Subtracted from each channel's values, which go from 0 to 1. The default, like that of ``std``,
            is what the bundled micro ViT was trained with.
        std: Each channel is divided by it.
        augment: Turn, shift and scale the training images a little at random. They are never flipped: a
            mirrored 2 is no 2.

    Raises:
        ConfigurationError: An argument is out of range.

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.num_classes
        10
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 3, 32, 32]), torch.Size([32]))
    """

    def __init__(
        self,
        batch_size: int = 64,
        img_size: int = 32,
        val_fraction: float = 0.165,
        seed: int = 0,
        num_workers: int = 0,
        mean: tuple[float, float, float] = (0.5071, 0.4866, 0.4409),
        std: tuple[float, float, float] = (0.2673, 0.2564, 0.2762),
        augment: bool = True,
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
        self.augment = augment

    @property
    def class_names(self) -> list[str]:
        """The digits "0" to "9"."""
        return [str(digit) for digit in range(10)]

    def setup(self, stage: str | None = None) -> None:
        """Read and split the images; the stage does not matter, a second call changes nothing."""
        if self.datasets:
            return
        digits = load_digits()
        labels = digits.target.tolist()
        images = torch.from_numpy(digits.images).float().div(_DARKEST)
        samples = TensorDataset(images[:, None].expand(-1, 3, -1, -1), torch.tensor(labels))

        rest, test = train_test_split(range(len(labels)), test_size=_TEST_IMAGES, stratify=labels, random_state=0)
        train, val = split_by_class([labels[index] for index in rest], self.val_fraction, self.seed)
        evaluation = self._transform()
        self.datasets = {
            "train": TransformedSubset(
                samples, [rest[position] for position in train], self._transform(augment=self.augment)
            ),
            "val": TransformedSubset(samples, [rest[position] for position in val], evaluation),
            "test": TransformedSubset(samples, test, evaluation),
            "predict": TransformedSubset(samples, test, evaluation),
        }

    def _transform(self, *, augment: bool = False) -> Callable[[Tensor], Tensor]:
        bilinear = v2.InterpolationMode.BILINEAR
        steps: list[torch.nn.Module] = [v2.Resize((self.img_size, self.img_size), antialias=True)]
        if augment:
            steps.append(v2.RandomAffine(10, translate=(0.08, 0.08), scale=(0.9, 1.1), interpolation=bilinear))
        compose: Callable[[Tensor], Tensor] = v2.Compose([*steps, v2.Normalize(self.mean, self.std)])
        return compose
