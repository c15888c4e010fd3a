"""``lightning-bsr compare``: in a process of its own where it is interrupted, else by the main function."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lightning_bsr.cli import main
from lightning_bsr.methods import METHODS

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # with pytest's sys.argv
)

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
SMALL = [
    "compare",
    f"--config={QUICKSTART}",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--data.batch_size=8",
]
MICRO = ["--methods=head", "--lrs=1e-3,1e-2", "--seeds=0,1", "--equal-time=false", "--timing-steps=1", "--output=out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=full,magic"], f"There is no method 'magic'; the methods are {', '.join(METHODS)}."),
        (["--lrs=[]"], "lrs is [], expected one or more learning rates, such as 5e-4,1.5e-3."),
        (["--lrs=fast"], "lrs is 'fast', expected numbers separated by commas."),
        (["--monitor=val/f1"], "monitor is 'val/f1', but validation does not log that; it logs val/accuracy, "
         "val/loss."),
        (["--lr-key=model.lr"], "lr_key is 'model.lr', expected a key of the configuration; the configuration has "
         "model.init_args.lr."),
        (["--ckpt_path=a.ckpt"], "ckpt_path is 'a.ckpt', but there is no such file; expected a checkpoint file or one "
         "of 'last', 'hpc'."),
        (["--ckpt_path=last"], "ckpt_path is 'last', expected none: all methods start alike, from the model."),
    ],
)  # fmt: skip
def test_mistakes__end_in_one_line_and_exit_code_2(arguments, message, here, pools, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lightning-bsr: error: {message}"
    assert not [*here.rglob("runs/*.json")]


def test_compare__takes_lists_and_a_configuration_that_fit_has_written(here, pools, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *SMALL[1:], "--print_config"])
    (here / "config.yaml").write_text(capsys.readouterr().out)
    main(["compare", "--config=config.yaml", *MICRO, "--lrs=[1e-2]", "--seeds=[3]"])
    (run,) = (here / "out" / "runs").iterdir()
    assert run.name.startswith("head-lr0.01-seed3-epochs1-")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("Written to out: table.md") for line in lines)
    start = lines.index("Planning a step of head.")
    assert lines[start + 1] == "Timing 1 steps of each method, 3 times around."
    for turn, line in enumerate(lines[start + 2 : start + 5], 1):
        assert re.fullmatch(rf"Timed head, {turn} of 3: \d+\.\d ms a step\.", line)


def test_compare__rates_of_the_configuration_and_of_each_method_for_steps(here, pools, capsys):
    steps = ["--trainer.max_epochs=null", "--trainer.max_steps=2"]
    lrs = "--lrs={full: configured, head: '1e-3,1e-2'}"
    main([*SMALL, *steps, *MICRO, "--methods=full,head", lrs, "--seeds=3"])
    names = sorted(path.name.rpartition("-")[0] for path in (here / "out" / "runs").iterdir())
    assert names == ["full-lr0.0045-seed3-steps2", "head-lr0.001-seed3-steps2", "head-lr0.01-seed3-steps2"]
    table = json.loads((here / "out" / "table.json").read_text())
    assert (table["settings"]["length"], table["settings"]["unit"]) == (2, "steps")
    assert table["settings"]["lrs"] == {"full": [0.0045], "head": [0.001, 0.01]}
    assert table["rows"][0]["lr_at_edge"] is False
    assert "2 steps; learning rate of 0.0045, or 0.001, 0.01 chosen by val/accuracy (max)" in capsys.readouterr().out


@pytest.mark.slow
def test_compare__interrupted_and_gone_on_with(here, pools, capsys):
    command = [Path(sys.executable).parent / "lightning-bsr", *SMALL, *MICRO]

    first = subprocess.Popen(
        command,
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore interrupts, and hand that on to all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    if not any("[1 of 3]" in line for line in first.stdout):
        raise AssertionError(first.stderr.read())
    workers = psutil.Process(first.pid).children(recursive=True)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does
    _, error = first.communicate(timeout=20)
    assert first.returncode == 130
    assert "interrupted; what has finished is kept in out. The same command goes on from there: lightning-bsr" in error
    assert "Traceback" not in error
    kept = {path: path.stat().st_mtime_ns for path in (here / "out" / "runs").iterdir()}
    assert kept
    assert workers
    assert not psutil.wait_procs(workers, timeout=20)[1]

    main(command[1:])
    assert "Timing" not in capsys.readouterr().out
    table = json.loads((here / "out" / "table.json").read_text())
    assert len(table["rows"][0]["equal_length"]["values"]) == 2
    untested = [path for path in kept if "test" not in json.loads(path.read_text())]
    assert all(path.stat().st_mtime_ns == kept[path] for path in untested)
    assert not [*(here / "out").rglob(".*.json.*")]
