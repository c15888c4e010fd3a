import copy
import functools
import importlib.util
import math
import pickle
import re

import pytest
import timm
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bsr import ConfigurationError
from lightning_bsr.models import ViTClassifier

pytestmark = [
    # Tiny data in memory need no workers.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # A few batches an epoch are fewer than the logging interval.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # Most fits here look at training alone.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # Lightning walks trees in a way that the newest torch discourages.
    pytest.mark.filterwarnings("ignore:.isinstance\\(treespec, LeafSpec\\). is deprecated:FutureWarning"),
    # The tests pin the accelerator to the CPU also where there is a GPU.
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]

MICRO = "vit_micro_patch4_32"
TINY = {"depth": 3, "embed_dim": 32, "num_heads": 2}
BUNDLED = 'the bundled model_name="vit_micro_patch4_32.cifar100"'


def tiny(**kwargs):
    kwargs = {"model_name": MICRO, "num_classes": 4, "pretrained": False, "model_kwargs": TINY, **kwargs}
    return ViTClassifier(**kwargs)


def loader(size=16, batch_size=4, shuffle=False):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(size) % 4
    images = torch.randn(size, 3, 32, 32, generator=generator) * 0.3
    images += 3 * torch.eye(4, 3)[targets, :, None, None]  # red, green, blue and grey ones
    return DataLoader(TensorDataset(images, targets), batch_size, shuffle=shuffle)


def trainer(tmp_path, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**defaults, **kwargs})


class LearningRates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def groups_by_name(model):
    optimizer = model.trainer.optimizers[0]
    names = {parameter: name for name, parameter in model.model.named_parameters()}
    return {names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]}


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fit__learns_and_logs(tmp_path, optimizer):
    torch.manual_seed(0)
    model = tiny(optimizer=optimizer, lr=3e-3 if optimizer == "adamw" else 3e-2, label_smoothing=0.1)
    run = trainer(tmp_path, max_epochs=12)
    run.fit(model, loader(), loader())

    assert set(run.callback_metrics) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    assert run.callback_metrics["val/accuracy"] > 0.9
    assert "val/accuracy" in run.progress_bar_metrics
    (tested,) = run.test(model, loader(), verbose=False)
    assert tested == pytest.approx(
        {
            "test/loss": run.callback_metrics["test/loss"].item(),
            "test/accuracy": run.callback_metrics["test/accuracy"].item(),
        }
    )
    assert tested["test/accuracy"] > 0.9


def test_validate__loss_and_accuracy_are_means_over_all_images(tmp_path):
    model = tiny(label_smoothing=0.3)
    data = loader(size=10)  # the last batch is smaller than the others
    images, targets = data.dataset.tensors

    (logged,) = trainer(tmp_path).validate(model, data, verbose=False)

    model.eval()
    with torch.inference_mode():
        logits = model(images)
    assert logged == pytest.approx(
        {
            "val/loss": torch.nn.functional.cross_entropy(logits, targets).item(),
            "val/accuracy": (logits.argmax(1) == targets).float().mean().item(),
        },
        abs=1e-5,
    )


def test_training_step__smooths_the_labels(tmp_path):
    model = tiny(label_smoothing=0.3)
    losses = []
    model.log = lambda name, value, **_: losses.append((name, value))
    images, targets = next(iter(loader()))

    loss = model.training_step((images, targets), 0)

    expected = torch.nn.functional.cross_entropy(model(images), targets, label_smoothing=0.3)
    torch.testing.assert_close(loss, expected)
    assert losses[0] == ("train/loss", loss)


@pytest.mark.parametrize("with_targets", [True, False])
def test_predict__gives_probabilities(tmp_path, with_targets):
    model = tiny()
    data = loader()
    images = data.dataset.tensors[0]
    if not with_targets:
        data = DataLoader(images, batch_size=4)

    probabilities = torch.cat(trainer(tmp_path).predict(model, data))

    assert probabilities.shape == (16, 4)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(16))
    with torch.inference_mode():
        torch.testing.assert_close(probabilities, model.eval()(images).softmax(-1))


def test_classifier__pickles_and_deepcopies():
    model = tiny()
    images = torch.randn(2, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(images), model(images))


