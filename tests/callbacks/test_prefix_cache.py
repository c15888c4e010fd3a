import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from timm.models.eva import Eva
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, ConfigurationError, DigitsDataModule, TokenDrop
from lightning_bsr.callbacks._prefix_data import FixedVariants
from lightning_bsr.callbacks.prefix_cache import PrefixCache
from lightning_bsr.functional._prefix import PrefixForward
from lightning_bsr.functional._prefix_pass import PrefixCounts
from lightning_bsr.functional._prefix_store import FILE_NAME
from plain_modules import BuildsInConfigureModel, BuildsInSetup, ManualOptimization, PlainModule, RandomImages

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
ADVICE = (
    "so what the first blocks of the ViT give for it cannot be read again. Turn the random augmentation off, ask for a "
    "fixed number of variants of each image with PrefixCache(variants=4), or leave PrefixCache out."
)


class Losses(Callback):
    """Notes the loss of each batch, what the cache did by the end, and what was attached."""

    def __init__(self):
        self.losses, self.counts, self.wrapped = [], None, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() if outputs else None)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        blocks = pl_module.model.blocks
        self.wrapped = [i for i, block in enumerate(blocks) if isinstance(vars(block).get("forward"), PrefixForward)]

    def on_validation_end(self, trainer, pl_module):
        self.losses.append(trainer.callback_metrics["val_loss"].item())

    def on_train_end(self, trainer, pl_module):
        if isinstance(forward := vars(pl_module.model.blocks[0]).get("forward"), PrefixForward):
            self.counts = forward.prefix.counts


class Shuffled(RandomImages):
    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size, shuffle=True)


class Noisy(Dataset):
    """Random images: other ones each time."""

    def __init__(self, count=16):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.randn(3, 32, 32) + index, index % 4


def bsr():
    return [BlockSelect([3, 5]), TokenDrop([1, 2, 4], 0.5)]


def fit(make_trainer, data, *callbacks, module_class=PlainModule, max_epochs=3, module=None, **kwargs):
    torch.manual_seed(5)
    module, losses = module or module_class(), Losses()
    make_trainer(*callbacks, losses, max_epochs=max_epochs, **kwargs).fit(module, data)
    return module, losses


