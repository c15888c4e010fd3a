"""Where the stored tokens are kept, and where the weights that they make superfluous go."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_bsr.functional import install_prefix_cache, select_blocks_
from lightning_bsr.functional._prefix_pass import PATIENCE
from lightning_bsr.functional._prefix_store import FILE_NAME
from plain_modules import tiny_vit

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(8, 3, 32, 32, generator=GENERATOR)
Y = torch.tensor([0, 1, 2, 3] * 2)
OTHERS = torch.randn(8, 3, 32, 32, generator=GENERATOR)


def selected():
    model = tiny_vit().eval()
    select_blocks_(model, [3, 5])
    return model


def offloading():
    model = selected()
    return model, install_prefix_cache(model, offload=True)


def step(model):
    model.zero_grad()
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same_step(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_offload__moves_weights_after_patience_and_back(monkeypatch):
    """There is only the CPU here: what is checked is when the weights go where, not that they do."""
    moves = []
    monkeypatch.setattr(nn.Parameter, "device", property(lambda self: torch.device("cuda", 0)), raising=False)
    monkeypatch.setattr(
        "lightning_bsr.functional._prefix_pass.CachedPrefix._move", lambda self, device: moves.append(str(device))
    )
    model, handle = offloading()
    model(X)
    for _ in range(PATIENCE - 1):
        model(X)
    assert moves == []
    model(X)
    assert moves == ["cpu"]
    for _ in range(PATIENCE):
        model(X)
    assert moves == ["cpu"]
    model(OTHERS)
    assert moves == ["cpu", "cuda:0"]
    for _ in range(PATIENCE):
        model(X)
    model.forward_intermediates(X)
    assert moves == ["cpu", "cuda:0"] * 2
    for _ in range(2 * PATIENCE):
        model(X)
    assert moves == ["cpu", "cuda:0"] * 2 + ["cpu"]
    handle.remove()
    assert moves == ["cpu", "cuda:0"] * 3


def test_offload__a_move_is_no_change_of_the_weights():
    plain, (model, handle) = selected(), offloading()
    step(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.inference_mode():
        handle._prefix._move(torch.device("cpu"))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(p.is_inference() for p in model.parameters())
    fingerprint = handle.fingerprint
    assert_same_step(step(model), step(plain))
    assert (handle.fingerprint, handle.counts.hits) == (fingerprint, 8)


def test_offload__nothing_moves_on_the_cpu():
    model, handle = offloading()
    pointers = [p.data_ptr() for p in model.parameters()]
    for _ in range(2 * PATIENCE):
        model(X)
    handle.remove()
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_cache_in_a_folder__goes_on_in_a_later_model(tmp_path):
    plain = selected()
    for computed in (8, 0):
        model = selected()
        handle = install_prefix_cache(model, place=tmp_path / "new" / "folder")
        for _ in range(2):
            assert_same_step(step(model), step(plain))
        assert handle.counts.misses == computed
        handle.remove()
        handle.remove()
    other = selected()
    with torch.no_grad():
        other.blocks[2].mlp.fc2.bias[0] += 1
    handle = install_prefix_cache(other, place=str(tmp_path / "new" / "folder"))
    step(other)
    assert handle.counts.misses == 8
    handle.remove()


def test_cache_in_a_folder__damage_is_computed_anew(tmp_path):
    plain, model = selected(), selected()
    handle = install_prefix_cache(model, place=tmp_path)
    step(model)
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"damaged")
    for hits in (0, 8):
        assert_same_step(step(model), step(plain))
        assert handle.counts.hits == hits
    assert handle.counts.known == 7
    handle.remove()
