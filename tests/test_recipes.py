"""The published recipes: what they say, and that each of them trains the real model on made-up pictures."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_bsr.cli import BSRCLI
from lightning_bsr.methods import METHODS

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
BASE_FILES = ("full", "head", "bitfit", "lora", "int8_activations", "sparse_activations", "side_network", "bsr")
DATA = {
    "cifar10": "CIFAR10DataModule",
    "cifar100": "CIFAR100DataModule",
    "pets": "OxfordIIITPetDataModule",
    "flowers": "Flowers102DataModule",
    "food101": "Food101DataModule",
}
# The published hyperparameters (arXiv 2405.10951 and its code).
VIT_BASE = {
    "trainer.max_epochs": None,
    "trainer.max_steps": 20_000,
    "trainer.gradient_clip_val": 1.0,
    "trainer.accumulate_grad_batches": 1,
    "model.init_args.model_name": "vit_base_patch16_224.augreg_in21k",
    "model.init_args.pretrained": True,
    "model.init_args.zero_head": True,
    "model.init_args.optimizer": "sgd",
    "model.init_args.momentum": 0.9,
    "model.init_args.weight_decay": 0.0,
    "model.init_args.layer_decay": None,
    "model.init_args.warmup_steps": 500,
    "model.init_args.label_smoothing": 0.0,
    "data.init_args.batch_size": 128,
    "data.init_args.img_size": 224,
    "data.init_args.scale": [0.05, 1.0],
    "data.init_args.hflip": False,
    "data.init_args.mean": [0.5, 0.5, 0.5],
    "data.init_args.std": [0.5, 0.5, 0.5],
    "data.init_args.synthetic": False,
}
DEIT_SMALL = {
    "trainer.max_epochs": 50,
    "trainer.max_steps": -1,
    "trainer.gradient_clip_val": None,
    "trainer.precision": "bf16-mixed",
    "model.init_args.model_name": "deit_small_patch16_224.fb_in1k",
    "model.init_args.pretrained": True,
    "model.init_args.optimizer": "adamw",
    "model.init_args.lr": 5e-4,
    "model.init_args.layer_decay": 0.75,
    "model.init_args.weight_decay": 0.05,
    "model.init_args.warmup_epochs": 5,
    "model.init_args.label_smoothing": 0.1,
    "data.init_args.batch_size": 128,
    "data.init_args.img_size": 224,
    "data.init_args.scale": [0.05, 1.0],
    "data.init_args.hflip": False,
    "data.init_args.mean": [0.485, 0.456, 0.406],
    "data.init_args.std": [0.229, 0.224, 0.225],
    "data.init_args.synthetic": False,
}
PUBLISHED = {
    "vit_base/cifar10": VIT_BASE | {"model.init_args.lr": 1e-3},
    "vit_base/cifar100": VIT_BASE | {"model.init_args.lr": 1e-2},
    "vit_base/pets": VIT_BASE | {"model.init_args.lr": 1e-3},
    "vit_base/flowers": VIT_BASE | {"model.init_args.lr": 3e-2},
    "vit_base/food101": VIT_BASE | {"model.init_args.lr": 1e-2, "trainer.max_steps": 30_000},
    **{f"deit_small/{data}": DEIT_SMALL for data in DATA},
}
DRY = [
    "--data.synthetic=true",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--model.pretrained=false",
    "--trainer.max_steps=1",
    "--trainer.limit_val_batches=0",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # with pytest's sys.argv
)


def configs(recipe, method):
    return [f"--config={RECIPES / recipe}.yaml", f"--config={RECIPES / 'methods' / method}.yaml"]


@pytest.fixture
def parsed(capsys):
    def parse(*arguments):
        with pytest.raises(SystemExit):
            BSRCLI([*arguments, "--print_config"], run=False)
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def found_at(configuration, key):
    for name in key.split("."):
        configuration = configuration[name]
    return configuration


def test_recipes__are_those_that_are_listed():
    assert {f"{p.parent.name}/{p.stem}" for p in RECIPES.glob("*/*.yaml") if p.parent.name != "methods"} == {*PUBLISHED}
    assert {path.stem for path in (RECIPES / "methods").glob("*.yaml")} == {*BASE_FILES}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipe__has_the_published_hyperparameters(recipe, parsed):
    configuration = parsed(f"--config={RECIPES / recipe}.yaml")
    expected = PUBLISHED[recipe] | {"data.class_path": f"lightning_bsr.{DATA[recipe.split('/')[1]]}"}
    assert {key: found_at(configuration, key) for key in expected} == expected
    assert configuration["trainer"]["callbacks"] is None


@pytest.mark.parametrize("method", BASE_FILES)
def test_method__is_added_to_the_callbacks_that_are_there(method, parsed, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("trainer:\n  callbacks:\n    - class_path: ActivationMemoryMonitor\n")
    recipe, added = configs("deit_small/pets", method)
    callbacks = parsed(recipe, f"--config={own}", added)["trainer"]["callbacks"]
    assert callbacks[0]["class_path"] == "lightning_bsr.ActivationMemoryMonitor"
    if method == "bsr":
        select, drop = callbacks[1:]
        assert (select["class_path"], select["init_args"]["blocks"]) == ("lightning_bsr.BlockSelect", [3, 7, 11])
        assert drop["class_path"] == "lightning_bsr.TokenDrop"
        assert {key: drop["init_args"][key] for key in ("blocks", "keep_rate", "fuse")} == {
            "blocks": [3, 6, 9],
            "keep_rate": 0.5,
            "fuse": True,
        }
    else:
        (tuned,) = callbacks[1:]
        assert (tuned["class_path"], tuned["init_args"]["method"]) == ("lightning_bsr.FineTune", method)
        assert method in METHODS


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipe__trains_the_real_model_a_step_on_made_up_pictures(recipe):
    # Without the matrix units of some CPUs bf16 is slow: once is enough.
    fast = ["--trainer.precision=32-true"] if recipe.startswith("deit_small") and recipe != "deit_small/pets" else []
    cli = BSRCLI([*configs(recipe, "bsr"), *DRY, *fast], run=False)
    before = {name: parameter.detach().clone() for name, parameter in cli.model.named_parameters() if "head" in name}
    frozen = cli.model.model.blocks[0].mlp.fc1.weight.clone()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 1
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    after = dict(cli.model.named_parameters())
    assert all(not torch.equal(after[name], values) for name, values in before.items())
    assert torch.equal(cli.model.model.blocks[0].mlp.fc1.weight, frozen)
    assert after["model.head.weight"].shape[0] == cli.datamodule.num_classes
    if recipe.startswith("vit_base"):
        assert not before["model.head.weight"].any()
