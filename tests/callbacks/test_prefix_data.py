"""PrefixCache and the data: what is random is refused, or stored in a fixed number of variants."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_bsr import DigitsDataModule
from lightning_bsr.callbacks._prefix_data import FixedVariants
from lightning_bsr.callbacks.prefix_cache import PrefixCache
from lightning_bsr.functional._prefix_pass import PrefixCounts
from plain_modules import PlainModule, RandomImages
from prefix_runs import Losses, Shuffled, assert_same_run, bsr, fit, raised

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
ADVICE = (
    "so what the first blocks of the ViT give for it cannot be read again. Turn the random augmentation off, ask for a "
    "fixed number of variants of each image with PrefixCache(variants=4), or leave PrefixCache out."
)


class Noisy(Dataset):
    """Random images: other ones each time."""

    def __init__(self, count=16):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.randn(3, 32, 32) + index, index % 4


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_augmentation__is_refused_before_training(workers, make_trainer):
    class Module(PlainModule):
        def on_train_start(self):
            raise AssertionError("it is too late")

    loader, constructor = DataLoader(Noisy(), batch_size=4, num_workers=workers), DataLoader.__init__
    message = raised(lambda: make_trainer(*bsr(), PrefixCache()).fit(Module(), loader))
    # Lightning wraps it while it asks for loaders, and does not put it back after an error.
    assert DataLoader.__init__ is constructor
    assert message == f"The training dataset (Noisy) gives sample 0 another image each time, {ADVICE}"


def test_random_augmentation__in_the_package_s_own_data(make_trainer):
    class Images(PlainModule):
        def __init__(self):
            super().__init__(num_classes=10)

    data = DigitsDataModule(batch_size=32)
    message = raised(lambda: make_trainer(*bsr(), PrefixCache()).fit(Images(), data))
    assert message == f"The training dataset (TransformedSubset) gives sample 0 another image each time, {ADVICE}"
    fit(make_trainer, DigitsDataModule(batch_size=32, augment=False), *bsr(), PrefixCache(), module=Images(),
        max_epochs=1, limit_train_batches=2, limit_val_batches=1)  # fmt: skip


def test_random_augmentation__in_the_step_is_refused_after_the_first_epoch(make_trainer, images):
    class Augments(PlainModule):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] + torch.randn(()), batch[1]), batch_idx)

    spy = Losses()
    message = raised(lambda: make_trainer(*bsr(), PrefixCache(), spy, max_epochs=3).fit(Augments(), images))
    assert message == (
        "PrefixCache saw 0 of the first 16 images of epoch 1 before: an image reaches the ViT in another form each "
        f"time, {ADVICE}"
    )


def test_parts_of_shuffled_data__are_no_random_augmentation(make_trainer):
    data = RandomImages(batches=200, batch_size=2)
    data.train_dataloader = lambda: DataLoader(data.data, batch_size=2, shuffle=True)
    ours = fit(make_trainer, data, *bsr(), PrefixCache(), limit_train_batches=2, limit_val_batches=0, max_epochs=4)
    assert ours[1].counts.hits < 4


def test_random_augmentation__of_few_forms_is_none(make_trainer, images):
    class Flips(PlainModule):
        def training_step(self, batch, batch_idx):
            flip = torch.rand(len(batch[0]), 1, 1, 1) < 0.5
            return super().training_step((torch.where(flip, batch[0].flip(3), batch[0]), batch[1]), batch_idx)

    ours = fit(make_trainer, images, *bsr(), PrefixCache(), module_class=Flips, max_epochs=8)
    assert_same_run(ours, fit(make_trainer, images, *bsr(), module_class=Flips, max_epochs=8))
    assert ours[1].counts.misses < 8 * 16


def test_checking_the_data__leaves_the_random_numbers_alone(make_trainer):
    ours, theirs = (fit(make_trainer, Shuffled(), *bsr(), *more) for more in ([PrefixCache()], []))
    assert_same_run(ours, theirs)
    assert len(set(ours[1].losses)) > 12  # the order matters


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_variants__all_is_stored_after_so_many_epochs(workers, make_trainer):
    def run(*more, **kwargs):
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        return fit(make_trainer, loader, *bsr(), *more, max_epochs=6, **kwargs)

    ours = run(PrefixCache(variants=2))
    assert ours[1].counts == PrefixCounts(hits=4 * 16, misses=2 * 16)
    with pytest.warns(UserWarning, match="PrefixCache has no room"):
        uncached = run(PrefixCache(variants=2, max_bytes=1))
    assert uncached[1].counts.hits == 0
    assert_same_run(ours, uncached)
    assert run(PrefixCache(variants=2, seed=1))[1].losses != ours[1].losses


def test_variants__what_is_random_elsewhere_is_refused_after_them(make_trainer, images):
    class Augments(PlainModule):
        def training_step(self, batch, batch_idx):
            self.last_epoch = self.current_epoch
            return super().training_step((batch[0] + torch.randn(()), batch[1]), batch_idx)

    module = Augments()
    message = raised(lambda: make_trainer(*bsr(), PrefixCache(variants=2), max_epochs=5).fit(module, images))
    assert message.startswith("PrefixCache saw 0 of the first 16 images of epoch 2 before: an image reaches the ViT")
    assert module.last_epoch == 2


def test_fixed_variants__depend_on_seed_index_and_epoch_alone():
    fixed = FixedVariants(Noisy(), variants=3, seed=0)

    def images(*indices, epoch):
        fixed.epoch.fill_(epoch)
        return [image for image, _ in fixed(list(indices))]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = images(0, 1, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = images(1, 0, epoch=3)
    assert torch.equal(first, again[1])
    assert torch.equal(second, again[0])
    assert not torch.equal(second - 1, first)
    assert not torch.equal(images(0, epoch=1)[0], first)


def test_variants__need_data_that_are_fetched_by_index(make_trainer, images):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(3, 32, 32), 0)] * 4)

    samples = [(torch.zeros(3, 32, 32), 0)] * 4
    for loader, message in (
        (DataLoader(Stream(), batch_size=2), "variants is 2, but the training data (Stream) are not fetched in batches "
         "by index, which choosing a variant takes; use a dataset with __getitem__ and a batch_size."),
        (DataLoader(samples, batch_size=2), "variants is 2, but the training dataset is a list, on which no attribute "
         "can be set; wrap it in a torch.utils.data.Dataset."),
    ):  # fmt: skip
        assert raised(lambda: make_trainer(*bsr(), PrefixCache(variants=2)).fit(PlainModule(), loader)) == message  # noqa: B023
        fit(make_trainer, loader, *bsr(), PrefixCache())
