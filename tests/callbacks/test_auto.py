import pytest
import torch
from timm.models.eva import Eva

from lightning_bsr import (
    ActivationMemoryMonitor,
    BlockSelect,
    ConfigurationError,
    DeltaCheckpoint,
    FineTune,
    LeanActivations,
    TokenDrop,
)
from lightning_bsr.functional import merge_delta, read_delta
from lightning_bsr.memory import parse_bytes
from plain_modules import ManualOptimization, PlainModule

pytestmark = pytest.mark.usefixtures("short_frontier")


class Small(PlainModule):
    """Three blocks: what may be dropped and trained grows fast with their number."""

    def __init__(self):
        super().__init__(depth=3)


class LooksAtValues(Small):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() > 0 else None


class Rotary(PlainModule):
    """A ViT whose blocks are given rotary embeddings."""

    def __init__(self):
        super().__init__()
        self.model = Eva(
            img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=4, use_rot_pos_emb=True
        )


def auto(budget="0.4MiB", kind="activations", **kwargs):
    return BlockSelect("auto", memory_budget=budget, budget_kind=kind, **kwargs)


def forwards(module):
    return [type(vars(block).get("forward")).__name__ for block in module.model.blocks]


def test_auto__with_rotary_embeddings(make_trainer, images):
    select, monitor = auto(), ActivationMemoryMonitor()
    make_trainer(select, monitor).fit(Rotary(), images)
    assert select.budget_plan.choice.blocks
    assert 0 < monitor.report.activations <= parse_bytes("0.4MiB")
    assert monitor.report.activations == select.budget_plan.report.activations


def test_auto__trains_within_the_budget_and_evaluates_as_it_trained(make_trainer, images, capsys, infos, tmp_path):
    select, monitor, module = auto(), ActivationMemoryMonitor(), Small()
    trainer = make_trainer(select, monitor)
    before = [p.detach().clone() for p in module.parameters()]
    trainer.fit(module, images)
    chosen = select.budget_plan.choice
    assert 0 < monitor.report.activations <= parse_bytes("0.4MiB")
    assert monitor.report.activations == select.budget_plan.report.activations
    changed = {
        name.split(".")[2]
        for (name, p), old in zip(module.named_parameters(), before, strict=True)
        if "blocks" in name and not torch.equal(p, old)
    }
    assert changed == set(map(str, chosen.blocks))
    assert f"chosen: {chosen}" in " ".join(capsys.readouterr().out.split())
    assert any(message.startswith("BlockSelect: blocks") for message in infos)
    assert set(forwards(module)) == {"NoneType"}
    assert all(p.requires_grad for p in module.parameters())

    tested = trainer.test(module, images, verbose=False)
    path = tmp_path / "auto.ckpt"
    trainer.save_checkpoint(path)
    # As in another process: a new callback learns from the checkpoint where tokens are dropped.
    fresh = auto()
    again = make_trainer(fresh).test(Small(), images, ckpt_path=path, verbose=False)
    assert again == tested
    assert fresh._auto.chosen == chosen

    # A resumed run goes on with the checkpoint's choice, also if the budget would choose another one now.
    resumed = auto("0.2MiB")
    make_trainer(resumed, max_epochs=2).fit(Small(), images, ckpt_path=path)
    assert resumed._auto.chosen == chosen
    assert resumed.budget_plan is None
    assert any(message.startswith("As in the checkpoint, not as chosen now") for message in infos)


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_auto__is_saved_resumed_and_merged_as_a_delta(make_trainer, images, tmp_path):
    def fit(**resume):
        module, select = PlainModule(depth=2, patch_size=8), auto("0.06MiB")
        checkpoint = DeltaCheckpoint(tmp_path / f"{len(resume)}", "{step}", save_top_k=-1, resumable=True)
        trainer = make_trainer(select, checkpoint, max_epochs=2, limit_val_batches=0, enable_checkpointing=True)
        trainer.fit(module, images, **resume)
        return module, select._auto.chosen

    whole, chosen = fit()
    resumed, again = fit(ckpt_path=tmp_path / "0" / "step=4.ckpt", weights_only=True)
    assert chosen == again
    merged = [
        merge_delta(PlainModule(depth=2, patch_size=8), tmp_path / folder / "step=8.safetensors") for folder in "02"
    ]
    for name, tensor in whole.state_dict().items():
        assert all(torch.equal(other[name], tensor) for other in (resumed.state_dict(), *merged)), name
    saved = read_delta(tmp_path / "0" / "step=8.safetensors").tensors
    assert {name.split(".")[2] for name in saved if "blocks" in name} == set(map(str, chosen.blocks))
    assert sum(tensor.numel() for tensor in saved.values()) < sum(p.numel() for p in whole.parameters())


def test_auto__refuses_another_choice_of_what_is_kept(make_trainer, images):
    module = Small()
    with pytest.raises(ConfigurationError) as error:
        make_trainer(auto(), LeanActivations("recompute")).fit(module, images)
    assert str(error.value) == (
        "A memory budget chooses what each half-block keeps, and so does LeanActivations('recompute'); leave that "
        "callback out, or give it policy={} for its skip_unread alone."
    )
    assert set(forwards(module)) == {"NoneType"}
    select = auto()
    make_trainer(LeanActivations({}, skip_unread=True), select, fast_dev_run=True).fit(module, images)
    assert select.budget_plan.choice.lean


