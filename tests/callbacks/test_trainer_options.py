"""What else a Trainer and a module may do, beside the callbacks: the same as a plain loop with the functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, LeanActivations, PrefixCache, TokenDrop
from lightning_bsr.functional import install_token_drop, select_blocks_
from plain_modules import BuildsInConfigureModel, PlainModule, RandomImages, tiny_vit


class Small(PlainModule):
    def __init__(self):
        super().__init__(depth=3)


def levers():
    return [BlockSelect([1, 2]), TokenDrop([1], 0.5)]


def first_batches(count):
    images = RandomImages()
    images.data.tensors = tuple(tensor[: count * images.batch_size] for tensor in images.data.tensors)
    return images


def assert_equal(ours, theirs):
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# Fewer batches


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"overfit_batches": 2}, 2),
        ({"fast_dev_run": 2}, 1),
        ({"limit_train_batches": 2, "limit_val_batches": 0.5}, 2),
    ],
    ids=["overfit", "fast_dev_run", "limit"],
)
def test_fit__fewer_batches_equal_less_data(options, epochs, make_trainer, images):
    fewer, less = Small(), Small()
    first = make_trainer(*levers(), LeanActivations(), PrefixCache(), max_epochs=2, **options)
    first.fit(fewer, images)
    second = make_trainer(*levers(), max_epochs=epochs)
    second.fit(less, first_batches(2))
    assert first.global_step == second.global_step == 2 * epochs
    assert_equal(fewer, less)
    assert first.callback_metrics["val_loss"] == second.callback_metrics["val_loss"]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation__equals_the_functional_api_on_fewer_batches(stage, make_trainer, images):
    plain, key = Small(), {"validate": "val", "test": "test"}.get(stage, stage)
    trainer = make_trainer(*levers(), **{f"limit_{key}_batches": 3})
    found = getattr(trainer, stage)(Small(), datamodule=images)
    install_token_drop(plain.eval(), [1], 0.5)
    with torch.no_grad():
        outputs = [plain.model(pictures) for pictures, _ in first_batches(3).loader()]
    if stage == "predict":
        assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))
    else:
        losses = [F.cross_entropy(out, labels) for out, (_, labels) in zip(outputs, images.loader(), strict=False)]
        assert found == [{f"{key}_loss": pytest.approx(sum(losses).item() / 3)}]


# Weights in two places


class Tied(Small):
    """A second head shares a weight with a block that trains, and one with a block that does not."""

    def __init__(self):
        super().__init__()
        self.second = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        self.second[0].weight = self.model.blocks[0].attn.proj.weight
        self.second[1].weight = self.model.blocks[2].attn.proj.weight

    def training_step(self, batch, batch_idx):
        token = self.model.forward_features(batch[0])[:, 0]
        return F.cross_entropy(self.model.head(token), batch[1]) + self.second(token).square().mean()


def test_tied_weights__train_if_the_block_does(make_trainer, images):
    module, plain, before = Tied(), Tied(), Tied()
    make_trainer(*levers(), LeanActivations(), PrefixCache(), limit_val_batches=0).fit(module, images)
    select_blocks_(plain, [1, 2])
    install_token_drop(plain, [1], 0.5)
    optimizer = plain.configure_optimizers()
    for batch in images.train_dataloader():
        optimizer.zero_grad()
        plain.training_step(batch, 0).backward()
        optimizer.step()
    assert_equal(module, plain)
    assert module.second[0].weight is module.model.blocks[0].attn.proj.weight
    assert module.second[1].weight is module.model.blocks[2].attn.proj.weight
    changed = [not torch.equal(module.second[i].weight, before.second[i].weight) for i in range(2)]
    assert changed == [False, True]


# timm's gradient checkpointing


def test_grad_checkpointing__same_weights_and_only_what_enters_the_blocks(make_trainer, images):
    modules, kept = [], []
    for checkpointing in (False, True):
        module, monitor = Small(), ActivationMemoryMonitor()
        module.model.set_grad_checkpointing(checkpointing)
        make_trainer(*levers(), monitor, limit_val_batches=0).fit(module, images)
        modules.append(module)
        kept.append([line.activations for line in monitor.report.by_block])
    plain, checkpointed = kept
    for a, b in zip(modules[1].parameters(), modules[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    # What enters blocks 1 and 2: four images, the tokens, 32 channels of 4 bytes. Block 0 is frozen.
    assert checkpointed[:-1] == [0, 0, 4 * 65 * 32 * 4, 4 * 34 * 32 * 4]
    assert checkpointed[-1] == plain[-1]
    assert sum(plain) > 8 * sum(checkpointed)


# torch.compile


class Silent(Small):
    """Logs nothing, which would break the graph."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])


class CompilesItsViT(BuildsInConfigureModel):
    def configure_model(self):
        if self.model is None:
            self.model = torch.compile(tiny_vit(depth=3), backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's, when log breaks a graph
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(Silent(), backend="aot_eager", fullgraph=True),
        lambda: torch.compile(Small(), backend="aot_eager"),
        CompilesItsViT,
    ],
    ids=["module", "module_that_logs", "configure_model"],
)
def test_compile__trains_the_same_weights(make, make_trainer, images):
    compiled, plain = make(), Small()
    options = {"limit_train_batches": 3, "limit_val_batches": 0}
    make_trainer(*levers(), **options).fit(compiled, images)
    make_trainer(*levers(), **options).fit(plain, images)
    found = {name.replace("_orig_mod.", ""): tensor for name, tensor in compiled.state_dict().items()}
    before, changed = Small().state_dict(), set()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(found[name], tensor)
        changed |= {name} if not torch.equal(found[name], before[name]) else set()
    trained = ("model.blocks.1.", "model.blocks.2.", "model.norm.", "model.head.")
    assert changed == {name for name in before if name.startswith(trained)}
