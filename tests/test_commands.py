"""Every command of the documentation runs, in its order, made short: one small batch, and the smallest model.

A block is left out by a comment directly above it that says why: ``<!-- not run: downloads -->``.
"""

import re
import runpy
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from PIL import Image

from lightning_bsr import DigitsDataModule, ViTClassifier
from lightning_bsr.cli import main
from pages import PAGES, ROOT, blocks_of, commands_in, configurations_of

pytestmark = [
    pytest.mark.documentation,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        "ignore:LightningCLI's args parameter is intended to run from within Python",  # with pytest's sys.argv
        "ignore:Starting from v1.9.0, `tensorboardX` has been removed",  # the CSV logger is meant
        "ignore:Checkpoint directory .* exists and is not empty",  # a command that is run again
        "ignore:The dirpath has changed from",  # what is evaluated comes from another run's folder
        "ignore:Be aware that when using `ckpt_path`",  # and had other callbacks
        "ignore:Precision bf16-mixed is not supported by the model summary",
        "ignore:`ViTClassifier.configure_optimizers` will be overridden",  # as --optimizer asks for
    ),
]

MICRO = ["--model=vit_micro_patch4_32", "--batch-size=2"]
ONE_STEP = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.max_steps=-1",
    *(f"--trainer.limit_{part}_batches=1" for part in ("train", "val", "test")),
]
# What is added to the arguments; the last of several counts.
SHORT_COMMANDS = {
    "fit": ONE_STEP,
    "test": ONE_STEP[-1:],
    "compare": [*ONE_STEP, "--lrs=1e-3", "--seeds=0", "--jobs=1", "--equal_time=false", "--timing_steps=1"],
    "visualize": ["--trainer.limit_val_batches=1"],
}
SMALL_RECIPE = [
    "--data.synthetic=true",
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--data.img_size=32",
    "--model.pretrained=false",
    "--model.model_name=vit_micro_patch4_32",
]
SHORT_SCRIPTS = {
    "accuracy.py": ["--epochs=1", "--learning-rates", "1e-3", "--seeds", "0"],
    "alternatives.py": [*MICRO, "--turns=1"],
    "attention.py": ["--tokens", "9", "--turns=1"],
    "budget_curve.py": [],
    "export.py": ["--models", "vit_micro_patch4_32", "--repeats=1"],
    "moe.py": ["--model=vit_micro_patch4_32", "--images=1", "--width=64", "--repeats=1"],
    "monitor.py": ["--steps=3", "--batch-size=2", "--rounds=1"],
    "multitask.py": ["--steps=1", "--seeds", "0"],
    "planning.py": ["--models", "vit_micro_patch4_32", "--batch-sizes", "1", "--no-large"],
    "profile_step.py": [*MICRO, "--turns=1"],
    "step.py": [*MICRO, "--repeats=1"],
    "training_state.py": MICRO,
}
MY_PACKAGE = """
from lightning_bsr import ViTClassifier


class MyModule(ViTClassifier):
    pass
"""
IN_PROCESSES = ("accuracy.py", "multitask.py")  # their workers import what they were started as
CONFIGURATION = """
trainer:
  callbacks:
    - class_path: BlockSelect
      init_args: {blocks: [3, 7, 11]}
    - class_path: TokenDrop
      init_args: {blocks: [3, 6, 9], keep_rate: 0.5}
    - class_path: DeltaCheckpoint
      init_args: {dirpath: deltas, filename: best}
    - class_path: ModelCheckpoint
      init_args: {dirpath: path/to, save_last: true, filename: file}
"""


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The files that a run of ``CONFIGURATION`` leaves, and pictures in ten folders."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "config.yaml").write_text(CONFIGURATION)
        main(["fit", "--config=config.yaml", *ONE_STEP])
    torch.manual_seed(0)
    safetensors.torch.save_file(ViTClassifier(num_classes=10).state_dict(), folder / "base.safetensors")
    digits = DigitsDataModule()
    digits.setup("fit")
    for number, (image, _) in zip(range(60), digits.train_dataloader().dataset, strict=False):
        split = ("train", "train", "val", "test")[number // 10 % 4]
        for name in ("cifar10", "pictures"):
            path = folder / "path" / "to" / name / split / str(number % 10) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(image).save(path)
    (folder / "my_package.py").write_text(MY_PACKAGE)
    for name in ("cat.jpg", "dog.jpg"):
        picture(image).save(folder / name)
    return folder


def picture(image):
    return Image.fromarray((255 * image.clamp(0, 1)).permute(1, 2, 0).to(torch.uint8).numpy())


@pytest.fixture
def here(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    for name in ("examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("images", "_build"))
    (tmp_path / "docs" / "images").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("cifar10", "pets", "flowers", "food"):  # where the examples have their pictures
        (tmp_path / "data" / name).symlink_to(tmp_path / "path" / "to" / "pictures")
    with (tmp_path / "docs" / "benchmarks.md").open("a") as page:
        page.write("\n<!-- profile vit_micro_patch4_32 32-true -->\n<!-- end -->\n")
    return tmp_path


def smaller(arguments, configuration):
    """Arguments for the small model and pictures, where a command would train a large one."""
    if any("examples/recipes/" in argument for argument in arguments):
        return SMALL_RECIPE
    if "config.yaml" in arguments and "img_size: 224" in configuration:
        return ["--data.batch_size=2", "--data.img_size=32", "--model.model_name=vit_micro_patch4_32"]
    return []


def run_command(subcommand, *arguments, configuration):
    if {"--help", "--print_config"} & {*arguments}:
        with pytest.raises(SystemExit) as stop:
            main([subcommand, *arguments])
        assert stop.value.code == 0
        return
    short = SHORT_COMMANDS.get(subcommand, [])
    if subcommand == "compare":
        short = [*short, f"--methods={method_with_options(arguments)}"]
    main([subcommand, *arguments, *smaller(arguments, configuration), *short])


def method_with_options(arguments):
    """The method that a comparison gives options, which have to be read, or full fine-tuning."""
    options = re.search(r"method[-_]options(?:=| )'?\{(\w+):", " ".join(arguments))
    return options[1] if options else "full"


def run_python(path, *arguments, monkeypatch):
    if path == "-m":
        subprocess.run([sys.executable, "-m", *arguments, *ONE_STEP], check=True, timeout=250)
        return
    script = ROOT / path
    command = [str(script), *arguments, *SHORT_SCRIPTS[script.name]]
    if script.name in IN_PROCESSES:
        subprocess.run([sys.executable, *command], check=True, timeout=250)
        return
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.syspath_prepend(script.parent)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(commands_in(block.code) for block in blocks_of(page, "bash"))],
    ids=lambda page: page.name,
)
@pytest.mark.usefixtures("short_frontier")
def test_commands__run_in_their_order(page, here, monkeypatch):
    configuration = next(iter(configurations_of(page)), CONFIGURATION)
    (here / "config.yaml").write_text(configuration)
    done = []
    for block in blocks_of(page, "bash"):
        for program, *arguments in [] if block.not_run else commands_in(block.code):
            if program == "python":
                run_python(*arguments, monkeypatch=monkeypatch)
            else:
                run_command(*arguments, configuration=configuration)
            done.append(arguments)
    assert done
