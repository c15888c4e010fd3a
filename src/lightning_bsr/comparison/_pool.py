"""Worker processes whose death or failure is an answer like any other."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jsonargparse import ArgumentError

from lightning_bsr._cli_errors import one_line
from lightning_bsr._errors import ConfigurationError


@dataclass(frozen=True)
class Failure:
    """Why a job has no result.

    Attributes:
        message: One line.
        details: The traceback, or nothing where there is none.
        mistake: Whether it is the user's: of the configuration, not of the code.
    """

    message: str
    details: str = ""
    mistake: bool = False

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Describe an exception."""
        mistake = next(
            (e for e in (error, error.__cause__) if isinstance(e, (ArgumentError, ConfigurationError))), None
        )
        if mistake is not None:
            return cls(one_line(str(mistake)), mistake=True)
        lines = str(error).strip().splitlines()
        message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return cls(message, "".join(traceback.format_exception(error)))


class Pool:
    """Processes that run one job at a time each and live until the pool is left.

    A process is started when a job finds none idle. What processes print goes to a log file. They end with the process
    that made them, whichever way it ends.

    Args:
        log: The file for what they print.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._idle: list[_Worker] = []
        self._busy: dict[Any, _Worker] = {}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in (*self._idle, *self._busy.values()):
            worker.kill()

    @property
    def running(self) -> list[Any]:
        """The names of the jobs that are not done yet."""
        return list(self._busy)

    def start(self, name: Any, share: int, function: Callable[..., Any], *args: Any) -> None:
        """Run ``function(*args)`` in a process, on this part of the CPU's threads.

        Args:
            name: What :meth:`wait` will call it.
            share: How many jobs share the threads.
            function: A module's function.
            *args: What can be pickled.
        """
        worker = self._idle.pop() if self._idle else _Worker(self._log)
        self._busy[name] = worker
        worker.send((share, function, args))

    def wait(self) -> tuple[Any, Any]:
        """Wait for any job; return its name and its result or :class:`Failure`."""
        listening: dict[Any, Any] = {worker.connection: name for name, worker in self._busy.items()}
        sentinels: dict[Any, Any] = {worker.process.sentinel: name for name, worker in self._busy.items()}
        ready = wait([*listening, *sentinels])
        # What was sent before a death is in the connection still.
        name = next(names[one] for names in (listening, sentinels) for one in ready if one in names)
        worker = self._busy.pop(name)
        try:
            result = worker.connection.recv()
        except (EOFError, OSError):
            return name, worker.obituary()
        self._idle.append(worker)
        return name, result

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run one job while nothing else runs, on all threads; return its result or :class:`Failure`."""
        self.start("call", 1, function, *args)
        return self.wait()[1]


class _Worker:
    def __init__(self, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not daemonic: those may not have the data loaders' worker processes as children.
        self.process = context.Process(target=_serve, args=(theirs, log), daemon=False)
        with _sigint_ignored():
            self.process.start()
        theirs.close()

    def send(self, job: object) -> None:
        with contextlib.suppress(OSError):  # it died; wait() will say so
            self.connection.send(job)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def obituary(self) -> Failure:
        self.process.join()
        self.connection.close()
        code = self.process.exitcode or 0
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = ", which is what the system sends when memory runs out" if code == -9 else ""
        return Failure(f"The process died of {cause}{hint}.")


@contextlib.contextmanager
def _sigint_ignored() -> Iterator[None]:
    """A started process inherits that it ignores Ctrl-C: its parent ends it, and it prints no traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, log: Path) -> None:
    _print_to(log)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threads = torch.get_num_threads()
    while True:
        try:
            share, function, args = connection.recv()
        except EOFError:
            return
        torch.set_num_threads(max(1, threads // share))
        try:
            answer = function(*args)
        except (Exception, SystemExit) as error:
            traceback.print_exception(error)
            answer = Failure.of(error)
        gc.collect()
        torch.cuda.empty_cache()
        sys.stdout.flush()
        connection.send(answer)


def _print_to(log: Path) -> None:
    # The descriptors too: what dies in C++ says why there.
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = log.open("a", buffering=1, encoding="utf-8")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    faulthandler.enable(stream)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
