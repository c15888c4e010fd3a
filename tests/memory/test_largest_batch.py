import math

import pytest
import torch

from lightning_bsr.memory import MemoryReport, largest_batch_size, plan
from plain_modules import tiny_vit


class Planner:
    """Plans by a formula, and remembers for which sizes."""

    def __init__(self, peak):
        self.peak = peak
        self.sizes = []

    def __call__(self, size):
        self.sizes.append(size)
        return MemoryReport(0, 0, 0, 0, (), peak=self.peak(size))


@pytest.mark.parametrize(
    "peak",
    [
        lambda size: 1000 * size,
        lambda size: 50_000 + 777 * size,
        lambda size: max(300_000, 1000 * size),
        lambda size: 1000 * size + 3 * size**2,
        lambda size: 4096 * math.ceil(size / 16) + 100 * size,
        lambda size: round(1e5 * math.sqrt(size)),
    ],
)
@pytest.mark.parametrize("budget", [1_000, 300_000, 654_321, 5_000_000])
def test_largest_batch_size__fits_and_one_more_does_not(peak, budget):
    planner = Planner(peak)
    found = largest_batch_size(planner, budget)
    assert found == max((size for size in range(1, 20_000) if peak(size) <= budget), default=0)
    assert len(planner.sizes) == len(set(planner.sizes)) <= 30


def test_largest_batch_size__few_plans_for_a_straight_line():
    planner = Planner(lambda size: 12_345_678 + 1_234_567 * size)
    assert largest_batch_size(planner, 12_345_678 + 1_234_567 * 500) == 500
    assert len(planner.sizes) <= 5


@pytest.mark.parametrize("at_most", [1, 2, 3, 100])
def test_largest_batch_size__bound(at_most):
    planner = Planner(lambda size: size)
    assert largest_batch_size(planner, 10**9, at_most=at_most) == at_most
    assert max(planner.sizes) <= at_most


def test_largest_batch_size__of_a_vit():
    model = tiny_vit(depth=2)
    optimizer = torch.optim.AdamW(model.parameters())

    def plan_at(size):
        return plan(model, (1, 3, 32, 32), batch_size=size, optimizer=optimizer)

    budget = 16 * 2**20
    size = largest_batch_size(plan_at, budget)
    assert plan_at(size).peak <= budget < plan_at(size + 1).peak
