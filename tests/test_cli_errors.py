"""Mistakes on the command line and in its files: one line each, and exit code 2."""

import re

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.cli import BSRCLI, main

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:LightningCLI's args parameter is intended to run from within Python",  # with pytest's sys.argv
    ),
]


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
        (["fitt"], "no subcommand is known by the name fitt; did you mean fit?"),
        (
            ["xyz"],
            "no subcommand is known by the name xyz; there are fit, validate, test, predict, compare, export, merge, "
            "plan, visualize.",
        ),
        (
            ["fit"],
            "fit was given nothing, expected a configuration, such as --config examples/quickstart.yaml, or options, "
            "such as --trainer.max_epochs=3 for full fine-tuning of the bundled micro ViT on digits; 'lightning-bsr "
            "fit --help' lists them.",
        ),
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


def test_mistakes__a_list_keeps_its_lines(here, capsys):
    model = ["--model=ViTClassifier", "--model.model_name=resnet18", "--model.pretrained=false"]
    head_only = ["--trainer.callbacks+=BlockSelect", "--trainer.callbacks.blocks=[]"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--trainer.accelerator=cpu", "--trainer.max_epochs=1", *model, *head_only])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    start = "lightning-bsr: error: No supported Vision Transformer was found in ViTClassifier."
    (first,) = (number for number, line in enumerate(lines) if line.startswith(start))
    assert {line.split(":")[0] for line in lines[first + 1 :]} >= {"  timm", "  torchvision", "  transformers"}


def test_mistakes__of_a_configuration_from_python():
    with pytest.raises(ConfigurationError) as raised:
        BSRCLI({"trainer": {"max_epoch": 3}}, run=False)
    assert str(raised.value) == "no option is known by the name trainer.max_epoch; did you mean trainer.max_epochs?"


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
