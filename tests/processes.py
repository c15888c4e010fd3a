"""Runs a function in two processes of one group on the CPU, started as torchrun starts them."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(function, folder):
    """Call ``function(rank)`` in each process and return what they gave, in the order of the ranks.

    The processes are forked, which needs no second import of everything, and what they raise is raised here.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_run, (function, port, folder), nprocs=2, start_method="fork")
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
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
