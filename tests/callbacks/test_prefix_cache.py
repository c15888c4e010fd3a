import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from timm.models.eva import Eva
from torch.utils.data import DataLoader

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, ConfigurationError, TokenDrop
from lightning_bsr.callbacks.prefix_cache import PrefixCache
from lightning_bsr.functional._prefix_store import FILE_NAME
from plain_modules import BuildsInConfigureModel, BuildsInSetup, ManualOptimization, PlainModule, RandomImages
from prefix_runs import Losses, Shuffled, assert_same_run, bsr, fit, raised

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


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
