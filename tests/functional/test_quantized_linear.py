import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bsr.functional._quantized_linear import dequantize_rows, quantize_rows, quantized_linear

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rows(dtype):
    """Rows of every kind: ordinary, of one value, zeros, nearly zeros, with one large value."""
    weight = torch.randn(64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 0.05
    weight[1], weight[2] = -0.7, 0
    weight[3] *= torch.finfo(dtype).tiny
    weight[4, 7] = 300
    weight[5:20] *= torch.logspace(-2, 2, 15, dtype=torch.float64)[:, None]
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows__no_value_moves_by_more_than_half_a_scale(dtype):
    weight = rows(dtype)
    codes, scale = quantize_rows(weight)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, dtype, (64, 1))
    error = (weight.double() - codes.double() * scale.double()).abs()
    assert (error <= scale.double() / 2 * (1 + 1e-5)).all()
    ordinary = torch.ones(64, dtype=torch.bool)
    ordinary[2:4] = False
    ordinary &= scale[:, 0] > torch.finfo(dtype).tiny
    assert ordinary.sum() > 40
    largest = weight.double().abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(scale.double()[ordinary], largest[ordinary], rtol=2**-8, atol=0)
    assert not codes[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows__of_a_rounded_weight_changes_nothing(dtype):
    codes, scale = quantize_rows(rows(dtype))
    again, scale_again = quantize_rows(dequantize_rows(codes, scale))
    assert torch.equal(again, codes)
    assert torch.equal(scale_again, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_rows__in_another_type_rounds_once(dtype):
    codes, scale = quantize_rows(rows(torch.float32))
    assert torch.equal(dequantize_rows(codes, scale, dtype), dequantize_rows(codes, scale).to(dtype))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_quantized_linear__equals_the_rounded_weight_bit_for_bit(autocast, bias):
    codes, scale = quantize_rows(rows(torch.float32))
    weight = dequantize_rows(codes, scale)
    x = torch.randn(2, 9, 48)
    b = torch.randn(64) if bias else None

    def run(function):
        leaves = [t.clone().requires_grad_() for t in (x, b) if t is not None]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(*leaves)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    ours = run(lambda x, b=None: quantized_linear(x, codes, scale, b))
    theirs = run(lambda x, b=None: F.linear(x, weight, b))
    assert len(ours) == 2 + bias
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)


def test_quantized_linear__gradients_of_gradients():
    codes, scale = quantize_rows(rows(torch.float64)[:3, :5].contiguous())
    x, b = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: quantized_linear(x, codes, scale, b).exp(), (x, b))
    assert torch.autograd.gradgradcheck(lambda x, b: quantized_linear(x, codes, scale, b).exp(), (x, b))


class Made(TorchDispatchMode):
    """Notes the storages of floating-point results that have the size of a weight."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.storages = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() == self.numel:
            self.storages.append(weakref.ref(out.untyped_storage()))
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_quantized_linear__keeps_neither_floats_nor_its_input(autocast):
    codes, scale = quantize_rows(rows(torch.float32))
    x, saved = torch.randn(2, 9, 48, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t)
    with hooks, Made(64 * 48) as made, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = quantized_linear(x, codes, scale)
    assert saved == [codes.data_ptr(), scale.data_ptr()]
    assert made.storages
    assert all(storage() is None for storage in made.storages)
    count = len(made.storages)
    with made:
        out.sum().backward()
    assert len(made.storages) > count
    assert all(storage() is None for storage in made.storages)
