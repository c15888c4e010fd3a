"""The command line: in a process of its own where that matters, else by its main function."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

import lightning_bsr
from lightning_bsr.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:LightningCLI's args parameter is intended to run from within Python",  # with pytest's sys.argv
        "ignore:The dirpath has changed from",  # what is evaluated comes from another run's folder
        "ignore:Starting from v1.9.0, `tensorboardX` has been removed",  # the CSV logger is what these tests read
    ),
]


def run(*arguments, cwd):
    """Run the installed command, as a user does."""
    command = [Path(sys.executable).parent / "lightning-bsr", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)


@pytest.fixture
def pictures(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        for label, colour in (("blue", (0, 0, 250)), ("green", (0, 250, 0)), ("red", (250, 0, 0))):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 36), tuple(max(0, c - i) for c in colour)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.slow
def test_quickstart__one_epoch_prints_table_summary_and_test_accuracy(tmp_path):
    limits = [f"--trainer.limit_{part}_batches={count}" for part, count in (("train", 10), ("val", 1), ("test", 1))]
    short = ["--trainer.max_epochs=1", *limits]
    done = run("fit", "--config", EXAMPLES / "quickstart.yaml", *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Activations kept for backward, ViT 'model' (VisionTransformer)" in done.stdout
    assert "test/accuracy" in done.stdout
    assert (
        "BlockSelect: blocks 3, 7, 11 of 12 train in the ViT 'model' (VisionTransformer): 596,362 of 2,395,530 "
        "parameters (24.9 %).\n"
    ) in done.stderr
    assert "65 -> 34 -> 19 -> 11 tokens.\n" in done.stderr
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    metrics = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "memory/activations_mib" in metrics.splitlines()[0]  # of the CSV logger, though TensorBoard is installed


@pytest.mark.slow
def test_fit_then_validate_test_and_predict__from_its_checkpoint_in_the_same_folder(here, pictures, capsys):
    common = [
        "--data=ImageFolderDataModule",
        f"--data.root={pictures}",
        "--data.img_size=32",
        "--data.batch_size=6",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.callbacks+=TokenDrop",
        "--trainer.callbacks.blocks=[3]",
        "--trainer.callbacks.keep_rate=0.5",
    ]
    selecting = ["--trainer.callbacks+=BlockSelect", "--trainer.callbacks.blocks=[7,11]", "--trainer.max_epochs=3"]
    fit = ["fit", *common, *selecting, "--model.lr=1e-3", "--trainer.log_every_n_steps=1"]
    main(fit)
    main([*fit, "--test_after_fit=true"])
    assert "test/accuracy" in capsys.readouterr().out
    assert sorted(p.name for p in (here / "lightning_logs").iterdir()) == ["version_0", "version_1"]
    (checkpoint,) = (here / "lightning_logs" / "version_1" / "checkpoints").iterdir()
    for stage in ("validate", "test", "predict"):
        main([stage, *common, *selecting, f"--ckpt_path={checkpoint}", "--trainer.logger=false"])
    assert "val/accuracy" in capsys.readouterr().out
    main([*fit, f"--ckpt_path={checkpoint}", "--trainer.max_epochs=4", "--weights_only=true"])
    saved = yaml.safe_load((here / "lightning_logs" / "version_1" / "config.yaml").read_text())
    assert saved["data"]["init_args"]["root"] == str(pictures)


def test_fit__learns_the_number_of_classes_from_the_data(here, pictures):
    main(
        [
            "fit",
            "--data=ImageFolderDataModule",
            f"--data.root={pictures}",
            "--data.img_size=32",
            "--data.num_workers=0",
            "--trainer.fast_dev_run=true",
            "--trainer.accelerator=cpu",
            "--trainer.callbacks+=ActivationMemoryMonitor",
        ]
    )


def test_print_config__reloads(here, capsys):
    def printed(config):
        with pytest.raises(SystemExit) as stop:
            main(["fit", f"--config={config}", "--print_config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    text = printed(EXAMPLES / "quickstart.yaml")
    (here / "again.yaml").write_text(text)
    assert printed("again.yaml") == text
    config = yaml.safe_load(text)
    assert [callback["class_path"] for callback in config["trainer"]["callbacks"]] == [
        "lightning_bsr.BlockSelect",
        "lightning_bsr.TokenDrop",
        "lightning_bsr.ActivationMemoryMonitor",
    ]
    assert config["data"]["class_path"] == "lightning_bsr.DigitsDataModule"


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ("3", "blocks 3, 7, 11 of 12 train"),
        ("[-1]", "block 11 of 12 trains"),
        ("{7: all, 3: [mlp]}", "blocks 3 (mlp only), 7 of 12 train"),
    ],
)
def test_block_select__all_forms_of_blocks_from_yaml(blocks, said, here, infos):
    (here / "config.yaml").write_text(
        f"trainer:\n  callbacks:\n    - class_path: BlockSelect\n      init_args:\n        blocks: {blocks}\n"
    )
    main(["fit", "--config=config.yaml", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"])
    assert any(said in message for message in infos)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lightning-bsr {lightning_bsr.__version__}\n"


def test_help__says_what_the_package_is_for_and_whose_the_options_are(capsys):
    def lines_of(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out.splitlines()

    assert "Fine-tunes vision transformers with little memory." in lines_of()
    lines = lines_of("merge")
    # Once for the subcommand, once for its options.
    assert sum("Make full weights of a delta file and of the weights that it was trained from" in x for x in lines) == 2
    assert "Options of Lightning's Trainer:" in lines


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_examples__parse(example, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(EXAMPLES / example), "--print_config"])
    assert stop.value.code == 0
    model = "MultiTaskClassifier" if example.startswith("multitask") else "ViTClassifier"
    assert f"class_path: lightning_bsr.{model}" in capsys.readouterr().out


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("multitask*.yaml")))
def test_multi_task_examples__run_a_step(example, here, pictures, infos):
    (here / "data").mkdir()
    for task in ("cifar10", "pets", "flowers", "food"):
        (here / "data" / task).symlink_to(pictures)
    main(
        [
            "fit",
            f"--config={EXAMPLES / example}",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=1",
            "--trainer.limit_val_batches=0",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--test_after_fit=false",
        ]
    )
    assert any("blocks 3, 7, 11 of 12 train" in message for message in infos) == ("bsr" in example)
    assert any("65 -> 34 -> 19 -> 11 tokens" in message for message in infos) == ("bsr" in example)


@pytest.mark.parametrize(("option", "folder"), [("--trainer.logger=true", "."), ("--trainer.default_root_dir=a", "a")])
def test_fit__logs_to_csv_though_tensorboard_is_installed(option, folder, here):
    limits = [f"--trainer.limit_{part}_batches=1" for part in ("train", "val")]
    main(["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", *limits, option])
    assert [path.name for path in (here / folder / "lightning_logs" / "version_0").glob("*.csv")] == ["metrics.csv"]
    assert not [*here.rglob("events.*")]


class LoggerWithoutFolder(DummyLogger):
    """A logger as MLflow's is that writes to a database."""

    save_dir = None
    name = "experiment"
    version = "run"


