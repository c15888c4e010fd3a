"""Delta files: what is in them, what they merge into, and what is refused."""

import copy
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import (
    Delta,
    install_lora,
    install_side_network,
    install_token_drop,
    load_delta,
    merge_delta,
    quantize_frozen_,
    read_delta,
    save_delta,
    select_blocks_,
)
from lightning_bsr.functional import _delta_file as delta_file
from plain_modules import tiny_vit


class Net(nn.Module):
    """A ViT and, outside of it, a layer with batch statistics."""

    def __init__(self):
        super().__init__()
        self.model = tiny_vit(depth=3, embed_dim=48)
        self.after = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.after(self.model(x))


def step(net):
    """One step of training."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(net(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(path, *, drop=False, quantize=False, **kwargs):
    """A net that trained with its middle block selected, and its delta at ``path``."""
    net = Net()
    select_blocks_(net, [1])
    if drop:
        install_token_drop(net, [0], 0.3, fuse=False)
        install_token_drop(net, [2], 0.5)
    handle = quantize_frozen_(net) if quantize else None
    step(net)
    save_delta(net, path, **kwargs)
    if handle:
        handle.remove()
    return net


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def rewritten(path, change, *, keep_hashes=False):
    """Change a file by hand; ``change`` is given tensors and metadata. Hashes are made to fit, unless told not to."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    if not keep_hashes:
        metadata.pop("sha256")
        metadata["sha256"] = delta_file._sha256_of(metadata)
    save_file(tensors, path, metadata)


def refused(call):
    with pytest.raises(ConfigurationError) as error:
        call()
    return str(error.value)


# What is in a file


def test_save_delta__holds_what_trained_and_buffers_and_no_more(path):
    net = trained(path)
    expected = {name for name, p in net.named_parameters() if p.requires_grad}
    expected |= {"after.running_mean", "after.running_var", "after.num_batches_tracked"}
    delta = read_delta(path)
    assert set(delta.tensors) == expected
    assert set(delta.base) == set(net.state_dict()) - expected
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in delta.tensors.items())
    assert path.stat().st_size < 0.45 * sum(t.nbytes for t in net.state_dict().values())


def test_save_delta__same_base_has_the_same_hash_whatever_trained(path, tmp_path):
    trained(path)
    net = Net()
    select_blocks_(net, [1])
    save_delta(net, tmp_path / "untrained.safetensors")
    assert read_delta(tmp_path / "untrained.safetensors").base_sha256 == read_delta(path).base_sha256
    nn.init.ones_(net.model.blocks[0].norm1.bias)
    save_delta(net, path)
    assert read_delta(tmp_path / "untrained.safetensors").base_sha256 != read_delta(path).base_sha256


def test_save_delta__keeps_configuration_version_and_ordinary_permissions(path):
    trained(path, configuration={"epoch": 3, "callbacks": [{"class": "BlockSelect"}]})
    delta = read_delta(path)
    assert delta.configuration["epoch"] == 3
    assert delta.configuration["callbacks"] == [{"class": "BlockSelect"}]
    assert delta.package_version == Delta({}, {}).package_version
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_save_delta__tied_and_strided_tensors_come_back(path):
    net = nn.Module()
    net.a = nn.Linear(3, 3)
    net.b = nn.Linear(3, 3)
    net.b.weight = net.a.weight
    net.c = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    net.d = nn.Parameter(torch.zeros(0, dtype=torch.bfloat16))
    net.e = nn.Parameter(torch.ones(2), requires_grad=False)
    save_delta(net, path)
    other = copy.deepcopy(net)
    for parameter in (other.a.weight, other.c, other.a.bias):
        nn.init.zeros_(parameter)
    load_delta(other, path)
    assert equal(other.state_dict(), net.state_dict())
    assert other.b.weight is other.a.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_save_delta__refuses_values_that_are_not_finite(path, value):
    net = trained(path)
    before = path.read_bytes()
    with torch.no_grad():
        net.model.head.bias[1] = value
    assert refused(lambda: save_delta(net, path)) == (
        f"'model.head.bias' has NaN or infinite values, so '{path}' was not written; train again from the last delta "
        "with a lower learning rate."
    )
    assert path.read_bytes() == before


def test_save_delta__refuses_another_ending(tmp_path):
    assert refused(lambda: trained(tmp_path / "net.ckpt")) == (
        f"The delta file is to be '{tmp_path}/net.ckpt', expected a name that ends in .safetensors."
    )


