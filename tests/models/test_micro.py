import importlib
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import Compose, Normalize, ToDtype, ToImage

from lightning_bsr.models import micro, vit_micro_patch4_32

NAME = "vit_micro_patch4_32.cifar100"
WEIGHTS = Path(micro.__file__).parent / "weights" / f"{NAME}.safetensors"
CIFAR10 = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "cifar10"


def stored(key):
    with safe_open(WEIGHTS, "pt") as file:
        return file.get_tensor(key)


def test_create_model__loads_the_file_as_float32():
    model = timm.create_model(NAME, pretrained=True)

    state = model.state_dict()
    assert sum(value.numel() for value in state.values()) == 2_407_140
    with safe_open(WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(state)
        for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            assert state[key].dtype == torch.float32
            assert torch.equal(state[key], file.get_tensor(key).float()), key


def test_create_model__without_tag_has_the_same_weights():
    torch.testing.assert_close(
        timm.create_model("vit_micro_patch4_32", pretrained=True).head.weight, stored("head.weight").float()
    )


def test_create_model__other_number_of_classes_resets_the_head_alone():
    model = timm.create_model(NAME, pretrained=True, num_classes=10)

    assert model.head.weight.shape == (10, 128)
    assert torch.equal(model.blocks[5].mlp.fc1.weight, stored("blocks.5.mlp.fc1.weight").float())
    assert torch.equal(model.pos_embed, stored("pos_embed").float())


def test_create_model__other_image_size_resamples_the_position_embedding():
    model = timm.create_model(NAME, pretrained=True, img_size=64)

    assert model.pos_embed.shape == (1, 1 + 16 * 16, 128)
    # The neighbours on the finer grid surround the coarse one's value.
    fine = model.pos_embed[0, 1:].reshape(8, 2, 8, 2, 128).mean(dim=(1, 3)).reshape(64, 128)
    coarse = stored("pos_embed")[0, 1:].float()
    assert torch.nn.functional.cosine_similarity(fine, coarse).min() > 0.9
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 100)


def test_create_model__not_pretrained_differs_from_the_file():
    assert not torch.equal(timm.create_model(NAME).pos_embed, stored("pos_embed").float())


def test_pretrained_cfg__agrees_with_the_metadata_of_the_file():
    with safe_open(WEIGHTS, "pt") as file:
        config = json.loads(file.metadata()["config"])
    model = timm.create_model(NAME)

    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, config["img_size"], config["img_size"])
    assert data["mean"] == tuple(config["mean"])
    assert data["std"] == tuple(config["std"])
    assert data["crop_pct"] == 1.0
    assert model.num_classes == config["num_classes"]
    assert len(model.blocks) == config["depth"]
    assert model.embed_dim == config["embed_dim"]
    assert model.blocks[0].attn.num_heads == config["num_heads"]
    assert model.patch_embed.patch_size == (config["patch_size"], config["patch_size"])
    assert f"{config['top1_cifar100_test']} %" in (WEIGHTS.parent / "MODEL_CARD.md").read_text()


def test_registry__lists_the_model_with_its_weights():
    assert timm.list_models("vit_micro*") == ["vit_micro_patch4_32"]
    assert timm.list_pretrained("vit_micro*") == [NAME]


def test_registry__reload_is_silent_and_leaves_it_working():
    importlib.reload(micro)

    assert timm.list_pretrained("vit_micro*") == [NAME]
    assert timm.create_model(NAME, pretrained=True).num_classes == 100


def test_vit_micro_patch4_32__called_directly():
    assert vit_micro_patch4_32(num_classes=7)(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_features_only__gives_maps_of_patches():
    model = timm.create_model(NAME, pretrained=True, features_only=True, out_indices=[-1])

    (features,) = model(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 128, 8, 8)


@torch.inference_mode()
def nearest_class_mean_accuracy(model):
    """Train on nothing: an image has the class whose mean feature is the closest to its own."""
    data = timm.data.resolve_model_data_config(model)
    transform = Compose([ToImage(), ToDtype(torch.float32, scale=True), Normalize(data["mean"], data["std"])])

    def features(split, per_class):
        folder = ImageFolder(CIFAR10 / split, transform)
        targets = torch.tensor(folder.targets)
        chosen = torch.cat([torch.nonzero(targets == c).flatten()[:per_class] for c in range(10)])
        images = torch.stack([folder[i][0] for i in chosen.tolist()])
        model.eval()
        embedded = [model.forward_head(model.forward_features(x), pre_logits=True) for x in images.split(250)]
        return torch.nn.functional.normalize(torch.cat(embedded), dim=-1), targets[chosen]

    train, train_targets = features("train", per_class=50)
    means = torch.stack([train[train_targets == c].mean(dim=0) for c in range(10)])
    test, test_targets = features("test", per_class=30)
    return ((test @ means.T).argmax(dim=-1) == test_targets).float().mean().item()


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"needs the CIFAR-10 images in {CIFAR10}")
def test_weights__features_separate_the_classes_of_other_images():
    torch.manual_seed(0)
    pretrained = nearest_class_mean_accuracy(timm.create_model(NAME, pretrained=True))
    random = nearest_class_mean_accuracy(timm.create_model(NAME))

    assert pretrained > 0.5
    assert random < 0.3
