import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lightning_bsr.functional import install_checkpointing, install_token_drop, select_blocks_
from lightning_bsr.memory import measure, plan
from lightning_bsr.memory._position import Position
from lightning_bsr.vit import find_vit
from plain_modules import tiny_vit

# Not every release of torch counts the CPU's kernels.
CPU_KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def blocks_of(report):
    return [line for line in report.by_block if line.name.isdigit()]


@pytest.mark.parametrize("selected", [False, True])
def test_flops__by_block_add_up_to_all(selected):
    model = tiny_vit()
    if selected:
        select_blocks_(model, [1, 4])
        install_token_drop(model, [2], 0.5)
    images = torch.randn(2, 3, 32, 32)
    report = measure(model, images)
    with FlopCounterMode(display=False, custom_mapping=CPU_KERNELS) as counter:
        loss = model(images).sum()
        forward = counter.get_total_flops()
        loss.backward()
    assert tuple(report.flops) == (forward, counter.get_total_flops() - forward)
    assert [sum(line.flops[phase] for line in report.by_block) for phase in (0, 1)] == list(report.flops)


def test_flops__equal_blocks_cost_the_same():
    report = plan(tiny_vit(), (2, 3, 32, 32))
    assert len({line.flops for line in blocks_of(report)}) == 1
    forward, backward = blocks_of(report)[0].flops
    tokens, width = 2 * 65, 32
    linear = 2 * tokens * 12 * width**2
    attention = 2 * 2 * tokens * 65 * width
    assert forward == linear + attention
    # Two products for each linear layer; the fused kernel computes the scores again beside four products.
    assert backward == 2 * linear + 5 * attention // 2


def test_flops__nothing_in_backward_before_the_first_trained_block():
    model = tiny_vit()
    select_blocks_(model, [3])
    lines = {line.name: line.flops for line in plan(model, (2, 3, 32, 32)).by_block}
    assert [lines[name].backward for name in ("embed", "0", "1", "2")] == [0] * 4
    # A frozen block above hands gradients on and has none of its own weights.
    assert 0 < lines["4"].backward == lines["5"].backward < lines["3"].backward
    assert len({lines[str(index)].forward for index in range(6)}) == 1
    assert lines["head"].backward > 0


def test_flops__computing_again_counts_to_the_block():
    plain = blocks_of(plan(tiny_vit(), (2, 3, 32, 32)))
    model = tiny_vit()
    install_checkpointing(model, [1, 5])
    again = blocks_of(plan(model, (2, 3, 32, 32)))
    assert [line.flops.forward for line in again] == [line.flops.forward for line in plain]
    added = [line.flops.backward - other.flops.backward for line, other in zip(again, plain, strict=True)]
    assert added[1] == added[5]
    assert [index for index, more in enumerate(added) if more] == [1, 5]
    # All but, at most, the last layer, of which backward needs no output.
    assert 0.6 * plain[1].flops.forward < added[1] <= plain[1].flops.forward


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_halves__of_blocks_add_up(precision):
    report = plan(tiny_vit(), (2, 3, 32, 32), precision=precision)
    for line in blocks_of(report):
        assert line.attn + line.mlp == line.activations
        assert line.attn > 0
        assert line.mlp > 0
    assert all(line.attn == line.mlp == 0 for line in report.by_block if line.name in ("embed", "head"))


def test_halves__what_is_selected():
    model = tiny_vit()
    select_blocks_(model, {2: "attn"}, head=False, norm=False)
    attn = blocks_of(plan(model, (2, 3, 32, 32)))[2]
    model = tiny_vit()
    select_blocks_(model, {2: "mlp"}, head=False, norm=False)
    mlp = blocks_of(plan(model, (2, 3, 32, 32)))[2]
    assert mlp.attn == 0
    assert attn.attn > 0
    assert mlp.mlp > attn.mlp > 0  # of a frozen MLP above, only what gradients pass through


def test_position__leaves_no_hooks():
    model = tiny_vit(depth=2)
    with Position(find_vit(model), backward=True) as position:
        model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert position.line == "embed"
    assert position.tokens == {"embed": 65, "0": 65, "1": 65}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    position.reset()
    assert (position.line, position.half) == ("embed", None)