def test_auto__whole_memory_with_the_modules_own_optimizer(make_trainer, images):
    select = auto("1MiB", kind="total")
    make_trainer(select).fit(Small(), images)
    report = select.budget_plan.report
    assert report.peak <= parse_bytes("1MiB")
    # SGD with momentum keeps as many bytes as there are of gradients.
    assert report.optimizer_state == report.gradients > 0


def test_auto__counts_the_optimizer_of_what_the_module_had_frozen(make_trainer, images):
    class Frozen(Small):
        def __init__(self):
            super().__init__()
            self.model.requires_grad_(False)
            self.model.head.requires_grad_(True)

        def training_step(self, batch):
            return {"loss": super().training_step(batch, 0)}

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

    select, module = auto("1MiB", kind="total"), Frozen()
    make_trainer(select).fit(module, images)
    report = select.budget_plan.report
    assert select.budget_plan.choice.blocks
    assert 2 * report.gradients < report.optimizer_state < 2 * report.gradients + 1000
    assert report.peak <= parse_bytes("1MiB")
    assert [name for name, p in module.named_parameters() if p.requires_grad] == [
        "model.head.weight",
        "model.head.bias",
    ]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (ManualOptimization, "ManualOptimization optimizes by itself, so its training step cannot be run"),
        (LooksAtValues, "The training step of LooksAtValues looks at values, which planning has not"),
    ],
)
def test_auto__modules_that_cannot_be_planned(module, message, make_trainer, images):
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(auto()).fit(module(), images)


def test_auto__resume_from_a_fixed_choice_and_back(make_trainer, images, tmp_path):
    trainer = make_trainer(BlockSelect([2]))
    trainer.fit(Small(), images)
    trainer.save_checkpoint(tmp_path / "fixed.ckpt")
    with pytest.raises(ConfigurationError, match="The checkpoint was trained with a fixed choice, and now a memory"):
        make_trainer(auto(), max_epochs=2).fit(Small(), images, ckpt_path=tmp_path / "fixed.ckpt")
    trainer = make_trainer(auto())
    trainer.fit(Small(), images)
    trainer.save_checkpoint(tmp_path / "auto.ckpt")
    with pytest.raises(ConfigurationError, match=r"BlockSelect\(blocks='auto', which chose: train "):
        make_trainer(BlockSelect([2]), max_epochs=2).fit(Small(), images, ckpt_path=tmp_path / "auto.ckpt")


def test_auto__does_not_change_the_random_numbers_of_the_run(make_trainer, images):
    drawn = []

    class Draws(Small):
        def on_train_start(self):
            drawn.append(torch.rand(3))

    for select in (auto(), BlockSelect([2])):
        torch.manual_seed(7)
        module = Draws()
        torch.manual_seed(7)
        make_trainer(select).fit(module, images)
    assert torch.equal(*drawn)


def test_auto__keeps_to_the_tokens_that_token_drop_leaves(make_trainer, images):
    select = auto()
    make_trainer(TokenDrop([1], 0.5), select).fit(Small(), images)
    assert select.budget_plan.choice.drop == {}
    assert [line.tokens for line in select.budget_plan.report.by_block][2:4] == [34, 34]


def test_auto__token_drop_must_come_before(make_trainer, images):
    with pytest.raises(ConfigurationError, match="TokenDrop must come first; put it before in the list of callbacks"):
        make_trainer(auto(), TokenDrop([1], 0.5)).fit(Small(), images)


def test_auto__nothing_fits(make_trainer, images):
    module = Small()
    with pytest.raises(ConfigurationError, match=r"budget is 1\.0 KiB of activations, but fine-tuning the"):
        make_trainer(auto("1KiB")).fit(module, images)
    assert set(forwards(module)) == {"NoneType"}
    assert all(p.requires_grad for p in module.parameters())
    assert "log" not in vars(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": "auto"}, "expected a memory_budget with blocks='auto', and only then"),
        ({"blocks": [3], "memory_budget": "1MiB"}, "expected a memory_budget with blocks='auto', and only then"),
        ({"blocks": "auto", "memory_budget": "lots"}, "memory_budget is 'lots', expected a number of bytes"),
        ({"blocks": "auto", "memory_budget": "1MiB", "head": False}, "expected both to be true"),
        ({"blocks": "auto", "memory_budget": "1MiB", "budget_kind": "some"}, "budget_kind is 'some', expected one of"),
    ],
)
def test_auto__mistakes_in_the_constructor(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        BlockSelect(**arguments)


def test_bsr_auto__as_many_activations_as_bsr(make_trainer, images):
    published, chosen = ActivationMemoryMonitor(), ActivationMemoryMonitor()
    make_trainer(FineTune("bsr"), published).fit(Small(), images)
    module, method = Small(), FineTune("bsr_auto")
    make_trainer(method, chosen).fit(module, images)
    assert 0 < chosen.report.activations <= published.report.activations
    assert method.state_dict()["auto"]["blocks"]
    assert set(forwards(module)) == {"NoneType"}