# --- optimizer and schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "warmup_steps"),
    [({}, 0), ({"warmup_steps": 3}, 3), ({"warmup_epochs": 1.5}, 6)],
    ids=["none", "steps", "epochs"],
)
def test_schedule__warms_up_then_follows_the_cosine(tmp_path, warmup, warmup_steps):
    rates = LearningRates()
    model = tiny(lr=0.01, **warmup)
    trainer(tmp_path, max_epochs=3, callbacks=[rates]).fit(model, loader())

    expected = [
        0.01 * (step + 1) / (warmup_steps + 1)
        if step < warmup_steps
        else 0.005 * (1 + math.cos(math.pi * (step - warmup_steps) / (12 - warmup_steps)))
        for step in range(12)
    ]
    assert [seen[0] for seen in rates.seen] == pytest.approx(expected)
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


def test_schedule__counts_optimizer_steps_not_batches(tmp_path):
    rates = LearningRates()
    model = tiny(lr=0.01, warmup_epochs=1)
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[rates])
    run.fit(model, loader(size=20))  # 5 batches, so 3 optimizer steps an epoch, 3 of 6 to warm up

    steps = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    factors = [1 / 4, 2 / 4, 3 / 4, 1, 0.75, 0.25]
    assert [seen[0] for seen in rates.seen] == pytest.approx([0.01 * factors[step] for step in steps])


def test_schedule__warmup_longer_than_the_run_still_runs(tmp_path):
    model = tiny(warmup_steps=500)
    run = trainer(tmp_path, fast_dev_run=True)
    run.fit(model, loader(), loader())
    assert run.global_step == 1


