import pytest
import torch

from lightning_bsr.functional._packed_rows import Int8Rows, SparseRows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_rows__error_is_half_a_step(dtype):
    x = (torch.randn(5, 7, 64) * torch.logspace(-3, 3, 7).unsqueeze(1) + 2).to(dtype)
    rows = Int8Rows(x)
    restored = rows.restore()
    step_size = (x.float().amax(-1, keepdim=True) - x.float().amin(-1, keepdim=True)) / 255
    rounding = torch.finfo(dtype).eps * x.float().abs()
    assert ((restored.float() - x.float()).abs() <= 0.501 * step_size + rounding).all()
    assert restored.dtype == dtype


def test_int8_rows__of_equal_values_are_exact():
    x = torch.tensor([[0.0, 0.0], [3.5, 3.5]])
    assert torch.equal(Int8Rows(x).restore(), x)


def test_sparse_rows__keep_the_largest():
    x = torch.randn(3, 5, 40)
    restored = SparseRows(x, 4).restore()
    assert ((restored != 0).sum(-1) == 4).all()
    assert torch.equal(restored[restored != 0], x[restored != 0])
    assert (x[restored == 0].view(3, 5, 36).abs().amax(-1) <= restored.abs().topk(4).values.amin(-1)).all()


def test_sparse_rows__indices_are_as_small_as_they_can_be():
    assert SparseRows(torch.randn(2, 32767), 3).index.dtype == torch.int16
    assert SparseRows(torch.randn(2, 32768), 3).index.dtype == torch.int32
