"""Weights for the classifier from files of many kinds, and its own checkpoints."""

import functools
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from lightning_bsr import ConfigurationError
from lightning_bsr.models import ViTClassifier
from tiny_classifier import TINY, tiny, write_lightning

# Most fits here look at training alone.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


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
