import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import lightning_bsr.models  # noqa: F401 - registers the micro ViT with timm
from lightning_bsr import DigitsDataModule
from lightning_bsr.functional import (
    install_checkpointing,
    install_int8_activations,
    install_lora,
    install_token_drop,
    select_blocks_,
    train_biases_,
)
from lightning_bsr.functional._quantize import quantize_frozen_
from lightning_bsr.memory import measure, plan
from plain_modules import tiny_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3])
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def rounded_twin(model, install):
    """A float model with the weights that ``model``, quantised, computes with."""
    twin = tiny_vit()
    install(twin)
    twin.load_state_dict(model.state_dict())
    return twin


def gradients(model):
    model.zero_grad()
    torch.manual_seed(1)
    F.cross_entropy(model(X).float(), Y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_quantize_frozen__takes_the_frozen_linear_layers_of_blocks():
    model = tiny_vit()
    select_blocks_(model, {1: "mlp", 4: "all"})
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    parameters["blocks.0.mlp.fc1.weight"].grad = torch.ones(128, 32)
    handle = quantize_frozen_(model)
    expected = {f"blocks.{i}.{layer}" for i in (0, 2, 3, 5) for layer in LAYERS}
    assert set(handle.layers) == expected | {"blocks.1.attn.qkv", "blocks.1.attn.proj"}
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        held = name.removesuffix(".weight") in handle.layers
        assert parameter.dtype == (torch.int8 if held else torch.float32), name
        assert parameter.shape == before[name].shape
        assert held or torch.equal(parameter, before[name])
    assert parameters["blocks.0.mlp.fc1.weight"].grad is None
    assert all(isinstance(layer, nn.Linear) for layer in handle.layers.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_quantize_frozen__trains_as_with_the_rounded_weights(autocast):
    def select(model):
        select_blocks_(model, {1: "mlp", 4: "all"})

    model = tiny_vit()
    select(model)
    exact = model(X)
    quantize_frozen_(model)
    twin = rounded_twin(model, select)
    assert torch.equal(model(X), twin(X))
    assert not torch.equal(model(X), exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = gradients(model), gradients(twin)
    assert "blocks.1.mlp.fc1.weight" in ours
    assert_equal(ours, theirs)


LEVERS = {
    "token_drop": lambda model: install_token_drop(model, [1, 3], 0.5),
    "checkpointing": install_checkpointing,
    "int8_activations": install_int8_activations,
    "biases": train_biases_,
}


@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("last", [True, False], ids=["quantized_last", "quantized_first"])
def test_quantize_frozen__composes(lever, last):
    def install(model):
        if lever != "biases":
            select_blocks_(model, [1, 4])

    model = tiny_vit()
    install(model)
    if last or lever == "biases":
        LEVERS[lever](model)
        quantize_frozen_(model)
    else:
        quantize_frozen_(model)
        LEVERS[lever](model)
    twin = rounded_twin(model, install)
    LEVERS[lever](twin)
    ours = gradients(model)
    assert ("blocks.0.attn.qkv.bias" in ours) == (lever == "biases")
    assert_equal(ours, gradients(twin))


def test_quantize_frozen__under_adapters():
    model = tiny_vit()
    adapters = install_lora(model, rank=2)
    handle = quantize_frozen_(model)
    assert "blocks.0.attn.qkv.base_layer" in handle.layers
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    trained = model(X)
    handle.remove()
    adapters.remove()
    torch.testing.assert_close(model(X), trained)


def test_handle__says_what_is_held():
    model = tiny_vit()
    select_blocks_(model, [3])
    handle = quantize_frozen_(model)
    assert (handle.bytes_before, handle.bytes_after) == (5 * 12 * 32**2 * 4, 5 * (12 * 32**2 + 9 * 32 * 4))
    assert str(handle) == (
        "20 frozen weights in blocks of the ViT (VisionTransformer) are held in 8 bits: 0.23 -> 0.06 MiB; they stay "
        "rounded afterwards"
    )


def test_remove__leaves_the_rounded_weights():
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: {k: str(v) for k, v in vars(m).items() if "hooks" in k} for name, m in model.named_modules()}
    selection = select_blocks_(model, [3])
    handle = quantize_frozen_(model)
    held, out = model.state_dict(), model(X)
    handle.remove()
    handle.remove()
    assert_equal(model.state_dict(), held)
    assert torch.equal(model(X), out)
    for name, layer in handle.layers.items():
        error = (layer.weight - before[f"{name}.weight"]).abs()
        assert 0 < error.max() <= before[f"{name}.weight"].abs().max() / 254 * 1.01
    selection.remove()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    for name, module in model.named_modules():
        assert "forward" not in vars(module)
        assert not module._non_persistent_buffers_set
        assert {k: str(v) for k, v in vars(module).items() if "hooks" in k} == attributes[name]
    # Rounding what is rounded changes nothing.
    select_blocks_(model, [3])
    again = quantize_frozen_(model)
    assert_equal(model.state_dict(), held)
    again.remove()
    assert_equal(model.state_dict(), held)


def test_state_dict__has_its_keys_and_types():
    model = tiny_vit().to(torch.bfloat16)
    before = {name: (t.dtype, t.shape) for name, t in model.state_dict().items()}
    select_blocks_(model, [3])
    quantize_frozen_(model)
    state = model.state_dict()
    assert list(state) == list(before)
    assert {name: (t.dtype, t.shape) for name, t in state.items()} == before
    plain = tiny_vit().to(torch.bfloat16)
    plain.load_state_dict(state)
    assert torch.equal(plain(X.bfloat16()), model(X.bfloat16()))


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict__rounds_ordinary_weights(assign):
    other = tiny_vit()
    other.init_weights("jax")
    weights = other.state_dict()
    kept = copy.deepcopy(weights)
    model = tiny_vit()
    select_blocks_(model, [3])
    handle = quantize_frozen_(model)
    model.load_state_dict(weights, assign=assign)
    assert_equal(weights, kept)
    select_blocks_(other, [3])
    quantize_frozen_(other)
    assert model.blocks[0].attn.qkv.weight.dtype == torch.int8
    assert torch.equal(model(X), other(X))
    handle.remove()
    assert_equal(model.state_dict(), other.state_dict())


def test_load_state_dict__of_what_trained_only():
    model = tiny_vit()
    select_blocks_(model, [3])
    quantize_frozen_(model)
    before = model.state_dict()
    delta = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    missing, unexpected = model.load_state_dict(delta, strict=False)
    assert not unexpected
    assert set(missing) == before.keys() - delta.keys()
    assert_equal(model.state_dict(), before | delta)


def test_load_state_dict__reports_what_does_not_fit():
    model = tiny_vit()
    select_blocks_(model, [3])
    quantize_frozen_(model)
    before, weights = model.state_dict(), tiny_vit().state_dict()
    weights["blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)
    del weights["blocks.0.attn.proj.weight"]
    weights["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(weights)
    assert str(error.value) == (
        "Error(s) in loading state_dict for VisionTransformer:\n"
        '\tMissing key(s) in state_dict: "blocks.0.attn.proj.weight". \n'
        "\tsize mismatch for blocks.0.attn.qkv.weight: copying a param with shape torch.Size([3, 3]) from checkpoint, "
        "the shape in current model is torch.Size([96, 32]).\n"
        "\tblocks.0.mlp.fc1.weight has NaN or infinite values, which cannot be held in 8 bits."
    )
    for name in ("attn.qkv", "attn.proj", "mlp.fc1"):
        assert torch.equal(model.state_dict()[f"blocks.0.{name}.weight"], before[f"blocks.0.{name}.weight"])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies__are_quantised_on_their_own(copier):
    model = tiny_vit()
    select_blocks_(model, [3])
    handle = quantize_frozen_(model)
    twin = copier(model)
    assert twin.blocks[0].attn.qkv.forward.layer is twin.blocks[0].attn.qkv
    assert_equal(gradients(twin), gradients(model))
    state = model.state_dict()
    twin.load_state_dict({name: -t for name, t in state.items()})
    assert_equal(twin.state_dict(), {name: -t for name, t in state.items()})
    assert_equal(model.state_dict(), state)
    handle.remove()
    assert twin.blocks[0].attn.qkv.weight.dtype == torch.int8


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_measure_and_plan__agree_on_frozen_bytes(precision):
    model = tiny_vit()
    if precision == "bf16-true":
        model.to(torch.bfloat16)
    x = X.to(next(model.parameters()).dtype)
    select_blocks_(model, {1: "mlp", 4: "all"})
    before = measure(model, x, precision=precision)
    handle = quantize_frozen_(model)
    measured = measure(model, x, precision=precision)
    assert plan(model, x, precision=precision) == measured
    numel = sum(layer.weight.numel() for layer in handle.layers.values())
    floats = {kind: num for kind, num in before.parameter_dtypes.items() if kind.startswith("frozen")}
    (kind, frozen), size = floats.popitem(), x.element_size()
    assert measured.parameter_dtypes == {**before.parameter_dtypes, kind: frozen - numel * size, "frozen int8": numel}
    assert measured.parameters == before.parameters - numel * (size - 1)
    assert measured.activations == before.activations
    assert measured.weight_copies <= before.weight_copies
    assert measured.peak < before.peak
    assert measured.flops == before.flops


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, when compiling
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # and torch 2.6's
def test_quantize_frozen__compiles_as_a_whole():
    model = tiny_vit(depth=2)
    select_blocks_(model, [0])
    quantize_frozen_(model)
    expected = gradients(model)
    model.zero_grad()
    F.cross_entropy(torch.compile(model, backend="aot_eager", fullgraph=True)(X), Y).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_micro_vit__says_the_same_of_real_images():
    data = DigitsDataModule(batch_size=32, augment=False)
    data.prepare_data()
    data.setup("test")
    pictures = next(iter(data.test_dataloader()))[0]
    model = timm.create_model("vit_micro_patch4_32.cifar100", pretrained=True).eval()
    model.requires_grad_(False)
    with torch.no_grad():
        exact = model(pictures)
        quantize_frozen_(model)
        rounded = model(pictures)
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.02 * exact.norm()
    assert (exact.argmax(1) == rounded.argmax(1)).float().mean() > 0.95


def test_quantize_frozen__the_same_layer_under_two_names_is_no_sharing():
    module = nn.ModuleDict({"vit": tiny_vit()})
    module["blocks"] = nn.ModuleDict({"first": module["vit"].blocks[0]})
    module.requires_grad_(False)
    assert len(quantize_frozen_(module).layers) == 24


def test_quantize_frozen__one_vit_of_two():
    module = nn.ModuleDict({"student": tiny_vit(), "teacher": tiny_vit()}).requires_grad_(False)
    handle = quantize_frozen_(module, vit="teacher")
    assert all(name.startswith("teacher.blocks.") for name in handle.layers)
    assert module["student"].blocks[0].attn.qkv.weight.dtype == torch.float32


def test_quantize_frozen__leaves_subclasses_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_vit()
    model.blocks[0].mlp.fc1 = Doubled(32, 128)
    model.requires_grad_(False)
    assert "blocks.0.mlp.fc1" not in quantize_frozen_(model).layers
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.float32
