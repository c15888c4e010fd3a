"""Training on two processes: DDP, and parameters that are divided among them."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bsr import (
    ActivationMemoryMonitor,
    BlockSelect,
    ConfigurationError,
    DeltaCheckpoint,
    FineTune,
    LeanActivations,
    PrefixCache,
    QuantizeFrozen,
    TokenDrop,
)
from lightning_bsr.functional import merge_delta
from plain_modules import PlainModule, RandomImages, tiny_vit
from processes import in_two_processes

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),  # plain modules do not
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),  # Python 3.12
]


class Small(PlainModule):
    def __init__(self):
        super().__init__(depth=4)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("mean_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


class Halves(RandomImages):
    """Gives each of two processes every other image, so that both together see the batches of one process."""

    def __init__(self):
        super().__init__(batches=2, batch_size=2)
        self.data.tensors = tuple(tensor[:8] for tensor in RandomImages(batches=2, batch_size=4).data.tensors)

    def train_dataloader(self):
        sampler = DistributedSampler(self.data, shuffle=False)
        return DataLoader(self.data, batch_size=2, sampler=sampler)


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_close(ours, theirs):
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def core():
    return [BlockSelect([2, 3]), TokenDrop([1], 0.5), LeanActivations(), PrefixCache(), ActivationMemoryMonitor()]


def quantized():
    return [QuantizeFrozen(), BlockSelect([1, 3]), TokenDrop([2], 0.5)]


@pytest.mark.parametrize("make", [core, quantized], ids=["core", "quantized"])
def test_ddp__equals_one_process_with_the_doubled_batch(make, make_trainer, tmp_path):
    def fit(rank):
        module = Small()
        # Parameters that get no gradient would make DDP fail in the second batch.
        strategy = DDPStrategy(find_unused_parameters=False)
        trainer = make_trainer(*make(), strategy=strategy, devices=2, max_epochs=2, use_distributed_sampler=False)
        trainer.fit(module, datamodule=Halves())
        return weights(module), {name: float(value) for name, value in trainer.callback_metrics.items()}

    (first, metrics), (second, other_metrics) = in_two_processes(fit, tmp_path)
    alone = Small()
    trainer = make_trainer(*make(), max_epochs=2)
    trainer.fit(alone, datamodule=RandomImages(batches=2, batch_size=4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first, weights(alone))
    assert metrics["mean_loss"] == other_metrics["mean_loss"]
    assert metrics["mean_loss"] == pytest.approx(trainer.callback_metrics["mean_loss"].item(), abs=1e-6)
    if make is core:
        assert metrics["prefix_cache/hit_rate"] == 1
        # Half a batch keeps half the bytes in each process, but for a few of the loss.
        whole = trainer.callback_metrics["memory/activations_mib"].item()
        assert metrics["memory/activations_mib"] == pytest.approx(whole / 2, rel=0.01)


@pytest.mark.parametrize("method", ["lora", "side_network"])
def test_ddp__methods_train_the_same_weights_in_both_processes(method, make_trainer, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")

    def fit(rank):
        module, before = Small(), weights(Small())
        torch.manual_seed(rank)  # new weights may differ at first
        trainer = make_trainer(
            FineTune(method), strategy="ddp", devices=2, use_distributed_sampler=False, limit_val_batches=0
        )
        trainer.fit(module, datamodule=Halves())
        return weights(module), before

    (first, before), (second, _) = in_two_processes(fit, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], before[name]) for name in first)


@pytest.mark.slow
@pytest.mark.usefixtures("short_frontier")
def test_ddp__a_memory_budget_chooses_the_same_in_both_processes(make_trainer, tmp_path):
    def fit(rank):
        module = PlainModule(depth=2, patch_size=8)
        torch.manual_seed(rank)
        for parameter in module.parameters():
            parameter.data += 0.1 * rank * torch.randn_like(parameter)  # so that their probes differ
        select = BlockSelect("auto", memory_budget="0.06MiB", budget_kind="activations")
        trainer = make_trainer(select, strategy="ddp", devices=2, use_distributed_sampler=False, limit_val_batches=0)
        trainer.fit(module, datamodule=Halves())
        return select.state_dict(), weights(module)

    (chosen, first), (others, second) = in_two_processes(fit, tmp_path)
    assert chosen == others != {}
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_ddp__a_delta_is_saved_resumed_and_merged(make_trainer, tmp_path):
    def trained(folder, **resume):
        module = Small()
        checkpoint = DeltaCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, resumable=True)
        trainer = make_trainer(
            BlockSelect([2, 3]),
            TokenDrop([1], 0.5),
            checkpoint,
            strategy="ddp",
            devices=2,
            max_epochs=2,
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_checkpointing=True,
        )
        trainer.fit(module, datamodule=Halves(), **resume)
        return weights(module)

    def fit(rank):
        whole = trained("whole")
        return whole, trained("resumed", ckpt_path=tmp_path / "whole" / "step=2.ckpt", weights_only=True)

    (whole, resumed), others = in_two_processes(fit, tmp_path)
    merged = [merge_delta(Small(), tmp_path / run / "step=4.safetensors") for run in ("whole", "resumed")]
    assert not torch.equal(whole["model.blocks.3.mlp.fc1.weight"], Small().model.blocks[3].mlp.fc1.weight)
    for name, tensor in whole.items():
        assert all(torch.equal(other[name], tensor) for other in (resumed, *others, *merged)), name
    for run, steps in (("whole", (2, 4)), ("resumed", (4,))):
        names = sorted(path.name for path in (tmp_path / run).iterdir())
        assert names == [f"step={step}.{ending}" for step in steps for ending in ("ckpt", "safetensors")]


class Divided(Small):
    """Divides its ViT among the processes as Lightning's guide to FSDP2 does."""

    def __init__(self):
        LightningModule.__init__(self)
        self.model = None

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if self.model is None:
            self.model = tiny_vit(depth=4)
            for part in (*self.model.blocks, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def divided_trainer(make_trainer, *callbacks):
    return make_trainer(
        *callbacks,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        devices=2,
        max_epochs=2,
        limit_val_batches=0,  # it would leave some weights gathered
        use_distributed_sampler=False,
    )


def divisible():
    return [
        BlockSelect([1, 3]),
        TokenDrop([2], 0.5),
        LeanActivations({3: "recompute", 1: "exact"}, skip_unread=True),
        ActivationMemoryMonitor(),
    ]


@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 of torch 2.6 asks for the streams of a GPU")
def test_model_parallel__equals_one_process_with_the_doubled_batch(make_trainer, tmp_path):
    def fit(rank):
        module = Divided()
        trainer = divided_trainer(make_trainer, *divisible())
        trainer.fit(module, datamodule=Halves())
        return {name: p.full_tensor() for name, p in module.named_parameters()}, {*trainer.callback_metrics}

    (first, metrics), (second, _) = in_two_processes(fit, tmp_path)
    alone = Small()
    make_trainer(*divisible(), max_epochs=2).fit(alone, datamodule=RandomImages(batches=2, batch_size=4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(weights(alone), first)
    assert "memory/rss_mib" in metrics
    assert "memory/activations_mib" not in metrics


REFUSALS = {
    "lora": (
        lambda: [FineTune("lora")],
        "The ViT 'model' (FSDPVisionTransformer) is divided among processes, so each process would train adapters of "
        "its own; install LoRA before it is divided.",
    ),
    "side_network": (
        lambda: [FineTune("side_network")],
        "The ViT 'model' (FSDPVisionTransformer) is divided among processes, so each process would train a side "
        "network of its own; do not divide it.",
    ),
    "quantize": (
        lambda: [BlockSelect([1]), QuantizeFrozen()],
        "The strategy of the Trainer is ModelParallelStrategy, expected SingleDeviceStrategy or DDPStrategy: others "
        "may divide the weights that QuantizeFrozen rounds.",
    ),
    "prefix": (
        lambda: [BlockSelect([1]), PrefixCache()],
        "The strategy is ModelParallelStrategy, expected a single device or DDP, as PrefixCache needs the whole "
        "weights of the blocks whose output it stores.",
    ),
    "auto": (
        lambda: [BlockSelect("auto", memory_budget="1MiB")],
        "The ViT 'model' (FSDPVisionTransformer) is divided among processes, so a memory budget cannot choose; choose "
        "before it is.",
    ),
    "lean_budget": (
        lambda: [LeanActivations("recompute", memory_budget="1MiB")],
        "The strategy of the Trainer is ModelParallelStrategy, expected a single device or DDP: a plan for a memory "
        "budget needs undivided weights.",
    ),
}


def test_model_parallel__refuses_what_needs_whole_weights(make_trainer, tmp_path):
    pytest.importorskip("peft")

    def fit(rank):
        messages = {}
        for name, (make, _) in REFUSALS.items():
            with pytest.raises(ConfigurationError) as error:
                divided_trainer(make_trainer, *make()).fit(Divided(), datamodule=Halves())
            messages[name] = str(error.value)
        return messages

    for messages in in_two_processes(fit, tmp_path):
        assert messages == {name: message for name, (_, message) in REFUSALS.items()}