# What it merges into


@pytest.mark.parametrize("drop", [False, True])
def test_load_delta__computes_what_was_trained(path, drop):
    net, base = trained(path, drop=drop), Net()
    handle = load_delta(base, path)
    assert equal(base.state_dict(), net.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(base.eval()(images), net.eval()(images))
    assert [drop.forwards.keys() for drop in handle.drops] == ([{0}, {2}] if drop else [])
    assert ("65 -> 34 tokens" in str(handle)) == drop
    handle.remove()
    assert not any("forward" in vars(block) for block in base.model.blocks)
    assert equal(base.state_dict(), net.state_dict())


def test_load_delta__into_what_lies_at_the_common_path(path):
    net = nn.ModuleDict({"inner": nn.ModuleDict({"vit": tiny_vit(depth=3, embed_dim=48)})})
    select_blocks_(net, [1])
    install_token_drop(net, [2], 0.5)
    nn.init.ones_(net["inner"]["vit"].head.bias)
    save_delta(net, path)
    vit = tiny_vit(depth=3, embed_dim=48)
    load_delta(vit, path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit(images), net["inner"]["vit"](images))


def test_merge_delta__gives_full_weights_and_leaves_the_base(path):
    net, base = trained(path), Net()
    before = copied(base)
    for given in (base, base.state_dict()):
        assert equal(merge_delta(given, path), net.state_dict())
    assert equal(base.state_dict(), before)


@pytest.mark.parametrize("rounded_before", [False, True])
def test_merge_delta__rounds_what_was_held_in_8_bits(path, rounded_before):
    net, base = trained(path, quantize=True), Net()
    if rounded_before:  # such as the module after fit
        selection = select_blocks_(base, [1])
        quantize_frozen_(base).remove()
        selection.remove()
    original = base.model.blocks[0].attn.qkv.weight.clone()
    merged = merge_delta(base, path)
    assert equal(merged, net.state_dict())
    assert torch.equal(merged["model.blocks.0.attn.qkv.weight"], original) == rounded_before
    load_delta(base, path)
    assert equal(base.state_dict(), net.state_dict())


@pytest.mark.parametrize("install", [install_lora, install_side_network])
def test_load_delta__adapters_need_the_method_first(path, install):
    net = tiny_vit(depth=3, embed_dim=48)
    handle = install(net)
    step(net)
    images = torch.randn(2, 3, 32, 32)
    expected = net.eval()(images)
    save_delta(net, path, configuration={"callbacks": [{"class": "FineTune", "arguments": {"method": "lora"}}]})
    base = tiny_vit(depth=3, embed_dim=48)
    before = copied(base)
    assert "; expected the module that it was trained from, with the method 'lora' applied to it." in refused(
        lambda: load_delta(base, path)
    )
    assert equal(copied(base), before)
    loaded = install(base)
    load_delta(base, path)
    assert torch.equal(base.eval()(images), expected)
    if install is install_lora:
        loaded.remove()
        handle.remove()
        assert equal(base.state_dict(), net.state_dict())


# What is refused, with the model unchanged


@pytest.fixture
def given(path):
    """A delta and a base that fits it; afterwards the base is as it was."""
    trained(path, drop=True)
    base = Net()
    before, flags = copied(base), [p.requires_grad for p in base.parameters()]
    yield path, base
    assert equal({n: t for n, t in base.state_dict().items() if n in before}, before)
    assert [p.requires_grad for p in base.parameters()] == flags
    assert not any("forward" in vars(block) for block in base.model.blocks)


def test_other_base__is_refused_with_the_first_difference(given):
    path, base = given
    with torch.no_grad():
        other = copy.deepcopy(base)
        other.model.blocks[0].attn.qkv.weight[0, 0] += 1
    expected = read_delta(path).base["model.blocks.0.attn.qkv.weight"]
    found = delta_file.fingerprint(other.model.blocks[0].attn.qkv.weight)
    assert refused(lambda: load_delta(other, path)) == (
        f"The base is another one than '{path}' was trained from: 1 of its 28 frozen tensors differ, such as "
        f"'model.blocks.0.attn.qkv.weight', which is {found}, expected {expected}."
    )


def test_other_dtype__is_refused(given):
    path, base = given
    assert refused(lambda: load_delta(copy.deepcopy(base).bfloat16(), path)) == (
        f"'after.bias' is float32[4] in '{path}', but bfloat16[4] in the base; expected the module that it was trained "
        "from."
    )


def test_other_shape__is_refused(given):
    path, base = given
    other = copy.deepcopy(base)
    other.model.head = nn.Linear(48, 7)
    assert refused(lambda: load_delta(other, path)) == (
        f"'model.head.bias' is float32[4] in '{path}', but float32[7] in the base; expected the module that it was "
        "trained from."
    )


def test_missing_and_extra_names__are_refused(given):
    path, base = given
    other = copy.deepcopy(base)
    del other.after
    other.more = nn.Linear(2, 2)
    assert refused(lambda: load_delta(other, path)) == (
        f"The names in '{path}' and in the base differ: the base lacks 5 tensors ('after.bias', "
        "'after.num_batches_tracked', 'after.running_mean' and 2 more) and the base has 2 that it does not know "
        "('more.bias', 'more.weight'); expected the module that it was trained from."
    )


def test_base_that_drops_tokens__is_refused(given):
    path, base = given
    handle = install_token_drop(base, [2], 0.5)
    assert refused(lambda: load_delta(base, path)) == (
        "Block 2 of the ViT 'model' (VisionTransformer) drops tokens already; remove that first."
    )
    handle.remove()


def test_missing_file__is_named(given):
    path, base = given
    assert refused(lambda: load_delta(base, path.with_name("none.safetensors"))) == (
        f"'{path.with_name('none.safetensors')}' does not exist, expected a delta file."
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999999])
def test_truncated_file__is_refused(given, share):
    path, base = given
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refused(lambda: load_delta(base, path))
    assert message.startswith(f"'{path}' cannot be read, expected a whole safetensors file: ")
    assert message.endswith("; it may be truncated.")


