"""Beside the callbacks of Lightning: the same results as without the exact levers, or a refusal before training."""

import copy
from functools import partial
from itertools import combinations
from random import Random

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from lightning_bsr import (
    ActivationMemoryMonitor,
    BlockSelect,
    ConfigurationError,
    DeltaCheckpoint,
    FineTune,
    LeanActivations,
    PrefixCache,
    QuantizeFrozen,
    ReleaseGradients,
    TokenDrop,
)
from lightning_bsr.functional import read_delta
from plain_modules import PlainModule, RandomImages, ResumableLoader, tiny_vit

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:.*The `LearningRateFinder`"),
    pytest.mark.filterwarnings("ignore:The sampler has"),
]


class Small(PlainModule):
    def __init__(self, **kwargs):
        super().__init__(depth=3, **kwargs)
        self.lr, self.batch_size = 0.1, 2

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Images(RandomImages):
    """Small batches, of a size that may be searched for."""

    def __init__(self, batches=4):
        super().__init__(batches, batch_size=2)

    def loader(self):
        return DataLoader(self.data, batch_size=self.batch_size)

    train_dataloader = val_dataloader = loader


def bsr():
    return [BlockSelect([1, 2]), TokenDrop([0, 1], 0.5)]


def exact_levers():
    return [LeanActivations(), PrefixCache(), ActivationMemoryMonitor(every_n_steps=2)]


def state(module):
    return {
        "flags": [p.requires_grad for p in module.parameters()],
        "attributes": {name: sorted(vars(part)) for name, part in module.model.named_modules()},
        "modes": [part.training for part in module.modules()],
        "keys": list(module.state_dict()),
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()],
    }


def assert_equal(ours, theirs):
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(autouse=True)
def _quick_search(monkeypatch):
    # It collects garbage, which takes seconds with all that tests leave.
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)


OTHERS = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    # It judges none of the first ten losses, nor the last.
    "lr_finder": lambda: LearningRateFinder(num_training_steps=15, min_lr=1e-3, max_lr=0.5),
    "batch_size_finder": lambda: BatchSizeFinder(max_trials=1, steps_per_trial=1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_fit__exact_levers_change_nothing_beside(name, make_trainer):
    modules, batches = [], 6 if name == "lr_finder" else 4  # its search ends with the last epoch
    for place in (None, 0, -1):  # without the exact levers; then with them, the other one first, and last
        module, callbacks = Small(), bsr() + ([] if place is None else exact_levers())
        before = state(module)
        callbacks.insert(place or 0, OTHERS[name]()) if place != -1 else callbacks.append(OTHERS[name]())
        make_trainer(*callbacks, max_epochs=3, limit_val_batches=0).fit(module, datamodule=Images(batches))
        assert state(module) == before
        modules.append(module)
    plain, *others = modules
    for module in others:
        assert_equal(module, plain)
        assert module.lr == plain.lr
    assert (plain.lr != Small().lr) == (name == "lr_finder")


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_tuner__leaves_no_trace_and_fit_goes_on(search, make_trainer):
    module, data = Small(), Images(batches=16)  # the search ends with the epoch
    before, weights = state(module), copy.deepcopy(module.state_dict())
    trainer = make_trainer(*bsr(), *exact_levers(), QuantizeFrozen(), limit_val_batches=0)
    if search == "lr_find":
        found = Tuner(trainer).lr_find(module, datamodule=data, num_training=15, min_lr=1e-3, max_lr=0.5)
        assert module.lr == found.suggestion() != Small().lr
    else:  # it tries 2 images, then 4, and keeps the last that went well
        assert Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1) == 4
        assert data.batch_size == 4
    assert state(module) == before
    frozen = ("model.blocks.0.attn.qkv.weight", "model.blocks.0.mlp.fc1.weight")  # which QuantizeFrozen may round
    for key in (key for key in weights if not key.startswith("model.blocks.0.")):
        assert torch.equal(module.state_dict()[key], weights[key]), key
    trainer.fit(module, datamodule=data)
    assert state(module) == before
    assert not torch.equal(module.state_dict()[frozen[0]], weights[frozen[0]])


