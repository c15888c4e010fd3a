import pytest
import torch
import torch.nn.functional as F

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_lean_activations, install_token_drop, select_blocks_
from lightning_bsr.memory import fit_lean, measure, plan
from plain_modules import tiny_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def loss(out):
    return F.cross_entropy(out, torch.arange(4))


@pytest.fixture(scope="module")
def model():
    model = tiny_vit()
    select_blocks_(model, [1, 3])
    install_token_drop(model, [3], 0.5)
    return model


@pytest.fixture(scope="module")
def bounds(model):
    """Activations at most, and the report, with all halves exact and with all computed again."""
    found = {}
    for policy in ("exact", "recompute"):
        handle = install_lean_activations(model, policy)
        found[policy] = plan(model, X, loss=loss)
        handle.remove()
    return found


def within(model, budget, **arguments):
    policies = fit_lean(model, lambda: plan(model, X, loss=loss), budget, **arguments)
    handle = install_lean_activations(model, policies)
    try:
        return policies, measure(model, X, loss=loss)
    finally:
        handle.remove()


def again(policies):
    return [(index, half) for index, halves in policies.items() for half, policy in halves.items() if policy != "exact"]


def test_enough_for_all__computes_nothing_again(model, bounds):
    policies, report = within(model, bounds["exact"].activations_peak, kind="activations")
    assert again(policies) == []
    assert report.flops == bounds["exact"].flops


@pytest.mark.parametrize(("kind", "figure"), [("activations", "activations_peak"), ("total", "peak")])
def test_measured__it_fits_and_computes_less_again_the_more_there_is(model, bounds, kind, figure):
    least, most = getattr(bounds["recompute"], figure), getattr(bounds["exact"], figure)
    counts = []
    for share in (0.2, 0.8):
        budget = round(least + share * (most - least))
        policies, report = within(model, budget, kind=kind)
        assert getattr(report, figure) <= budget
        assert bounds["exact"].flops.backward < report.flops.backward < bounds["recompute"].flops.backward
        counts.append(len(again(policies)))
        assert policies[0] == {"attn": "exact", "mlp": "exact"}  # which keeps nothing
    assert counts[0] > counts[1] > 0


def test_leaves_the_module_as_it_was(model):
    forwards = [vars(block).get("forward") for block in model.blocks]
    within(model, "1GiB")
    assert [vars(block).get("forward") for block in model.blocks] == forwards


def test_too_little__says_the_least(model, bounds):
    least = bounds["recompute"].activations_peak
    with pytest.raises(ConfigurationError) as error:
        within(model, 1024, kind="activations")
    assert str(error.value) == (
        "budget is 1.0 KiB of activations, but the least that the ViT (VisionTransformer) can do with, all half-blocks "
        f"computed again, is {least / 1024:.1f} KiB; give more, train less, drop more tokens, or take a smaller batch."
    )


def test_checks_the_kind(model):
    with pytest.raises(ConfigurationError) as error:
        within(model, "1MiB", kind="peak")
    assert str(error.value) == "kind is 'peak', expected one of 'total', 'activations'."
