"""Worker processes: results, exceptions, deaths and how they end."""

import multiprocessing
import operator
import os
import signal
import time

import psutil
import pytest
from jsonargparse import ArgumentError

from lightning_bsr import ConfigurationError
from lightning_bsr.comparison._pool import Failure, Pool


def test_failure__of_what_the_user_got_wrong():
    assert Failure.of(ConfigurationError("lr is -1.")) == Failure("lr is -1.", mistake=True)
    wrapped = ValueError("many\nlines")
    wrapped.__cause__ = ArgumentError(None, "Parser key \"lr\":\n  Expected a <class 'float'>. Got value: x")
    assert Failure.of(wrapped) == Failure("lr: expected a number, got x", mistake=True)


def test_failure__of_the_code_is_one_line_and_a_traceback():
    try:
        raise RuntimeError("first\nsecond")
    except RuntimeError as error:
        failure = Failure.of(error)
    assert (failure.message, failure.mistake) == ("RuntimeError: first", False)
    assert "test_pool.py" in failure.details
    assert Failure.of(KeyError()).message == "KeyError"


@pytest.mark.slow
def test_pool__results_failures_and_deaths(tmp_path):
    with Pool(tmp_path / "log.txt") as pool:
        assert pool.call(operator.truediv, 1, 2) == 0.5
        assert pool.call(operator.truediv, 1, 0).message == "ZeroDivisionError: division by zero"
        pool.start("gone", 1, os._exit, 3)  # in the same process, the only one
        pool.start("killed", 2, time.sleep, 60)
        assert pool.running == ["gone", "killed"]
        assert pool.wait() == ("gone", Failure("The process died of exit code 3."))
        os.kill(pool._busy["killed"].process.pid, signal.SIGKILL)
        message = "The process died of signal SIGKILL, which is what the system sends when memory runs out."
        assert pool.wait() == ("killed", Failure(message))
        pool.start("long", 1, time.sleep, 60)
        worker = pool._busy["long"].process
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert not worker.is_alive()
    assert "ZeroDivisionError" in (tmp_path / "log.txt").read_text()


def _own_a_worker_and_die(log, connection):
    pool = Pool(log)
    pool.start("long", 1, time.sleep, 60)
    (worker,) = pool._busy.values()
    connection.send(worker.process.pid)
    time.sleep(60)


@pytest.mark.slow
def test_pool__its_processes_end_with_the_one_that_made_them(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(
        target=_own_a_worker_and_die, args=(tmp_path / "log.txt", theirs)
    )
    parent.start()
    worker = psutil.Process(ours.recv())
    while not (tmp_path / "log.txt").exists():  # it has got as far as serving
        time.sleep(0.1)
    parent.kill()
    parent.join()
    worker.wait(timeout=10)
    assert not worker.is_running()