def test_schedule__resumes(tmp_path):
    model = tiny(lr=0.01, warmup_steps=2)
    straight = LearningRates()
    trainer(tmp_path, max_epochs=2, callbacks=[straight]).fit(model, loader())

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    first, second = LearningRates(), LearningRates()
    run = trainer(tmp_path, max_epochs=2, callbacks=[first, Stop()])
    run.fit(tiny(lr=0.01, warmup_steps=2), loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_epochs=2, callbacks=[second]).fit(
        tiny(lr=0.01, warmup_steps=2), loader(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert len(first.seen) == len(second.seen) == 4
    assert first.seen + second.seen == straight.seen


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_optimizer__spares_biases_norms_and_embeddings_the_decay(tmp_path, weight_decay):
    model = tiny(weight_decay=weight_decay)
    trainer(tmp_path, fast_dev_run=True).fit(model, loader())

    groups = groups_by_name(model)
    assert set(groups) == {name for name, _ in model.model.named_parameters()}
    for name, group in groups.items():
        spared = name in ("cls_token", "pos_embed") or name.endswith("bias") or "norm" in name
        assert group["weight_decay"] == (0.0 if spared else weight_decay), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_optimizer__leaves_frozen_parameters_out(tmp_path, weight_decay, layer_decay):
    model = tiny(weight_decay=weight_decay, layer_decay=layer_decay)
    model.model.requires_grad_(False)
    model.model.head.requires_grad_(True)
    model.model.blocks[1].attn.requires_grad_(True)
    before = copy.deepcopy(model.model.state_dict())
    trainer(tmp_path, max_epochs=1).fit(model, loader())

    trained = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert set(groups_by_name(model)) == trained
    changed = {name for name, value in model.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained


def test_optimizer__layer_decay_scales_the_rate_with_depth(tmp_path):
    rates = LearningRates()
    model = tiny(lr=0.01, layer_decay=0.5)
    trainer(tmp_path, max_epochs=1, callbacks=[rates]).fit(model, loader())

    expected = {"head": 0, "norm": 1, "blocks.2": 1, "blocks.1": 2, "blocks.0": 3, "patch_embed": 4}
    groups = groups_by_name(model)
    for name, group in groups.items():
        power = next((p for prefix, p in expected.items() if name.startswith(f"{prefix}.")), 4)
        assert group["initial_lr"] == pytest.approx(0.01 * 0.5**power), name
    assert rates.seen[0] == [group["initial_lr"] for group in model.trainer.optimizers[0].param_groups]
    for first, later in zip(rates.seen[0], rates.seen[2], strict=True):
        assert later == pytest.approx(first / 2)


def test_optimizer__arguments_arrive(tmp_path):
    model = tiny(betas=(0.8, 0.98), weight_decay=0.3)
    trainer(tmp_path, fast_dev_run=True).fit(model, loader())
    assert isinstance(model.trainer.optimizers[0], torch.optim.AdamW)
    assert {group["betas"] for group in model.trainer.optimizers[0].param_groups} == {(0.8, 0.98)}

    model = tiny(optimizer="sgd", momentum=0.7)
    trainer(tmp_path, fast_dev_run=True).fit(model, loader())
    assert isinstance(model.trainer.optimizers[0], torch.optim.SGD)
    assert {group["momentum"] for group in model.trainer.optimizers[0].param_groups} == {0.7}


def test_fit__all_frozen(tmp_path):
    model = tiny()
    model.model.requires_grad_(False)
    with pytest.raises(ConfigurationError) as error:
        trainer(tmp_path, max_epochs=1).fit(model, loader())
    assert str(error.value) == (
        "No parameter of the model requires gradients, expected at least one to train; unfreeze a part of it."
    )


def test_fit__endless(tmp_path):
    with pytest.raises(ConfigurationError) as error:
        trainer(tmp_path, max_epochs=-1).fit(tiny(), loader())
    assert str(error.value) == (
        "The Trainer has no last step, expected one for the cosine schedule to end at; give it max_epochs or max_steps."
    )


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(3, 32, 32), 0


def test_fit__data_without_length(tmp_path):
    data = DataLoader(Endless(), batch_size=2)
    run = trainer(tmp_path, max_steps=3)
    run.fit(tiny(warmup_steps=1), data)
    assert run.global_step == 3

    with pytest.raises(ConfigurationError) as error:
        trainer(tmp_path, max_steps=3).fit(tiny(warmup_epochs=0.5), data)
    assert str(error.value) == (
        "warmup_epochs is 0.5, but the training data have no length to count epochs by; give warmup_steps instead."
    )


# --- weights from files -----------------------------------------------------------------------------------


def assert_same_but_for_the_head(model, state, head_too):
    loaded = model.model.state_dict()
    assert set(loaded) == set(state)
    for key, value in state.items():
        if key.startswith("head.") and not head_too:
            assert loaded[key].shape[0] == model.hparams.num_classes
        else:
            assert torch.equal(loaded[key], value), key


def write_safetensors(model, path):
    save_file(model.model.state_dict(), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_torch(model, path, wrap=lambda state: state):
    torch.save(wrap(model.model.state_dict()), path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def write_lightning(model, path):
    run = trainer(path.parent, fast_dev_run=True)
    run.fit(model, loader())
    run.save_checkpoint(path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


@pytest.mark.parametrize("num_classes", [4, 9])
@pytest.mark.parametrize(
    "write",
    [
        write_safetensors,
        write_torch,
        functools.partial(write_torch, wrap=lambda state: {"state_dict": state, "epoch": 3}),
        functools.partial(write_torch, wrap=lambda state: {"model": state}),
        functools.partial(write_torch, wrap=lambda state: {f"module.{k}": v for k, v in state.items()}),
        write_lightning,
    ],
    ids=["safetensors", "torch", "state_dict", "model", "module", "lightning"],
)
def test_checkpoint_path__loads(tmp_path, write, num_classes):
    torch.manual_seed(0)
    source = tiny()
    path = write(source, tmp_path / "weights")

    model = tiny(pretrained=True, checkpoint_path=path, num_classes=num_classes)

    assert_same_but_for_the_head(model, source.model.state_dict(), head_too=num_classes == 4)
    assert "state_dict" not in model.model.pretrained_cfg
    assert model.hparams.checkpoint_path == str(path)


def test_checkpoint_path__without_head_or_in_half_precision(tmp_path):
    source = tiny()
    state = {key: value.half() for key, value in source.model.state_dict().items() if "head" not in key}
    save_file(state, tmp_path / "backbone.safetensors")

    model = tiny(checkpoint_path=tmp_path / "backbone.safetensors")

    assert model.model.head.weight.shape == (4, 32)
    torch.testing.assert_close(model.model.pos_embed, state["pos_embed"].float())
    assert {value.dtype for value in model.model.state_dict().values()} == {torch.float32}


def test_checkpoint_path__other_image_size_resamples(tmp_path):
    path = write_safetensors(tiny(), tmp_path / "weights")
    model = tiny(checkpoint_path=path, model_kwargs={**TINY, "img_size": 48})
    assert model.model.pos_embed.shape == (1, 1 + 12 * 12, 32)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 4)


def test_checkpoint_path__downloads_nothing(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    save_file(state, tmp_path / "tiny.safetensors")
    model = ViTClassifier("vit_tiny_patch16_224", checkpoint_path=tmp_path / "tiny.safetensors")
    assert_same_but_for_the_head(model, state, head_too=False)


def test_checkpoint_path__another_architecture(tmp_path):
    path = write_safetensors(tiny(model_kwargs={**TINY, "depth": 2, "init_values": 0.1}), tmp_path / "weights")
    with pytest.raises(ConfigurationError) as error:
        tiny(checkpoint_path=path, num_classes=9)
    assert str(error.value) == (
        f"checkpoint_path is '{path}', whose weights do not fit vit_micro_patch4_32: 12 missing "
        "(blocks.2.norm1.weight, blocks.2.norm1.bias, blocks.2.attn.qkv.weight, ...); 4 unexpected "
        "(blocks.0.ls1.gamma, blocks.0.ls2.gamma, blocks.1.ls1.gamma, ...)."
    )


def test_checkpoint_path__another_width(tmp_path):
    path = write_safetensors(tiny(model_kwargs={**TINY, "mlp_ratio": 2}), tmp_path / "weights")
    with pytest.raises(ConfigurationError) as error:
        tiny(checkpoint_path=path)
    assert str(error.value) == (
        f"checkpoint_path is '{path}', whose weights do not fit vit_micro_patch4_32: 9 of another shape "
        "(blocks.0.mlp.fc1.weight, blocks.0.mlp.fc1.bias, blocks.0.mlp.fc2.weight, ...)."
    )


def test_checkpoint_path__not_there(tmp_path):
    path = tmp_path / "none.ckpt"
    with pytest.raises(ConfigurationError) as error:
        tiny(checkpoint_path=path)
    assert str(error.value) == f"checkpoint_path is '{path}', expected an existing file."


def test_checkpoint_path__unknown_suffix(tmp_path):
    path = tmp_path / "weights.npz"
    path.touch()
    with pytest.raises(ConfigurationError) as error:
        tiny(checkpoint_path=path)
    assert str(error.value) == (
        f"checkpoint_path is '{path}', expected a file ending in one of .safetensors, .bin, .ckpt, .pt, .pth."
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_checkpoint_path__corrupt(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as error:
        tiny(checkpoint_path=path)
    assert re.fullmatch(
        rf"checkpoint_path is '{re.escape(str(path))}', which cannot be read \(\w+\); expected a safetensors "
        r"file or a torch file of tensors that loads with weights_only=True\.",
        str(error.value),
    )


def test_checkpoint_path__truncated(tmp_path):
    path = write_torch(tiny(), tmp_path / "weights")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigurationError, match=r"which cannot be read \(\w+\); expected"):
        tiny(checkpoint_path=path)


def test_checkpoint_path__code_in_the_file_does_not_run(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": functools.partial(print, "ran")}, path)
    with pytest.raises(ConfigurationError, match=r"which cannot be read \(UnpicklingError\); expected"):
        tiny(checkpoint_path=path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {"a": 1}}])
def test_checkpoint_path__no_state_dict(tmp_path, content):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ConfigurationError) as error:
        tiny(checkpoint_path=path)
    assert str(error.value) == (
        f"checkpoint_path is '{path}', which holds no state dict; expected one at the top, under "
        "'state_dict' or under 'model'."
    )


# --- checkpoints of the classifier ------------------------------------------------------------------------


def test_load_from_checkpoint__needs_neither_network_nor_the_first_file(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    save_file(state, tmp_path / "start.safetensors")
    model = ViTClassifier(
        "vit_tiny_patch16_224",
        num_classes=4,
        checkpoint_path=tmp_path / "start.safetensors",
        model_kwargs={"depth": 1, "img_size": 32},
        lr=3e-4,
    )
    path = write_lightning(model, tmp_path / "last")
    (tmp_path / "start.safetensors").unlink()

    loaded = ViTClassifier.load_from_checkpoint(path)

    assert_same_but_for_the_head(loaded, model.model.state_dict(), head_too=True)
    assert (loaded.lr, loaded.hparams.pretrained, loaded.hparams.checkpoint_path) == (3e-4, False, None)
    # The run itself is remembered as it was.
    assert model.hparams.pretrained is True
    assert model.hparams.checkpoint_path == str(tmp_path / "start.safetensors")


def test_load_from_checkpoint__takes_new_arguments(tmp_path):
    path = write_lightning(tiny(lr=0.1), tmp_path / "last")
    assert ViTClassifier.load_from_checkpoint(path, lr=0.2).lr == 0.2


# --- what cannot be built ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0, expected 2 or more."),
        ({"num_classes": 1}, "num_classes is 1, expected 2 or more."),
        ({"optimizer": "lion"}, "optimizer is 'lion', expected 'adamw' or 'sgd'."),
        ({"lr": 0.0}, "lr is 0.0, expected a number above 0."),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected 0 or more."),
        ({"momentum": 1.0}, "momentum is 1.0, expected at least 0 and below 1."),
        ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0), expected two numbers, each at least 0 and below 1."),
        ({"betas": (0.9,)}, "betas is (0.9,), expected two numbers, each at least 0 and below 1."),
        ({"layer_decay": 0.0}, "layer_decay is 0.0, expected a number above 0 and at most 1, or None."),
        ({"warmup_steps": -1}, "warmup_steps is -1, expected 0 or more."),
        ({"warmup_epochs": -0.5}, "warmup_epochs is -0.5, expected 0 or more."),
        (
            {"warmup_steps": 5, "warmup_epochs": 0.5},
            "warmup_steps is 5 and warmup_epochs is 0.5, expected only one of them.",
        ),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected at least 0 and below 1."),
        (
            {"model_kwargs": {"num_classes": 5}},
            "model_kwargs has num_classes, expected only further arguments of the timm model; those are "
            "arguments of ViTClassifier itself.",
        ),
        (
            {"model_kwargs": {"dept": 5}},
            "model_kwargs is {'dept': 5}, which does not fit vit_micro_patch4_32: "
            "VisionTransformer.__init__() got an unexpected keyword argument 'dept'.",
        ),
        (
            {"model_kwargs": {"num_heads": 3}},
            "model_kwargs is {'num_heads': 3}, which does not fit vit_micro_patch4_32: dim should be "
            "divisible by num_heads.",
        ),
        (
            {"model_name": "qqqqqqqqqqqqqqq"},
            "model_name is 'qqqqqqqqqqqqqqq', expected the name of a timm model; timm.list_models() has them all.",
        ),
        (
            {"model_name": "vit_micro_patch4_32.in1k"},
            "model_name is 'vit_micro_patch4_32.in1k', but vit_micro_patch4_32 has no weights with the tag "
            "'in1k'; available are vit_micro_patch4_32.cifar100.",
        ),
        (
            {"model_name": "vit_base_patch16_18x2_224", "model_kwargs": {}, "pretrained": True},
            "pretrained is True, but no weights are published for vit_base_patch16_18x2_224; give "
            "checkpoint_path=..., pretrained=False, or one of the names in timm.list_pretrained().",
        ),
    ],
)
def test_classifier__refuses(arguments, message):
    with pytest.raises(ConfigurationError) as error:
        tiny(**arguments)
    assert str(error.value) == message


def test_model_name__misspelt():
    with pytest.raises(ConfigurationError) as error:
        tiny(model_name="vit_micro_patch4_23")
    # The names after the first depend on timm's version.
    assert re.fullmatch(
        r"model_name is 'vit_micro_patch4_23', expected the name of a timm model; close matches are "
        r"vit_micro_patch4_32, \w+, \w+\.",
        str(error.value),
    )


def test_pretrained__no_network(monkeypatch, tmp_path):
    if importlib.util.find_spec("huggingface_hub"):
        # Without it, the hub is asked again and again for most of a minute.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError) as error:
        ViTClassifier("vit_tiny_patch16_224")
    assert re.fullmatch(
        r"The weights of vit_tiny_patch16_224 could not be downloaded \(.+\); give checkpoint_path=\.\.\. of "
        rf"a local file, pretrained=False, or {re.escape(BUNDLED)}\.",
        str(error.value),
    )


# --- the head ---------------------------------------------------------------------------------------------


def test_zero_head__starts_at_even_odds_and_can_be_loaded_over(tmp_path):
    model = ViTClassifier(num_classes=100, zero_head=True)  # whose weights bring a head of 100 classes
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), torch.zeros(2, 100))
    path = write_lightning(model, tmp_path / "last")  # after a step of training
    loaded = ViTClassifier.load_from_checkpoint(path)
    assert loaded.model.head.weight.any()
    assert torch.equal(loaded.model.head.weight, model.model.head.weight)


def test_zero_head__needs_one_linear_layer():
    with pytest.raises(ConfigurationError) as stop:
        ViTClassifier("deit_tiny_distilled_patch16_224", pretrained=False, model_kwargs={"depth": 1}, zero_head=True)
    assert str(stop.value) == (
        "zero_head is True, expected a head that is one linear layer; that of VisionTransformerDistilled is tuple."
    )
