import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_bsr.memory._live import StepTracker


def test_tracker__views_and_in_place_operations_are_no_new_memory():
    with StepTracker() as tracker:
        x = torch.ones(256)
        y = x.view(16, 16).t()[2:]
        x.add_(1)
    assert tracker.bytes["temporaries"] == tracker.peak.bytes == 1024
    del x
    assert tracker.bytes["temporaries"] == 1024
    del y
    assert tracker.bytes["temporaries"] == 0
    assert tracker.peak.bytes == 1024


def test_tracker__peak_is_the_moment_when_most_lived():
    with StepTracker() as tracker:
        a = torch.ones(100)
        b = a + 1
        tracker.phase = "backward"
        c = a + b  # 1200 bytes
        tracker.phase = "optimizer"
        del a, b
        d = c + 1
    assert (tracker.peak.bytes, tracker.peak.phase) == (1200, "backward")
    assert dict(tracker.peak.parts) == {"temporaries": 1200}
    assert tracker.bytes["temporaries"] == c.nbytes + d.nbytes
    tracker.forget_peak()
    assert tracker.peak.bytes == 800


def test_tracker__what_was_there_before_counts_when_held():
    weight, images = torch.ones(50), torch.ones(100)
    with StepTracker() as tracker:
        tracker.hold([weight, weight.view(5, 10)], "parameters")
        tracker.hold([images], "inputs")
        product = images[:50] * weight
        tracker.hold([product, weight], "activations")
    assert tracker.bytes == {"parameters": 200, "inputs": 400, "temporaries": 0, "activations": 200}
    assert tracker.activations_peak == 200
    del product
    assert tracker.bytes["activations"] == 0
    assert tracker.activations_peak == 200


def test_tracker__phantoms_count_at_the_peak():
    with StepTracker() as tracker:
        tracker.hold_phantom(1000, "gradients")
        x = torch.ones(100)
        tracker.hold_phantom(-1000, "gradients")
        y = x + torch.ones(100)
    assert tracker.peak.bytes == 1400
    assert dict(tracker.peak.parts) == {"gradients": 1000, "temporaries": 400}
    assert tracker.bytes["temporaries"] == x.nbytes + y.nbytes


def test_tracker__copies_of_weights():
    weight, other = torch.ones(10), torch.ones(10)
    with StepTracker() as tracker:
        tracker.hold([weight], "parameters")
        tracker.hold([other], "inputs")
        low, other_low = weight.bfloat16(), other.bfloat16()
        assert tracker.is_weight_copy(low)
        assert tracker.is_weight_copy(low.t())
        assert not any(tracker.is_weight_copy(t) for t in (other_low, weight, low + 1, torch.ones(10)))


def test_tracker__what_is_computed_again_is_kept():
    weight = torch.ones(10)
    with StepTracker() as tracker:
        tracker.hold([weight], "parameters")
        before = torch.ones(5)
        tracker.recompute(True)
        kept, low, freed = torch.ones(100), weight.bfloat16(), torch.ones(1000)
        tracker.recompute(False)
        del freed
        after = torch.ones(20)
    assert tracker.bytes["activations"] == tracker.activations_peak == kept.nbytes
    assert tracker.bytes["weight_copies"] == low.nbytes
    assert tracker.bytes["temporaries"] == before.nbytes + after.nbytes


@pytest.mark.parametrize("fake", [False, True])
def test_tracker__operations_by_phase(fake):
    with FakeTensorMode() if fake else torch.no_grad(), StepTracker() as tracker:
        a, b = torch.ones(3, 5), torch.ones(5, 7)
        a @ b
        tracker.phase = "backward"
        a @ b
        a @ b
        a + a
    assert dict(tracker.flops) == {("forward", ""): 2 * 3 * 5 * 7, ("backward", ""): 4 * 3 * 5 * 7}
    assert tracker.peak.bytes == 4 * (15 + 35 + 21)