def assert_same_run(ours, theirs):
    assert ours[1].losses == theirs[1].losses
    for (name, a), b in zip(ours[0].state_dict().items(), theirs[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def state(module):
    return {
        "flags": [p.requires_grad for p in module.parameters()],
        "attributes": {name: sorted(vars(m)) for name, m in module.model.named_modules()},
    }


@pytest.mark.parametrize(
    ("module_class", "position"),
    [(PlainModule, 0), (PlainModule, 2), (BuildsInConfigureModel, 0), (BuildsInSetup, 1), (ManualOptimization, 2)],
)
def test_fit__losses_and_weights_are_equal_bit_for_bit(module_class, position, make_trainer):
    callbacks = bsr()
    callbacks.insert(position, PrefixCache())
    ours = fit(make_trainer, Shuffled(), *callbacks, module_class=module_class)
    assert_same_run(ours, fit(make_trainer, Shuffled(), *bsr(), module_class=module_class))
    assert ours[1].wrapped == [0, 1, 2]
    # 16 images to train and to validate: computed once for each.
    assert ours[1].counts.misses == 32
    assert ours[1].counts.hits >= 2 * 16 + 2 * 16
    assert state(ours[0]) == state(PlainModule())


class Rotary(PlainModule):
    """A ViT whose blocks are given rotary embeddings."""

    def __init__(self, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        size = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 4}
        self.model = Eva(**size, use_rot_pos_emb=True, **kwargs)


def test_fit__with_rotary_embeddings(make_trainer):
    ours = fit(make_trainer, Shuffled(), *bsr(), PrefixCache(), module_class=Rotary)
    assert_same_run(ours, fit(make_trainer, Shuffled(), *bsr(), module_class=Rotary))
    assert ours[1].counts.misses == 32
    assert ours[1].counts.hits >= 2 * 16 + 2 * 16


def test_fit__refuses_rotary_embeddings_that_move_at_random(make_trainer, images):
    with pytest.raises(ConfigurationError, match=r"^The rope of the ViT 'model' \(Eva\) moves positions at random"):
        fit(make_trainer, images, *bsr(), PrefixCache(), module=Rotary(rope_shift_coords=0.5))


def test_fit__with_a_smaller_last_batch(make_trainer, images):
    class Ragged(RandomImages):
        def loader(self):
            return DataLoader(self.data, batch_size=6)

        train_dataloader = val_dataloader = loader

    ours = fit(make_trainer, Ragged(), *bsr(), PrefixCache())
    assert_same_run(ours, fit(make_trainer, Ragged(), *bsr()))
    assert ours[1].counts.misses == 32


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_fit__in_lower_precision(precision, make_trainer):
    ours = fit(make_trainer, Shuffled(), *bsr(), PrefixCache(), precision=precision)
    assert_same_run(ours, fit(make_trainer, Shuffled(), *bsr(), precision=precision))
    assert ours[1].counts.misses == 32


def test_fit__with_a_warm_up_of_the_keep_rate(make_trainer, images):
    def callbacks():
        return [BlockSelect([3, 5]), TokenDrop([1, 4], 0.5, warmup_epochs=2)]

    ours = fit(make_trainer, images, *callbacks(), PrefixCache(), max_epochs=5)
    assert_same_run(ours, fit(make_trainer, images, *callbacks(), max_epochs=5))
    # The rate is the final one from the third epoch on; each epoch before has tokens of its own, and of the first
    # one's the sanity check computes some.
    assert ours[1].counts.hits == 2 * 32 + 2 * 4


def test_fit__in_a_folder_the_next_run_computes_nothing(make_trainer, tmp_path):
    plain = fit(make_trainer, Shuffled(), *bsr())
    for misses in (32, 0):
        ours = fit(make_trainer, Shuffled(), *bsr(), PrefixCache(place=tmp_path / "prefix"))
        assert_same_run(ours, plain)
        assert ours[1].counts.misses == misses
    assert (tmp_path / "prefix" / FILE_NAME).stat().st_size > 32 * 19 * 32 * 4
    path = tmp_path / "prefix" / FILE_NAME
    path.write_bytes(path.read_bytes()[:-5_000])
    ours = fit(make_trainer, Shuffled(), *bsr(), PrefixCache(place=str(tmp_path / "prefix")))
    assert_same_run(ours, plain)
    assert 0 < ours[1].counts.misses < 32


def test_fit__what_does_not_fit_is_computed_and_said_once(make_trainer, images):
    message = (
        "PrefixCache has no room for all images in 20.0 KiB: what does not fit is computed each time, and with it the "
        "batch that it is in. Raise max_bytes, choose a folder as the place, or store in dtype='bfloat16'."
    )
    with pytest.warns(UserWarning, match="no room") as warnings:
        ours = fit(make_trainer, images, *bsr(), PrefixCache(max_bytes="20KiB"))
    assert [str(warning.message) for warning in warnings if "PrefixCache" in str(warning.message)] == [message]
    assert_same_run(ours, fit(make_trainer, images, *bsr()))
    assert ours[1].counts.hits == 3 * 8  # the images of the first two batches, which the sanity check computed


def test_fit__logs_and_says_what_it_does(make_trainer, images, tmp_path, infos):
    callbacks = [*bsr(), PrefixCache(), ActivationMemoryMonitor()]
    trainer = make_trainer(*callbacks, max_epochs=2, logger=CSVLogger(tmp_path), num_sanity_val_steps=0)
    trainer.fit(PlainModule(), images)
    assert trainer.logged_metrics["prefix_cache/hit_rate"] == 1
    assert trainer.logged_metrics["prefix_cache/stored_mib"] == pytest.approx(2 * 16 * 19 * 32 * 4 / 2**20)
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rates = [line.split(",")[lines[0].split(",").index("prefix_cache/hit_rate")] for line in lines[1:]]
    assert [float(rate) for rate in rates if rate] == [0, 1]
    assert (
        "PrefixCache: blocks 0 to 2 of 6 of the ViT 'model' (VisionTransformer) run once for each image, then their "
        "output is read; 0.0 of at most 1024.0 MiB."
    ) in infos


def test_two_fits_and_copies__behave_like_one(make_trainer, images):
    cache = PrefixCache()
    first = fit(make_trainer, images, *bsr(), cache)
    for callback in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert not callback.is_attached
        assert_same_run(fit(make_trainer, images, *bsr(), callback), first)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume__equals_an_uninterrupted_run(make_trainer, images, tmp_path):
    whole = fit(make_trainer, images, *bsr(), max_epochs=4)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    begun = fit(make_trainer, images, *bsr(), PrefixCache(), checkpoint, max_epochs=2, enable_checkpointing=True)
    module, losses = PlainModule(), Losses()
    # Other weights than those of the checkpoint, of which nothing may be stored.
    torch.nn.init.normal_(module.model.blocks[0].mlp.fc1.weight)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(*bsr(), PrefixCache(), losses, checkpoint, max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, images, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert whole[1].losses[-len(losses.losses) + 1 :] == losses.losses[1:]  # without the sanity check
    for (name, a), b in zip(module.state_dict().items(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert begun[1].counts.hits


def test_evaluation__attaches_nothing(make_trainer, images):
    callbacks = [TokenDrop([1], 0.5), PrefixCache(), spy := Losses()]
    make_trainer(*callbacks).validate(PlainModule(), images, verbose=False)
    assert spy.wrapped == []
    assert not callbacks[1].is_attached


def test_failed_fit__cleans_up(make_trainer, images):
    class Fails(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    module, cache = PlainModule(), PrefixCache(variants=2)
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(*bsr(), cache, Fails()).fit(module, images)
    assert state(module) == state(PlainModule())
    assert "__getitems__" not in vars(images.data)
    assert_same_run(
        fit(make_trainer, images, *bsr(), cache, max_epochs=2),
        fit(make_trainer, images, *bsr(), max_epochs=2),
    )


def raised(call):
    with pytest.raises(ConfigurationError) as error:
        call()
    return str(error.value)


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


def test_bad_models__stop_before_the_first_step(make_trainer, images):
    module = PlainModule()
    message = raised(lambda: make_trainer(BlockSelect([0, 5]), PrefixCache()).fit(module, images))
    assert message == (
        "Block 0 of the ViT 'model' (VisionTransformer) trains, so no block before it can be stored; freeze the first "
        "blocks, such as with BlockSelect([-2, -1])."
    )
    message = raised(lambda: make_trainer(PrefixCache(vit="student")).fit(module, images))
    assert message.startswith("vit='student' names no module of PlainModule")
    assert state(module) == state(PlainModule())


def test_sharded_strategies__are_refused(make_trainer):
    trainer = make_trainer()
    trainer._accelerator_connector.strategy = FSDPStrategy()
    message = raised(lambda: PrefixCache().attach(trainer, PlainModule()))
    assert message == (
        "The strategy is FSDPStrategy, expected a single device or DDP, as PrefixCache needs the whole weights of the "
        "blocks whose output it stores."
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_bytes", "many", "a number of bytes above 0, or a number and a unit such as '512MiB' or '1.5GB'"),
        ("variants", 0, "None or a whole number of at least 1"),
        ("variants", True, "None or a whole number of at least 1"),
        ("seed", -1, "a whole number of at least 0"),
        ("seed", "a", "a whole number of at least 0"),
    ],
)
def test_constructor__checks_its_arguments(name, value, expected):
    assert raised(lambda: PrefixCache(**{name: value})) == f"{name} is {value!r}, expected {expected}."
