"""A run that is killed again and again, at any moment, ends with the weights of one that never was."""

import random
import signal
import time

import pytest
import torch

from killed_runs import BATCHES, EPOCHS, Small, run
from lightning_bsr.functional import merge_delta, read_delta
from processes import fork_server

KILLS = 24


def checkpoints(folder):
    """Read all that is called a checkpoint or a delta: each must be whole. Newest first."""
    found = []
    for path in folder.rglob("*.ckpt"):
        found.append((torch.load(path, weights_only=True)["global_step"], path))
        if path.parent.name == "delta":
            assert path.with_suffix(".safetensors").exists()
    for path in folder.rglob("*.safetensors"):
        read_delta(path)
    return sorted(found, reverse=True)


def receive(connection):
    try:
        return connection.recv()
    except EOFError:
        return None


@pytest.mark.slow
@pytest.mark.timeout(600)  # a busy machine has much to do for each of the processes
def test_killed_at_random_moments__ends_as_if_it_never_was(tmp_path):
    processes = fork_server()
    chance = random.Random(0)
    moments = [(("file", "wall")[number % 2], chance.randint(1, 30), chance.random()) for number in range(KILLS)]
    killed, while_saving, resumed_from, found = 0, 0, [], []
    for kind, number, share in [*moments, ("never", 0, 0.0)]:
        newest = [path for step, path in found if step == found[0][0]]
        ckpt_path = chance.choice(sorted(newest)) if newest else None
        resumed_from.append(ckpt_path.parent.name if ckpt_path else "nothing")

        reports, connection = processes.Pipe(duplex=False)
        arguments = (tmp_path, connection, ckpt_path, number if kind == "file" else None)
        child = processes.Process(target=run, args=arguments)
        child.start()
        connection.close()
        lines = []
        if kind == "wall":
            while len(lines) < number % 4 + 1 and (line := receive(reports)):
                lines.append(line)
            time.sleep(0.03 * share)
            child.kill()
        while line := receive(reports):
            lines.append(line)
        reports.close()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        assert child.exitcode in (0, -signal.SIGKILL)
        while_saving += any(tmp_path.rglob("*.partial"))
        # Nothing is lost but what came after the last checkpoint.
        saved = [int(line.split()[1]) for line in lines if line.startswith("saved")]
        before, found = found, checkpoints(tmp_path)
        assert not saved or found[0][0] >= saved[-1]
        assert not before or found[0][0] >= before[0][0]

    assert killed >= 20
    assert while_saving >= 1
    assert {"nothing", "whole", "delta"} == set(resumed_from)
    # In a process like the others: what other tests did to this one may change the last bit of a sum.
    reports, connection = processes.Pipe(duplex=False)
    undisturbed = processes.Process(target=run, args=(tmp_path / "undisturbed", connection, None, None))
    undisturbed.start()
    connection.close()
    while receive(reports):
        pass
    undisturbed.join()
    step = found[0][0]
    assert step == EPOCHS * BATCHES
    whole, expected = (
        torch.load(folder / "whole" / f"step={step}.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path, tmp_path / "undisturbed")
    )
    merged = merge_delta(Small(), tmp_path / "delta" / f"step={step}.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(whole[name], tensor), name
        assert torch.equal(merged[name], tensor), name
