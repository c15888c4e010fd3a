"""A comparison from start to end, with its runs in this process."""

import csv
import json
import statistics
import sys

import pytest

from lightning_bsr import ConfigurationError
from lightning_bsr.comparison import compare
from lightning_bsr.comparison._runs import run_once

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # with pytest's sys.argv
)


@pytest.fixture(autouse=True)
def _steady_clock(monkeypatch):
    """The head takes a third of the time of the others."""

    def time_steps(build, configuration, steps):
        method = configuration["trainer"]["callbacks"][-1]["init_args"]["method"]
        return {"seconds": [1.0 if method == "head" else 3.0] * steps, "steps_per_epoch": 3}

    monkeypatch.setattr("lightning_bsr.comparison._compare.time_steps", time_steps)


@pytest.fixture
def _without_plots(monkeypatch):
    """They take longer to draw than the small runs take; what is drawn is looked at by the tests without this."""
    monkeypatch.setattr("lightning_bsr.comparison._compare.plot", lambda rows, settings: "")


def records(settings):
    return [json.loads(path.read_text()) for path in sorted((settings.output / "runs").iterdir())]


def test_table__is_what_the_run_files_say(configuration, make_settings, build, pools, capsys):
    settings = make_settings(method_options={"bsr": {"blocks": [99]}}, methods=("full", "head", "bsr"))
    rows = compare(configuration, settings, build)
    found = records(settings)
    assert len([record for record in found if "error" in record]) == 2
    finished = [record for record in found if "error" not in record]
    for row in rows[:2]:
        of_method = [record for record in finished if record["method"] == row.method]
        tried = {r["lr"]: r["validation"]["val/accuracy"] for r in of_method if (r["seed"], r["length"]) == (0, 2)}
        assert sorted(tried) == [1e-3, 1e-2]
        assert row.lr == min(lr for lr in tried if tried[lr] == max(tried.values()))
        assert row.lr_at_edge
        assert row.validation == tried[row.lr]
        for score, length in ((row.equal_length, 2), (row.equal_time, 6 if row.method == "head" else 2)):
            tests = [r["test"]["test/accuracy"] for r in of_method if (r["lr"], r["length"]) == (row.lr, length)]
            assert score.length == length
            assert sorted(score.values) == sorted(tests)
            assert score.mean == statistics.fmean(tests)
            assert score.deviation == statistics.stdev(tests)
        assert row.measured_activations == row.planned_activations
    # Only chosen ones were tested.
    assert {(r["method"], r["lr"]) for r in finished if "test" in r} == {(row.method, row.lr) for row in rows[:2]}
    assert not [*(settings.output / "weights").rglob("*.ckpt")]
    assert [row.step_ratio for row in rows] == [1, 1 / 3, 1]
    assert rows[2].lr is None
    assert rows[2].notes == (
        "failed: blocks has 99, but the ViT 'model' (VisionTransformer) has 4 blocks, numbered 0 to 3 or -4 to -1.",
    )

    written = json.loads((settings.output / "table.json").read_text())
    assert [row["equal_length"] and row["equal_length"]["mean"] for row in written["rows"]] == [
        row.equal_length and row.equal_length.mean for row in rows
    ]
    with (settings.output / "table.csv").open() as file:
        lines = [*csv.DictReader(file)]
    assert [line["method"] for line in lines] == ["full", "head", "bsr"]
    assert float(lines[1]["equal_time_mean"]) == rows[1].equal_time.mean
    assert lines[1]["equal_time_length"] == "6"
    markdown = (settings.output / "table.md").read_text()
    assert f"| head | 1,290 | {rows[1].planned_activations / 2**20:.3f} |" in markdown
    assert {path.suffix for path in settings.output.iterdir()} >= {".png", ".svg"}
    said = capsys.readouterr().out
    assert "[8 of 10]" in said
    assert "[10 of 10]" in said
    assert "Left out of trainer.callbacks: BlockSelect, ModelCheckpoint" in said
    assert f"head: lr {rows[1].lr:g} is at the edge of the grid: a better one may lie beyond" in said


@pytest.mark.usefixtures("_without_plots")
def test_again__nothing_runs_but_what_failed_or_changed(configuration, make_settings, build, pools):
    settings = make_settings(methods=("head",), lrs=(1e-2,), seeds=(0, 1))
    first = compare(configuration, settings, build)
    assert sorted({*pools[-1].calls}) == ["metric_names", "plan_once", "run_once", "time_steps"]
    assert compare(configuration, settings, build) == first
    assert pools[-1].calls == []

    more = make_settings(methods=("head",), lrs=(1e-2,), seeds=(0, 1, 2))
    compare(configuration, more, build)
    assert pools[-1].calls == ["run_once"]

    configuration["model"]["init_args"]["weight_decay"] = 0.5
    compare(configuration, settings, build)
    assert pools[-1].calls.count("run_once") == 2
    assert len(records(settings)) == 5
    compare(configuration, make_settings(methods=("head",), lrs=(1e-3, 1e-2), seeds=(0,)), build)
    assert pools[-1].calls.count("run_once") == 1


