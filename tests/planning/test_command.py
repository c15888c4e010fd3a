"""``lightning-bsr plan``: what it prints, writes and refuses."""

import importlib.util
import json
import re

import pytest
import yaml

from lightning_bsr import BlockSelect, DigitsDataModule, TokenDrop, ViTClassifier
from lightning_bsr.cli import main
from lightning_bsr.memory import MIB
from lightning_bsr.planning import plan_fit

CONFIG = """\
trainer:
  accelerator: cpu
  max_epochs: 2
  min_epochs: 2
  callbacks:
    - class_path: BlockSelect
      init_args: {blocks: [1, 3]}
    - class_path: TokenDrop
      init_args: {blocks: [2], keep_rate: 0.5}
    - class_path: LearningRateMonitor
    - class_path: ModelCheckpoint
model:
  class_path: ViTClassifier
  init_args:
    model_name: test_vit
    pretrained: false
    model_kwargs: {img_size: 32, depth: 4}
data:
  class_path: DigitsDataModule
  init_args: {batch_size: 4, num_workers: 0}
"""

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # tests do, with pytest's sys.argv
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",  # the CSV logger is meant
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    return tmp_path


def plan(*arguments):
    main(["plan", "--config=cfg.yaml", *arguments])


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def digits_report(**options):
    return plan_fit(
        ViTClassifier("test_vit", num_classes=10, pretrained=False, model_kwargs={"img_size": 32, "depth": 4}),
        DigitsDataModule(batch_size=4, num_workers=0),
        [BlockSelect([1, 3]), TokenDrop([2], 0.5)],
        accelerator="cpu",
        **options,
    )


def test_plan__prints_tables_and_verdict_and_trains_and_writes_nothing(here, capsys, monkeypatch):
    monkeypatch.setattr(ViTClassifier, "optimizer_step", lambda *args, **kwargs: pytest.fail("a step was trained"))
    plan()
    out = capsys.readouterr().out
    report = digits_report()
    assert "Activations kept for backward, batch of 4" in out
    assert f"{report.activations / MIB:.2f}" in out
    for label in (
        "parameters, trained float32",
        "parameters, frozen float32",
        "gradients",
        "optimizer state",
        "temporaries",
        "peak of the step",
        "compute, backward",
        "flash_attention_for_cpu",
        "published formula: total",
    ):
        assert label in out
    assert out.splitlines()[-1].startswith(f"Fits: needs {report.peak / MIB:.1f} MiB of ")
    assert out.splitlines()[-1].endswith(" available on cpu.")
    assert names_in(here) == ["cfg.yaml"]


def test_json__has_the_figures_of_plan_fit_and_is_alone_on_standard_output(here, capsys):
    plan("--json=-")
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == json.loads(json.dumps(digits_report().to_dict()))
    assert found["device"] == "cpu"
    assert found["fits"] is True
    assert found["available"] > found["report"]["peak"]
    assert found["reference"]["total"] == found["reference"]["parameters"] + 4 * found["reference"]["activations"]
    assert found["budget_plan"] is None
    assert names_in(here) == ["cfg.yaml"]


def test_batch_size__is_planned_and_goes_to_the_output_which_fit_takes(here, capsys):
    plan("--batch_size=6", "--output=plan.yaml", "--json=plan.json", "--trainer.precision=bf16-mixed")
    assert "Written: plan.yaml, plan.json.\n" in capsys.readouterr().out
    report = json.loads((here / "plan.json").read_text())["report"]
    assert report["batch_size"] == 6
    text = (here / "plan.yaml").read_text()
    assert "#   lightning-bsr plan --config=cfg.yaml --batch_size=6 --output=plan.yaml --json=plan.json" in text
    assert "#   lightning-bsr fit --config plan.yaml\n" in text
    assert f"# Planned for a batch of 6 on cpu: peak of the step {report['peak'] / MIB:.1f} MiB" in text
    written = yaml.safe_load(text)
    assert written["data"]["init_args"]["batch_size"] == 6
    assert written["trainer"]["precision"] == "bf16-mixed"
    assert written["trainer"]["min_epochs"] == 2
    assert [entry["class_path"].split(".")[-1] for entry in written["trainer"]["callbacks"]] == [
        "BlockSelect",
        "TokenDrop",
        "LearningRateMonitor",
        "ModelCheckpoint",
    ]
    main(["fit", "--config=plan.yaml", "--trainer.fast_dev_run=true", "--trainer.enable_model_summary=false"])


def test_largest_batch__fits_in_the_budget_and_one_more_does_not(here, capsys):
    plan("--largest-batch=true", "--memory-budget=12MiB", "--json=found.json", "--output=plan.yaml")
    assert "The largest batch within 12.0 MiB has " in capsys.readouterr().out
    found = json.loads((here / "found.json").read_text())
    assert found["report"]["peak"] <= 12 * MIB
    assert yaml.safe_load((here / "plan.yaml").read_text())["data"]["init_args"]["batch_size"] == found["batch_size"]
    plan(f"--batch_size={found['batch_size'] + 1}", "--json=-")
    assert json.loads(capsys.readouterr().out)["report"]["peak"] > 12 * MIB


