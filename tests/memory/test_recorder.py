import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_bsr.functional import install_token_drop, select_blocks_
from lightning_bsr.memory import MIB, ActivationRecorder, measure
from lightning_bsr.vit import find_vit
from plain_modules import tiny_vit


def record(model, images, **autocast):
    with ActivationRecorder(model, find_vit(model)) as recorder, torch.autocast("cpu", torch.bfloat16, **autocast):
        out = model(images)
        report = recorder.report()
    del out
    return report


def test_recorder__counts_each_storage_once_and_no_parameters():
    linear = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with ActivationRecorder(linear) as recorder:
        y = linear(x) + linear(x)
        z = y * y[:, :4].repeat(1, 2)
    report = recorder.report()
    assert report.activations == 4 * (x.numel() + y.numel() + z.numel())
    assert report.parameters == report.gradients == 4 * 72


def test_recorder__forgets_what_was_freed():
    linear = nn.Linear(8, 8)
    with ActivationRecorder(linear) as recorder:
        first = linear(torch.randn(4, 8)).exp()
        del first
        second = linear(torch.randn(4, 8)).exp()
    assert recorder.report().activations == 4 * 2 * 32
    second.sum().backward()
    assert recorder.report().activations == 4 * 32  # the result itself, which the test still holds


def test_recorder__blocks_add_up_and_nothing_before_the_first_trained_block():
    model = tiny_vit()
    select_blocks_(model, [2, 5])
    install_token_drop(model, [1, 3], 0.5)
    report = record(model, torch.randn(2, 3, 32, 32), enabled=False)
    lines = {line.name: line for line in report.by_block}
    assert list(lines) == ["embed", "0", "1", "2", "3", "4", "5", "head"]
    assert [line.tokens for line in report.by_block] == [65, 65, 34, 34, 19, 19, 19, None]
    assert [lines[name].activations for name in ("embed", "0", "1")] == [0, 0, 0]
    assert all(lines[name].activations > 0 for name in ("2", "3", "4", "5", "head"))
    assert report.activations == sum(line.activations for line in report.by_block)
    assert sum(line.parameters for line in report.by_block) == sum(p.numel() for p in model.parameters())
    assert [name for name, line in lines.items() if line.trained] == ["2", "5", "head"]


def test_recorder__one_block_by_hand():
    """16 C numbers a token in a trained block, 10 in a frozen one above it; small vectors beside them."""
    model = tiny_vit(depth=2)
    select_blocks_(model, [0], head=False, norm=False)
    report = record(model, torch.randn(4, 3, 32, 32), enabled=False)
    unit = 4 * 65 * 32 * 4
    for line, expected in zip(report.by_block[1:3], (16, 10), strict=True):
        assert expected <= line.activations / unit < expected + 0.5


def test_recorder__leaves_hooks_and_modules_as_they_were():
    model = tiny_vit()
    record(model, torch.randn(1, 3, 32, 32))
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in model.blocks)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        model(torch.randn(1, 3, 32, 32))
    assert seen


def test_recorder__copies_of_weights_under_autocast_are_apart():
    model = tiny_vit()
    select_blocks_(model, [0, 3])
    small, large = (record(model, torch.randn(batch, 3, 32, 32), enabled=True) for batch in (2, 6))
    assert small.weight_copies == large.weight_copies > 0
    assert large.activations == pytest.approx(3 * small.activations, rel=1e-3)


def test_recorder__no_activation_is_taken_for_a_weight():
    model = tiny_vit(embed_dim=64, num_heads=1)  # 65 tokens: none; 64 x 64 matrices beside 64-wide weights
    report = record(model, torch.randn(1, 3, 32, 32), enabled=False)
    assert report.weight_copies == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_recorder__gradient_checkpointing_keeps_the_blocks_inputs(reentrant, monkeypatch):
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", reentrant)
    model = tiny_vit()
    images = torch.randn(2, 3, 32, 32)
    plain = record(model, images, enabled=False)
    model.set_grad_checkpointing()
    report = record(model, images, enabled=False)
    unit = 2 * 65 * 32 * 4
    # Six blocks' inputs, the last norm's input and output.
    assert 8 <= (report.activations - images.nbytes) / unit < 8.5
    assert plain.activations > 10 * report.activations


@pytest.mark.slow
def test_vit_base__published_configuration_keeps_at_most_24_1_mib_an_image():
    torch.manual_seed(0)
    model = tiny_vit(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, num_classes=10)
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([0, 1])

    def measured():
        return measure(model, images, loss=lambda logits: F.cross_entropy(logits, labels))

    full = measured()
    select_blocks_(model, [3, 7, 11])
    install_token_drop(model, [3, 6, 9], 0.5)
    bsr = measured()
    assert full.activations / 2 / MIB == pytest.approx(112.69, abs=0.01)
    assert bsr.activations / 2 / MIB <= 24.1
    assert [line.activations for line in bsr.by_block[:4]] == [0] * 4
    assert sum(bsr.flops) < 0.3 * sum(full.flops)
