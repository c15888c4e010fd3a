"""The command line: in a process of its own where that matters, else by its main function."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

import lightning_bsr
from lightning_bsr._errors import ConfigurationError
from lightning_bsr.cli import BSRCLI, main

EXAMPLES = Path(__file__).parents[1] / "examples"
CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # tests do, with pytest's sys.argv
    "ignore:The dirpath has changed from",  # what is evaluated comes from another run's folder
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",  # the CSV logger is what these tests read
)


@pytest.fixture(autouse=True)
def _hide_what_lightning_calls(monkeypatch):
    # lightning 2.6 calls add_instantiator, which jsonargparse 4.49 deprecates with a warning too long for a filter.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def run(*arguments, cwd):
    """Run the installed command, as a user does."""
    command = [Path(sys.executable).parent / "lightning-bsr", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
        ("[-1]", "blocks 11 of 12 train"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--trainer.callbacks+=BlockSelect", "--trainer.callbacks.blocks=[30]"],
            "blocks has 30, but the ViT 'model' (VisionTransformer) has 12 blocks, numbered 0 to 11 or -12 to -1.",
        ),
        (
            ["--trainer.callbacks+=BlockSelect", "--trainer.callbacks.blocks=x"],
            "trainer.callbacks: lightning_bsr.BlockSelect: blocks: expected a whole number or a list or a mapping, "
            "got x",
        ),
        (
            ["--trainer.callbacks+=TokenDrop", "--trainer.callbacks.blocks=[3]", "--trainer.callbacks.keep_rate=2"],
            "keep_rate is 2.0, expected a number above 0 and at most 1.",
        ),
        (
            ["--trainer.callbacks+=BlockSelct"],
            "trainer.callbacks: no class is known by the name BlockSelct; did you mean BlockSelect? A full import path "
            "works too.",
        ),
        (
            ["--model.optimizer=adam"],
            "model: lightning_bsr.ViTClassifier: optimizer: expected one of 'adamw', 'sgd', got adam",
        ),
        (["--model=foo.Bar"], "model: foo.Bar: No module named 'foo'"),
        (["--model.lr=-1"], "lr is -1.0, expected a number above 0."),
        (["--model.lr=abc"], "model: lightning_bsr.ViTClassifier: lr: expected a number, got abc"),
        (["--model.checkpoint_path=no.pt"], "checkpoint_path is 'no.pt', expected an existing file."),
        (
            ["--data=ImageFolderDataModule", "--data.root=nowhere"],
            "nowhere does not exist, expected a folder with train/<class>/<images> in it; . holds nothing.",
        ),
        (
            ["--ckpt_path=no.ckpt"],
            "ckpt_path is 'no.ckpt', but there is no such file; expected a checkpoint file or one of 'last', 'hpc'.",
        ),
        (["--config=no.yaml"], "config: File does not exist: 'HERE/no.yaml'"),
        (
            ["--model.weight_decai=1"],
            "model: lightning_bsr.ViTClassifier: no option is known by the name weight_decai; did you mean "
            "weight_decay?",
        ),
        (
            ["--data.bogus=1"],
            "data: lightning_bsr.DigitsDataModule: no option is known by the name bogus; DigitsDataModule has augment, "
            "batch_size, img_size, mean, num_workers, seed, std, val_fraction.",
        ),
        (
            ["--trainer.callbacks+=TokenDrop", "--trainer.callbacks.keep_rat=0.5"],
            "trainer.callbacks: lightning_bsr.TokenDrop: no option is known by the name keep_rat; did you mean "
            "keep_rate?",
        ),
        (
            ["--optimizer=SGD", "--optimizer.params=1"],
            "optimizer: torch.optim.SGD: no option is known by the name params; SGD has dampening, differentiable, "
            "foreach, fused, lr, maximize, momentum, nesterov, weight_decay.",
        ),
        (
            ["--trainer.max_epoch_s=3"],
            "no option is known by the name trainer.max_epoch_s; did you mean trainer.max_epochs?",
        ),
        (["--optimzer=Adam"], "no option is known by the name optimzer; did you mean optimizer?"),
        (
            ["--bogus", "3"],
            "no option is known by the name bogus; fit has ckpt_path, config, data, lr_scheduler, model, optimizer, "
            "seed_everything, test_after_fit, trainer, weights_only.",
        ),
        (["--trainer.max_epochs=many"], "trainer.max_epochs: expected a whole number or null, got many"),
    ],
)
def test_mistakes__end_in_one_line_and_exit_code_2(arguments, message, here, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false", *arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("lightning-bsr: error: ")]
    expected = re.split(r"expected (?=a whole number)", message.replace("HERE", str(here.resolve())))
    assert len(said) == 1
    if len(expected) == 1:
        assert said[0] == f"lightning-bsr: error: {expected[0]}"
    else:  # the order of the types differs between releases of jsonargparse
        prefix, types = f"lightning-bsr: error: {expected[0]}expected ", expected[1]
        assert said[0].startswith(prefix)
        assert sorted(re.split(" or |, ", said[0].removeprefix(prefix))) == sorted(re.split(" or |, ", types))
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainr: {max_epochs: 3}", "no option is known by the name trainr; did you mean trainer?"),
        (
            "trainer: {max_epoch: 3}",
            "no option is known by the name trainer.max_epoch; did you mean trainer.max_epochs?",
        ),
        (
            "model: {class_path: ViTClassifier, init_arg: {lr: 1}}",
            "model: lightning_bsr.ViTClassifier: no option is known by the name init_arg; did you mean init_args?",
        ),
        (
            "trainer: {callbacks: [{class_path: TokenDrop, init_args: {keep_rat: 0.5}}]}",
            "trainer.callbacks: lightning_bsr.TokenDrop: no option is known by the name keep_rat; did you mean "
            "keep_rate?",
        ),
        (
            "trainer: {callbacks: [{class_pat: TokenDrop}]}",
            "trainer.callbacks: lightning.Callback: no option is known by the name class_pat; did you mean class_path?",
        ),
        (
            "trainer: {callbacks: [{class_pat: TokenDrop, init_args: {blocks: [3]}}]}",
            "trainer.callbacks: expected a mapping with class_path, the name of a Callback, got "
            "{'class_pat': 'TokenDrop', 'init_args': {'blocks': [3]}}",
        ),
    ],
)
def test_mistakes__in_a_file(text, message, here, capsys):
    (here / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=config.yaml"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"lightning-bsr: error: {message}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_epochs=3", "fit"], "trainer.max_epochs is an option of fit; give it after fit."),
        (["--confg=a.yaml"], "no option is known by the name confg; did you mean config?"),
    ],
)
def test_mistakes__before_the_subcommand(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"lightning-bsr: error: {message}"]


@pytest.mark.parametrize("arguments", [[], ["--config=config.yaml"]])
def test_mistakes__no_subcommand_lists_them_all(arguments, here, capsys):
    (here / "config.yaml").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    first, *lines, last = capsys.readouterr().err.splitlines()
    assert first == "lightning-bsr: error: no subcommand is given, expected one of:"
    assert last == "With --help after it, each lists its options."
    assert [line.split()[0] for line in lines] == [*BSRCLI.subcommands()]
    assert "  predict    Run inference on your data." in lines
    assert "  merge      Make full weights of a delta file and of the weights that it was trained from." in lines


def test_mistakes__of_a_configuration_from_python():
    with pytest.raises(ConfigurationError) as raised:
        BSRCLI({"trainer": {"max_epoch": 3}}, run=False)
    assert str(raised.value) == "no option is known by the name trainer.max_epoch; did you mean trainer.max_epochs?"


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
    assert "TokenDrop: blocks 0 of the ViT 'model' (VisionTransformer) keep 0.5 of the patch tokens: " in infos[-1]


def test_errors_of_the_code__keep_their_traceback(monkeypatch, here):
    def broken(*args, **kwargs):
        raise ValueError("not the user's fault")

    monkeypatch.setattr(CSVLogger, "log_hyperparams", broken)
    with pytest.raises(ValueError, match="not the user's fault"):
        main(
            [
                "fit",
                "--trainer.accelerator=cpu",
                "--trainer.max_epochs=1",
                "--trainer.logger=CSVLogger",
                "--trainer.logger.save_dir=.",
            ]
        )