def test_largest_batch__of_activations(here, capsys):
    plan("--largest_batch=true", "--memory_budget=2MiB", "--budget_kind=activations", "--json=-")
    out, err = capsys.readouterr()
    assert "Searching the largest batch within 2.0 MiB.\n" in err
    found = json.loads(out)
    assert found["report"]["activations"] <= 2 * MIB < found["report"]["peak"]
    assert found["report"]["activations"] / found["batch_size"] > 2 * MIB / (found["batch_size"] + 1) * 0.99


@pytest.mark.slow
def test_memory_budget__is_kept_and_its_output_trains(here, capfd):
    options = ["--memory-budget", "250KiB", "--budget-kind", "activations", "--probe-batches", "2"]
    plan(*options, "--output", "plan.yaml", "--plot", "plan.svg", "--json", "-")
    out, err = capfd.readouterr()
    found = json.loads(out)
    said = [line for line in err.splitlines() if line.startswith(("Probing", "Planning", "Searching"))]
    assert [re.split("[,;]", line)[0] for line in said] == [
        "Probing the worth of training each half of 4 blocks",
        "Planning single blocks.",
        "Searching what to train and to compute again",
        "Searching what other budgets would buy.",
    ]
    assert found["report"]["activations_peak"] <= 250 * 1024
    assert found["budget_plan"]["full"]["activations"] > 250 * 1024
    assert found["notes"] == [
        "Left out of trainer.callbacks: BlockSelect, TokenDrop; what the budget allows is chosen instead."
    ]
    assert names_in(here) == ["cfg.yaml", "plan.svg", "plan.yaml"]
    written = yaml.safe_load((here / "plan.yaml").read_text())
    names = [entry["class_path"].split(".")[-1] for entry in written["trainer"]["callbacks"]]
    assert names[0] == "BlockSelect"
    assert names[-2:] == ["LearningRateMonitor", "ModelCheckpoint"]
    assert written["trainer"]["callbacks"][0]["init_args"]["blocks"] != [1, 3]
    main(["fit", "--config=plan.yaml", "--trainer.fast_dev_run=true"])


def test_memory_budget__too_small_says_what_the_least_is(here, capsys):
    with pytest.raises(SystemExit) as stop:
        plan("--memory_budget=1KiB", "--probe_batches=2", "--output=plan.yaml")
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("lightning-bsr: error: budget is 1.0 KiB of memory, but fine-tuning the ViT")
    assert names_in(here) == ["cfg.yaml"]


def test_one_device__is_planned_for_and_noted(here, capsys):
    plan("--trainer.strategy=ddp", "--trainer.devices=2")
    note = "Note: Planned for one device with no strategy of its own; what trainer.strategy adds or spares is not in.\n"
    assert note in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size=0"], "batch_size is 0, expected 1 or more."),
        (["--probe_batches=1"], "probe_batches is 1, expected 2 or more."),
        (
            ["--batch_size=2", "--largest_batch=true"],
            "batch_size is 2 and largest_batch is true, expected one of them.",
        ),
        (
            ["--memory_budget=lots"],
            "memory_budget is 'lots', expected a number of bytes above 0, or a number and a unit such as '512MiB' or "
            "'1.5GB'.",
        ),
        (["--budget_kind=activations"], "budget_kind is 'activations', but there is no memory_budget."),
        (["--budget_kind=most"], "budget_kind: expected one of 'total', 'activations', got most"),
        (["--plot=plan.pdf"], "plot is 'plan.pdf', expected a file name that ends in .png or .svg."),
        (["--output=cfg.yaml"], "output is 'cfg.yaml', which exists already; with --overwrite true it is replaced."),
        (["--json=no/plan.json"], "json is 'no/plan.json', but there is no folder 'no'."),
        (["--json=.", "--overwrite=true"], "json is '.', which is a folder, expected a file."),
        (["--json=a.png", "--plot=a.png"], "json and plot are both 'a.png', expected two files."),
        (
            ["--memory_budget=1GiB", "--ckpt_path=last"],
            "ckpt_path is 'last', expected none with a memory_budget: a checkpoint goes on with the selection that it "
            "was trained with.",
        ),
    ],
)
def test_mistakes__end_in_one_line_before_anything_is_made(arguments, message, here, capsys, monkeypatch):
    monkeypatch.setattr(ViTClassifier, "__init__", lambda self: pytest.fail("the model was made"))
    with pytest.raises(SystemExit) as stop:
        plan(*arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lightning-bsr: error: {message}"
    assert names_in(here) == ["cfg.yaml"]


def test_plot__without_matplotlib_says_how_to_get_it(here, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(SystemExit):
        plan("--plot=plan.png")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lightning-bsr: error: plot is 'plan.png', but matplotlib is not installed; pip install 'lightning-bsr[plots]'."
    )


def test_largest_batch__without_room_for_one_image(here, capsys):
    with pytest.raises(SystemExit) as stop:
        plan("--largest_batch=true", "--memory_budget=1KiB")
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("lightning-bsr: error: Not even one image fits in 1.0 KiB: a step with one needs ")


def test_no_batches__is_said(here, capsys):
    with pytest.raises(SystemExit) as stop:
        plan("--trainer.limit_train_batches=0")
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lightning-bsr: error: fit would train on no batch; look at trainer.max_epochs, max_steps and limits."
    )


def test_overwrite__replaces(here, capsys):
    plan("--output=cfg.yaml", "--overwrite=true", "--plot=plan.png")
    assert (here / "cfg.yaml").read_text().startswith("# Written by lightning-bsr ")
    assert (here / "plan.png").read_bytes().startswith(b"\x89PNG")
