"""The five data sets on which Block Selective Reprogramming was published: one small declaration each."""

from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100, Flowers102, Food101, OxfordIIITPet
from typing_extensions import override

from lightning_bsr.data._base import Pictures
from lightning_bsr.data._pictures import PictureFiles
from lightning_bsr.data._published import Part, PublishedData, Source

_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"


class CIFAR10DataModule(PublishedData):
    """CIFAR-10: 60,000 pictures of 32x32 in 10 classes, 50,000 to train with and 10,000 to test.

    Its arguments are those of every published data set, see :class:`~lightning_bsr.data.PublishedData`.

    Example:
        >>> data = CIFAR10DataModule(batch_size=16, img_size=64, num_workers=0, synthetic=True)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, data.num_classes
        (torch.Size([16, 3, 64, 64]), 10)
    """

    source = Source(
        name="CIFAR-10",
        urls=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
        folder="cifar-10-batches-py",
        content="its files data_batch_1 to data_batch_5, test_batch and batches.meta",
        num_classes=10,
        picture_size=(32, 32),
    )

    @staticmethod
    @override
    def read(root: Path, part: Part, download: bool) -> Pictures:
        pictures: Pictures = CIFAR10(root, train=part == "train", download=download)
        return pictures


class CIFAR100DataModule(PublishedData):
    """CIFAR-100: 60,000 pictures of 32x32 in 100 classes, 50,000 to train with and 10,000 to test.

    Its arguments are those of every published data set, see :class:`~lightning_bsr.data.PublishedData`.

    Example:
        >>> CIFAR100DataModule(synthetic=True).num_classes
        100
    """

    source = Source(
        name="CIFAR-100",
        urls=("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
        folder="cifar-100-python",
        content="its files train, test and meta",
        num_classes=100,
        picture_size=(32, 32),
    )

    @staticmethod
    @override
    def read(root: Path, part: Part, download: bool) -> Pictures:
        pictures: Pictures = CIFAR100(root, train=part == "train", download=download)
        return pictures


class OxfordIIITPetDataModule(PublishedData):
    """Oxford-IIIT Pet: 7,349 photographs of 37 breeds of cats and dogs, 3,680 to train with and 3,669 to test.

    Its arguments are those of every published data set, see :class:`~lightning_bsr.data.PublishedData`.

    Example:
        >>> OxfordIIITPetDataModule(synthetic=True).num_classes
        37
    """

    source = Source(
        name="Oxford-IIIT Pet",
        urls=(f"{_OXFORD}/pets/data/images.tar.gz", f"{_OXFORD}/pets/data/annotations.tar.gz"),
        folder="oxford-iiit-pet",
        content="its folders images and annotations",
        num_classes=37,
        picture_size=(500, 375),
    )

    @staticmethod
    @override
    def read(root: Path, part: Part, download: bool) -> Pictures:
        pets = OxfordIIITPet(root, split="trainval" if part == "train" else part, download=download)
        return PictureFiles([*zip(map(str, pets._images), pets._labels, strict=True)], pets.classes)


class Flowers102DataModule(PublishedData):
    """Oxford 102 Flowers: 8,189 photographs in 102 classes; 1,020 to train with, 1,020 to validate, 6,149 to test.

    Its arguments are those of every published data set, see :class:`~lightning_bsr.data.PublishedData`. The classes'
    names are their numbers in the files of the data set, from 1.

    Example:
        >>> data = Flowers102DataModule(synthetic=True, num_workers=0)
        >>> data.setup("fit")
        >>> data.num_classes, [*data.datasets]
        (102, ['train', 'val', 'test', 'predict'])
    """

    source = Source(
        name="Oxford 102 Flowers",
        urls=tuple(f"{_OXFORD}/flowers/102/{file}" for file in ("102flowers.tgz", "imagelabels.mat", "setid.mat")),
        folder="flowers-102",
        content="its folder jpg and its files imagelabels.mat and setid.mat",
        num_classes=102,
        picture_size=(667, 500),
        parts=("train", "val", "test"),
    )

    @staticmethod
    @override
    def read(root: Path, part: Part, download: bool) -> Pictures:
        flowers = Flowers102(root, split=part, download=download)
        classes = [f"{number}" for number in range(1, 103)]  # torchvision 0.21 has no names
        return PictureFiles([*zip(map(str, flowers._image_files), flowers._labels, strict=True)], classes)


class Food101DataModule(PublishedData):
    """Food-101: 101,000 photographs of 101 dishes, 75,750 to train with, some wrongly labelled, and 25,250 to test.

    Its arguments are those of every published data set, see :class:`~lightning_bsr.data.PublishedData`.

    Example:
        >>> Food101DataModule(synthetic=True).num_classes
        101
    """

    source = Source(
        name="Food-101",
        urls=("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",),
        folder="food-101",
        content="its folders images and meta",
        num_classes=101,
        picture_size=(512, 384),
    )

    @staticmethod
    @override
    def read(root: Path, part: Part, download: bool) -> Pictures:
        food = Food101(root, split=part, download=download)
        return PictureFiles([*zip(map(str, food._image_files), food._labels, strict=True)], food.classes)
