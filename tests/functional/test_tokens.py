from itertools import pairwise

import pytest
import torch

from lightning_bsr.functional import cosine_keep_rate, drop_tokens, fuse_tokens, num_kept_tokens


def slow_drop(x, scores, num_kept, num_prefix_tokens, fuse, normalize):
    """One image and one token at a time."""
    rows = []
    for tokens, weights in zip(x, scores, strict=True):
        order = sorted(range(len(weights)), key=lambda i: -weights[i].item())
        patches = tokens[num_prefix_tokens:]
        row = [*tokens[:num_prefix_tokens], *(patches[i] for i in order[:num_kept])]
        if fuse:
            rest = order[num_kept:]
            total = sum(weights[i] for i in rest) if normalize else 1
            row.append(sum(patches[i] * weights[i] for i in rest) / total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
def test_drop_tokens__equals_a_slow_loop_with_gradients(fuse, normalize, num_prefix_tokens):
    x = torch.randn(3, num_prefix_tokens + 9, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(3, 9, dtype=torch.float64, requires_grad=True)
    arguments = {"num_prefix_tokens": num_prefix_tokens, "fuse": fuse, "normalize": normalize}
    fast, slow = drop_tokens(x, scores, 4, **arguments), slow_drop(x, scores, 4, **arguments)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(fast)
    for ours, theirs in zip(
        torch.autograd.grad((fast * weight).sum(), [x, scores], allow_unused=True),
        torch.autograd.grad((slow * weight).sum(), [x, scores], allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_drop_tokens__keeps_no_whole_input_for_backward():
    x = torch.randn(2, 101, 8, requires_grad=True) * 1
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        drop_tokens(x, torch.rand(2, 100), 50, num_prefix_tokens=1)
    assert x.untyped_storage().data_ptr() not in saved


def test_fuse_tokens__keeps_float32_under_autocast():
    tokens, weights = torch.randn(2, 3, 4), torch.rand(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fuse_tokens(tokens, weights), (weights.unsqueeze(1) * tokens.mT).sum(-1).unsqueeze(1))


@pytest.mark.parametrize(
    ("patches", "rate", "kept"), [(196, 0.5, 98), (99, 0.5, 50), (51, 0.5, 26), (7, 0.01, 1), (5, 1, 5)]
)
def test_num_kept_tokens__rounds_up(patches, rate, kept):
    assert num_kept_tokens(patches, rate) == kept


def test_cosine_keep_rate__falls_to_the_rate_and_stays():
    rates = [cosine_keep_rate(0.3, epoch, 5) for epoch in range(8)]
    assert rates[0] == 1
    assert all(a > b for a, b in pairwise(rates[:6]))
    assert rates[5:] == [0.3] * 3
    assert cosine_keep_rate(0.3, 0, 0) == 0.3
