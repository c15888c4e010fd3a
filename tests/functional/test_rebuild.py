import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_bsr.functional._rebuild import RebuildLinearInputs
from lightning_bsr.memory import ActivationRecorder


def kept(function, *parameters):
    with ActivationRecorder(nn.ParameterList(parameters)) as recorder:
        out = function()  # what nobody holds is not kept
        activations = recorder.report().activations
    del out
    return activations


def rebuilding(function):
    def run(*args):
        with RebuildLinearInputs():
            return function(*args)

    return run


def behind_norm(x, norm, bias, weight, shift):
    return F.linear(F.layer_norm(x, (4,), norm, bias), weight, shift)


def behind_rms_norm(x, norm, bias, weight, shift):
    return F.linear(F.rms_norm(x, (4,), norm), weight, shift)


def behind_gelu(x, norm, bias, weight, shift):
    return F.linear(F.gelu(x, approximate="tanh"), weight, shift)


def behind_silu(x, norm, bias, weight, shift):
    return F.linear(F.silu(x), weight)


FUNCTIONS = [behind_norm, behind_rms_norm, behind_gelu, behind_silu]


def tensors(dtype=torch.float32, x_grad=True, weight_grad=True):
    make = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4), (4,), (4,), (5, 4), (5,)]
    made = [torch.randn(shape, generator=make, dtype=dtype) for shape in shapes]
    wanted = [x_grad, True, True, weight_grad, True]
    return [tensor.requires_grad_(grad) for tensor, grad in zip(made, wanted, strict=True)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients__by_finite_differences(function):
    inputs = tensors(torch.float64)
    assert torch.autograd.gradcheck(rebuilding(function), inputs)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("x_grad", "weight_grad"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("lower", [None, torch.bfloat16])
def test_gradients__are_equal_bit_for_bit(function, x_grad, weight_grad, lower):
    inputs = tensors(x_grad=x_grad, weight_grad=weight_grad)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    with torch.autocast("cpu", lower, enabled=lower is not None):
        theirs, ours = function(*inputs), rebuilding(function)(*inputs)
    assert torch.equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    out_grad = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, wanted, out_grad, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(ours, wanted, out_grad, allow_unused=True, materialize_grads=True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_kept__is_no_input_of_the_linear_layer(function):
    inputs = tensors()
    plain = kept(lambda: function(*inputs), *inputs[1:])
    assert kept(lambda: rebuilding(function)(*inputs), *inputs[1:]) == plain - inputs[0].nbytes


def test_kept__several_linear_layers_behind_one_norm():
    x, norm, bias, weight, shift = tensors()

    def qkv():
        y = F.layer_norm(x, (4,), norm, bias)
        return [F.linear(y, weight, shift) for _ in range(3)]

    def in_all(run):
        out = run()
        return torch.autograd.grad(sum(part.sum() for part in out), [x, norm, bias, weight, shift])

    assert all(map(torch.equal, in_all(rebuilding(qkv)), in_all(qkv)))
    assert kept(rebuilding(qkv), norm, bias, weight, shift) == kept(qkv, norm, bias, weight, shift) - x.nbytes


def test_kept__no_copy_of_a_weight_under_autocast():
    x = torch.randn(2, 3, 64, requires_grad=True)
    frozen, trained = nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 64)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return trained(frozen(x))

    def weight_copies(function):
        with ActivationRecorder(nn.ModuleList([frozen, trained])) as recorder:
            out = function()
            report = recorder.report()
        return report.weight_copies, report.activations, torch.autograd.grad(out.sum(), [x, trained.weight])

    *plain, expected = weight_copies(run)
    *ours, found = weight_copies(rebuilding(run))
    assert plain == [2 * 64 * 64 * 2, 2 * 3 * 64 * 2]
    assert ours == [0, 2 * 3 * 64 * 2]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("changes", ["output", "input"])
def test_a_tensor_that_changed__is_kept(changes):
    x, _, _, weight, shift = tensors()

    def run():
        before = x * 1
        y = F.gelu(before)
        with torch.no_grad():
            (y if changes == "output" else before.detach()).add_(1)
        return F.linear(y, weight, shift)

    # GELU's own gradient cannot be had once its input has changed; that of the weight can.
    expected = torch.autograd.grad(run().sum(), [weight])
    assert torch.equal(torch.autograd.grad(rebuilding(run)().sum(), [weight])[0], expected[0])


def test_what_it_is_made_of_changes_before_backward__is_refused():
    x, _, _, weight, shift = tensors()
    before = x * 1
    out = rebuilding(lambda: F.linear(F.gelu(before), weight, shift))()
    with torch.no_grad():
        before.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), [weight])


def test_second_derivatives__are_refused():
    inputs = tensors()
    out = rebuilding(behind_gelu)(*inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), [inputs[3]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_without_gradients__runs_plainly():
    inputs = tensors()
    with torch.no_grad():
        out = rebuilding(behind_norm)(*inputs)
        assert torch.equal(out, behind_norm(*inputs))
    assert not out.requires_grad


def test_vectors__are_left_alone():
    x, weight = torch.randn(4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    out = rebuilding(lambda: F.linear(F.gelu(x), weight))()
    assert type(out.grad_fn).__name__ != "_RebuildingLinearBackward"
    assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], F.gelu(x).detach().expand(5, 4))


@pytest.mark.parametrize(
    "parts", [["norm", "bias", "weight", "shift"], ["norm", "weight"], ["bias", "weight", "shift"]]
)
@pytest.mark.parametrize("lower", [None, torch.bfloat16])
def test_folded_norm__has_its_gradients_without_their_product(parts, lower):
    x, *rest = tensors(torch.float64 if lower is None else torch.float32, x_grad=False)
    given = dict(zip(("norm", "bias", "weight", "shift"), rest, strict=True))
    for name, tensor in given.items():
        tensor.requires_grad_(name in parts)
    wanted = [given[name] for name in parts]

    def folding():
        with RebuildLinearInputs(fold_norms=True):
            return behind_norm(x, **given)

    with torch.autocast("cpu", lower, enabled=lower is not None):
        theirs, ours = behind_norm(x, **given), folding()
    assert torch.equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    out_grad = torch.randn_like(ours)
    with FlopCounterMode(display=False) as plain_operations:
        expected = torch.autograd.grad(theirs, wanted, out_grad)
    with FlopCounterMode(display=False) as operations:
        found = torch.autograd.grad(ours, wanted, out_grad)
    tolerance = 1e-12 if lower is None else 5e-2
    for ours_grad, theirs_grad in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=tolerance, atol=tolerance)
    one_row = 2 * 5 * 4
    assert operations.get_total_flops() == plain_operations.get_total_flops() - (6 - 1) * one_row
    assert kept(folding, *rest) == x.nbytes


def test_folded_norm__others_are_as_they_were():
    x, norm, bias, weight, shift = tensors()
    frozen = [x.detach(), norm, bias, weight.detach(), shift]

    def without_bias(x):
        return F.linear(F.layer_norm(x, (4,), norm), weight)

    for function, arguments in (
        (behind_norm, [x, norm, bias, weight, shift]),
        (behind_norm, frozen),
        (behind_rms_norm, [x.detach(), norm, bias, weight, shift]),
        (without_bias, [x.detach()]),
    ):
        expected = rebuilding(function)(*arguments).grad_fn
        with RebuildLinearInputs(fold_norms=True):
            found = function(*arguments).grad_fn
        assert type(found) is type(expected)
