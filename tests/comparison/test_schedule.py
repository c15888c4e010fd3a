"""Which runs there are, in which order they become known, and how their results are kept."""

import json
import math

import pytest

from lightning_bsr.comparison._pool import Failure
from lightning_bsr.comparison._schedule import Progress, Run, Store, choose_lr, run_name, write_atomically


def result(validation, test=None):
    return {"validation": {"val/accuracy": validation}} | ({} if test is None else {"test": {"test/accuracy": test}})


@pytest.fixture
def progress(make_settings):
    settings = make_settings(lrs=(0.1, 0.2), seeds=(5, 6))
    return Progress(settings, length=4, timed_lengths={"full": 4, "head": 9}, results={}, failures={})


@pytest.mark.parametrize(
    ("mode", "metrics", "chosen"),
    [
        ("max", {0.1: 0.5, 0.2: 0.7, 0.3: 0.6}, 0.2),
        ("min", {0.1: 0.5, 0.2: 0.7, 0.3: 0.6}, 0.1),
        ("max", {0.3: 0.7, 0.2: 0.7, 0.1: 0.6}, 0.2),
        ("max", {0.1: None, 0.2: 0.3}, 0.2),
        ("min", {0.1: None, 0.2: None}, None),
        ("max", {}, None),
    ],
)
def test_choose_lr__best_then_smallest(mode, metrics, chosen, make_settings):
    assert choose_lr(make_settings(mode=mode), {lr: result(metric) for lr, metric in metrics.items()}) == chosen


def test_wanted__the_seeds_wait_for_the_grid(progress):
    grid = [Run(method, lr, 5, 4) for method in ("full", "head") for lr in (0.1, 0.2)]
    assert progress.wanted() == grid
    progress.results[Run("head", 0.1, 5, 4)] = result(0.9)
    assert progress.wanted() == grid
    progress.results[Run("head", 0.2, 5, 4)] = result(0.8)
    assert progress.wanted() == [*grid, Run("head", 0.1, 6, 4), Run("head", 0.1, 5, 9), Run("head", 0.1, 6, 9)]
    assert progress.untested() == [Run("head", 0.1, 5, 4)]
    progress.results[Run("head", 0.1, 5, 4)] = result(0.9, test=0.8)
    assert progress.untested() == []


def test_wanted__the_same_epochs_are_not_run_again(progress):
    for lr in (0.1, 0.2):
        progress.results[Run("full", lr, 5, 4)] = result(0.5, test=0.5)
    assert [run for run in progress.wanted() if run.method == "full"] == [
        Run("full", 0.1, 5, 4),
        Run("full", 0.2, 5, 4),
        Run("full", 0.1, 6, 4),
    ]


def test_wanted__a_failed_rate_leaves_the_others_to_choose_from(progress):
    progress.failures[Run("full", 0.1, 5, 4)] = "why"
    progress.results[Run("full", 0.2, 5, 4)] = result(0.1)
    assert progress.chosen_lr("full") == 0.2


def test_count__follows_what_is_known(progress):
    assert progress.count() == (2 + 1) + (2 + 1 + 2)
    progress.failures.update(dict.fromkeys(progress.grid("head"), "why"))
    assert progress.count() == (2 + 1) + 2
    assert progress.chosen_lr("head") is None


def test_store__failures_and_damage_are_read_as_nothing(tmp_path):
    store = Store(tmp_path)
    store.write_failure("runs/a", Failure("why", "where"), lr=0.1)
    assert json.loads((tmp_path / "runs" / "a.json").read_text()) == {"lr": 0.1, "error": "why", "details": "where"}
    assert store.read("runs/a") is None
    (tmp_path / "runs" / "a.json").write_text('{"half": ')
    assert store.read("runs/a") is None
    store.write("runs/a", {"lr": 0.2})
    assert store.read("runs/a") == {"lr": 0.2}


def test_store__refuses_what_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        Store(tmp_path).write("a", {"metric": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_write_atomically__an_interruption_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "old")]


def test_run_name__has_all_that_decides():
    run = Run("head", 1 / 3, 0, 20)
    names = {run_name(run, "x"), run_name(Run("head", 1 / 3 + 1e-12, 0, 20), "x"), run_name(run, "y")}
    assert len(names) == 3