@pytest.mark.parametrize("make", [OTHERS["ema"], OTHERS["swa"]], ids=["ema", "swa"])
def test_averages__of_weights_that_a_method_adds(make, make_trainer):
    average, method = make(), FineTune("side_network")
    with pytest.raises(ConfigurationError) as error:
        make_trainer(average, method).fit(Small(), datamodule=Images())
    assert str(error.value) == (
        f"{type(average).__name__} copied Small before FineTune('side_network') added its parameters, and would not "
        "average them; put FineTune('side_network') before it in the list of callbacks, and build the ViT in the "
        "constructor of the module."
    )
    module = Small()
    before = state(module)
    make_trainer(FineTune("side_network"), make(), max_epochs=3).fit(module, datamodule=Images())
    assert state(module) == before


class WithHead(Small):
    """Names its ViT as Lightning's BackboneFinetuning wants it."""

    def __init__(self):
        super().__init__(num_classes=0)
        self.backbone = self.model
        self.head = nn.Linear(32, 4)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])


def unfreezing():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5, should_align=False)


@pytest.mark.parametrize(
    ("callbacks", "name"),
    [
        (lambda: [BlockSelect([2])], "BlockSelect"),
        (lambda: [FineTune("last_blocks")], "FineTune('last_blocks')"),
        (lambda: [QuantizeFrozen()], "QuantizeFrozen"),
        (lambda: [PrefixCache()], "PrefixCache"),
    ],
    ids=["select", "method", "quantize", "prefix"],
)
@pytest.mark.parametrize("first", [True, False])
def test_backbone_finetuning__is_refused_beside(callbacks, name, first, make_trainer):
    module, ours = WithHead(), callbacks()
    with pytest.raises(ConfigurationError) as error:
        make_trainer(*([unfreezing(), *ours] if first else [*ours, unfreezing()])).fit(module, datamodule=Images())
    assert str(error.value) == (
        "BackboneFinetuning freezes the ViT 'model' (VisionTransformer) and unfreezes it later on, which "
        f"{name} cannot go together with; leave one of the two callbacks out."
    )


@pytest.mark.filterwarnings("ignore:.*will no longer be optimized")
def test_backbone_finetuning__works_beside_what_selects_nothing(make_trainer):
    modules = []
    for more in (
        [],
        [LeanActivations(), ActivationMemoryMonitor()],
        [LeanActivations("recompute"), ReleaseGradients()],
    ):
        module = WithHead()
        callbacks = [TokenDrop([0, 1], 0.5), unfreezing(), *more]
        make_trainer(*callbacks, max_epochs=3, limit_val_batches=0).fit(module, datamodule=Images())
        modules.append(module)
    assert not torch.equal(modules[0].backbone.blocks[0].mlp.fc1.weight, WithHead().backbone.blocks[0].mlp.fc1.weight)
    for module in modules[1:]:
        assert_equal(module, modules[0])


def test_base_finetuning__of_what_lies_outside_the_vit(make_trainer):
    class ThawsHead(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.head)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.head, optimizer)

    module, fresh = WithHead(), WithHead()
    make_trainer(ThawsHead(), *bsr(), max_epochs=2, limit_val_batches=0).fit(module, datamodule=Images())
    assert not torch.equal(module.head.weight, fresh.head.weight)
    assert torch.equal(module.model.blocks[0].mlp.fc1.weight, fresh.model.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: BlockSelect("auto", memory_budget="1MiB"),
        lambda: FineTune("bsr_auto"),
        lambda: LeanActivations("recompute", memory_budget="1MiB"),
    ],
    ids=["auto", "bsr_auto", "lean"],
)
def test_batch_size_finder__is_refused_beside_a_budget(callback, make_trainer):
    with pytest.raises(ConfigurationError) as error:
        make_trainer(callback(), BatchSizeFinder()).fit(Small(), datamodule=Images())
    assert str(error.value) == (
        "A memory budget chooses for the present batch size, which BatchSizeFinder would change; leave one of the two "
        "out: lightning-bsr plan finds the largest batch in a budget."
    )


