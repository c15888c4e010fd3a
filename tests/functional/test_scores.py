import pytest
import torch

from lightning_bsr.functional import cls_scores, mean_scores, random_scores


@pytest.fixture
def attention():
    """q, k and the whole softmax matrix, averaged over heads."""
    q, k = torch.randn(2, 3, 11, 4), torch.randn(2, 3, 11, 4)
    return q, k, (0.3 * q @ k.mT).softmax(-1).mean(1)


def test_cls_scores__equal_the_row_of_the_whole_matrix(attention):
    q, k, matrix = attention
    torch.testing.assert_close(cls_scores(q, k, 0.3, 2), matrix[:, 0, 2:])


def test_cls_scores__under_autocast_of_queries_in_fp32(attention):
    """Rotary embeddings in fp32 make queries and keys of fp32, which autocast multiplies in its own type."""
    q, k, _ = (tensor.requires_grad_() for tensor in attention)
    with torch.autocast("cpu", torch.bfloat16):
        scores = cls_scores(q, k, 0.3, 2)
    ours = torch.autograd.grad(scores.square().sum(), (q, k))
    theirs = torch.autograd.grad(cls_scores(q, k, 0.3, 2).square().sum(), (q, k))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.001)


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_mean_scores__equal_the_columns_of_the_whole_matrix(attention, chunk_size):
    q, k, matrix = attention
    torch.testing.assert_close(mean_scores(q, k, 0.3, 1, chunk_size), matrix.mean(1)[:, 1:])


def test_random_scores__positive_and_one_in_all():
    scores = random_scores(torch.zeros(2, 9, 4), 0)
    assert (scores >= 0).all()
    torch.testing.assert_close(scores.sum(1), torch.ones(2))
    assert not torch.equal(scores, random_scores(torch.zeros(2, 9, 4), 0))