def test_tampered_tensor__is_named_with_both_hashes(given):
    path, base = given
    expected = delta_file.fingerprint(load_file(path)["model.head.bias"])
    rewritten(path, lambda tensors, _: tensors["model.head.bias"].add_(1e-3))
    found = delta_file.fingerprint(load_file(path)["model.head.bias"])
    assert refused(lambda: load_delta(base, path)) == (
        f"'model.head.bias' of '{path}' was changed after it was written: it is {found}, expected {expected}."
    )


def test_one_flipped_bit__is_found_wherever_it_is(given):
    path, base = given
    content = path.read_bytes()
    for place in torch.randint(len(content), (40,)).tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        refused(lambda: load_delta(base, path))


def test_tampered_configuration__is_refused(given):
    path, base = given
    rewritten(path, lambda _, metadata: metadata.update(configuration="{}"), keep_hashes=True)
    message = refused(lambda: load_delta(base, path))
    assert message.startswith(f"The metadata of '{path}' was changed after it was written: its SHA-256 is ")


def test_tensor_taken_out_or_put_in__is_named(given):
    path, base = given
    rewritten(path, lambda tensors, _: tensors.pop("model.norm.bias"))
    assert refused(lambda: load_delta(base, path)) == (
        f"'{path}' lacks tensors that were written to it: 'model.norm.bias'."
    )
    trained(path)
    rewritten(path, lambda tensors, _: tensors.update(more=torch.ones(1)))
    assert refused(lambda: load_delta(base, path)) == f"'{path}' holds tensors that were not written to it: 'more'."


def test_newer_format__is_refused(given):
    path, base = given
    rewritten(path, lambda _, metadata: metadata.update(format_version="2", package_version="9.1"))
    assert refused(lambda: load_delta(base, path)) == (
        f"'{path}' has version '2' of the format and was written by lightning_bsr 9.1, expected at most 1, which "
        f"lightning_bsr {Delta({}, {}).package_version} reads; install a newer one."
    )


def test_other_safetensors_file__is_no_delta(given):
    path, base = given
    save_file({"a": torch.ones(1)}, path)
    assert refused(lambda: load_delta(base, path)) == (
        f"'{path}' has the format None in its metadata, expected 'lightning_bsr.delta'."
    )


def test_configuration__is_json(path):
    trained(path, drop=True, configuration={"path": path})
    with safe_open(path, "pt") as file:
        configuration = json.loads(file.metadata()["configuration"])
    options = {"detach": False, "normalize": False, "score": "cls", "restore": False, "vit": "model.blocks"}
    assert configuration == {
        "path": str(path),
        "rounded": [],
        "token_drop": [
            {"blocks": [0], "keep_rate": [0.3], "fuse": False, **options, "detach": True},
            {"blocks": [2], "keep_rate": [0.5], "fuse": True, **options},
        ],
    }
