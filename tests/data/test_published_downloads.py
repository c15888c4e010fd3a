"""Published data sets that are not there or damaged: what is downloaded, and what is said."""

import functools
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from torchvision import datasets as tv

from data_modules import message, module, ready
from lightning_bsr import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    Flowers102DataModule,
    Food101DataModule,
    OxfordIIITPetDataModule,
)
from published_files import ALL, labels_of, md5, write_cifar, write_food, write_pets

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def serve(tmp_path):
    """Serve the files of a folder on this machine; gives its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_download__unpacks_and_checks_by_torchvision(serve, tmp_path, monkeypatch):
    made = write_cifar(tmp_path / "made", tv.CIFAR10, 10, monkeypatch)
    folder, address = serve
    archive = folder / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(made, made.name)
    monkeypatch.setattr(tv.CIFAR10, "url", f"{address}/cifar.tar.gz")
    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", md5(archive))
    data = ready(CIFAR10DataModule, tmp_path / "root")
    assert labels_of(data, "test") == [*range(10)] * 2

    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", "0" * 32)
    assert message(lambda: ready(CIFAR10DataModule, tmp_path / "other")).startswith(
        f"CIFAR-10 in {tmp_path / 'other' / 'cifar-10-batches-py'} is not there and could not be downloaded from "
        "www.cs.toronto.edu (File not found or corrupted). Expected are "
    )


def test_download__fails_in_a_sentence_that_says_what_to_do(tmp_path):
    assert message(lambda: ready(OxfordIIITPetDataModule, tmp_path)) == (
        f"Oxford-IIIT Pet in {tmp_path / 'oxford-iiit-pet'} is not there and could not be downloaded from "
        "www.robots.ox.ac.uk (<urlopen error no network here>). Expected are its folders images and annotations, "
        "unpacked from https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz, "
        "https://www.robots.ox.ac.uk/~vgg/data/pets/data/annotations.tar.gz; or your own copy as "
        f"{tmp_path}/train/<class>/<images> and {tmp_path}/test/<class>/<images>; or synthetic=True for a dry run on "
        "made-up pictures."
    )


@pytest.mark.parametrize("cls", ALL)
def test_download__not_without_leave_nor_in_setup(cls, tmp_path):
    data = module(cls, tmp_path, download=False)
    for said in (message(data.prepare_data), message(module(cls, tmp_path).setup)):
        assert said.startswith(f"{data.source.name} in {tmp_path / data.source.folder} is not there (Dataset not found")
        assert "downloaded from" not in said
    assert data.num_classes == data.source.num_classes
    assert not [*tmp_path.iterdir()]


def test_sources__are_those_that_torchvision_downloads():
    assert CIFAR10DataModule.source.urls == (tv.CIFAR10.url,)
    assert CIFAR100DataModule.source.urls == (tv.CIFAR100.url,)
    assert OxfordIIITPetDataModule.source.urls == tuple(url for url, _ in tv.OxfordIIITPet._RESOURCES)
    prefix, files = tv.Flowers102._download_url_prefix, tv.Flowers102._file_dict
    assert Flowers102DataModule.source.urls == tuple(prefix + name for name, _ in files.values())
    assert Food101DataModule.source.urls == (tv.Food101._URL,)


def test_damage__of_a_checked_file(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path, tv.CIFAR10, 10, monkeypatch)
    (folder / "data_batch_3").write_bytes(b"half")
    assert message(lambda: ready(CIFAR10DataModule, tmp_path)).startswith(
        f"CIFAR-10 in {folder} is incomplete or damaged and could not be downloaded from www.cs.toronto.edu (<urlopen "
        "error no network here>). Expected are its files data_batch_1 to data_batch_5, test_batch and batches.meta, "
    )


def test_damage__of_lists(tmp_path):
    folder = write_food(tmp_path)
    (folder / "meta" / "train.json").write_text('{"apple_pie": [')
    assert message(lambda: ready(Food101DataModule, tmp_path, download=False)).startswith(
        f"Food-101 in {folder} is incomplete or damaged (Expecting value: line 1 column 16 (char 15)). Expected are "
    )
    folder = write_pets(tmp_path)
    (folder / "annotations" / "test.txt").unlink()
    assert message(lambda: ready(OxfordIIITPetDataModule, tmp_path, download=False)).startswith(
        f"Oxford-IIIT Pet in {folder} is incomplete or damaged ([Errno 2] No such file or directory: "
    )


def test_damage__missing_pictures_are_counted_and_named(tmp_path):
    folder = write_food(tmp_path)
    for number in (1, 3):
        (folder / "images" / "baklava" / f"{number}.jpg").unlink()
    assert message(lambda: ready(Food101DataModule, tmp_path)) == (
        f"2 of the 10 pictures of Food-101 (train) are missing in {tmp_path}: food-101/images/baklava/1.jpg, "
        f"food-101/images/baklava/3.jpg; remove {folder} to have it downloaded again."
    )


def test_damage__a_corrupt_picture_is_named_before_training_or_when_it_is_met(tmp_path):
    path = write_pets(tmp_path) / "images" / "Abyssinian_5.jpg"
    path.write_bytes(path.read_bytes()[:200])
    assert message(lambda: ready(OxfordIIITPetDataModule, tmp_path, check_files=True)) == (
        f"1 of the 14 image files under {tmp_path} cannot be decoded: oxford-iiit-pet/images/Abyssinian_5.jpg; repair "
        "or remove them."
    )
    data = ready(OxfordIIITPetDataModule, tmp_path)
    with pytest.raises(OSError, match=r" cannot be decoded \(") as stop:
        [*data.test_dataloader()]
    assert str(stop.value).startswith(f"The image file {path} cannot be decoded (")
    assert str(stop.value).endswith("); repair or remove it.")