def test_fit__with_a_logger_that_has_no_folder_writes_beside_the_checkpoints(here):
    limits = [f"--trainer.limit_{part}_batches=1" for part in ("train", "val")]
    logger = f"--trainer.logger={__name__}.LoggerWithoutFolder"
    main(["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", *limits, logger])
    files = [path.relative_to(here) for path in here.rglob("*") if path.is_file()]
    assert sorted(map(str, files)) == ["experiment/run/checkpoints/epoch=0-step=1.ckpt", "experiment/run/config.yaml"]


def test_pretraining_example__trains_all_of_a_new_model(here, pictures, infos):
    main(
        [
            "fit",
            f"--config={EXAMPLES / 'pretrain_micro.yaml'}",
            f"--data.root={pictures}",
            "--data.init_args.num_workers=0",
            "--data.init_args.batch_size=8",
            "--data.init_args.val_fraction=0.2",
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
            "--trainer.fast_dev_run=true",
        ]
    )
    assert not [message for message in infos if message.startswith(("BlockSelect", "TokenDrop"))]


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"needs the CIFAR-10 subset in {CIFAR10}")
def test_cifar10_example__runs_on_real_pictures(here, capsys):
    config = EXAMPLES / "cifar10_folder.yaml"
    main(
        [
            "fit",
            f"--config={config}",
            f"--data.root={CIFAR10}",
            "--data.num_workers=0",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=1",
            "--trainer.limit_train_batches=4",
            "--trainer.limit_val_batches=2",
            "--trainer.limit_test_batches=2",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert "test/accuracy" in capsys.readouterr().out


def test_quickstart_py__runs(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--epochs", "0"])
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    assert "test/accuracy" in capsys.readouterr().out


def test_mistakes__no_traceback_from_the_installed_command(tmp_path):
    done = run("fit", "--trainer.callbacks+=BlockSelect", "--trainer.callbacks.blocks=[99]", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("lightning-bsr: error: blocks has 99, but the ViT 'model'")


@pytest.mark.parametrize("arguments", [["plan"], ["export", "--output=model.pt2"], ["visualize"]])
def test_subcommands_that_train_nothing__say_nothing_of_lightning(arguments, here, capsys, infos):
    model = [
        "--model.model_name=test_vit",
        "--model.pretrained=false",
        "--model.model_kwargs={img_size: 32, patch_size: 8, depth: 2}",
        "--trainer.callbacks+=TokenDrop",
        "--trainer.callbacks.blocks=[0]",
        "--trainer.callbacks.keep_rate=0.5",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=60",
    ]
    main([*arguments, *model])
    assert infos == []
    assert capsys.readouterr().err == ""
    main(["validate", *model, "--trainer.limit_val_batches=1"])
    assert "TokenDrop: block 0 of the ViT 'model' (VisionTransformer) keeps 0.5 of the patch tokens: " in infos[-1]
