import pytest
import rich.console
import torch
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import select_blocks_
from lightning_bsr.memory import measure
from plain_modules import tiny_vit


def test_measure__leaves_gradients_and_generators_alone():
    model = tiny_vit(proj_drop_rate=0.1).train()
    model.norm.weight.grad = torch.ones(32)
    state = torch.get_rng_state()
    measure(model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.norm.weight.grad, torch.ones(32))
    assert model.head.weight.grad is None


def test_measure__flops_of_a_frozen_model_have_no_backward():
    model = tiny_vit().requires_grad_(False)
    report = measure(model, torch.randn(2, 3, 32, 32))
    assert report.flops.forward > 0
    assert report.flops.backward == 0
    assert report.activations == report.gradients == 0


def test_measure__report_as_table_and_numbers(capsys):
    model = tiny_vit()
    select_blocks_(model, [3])
    report = measure(model, torch.randn(2, 3, 32, 32))
    rich.console.Console(width=140).print(report.table())
    printed = capsys.readouterr().out
    assert "activations (MiB)" in printed
    assert "peak of the step" in printed
    assert "frozen" in printed
    assert f"{report.activations / 2**20:.2f}" in printed
    numbers = report.to_dict()
    assert numbers["flops"] == {"forward": report.flops.forward, "backward": report.flops.backward}
    assert numbers["by_block"][4]["name"] == "3"
    assert numbers["by_block"][4]["activations"] == report.by_block[4].activations


def test_measure__no_vit():
    with pytest.raises(ConfigurationError, match="No supported Vision Transformer was found in Linear"):
        measure(nn.Linear(2, 2), torch.zeros(1, 2))
