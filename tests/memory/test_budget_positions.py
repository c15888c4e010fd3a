"""Memory budgets for ViTs whose blocks are given positions, or have biases of pairs of positions."""

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from lightning_bsr.functional import install_token_drop
from lightning_bsr.memory import Configuration, fit_budget, measure, plan
from lightning_bsr.memory._costs import BlockCosts, InputWatch
from lightning_bsr.vit import find_vit
from vit_families import family

pytestmark = pytest.mark.usefixtures("short_frontier")

WHOLE = ("attn", "mlp")
SIZE = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 4}
ROPE = {**SIZE, "use_rot_pos_emb": True, "init_values": 0.5}
QUICK = ("eva", "mixed", "beit", "transformers_dinov3")
# Bytes of the tables of positions that are made anew in each step: of each block in one, of sine and cosine, of pairs.
TABLES = {
    "mixed": 4 * 2 * 64 * 32 * 4,
    "transformers_dinov3": 2 * 16 * 16 * 4,
    "transformers_beit_shared": 3 * 17 * 17 * 4,
}
MODELS = {
    "eva": lambda: Eva(**ROPE),
    "mixed": lambda: Eva(**ROPE, rope_type="mixed"),
    "dinov3": lambda: Eva(**ROPE, rope_type="dinov3", num_reg_tokens=4, rope_rotate_half=True, use_abs_pos_emb=False),
    "beit": lambda: Beit(**SIZE, use_rel_pos_bias=True),
    "beit_shared": lambda: Beit(**SIZE, use_shared_rel_pos_bias=True),
    "relpos": lambda: VisionTransformerRelPos(**SIZE, class_token=True),
    "transformers_dinov3": lambda: family("dinov3").model,
    "transformers_beit": lambda: family("beit").model,
    "transformers_beit_shared": lambda: family("beit_shared_bias").model,
}


def batches(count=2, size=4):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 32, 32, generator=generator),) for _ in range(count)]


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


def loss_of(model):
    def loss(batch):
        out = model(batch[0])
        out = out if isinstance(out, torch.Tensor) else out.logits if "logits" in out else out.pooler_output
        return out.square().mean()

    return loss


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_block_costs__add_up_to_the_whole_model(name):
    model = build(name)
    view = find_vit(model)
    exact, again = {"attn": "exact", "mlp": "exact"}, {"attn": "recompute", "mlp": "exact"}
    lean = {1: exact, 2: exact, 3: again}
    configuration = Configuration({0: WHOLE, 2: ("attn",), 3: WHOLE}, {1: 0.5, 2: 0.7}, {0: exact, **lean})
    with InputWatch(view) as watch:
        plan(model, batches()[0], forward=loss_of(model))
    costs = BlockCosts(view, watch.inputs, None, {})
    installed = configuration.install(model)
    lines = plan(model, batches()[0], forward=loss_of(model)).by_block[:-1]
    installed.remove()
    tokens = [line.tokens for line in lines]
    frozen, trained, first = 0, 1, 2
    costs_of = [
        costs(0, tokens[0], None),
        costs(1, tokens[1], 0.5),
        costs(2, tokens[2], 0.7, after_drop=True),
        costs(3, tokens[3], None, after_drop=True),
    ]
    # A table that all blocks are given is counted where it is kept first, and is no block's own.
    assert [line.activations for line in lines[1:5]] == [
        costs_of[0].attn[first] + costs_of[0].mlp[trained] + TABLES.get(name, 0),
        costs_of[1].attn[frozen] + costs_of[1].mlp[frozen],
        costs_of[2].attn[trained] + costs_of[2].mlp[frozen],
        costs_of[3].kept_again[0] + costs_of[3].mlp[trained],
    ]
    assert lines[3].flops.backward == costs_of[2].inputs + costs_of[2].weights[0]
    assert lines[4].flops.backward == costs_of[3].inputs + sum(costs_of[3].weights) + costs_of[3].again[0]


@pytest.mark.parametrize(
    ("name", "share", "precision"),
    [
        ("eva", 0.15, "32-true"),
        ("transformers_dinov3", 0.5, "bf16-mixed"),
        ("transformers_beit", 0.3, "32-true"),
        pytest.param("mixed", 0.5, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("dinov3", 0.5, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("beit", 0.15, "32-true", marks=pytest.mark.slow),
    ],
)
def test_fit_budget__activations_measured_are_those_planned(name, share, precision):
    model = build(name)
    full = measure(model, batches()[0], forward=loss_of(model), precision=precision).activations
    limit = int(share * full)
    found = fit_budget(
        model,
        batches(),
        limit,
        kind="activations",
        forward=loss_of(model),
        precision=precision,
        max_drops=1,
        keep_rates=(0.5,),
    )
    installed = found.choice.install(model)
    measured = measure(model, batches()[0], forward=loss_of(model), precision=precision)
    installed.remove()
    assert measured.activations_peak == found.report.activations_peak <= limit
    assert found.full.activations == full
    assert found.choice.blocks


def test_fit_budget__whole_step_measured_is_that_planned():
    model = build("eva")
    optimizer = torch.optim.AdamW(model.parameters())
    full = measure(model, batches()[0], forward=loss_of(model), optimizer=optimizer).peak
    found = fit_budget(model, batches(), full // 2, forward=loss_of(model), optimizer=optimizer, max_drops=1)
    installed = found.choice.install(model)
    measured = measure(model, batches()[0], forward=loss_of(model), optimizer=optimizer)
    installed.remove()
    assert measured.peak == found.report.peak <= full // 2
    assert not any("forward" in vars(block) or block._forward_pre_hooks for block in model.blocks)


def test_fit_budget__tokens_dropped_already_stay_dropped():
    model = build("eva")
    handle = install_token_drop(model, [1], 0.5)
    full = plan(model, batches()[0], forward=loss_of(model)).activations
    found = fit_budget(model, batches(), full // 2, kind="activations", forward=loss_of(model))
    installed = found.choice.install(model)
    measured = measure(model, batches()[0], forward=loss_of(model))
    installed.remove()
    assert measured.activations_peak == found.report.activations_peak <= full // 2
    assert not found.choice.drop
    assert [line.tokens for line in found.report.by_block][1:4] == [65, 34, 34]
    assert handle.keep_rates == {1: 0.5}
