"""Runs functions in processes of their own, started from one that has trained nothing and has no threads.

Forking the process of the tests, which has threads, may never end, and autograd refuses to run in what was forked
after it had started threads.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys

import cloudpickle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def fork_server():
    """Give the context of multiprocessing whose processes are forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_runs"])
    with pytest.MonkeyPatch.context() as patch:
        # The server of Python 3.11 does not look where its parent does, and says nothing if it finds nothing to import.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        multiprocessing.forkserver.ensure_running()
    return context


def in_two_processes(function, folder):
    """Call ``function(rank)`` in two processes of one group on the CPU, started as torchrun starts them.

    Returns what they gave, in the order of the ranks; what they raise is raised here.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork_server()
    # The functions are closures of tests, whose modules other processes cannot import.
    for name, module in list(sys.modules.items()):
        if name == function.__module__ or name.endswith("conftest"):
            cloudpickle.register_pickle_by_value(module)
    arguments = (cloudpickle.dumps(function), port, folder)
    mp.start_processes(_run, arguments, nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _run(rank, function, port, folder):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(cloudpickle.loads(function)(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