def test_our_callbacks__any_three_in_every_order(make_trainer, tmp_path):
    makers = [
        partial(BlockSelect, [1]),
        partial(TokenDrop, [0], 0.5),
        LeanActivations,
        PrefixCache,
        QuantizeFrozen,
        ActivationMemoryMonitor,
        ReleaseGradients,
    ]

    def fit(order):
        module = PlainModule(depth=2, embed_dim=16, patch_size=8)
        checkpoint = DeltaCheckpoint(tmp_path / f"{order}")  # Lightning puts it last in any case
        trainer = make_trainer(
            *(makers[i]() for i in order),
            checkpoint,
            enable_checkpointing=True,
            limit_train_batches=2,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=Images())
        return module, trainer.callback_metrics["loss"], read_delta(checkpoint.best_model_path)

    # Those that change what is learnt, without those that must not.
    expected, loss, delta = fit([0, 1, 4])
    random, numbers, covered = Random(0), range(len(makers)), set()
    while len(covered) < 7 * 6 * 5:
        order = random.sample(numbers, len(makers))
        if not covered.issuperset(combinations(order, 3)):
            covered.update(combinations(order, 3))
            module, metric, saved = fit(order)
            assert_equal(module, expected)
            assert torch.equal(metric, loss)
            assert saved.base_sha256 == delta.base_sha256
            assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in delta.tensors.items())


class Pair(Small):
    """A student, and a teacher that trains too."""

    def __init__(self):
        super().__init__()
        self.teacher = tiny_vit(depth=3, embed_dim=48)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.model(batch[0]), self.teacher(batch[0]))


def test_two_vits__with_two_of_each_callback(make_trainer):
    module = Pair()
    before, weights = state(module), copy.deepcopy(module.state_dict())
    monitors = [ActivationMemoryMonitor(vit=vit) for vit in ("model", "teacher")]
    callbacks = []
    for vit in ("teacher", "model"):
        callbacks += [QuantizeFrozen(vit=vit), PrefixCache(vit=vit), LeanActivations(vit=vit)]
        callbacks += [TokenDrop([0], 0.5, vit=vit), BlockSelect([1] if vit == "model" else [2], vit=vit)]
    make_trainer(*callbacks, *monitors, max_epochs=2, limit_val_batches=0).fit(module, datamodule=Images())
    assert state(module) == before
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert "model.blocks.1.norm1.weight" in changed
    assert "teacher.blocks.2.norm1.weight" in changed
    assert not {"model.blocks.2.norm1.weight", "teacher.blocks.1.norm1.weight"} & changed
    # Both see what both ViTs keep; each has a table of its own.
    first, second = (monitor.report for monitor in monitors)
    assert first.activations == second.activations > 0
    assert first.by_block[2].trained > 0 == second.by_block[2].trained


class StopAfter(EMAWeightAveraging):
    """An average of weights whose run is cut."""

    step = None

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        if self.step is not None and trainer.fit_loop.epoch_loop.total_batch_idx == self.step:
            raise RuntimeError("power cut")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume__inside_an_epoch_with_averages_and_accumulation(make_trainer, tmp_path):
    data = RandomImages(batches=6, batch_size=2, loader_class=ResumableLoader)

    def fit(folder, stop=None, **kwargs):
        module, average = Small(), StopAfter(decay=0.5)
        average.step = stop
        checkpoint = ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = make_trainer(
            *bsr(),
            *exact_levers(),
            average,
            checkpoint,
            max_epochs=2,
            limit_val_batches=0,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            enable_checkpointing=True,
        )
        trainer.fit(module, datamodule=data, **kwargs)
        return module

    whole = fit("whole")
    with pytest.raises(RuntimeError, match="power cut"):
        fit("cut", stop=9)
    resumed = fit("cut", ckpt_path=tmp_path / "cut" / "step=4.ckpt", weights_only=True)
    assert_equal(resumed, whole)