@pytest.mark.usefixtures("_without_plots")
def test_again__a_failed_run_is_tried_again(configuration, make_settings, build, pools, monkeypatch):
    settings = make_settings(methods=("head",), lrs=(1e-2,), seeds=(0, 1))

    def fails(build, configuration, weights):
        if configuration["seed_everything"] == 1:
            raise RuntimeError("the power is off")
        return run_once(build, configuration, weights)

    with monkeypatch.context() as patch:
        patch.setattr("lightning_bsr.comparison._compare.run_once", fails)
        (row,) = compare(configuration, settings, build)
    assert row.notes == ("failed (lr 0.01, seed 1, 2 epochs): RuntimeError: the power is off",)
    assert len(row.equal_length.values) == 1
    assert row.equal_length.deviation is None
    (row,) = compare(configuration, settings, build)
    assert row.notes == ()
    assert len(row.equal_length.values) == 2
    assert pools[-1].calls == ["run_once"]


@pytest.mark.usefixtures("_without_plots")
def test_again__goes_on_where_it_was_interrupted(configuration, make_settings, build, pools, monkeypatch):
    settings = make_settings(methods=("head",))

    def interrupted(build, configuration, weights):
        if configuration["model"]["init_args"]["lr"] == 1e-2:
            raise KeyboardInterrupt
        return run_once(build, configuration, weights)

    with monkeypatch.context() as patch:
        patch.setattr("lightning_bsr.comparison._compare.run_once", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(configuration, settings, build)
    (kept,) = (settings.output / "runs").iterdir()
    before = kept.stat().st_mtime_ns
    compare(configuration, settings, build)
    assert "metric_names" not in pools[-1].calls
    # The other rate, and the second seed; of the first seed only the better one is tested.
    assert (pools[-1].calls.count("run_once"), pools[-1].calls.count("test_once")) == (2, 1)
    if "test" not in json.loads(kept.read_text()):
        assert kept.stat().st_mtime_ns == before


@pytest.mark.usefixtures("_without_plots")
def test_weights__tested_are_those_of_the_chosen_learning_rate(configuration, make_settings, build, pools, tmp_path):
    # Rates that leave nothing alike, in both orders: whichever run comes last must not be the one that is tested.
    for number, lrs in enumerate(((1e-3, 0.5), (0.5, 1e-3))):
        together = make_settings(methods=("head",), lrs=lrs, seeds=(0,), output=tmp_path / f"both{number}")
        (row,) = compare(configuration, together, build)
        alone = make_settings(methods=("head",), lrs=(row.lr,), seeds=(0,), output=tmp_path / f"one{number}")
        assert compare(configuration, alone, build)[0].equal_length == row.equal_length
        (chosen,) = [r for r in records(together) if r["lr"] == row.lr]
        (only,) = records(alone)
        assert chosen["test"] == only["test"]


@pytest.mark.usefixtures("_without_plots")
def test_weights__deleted_before_the_test_are_trained_again(configuration, make_settings, build, pools, monkeypatch):
    settings = make_settings(methods=("head",), seeds=(0,), equal_time=False)
    (row,) = compare(configuration, settings, build)
    for path in (settings.output / "runs").iterdir():
        record = json.loads(path.read_text())
        record.pop("test", None)
        path.write_text(json.dumps(record))
    assert compare(configuration, settings, build) == [row]
    assert pools[-1].calls == ["run_once"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"monitor": "val/f1"},
            "monitor is 'val/f1', but validation does not log that; it logs val/accuracy, val/loss.",
        ),
        ({"test_metric": "acc"}, "test_metric is 'acc', but test does not log that; it logs test/accuracy, test/loss."),
    ],
)
def test_metrics__are_checked_before_anything_trains(given, message, configuration, make_settings, build, pools):
    with pytest.raises(ConfigurationError) as stop:
        compare(configuration, make_settings(**given), build)
    assert str(stop.value) == message
    assert pools[-1].calls == ["metric_names"]


def test_mistakes_in_the_configuration__are_the_users(configuration, make_settings, build, pools):
    configuration["model"]["init_args"]["weight_decay"] = -1
    with pytest.raises(ConfigurationError) as stop:
        compare(configuration, make_settings(), build)
    assert str(stop.value) == "weight_decay is -1.0, expected 0 or more."


def test_plots__without_matplotlib_say_how_to_get_it(configuration, make_settings, build, pools, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    settings = make_settings(methods=("head",), lrs=(1e-2,), seeds=(0,), equal_time=False)
    (row,) = compare(configuration, settings, build)
    assert row.equal_time is None
    assert str(row.equal_length) == f"{row.equal_length.mean:.4f}"
    assert "; no plots, which need matplotlib: pip install 'lightning-bsr[plots]'." in capsys.readouterr().out
    assert not [*settings.output.glob("*.png")]
