import itertools
import random

import pytest

from lightning_bsr.memory._costs import BlockCost
from lightning_bsr.memory._search import BlockSearch, DropPattern, _treatments, drop_patterns, worth_of

DEPTH = 4


def random_case(seed):
    rng = random.Random(seed)

    def cost():
        frozen = rng.randint(3, 12)
        trained = frozen + rng.randint(1, 10)
        mlp = rng.randint(3, 12)
        mlp_trained = mlp + rng.randint(1, 10)
        attn_costs = (frozen, trained, trained - rng.randint(0, 2))
        kept_again = (rng.randint(1, 4), rng.randint(1, 4))
        return BlockCost(attn_costs, (mlp, mlp_trained, mlp_trained - 1), kept_again, (4, 6), 10, 10, 8, (5, 5))

    costs = tuple(cost() for _ in range(DEPTH))
    gains = {(block, part): rng.random() for block in range(DEPTH) for part in ("attn", "mlp")}
    total = sum(gains.values())
    gains = {key: gain / total for key, gain in gains.items()}
    weights = {key: rng.randint(0, 3) for key in gains}
    return costs, gains, weights, rng.randint(15, 90)


def best_of_all(costs, gains, weights, bound, recompute):
    """Try every way to treat every block."""
    best = 0.0
    for start in range(DEPTH):
        options = [
            list(_treatments(i, costs[i], gains, weights, after_training=i > start, recompute=recompute))
            for i in range(start, DEPTH)
        ]
        for ways in itertools.product(*options):
            kept, fits = 0, True
            for way in ways:
                fits = fits and kept + max(way.spike, way.kept) <= bound
                kept += way.kept
            if fits:
                best = max(best, sum(way.gain for way in ways))
    return best


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_search__finds_the_best_of_all(seed, recompute):
    costs, gains, weights, bound = random_case(seed)
    search = BlockSearch(DropPattern({}, (1,) * (DEPTH + 1), 0.0, costs), gains, weights, recompute, {})
    found = search.run(bound, full_flops=1000, thrift=0.0)[0]
    assert found.gain == pytest.approx(best_of_all(costs, gains, weights, bound, recompute))
    assert found.activations <= bound
    trained = {(block, part) for block, parts in found.configuration.blocks.items() for part in parts}
    assert sum(gains[key] for key in trained) == pytest.approx(found.gain)
    again = [policies for policies in found.configuration.lean.values() if "recompute" in policies.values()]
    assert recompute or not again


def test_search__nothing_fits():
    costs, gains, weights, _ = random_case(0)
    search = BlockSearch(DropPattern({}, (1,) * (DEPTH + 1), 0.0, costs), gains, weights, True, {})
    found = search.run(1, full_flops=1000, thrift=0.0)[0]
    assert found.configuration.blocks == {}
    assert found.activations == 0


def test_search__thrift_saves_operations():
    costs, gains, weights, _ = random_case(1)
    search = BlockSearch(DropPattern({}, (1,) * (DEPTH + 1), 0.0, costs), gains, weights, True, {})
    lavish, thrifty = (min(search.run(40, 200, thrift), key=lambda f: f.flops) for thrift in (0.0, 20.0))
    assert thrifty.flops < lavish.flops


def test_worth():
    assert worth_of(0.0, 0.0) == 0
    assert worth_of(1.0, 0.0) == 1
    assert 0.8 < worth_of(0.25, 0.0) < 0.9
    assert worth_of(1.0, 0.2) == pytest.approx(0.6)


def test_drop_patterns__leaves_out_what_another_one_makes_needless():
    loss = {0: 0.3, 1: 0.1, 2: 0.0}

    def tokens(drop):
        counts, now = [16], 16
        for block in range(3):
            now = now // 2 if block in drop else now
            counts.append(now)
        return tuple(counts)

    found = [drop for drop, _, _ in drop_patterns(3, [0.5], 1, tokens, lambda drop: sum(loss[block] for block in drop))]
    # Dropping in the last block is free, so not to drop at all is needless.
    assert found == [{0: 0.5}, {1: 0.5}, {2: 0.5}]


def test_drop_patterns__leaves_out_what_costs_more_than_all_training_gains():
    assert [d for d, _, _ in drop_patterns(2, [0.5], 2, lambda d: (4, 4 - len(d), 4 - len(d)), lambda d: len(d))] == [
        {}
    ]
