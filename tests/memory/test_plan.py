import psutil
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_bsr.models  # noqa: F401  # registers the micro ViT
from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_checkpointing
from lightning_bsr.memory import measure, plan
from lightning_bsr.memory._kernels import KernelWatch
from lightning_bsr.methods import METHODS, apply_method_
from plain_modules import tiny_vit

GIB = 2**30
# One chooses by training batches, and then does what others do.
PLAIN_METHODS = [name for name in METHODS if name != "bsr_auto"]


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def assert_planned_as_measured(model, images, **options):
    planned = plan(model, images, **options)
    measured = measure(model, images, **options)
    assert planned == measured
    assert planned.peak >= planned.activations + planned.parameters
    assert planned.peak == sum(planned.peak_parts.values())
    return planned


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", PLAIN_METHODS)
def test_plan__is_what_is_measured(method, precision):
    model = tiny_vit(depth=3)
    apply_method_(model, method)
    batch_size, accumulate = (1, True) if precision == "32-true" else (8, False)
    report = assert_planned_as_measured(
        model,
        torch.randn(batch_size, 3, 32, 32),
        optimizer=adamw(model),
        precision=precision,
        accumulate=accumulate,
    )
    assert report.activations > 0
    assert report.attention_kernels


@pytest.mark.parametrize("method", ["full", "bsr"])
def test_plan__is_what_is_measured__micro(method):
    model = timm.create_model("vit_micro_patch4_32", num_classes=10)
    apply_method_(model, method)
    assert_planned_as_measured(model, torch.randn(4, 3, 32, 32), optimizer=adamw(model), precision="bf16-mixed")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", PLAIN_METHODS)
def test_plan__is_what_is_measured__micro_all(method, precision, accumulate):
    model = timm.create_model("vit_micro_patch4_32", num_classes=10, depth=4)
    apply_method_(model, method)
    for batch_size in (1, 8):
        images = torch.randn(batch_size, 3, 32, 32)
        assert_planned_as_measured(model, images, optimizer=adamw(model), precision=precision, accumulate=accumulate)


def test_plan__bf16_true_is_what_a_bf16_module_measures():
    images = torch.randn(2, 3, 32, 32)
    planned = plan(tiny_vit(), images, precision="bf16-true")
    measured = measure(tiny_vit().bfloat16(), images.bfloat16(), precision="bf16-true")
    assert planned == measured
    assert planned.parameter_dtypes == {"trained bfloat16": planned.parameters}
    assert planned.parameters * 2 == plan(tiny_vit(), images).parameters


def test_plan__leaves_the_module_as_it_was():
    model = tiny_vit(proj_drop_rate=0.1).train()
    model.blocks[0].eval()
    apply_method_(model, "bsr")
    model.register_buffer("count", torch.ones(3))
    model.norm.weight.grad = torch.ones(32)
    own = {name: (t, t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    state = torch.get_rng_state()
    plan(model, (2, 3, 32, 32), optimizer=adamw(model), precision="bf16-mixed")
    assert torch.equal(torch.get_rng_state(), state)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert after.keys() == own.keys()
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in own.items())
    assert not any(isinstance(value, FakeTensor) for m in model.modules() for value in vars(m).values())
    assert not any(isinstance(p.grad, FakeTensor) for p in model.parameters())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["norm.weight"]
    assert torch.equal(model.norm.weight.grad, torch.ones(32))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks


def test_plan__shapes_stand_for_tensors():
    model = tiny_vit(depth=1)
    from_shape = plan(model, (2, 3, 32, 32))
    assert from_shape == plan(model, torch.randn(2, 3, 32, 32)) == plan(model, torch.Size((2, 3, 32, 32)))


def test_plan__nested_batch_of_another_size():
    model = tiny_vit(depth=1)

    def forward(batch):
        return F.cross_entropy(model(batch["images"][0]), batch["labels"], weight=batch["weights"])

    def batch(size):
        labels = torch.zeros(size, dtype=torch.long)
        return {"images": [torch.randn(size, 3, 32, 32)], "labels": labels, "weights": torch.ones(4)}

    planned = plan(model, batch(2), batch_size=6, forward=forward)
    assert planned == measure(model, batch(6), forward=forward)
    assert planned.batch_size == 6
    shaped = {"images": [(2, 3, 32, 32)], "labels": torch.zeros(2, dtype=torch.long), "weights": (4,)}
    assert plan(model, shaped, batch_size=6, forward=forward) == planned


def test_plan__accumulated_gradients_stay_alive():
    model = tiny_vit(depth=2)
    apply_method_(model, "bitfit")
    images = torch.randn(1, 3, 32, 32)
    once, accumulated = (plan(model, images, accumulate=accumulate) for accumulate in (False, True))
    assert accumulated.peak_parts["gradients"] == accumulated.gradients
    assert accumulated.peak - once.peak == accumulated.gradients - once.peak_parts.get("gradients", 0)


def test_plan__several_optimizers_share_one_note():
    model = tiny_vit(depth=1)
    blocks, head = list(model.blocks.parameters()), list(model.head.parameters())
    optimizers = [torch.optim.SGD(blocks, lr=0.1, momentum=0.9), torch.optim.AdamW(head, lr=0.1)]
    report = assert_planned_as_measured(model, torch.randn(2, 3, 32, 32), optimizer=optimizers)
    steps = 4 * len(head)
    assert report.optimizer_state == sum(p.nbytes for p in blocks) + 2 * sum(p.nbytes for p in head) + steps
    assert report.notes == ()


def test_plan__optimizer_that_looks_at_values():
    model = tiny_vit(depth=1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.LBFGS(model.parameters())]
    report = assert_planned_as_measured(model, torch.randn(2, 3, 32, 32), optimizer=optimizers)
    assert report.optimizer_state is None
    assert report.notes == ("The state of SGD, LBFGS is not counted: the step cannot be run without values.",)


def test_plan__step_larger_than_any_machine():
    model = tiny_vit()
    plan(model, (1, 3, 32, 32))
    before = psutil.Process().memory_info().rss
    report = plan(model, (2**20, 3, 32, 32), optimizer=adamw(model))
    assert report.peak > 500 * GIB
    assert psutil.Process().memory_info().rss - before < 200 * 2**20


def test_plan__checkpointing_adds_one_block_to_the_peak():
    images = torch.randn(4, 3, 32, 32)
    plain = plan(tiny_vit(), images)
    model = tiny_vit()
    install_checkpointing(model)
    report = plan(model, images)
    block_input = 4 * 65 * 32 * 4
    own = plain.by_block[-2].activations
    assert plain.activations_peak == plain.activations
    # When the last block is computed again, the head is done with what it kept.
    most = report.activations + own - block_input
    assert most - report.by_block[-1].activations <= report.activations_peak <= most
    assert report.activations < report.activations_peak < plain.activations / 2


def test_plan__checkpointing_one_block_adds_nothing_when_others_keep_more():
    images = torch.randn(4, 3, 32, 32)
    model = tiny_vit()
    install_checkpointing(model, [0])
    report = plan(model, images)
    assert report.activations_peak == report.activations


def test_plan__unknown_precision():
    expected = "precision is '8-true', expected one of '32-true', '16-mixed', 'bf16-mixed', '16-true', 'bf16-true'."
    with pytest.raises(ConfigurationError) as error:
        plan(tiny_vit(depth=1), (1, 3, 32, 32), precision="8-true")
    assert str(error.value) == expected


def test_plan__no_images():
    with pytest.raises(ConfigurationError) as error:
        plan(tiny_vit(depth=1), (1, 3, 32, 32), batch_size=0)
    assert str(error.value) == "batch_size is 0, expected 1 or more."


def test_plan__no_vit():
    with pytest.raises(ConfigurationError, match="No supported Vision Transformer was found in Linear"):
        plan(nn.Linear(2, 2), (1, 2))


@pytest.mark.parametrize("options", [{}, {"attn_drop_rate": 0.1}])
def test_plan__attention_without_a_fused_kernel(options):
    model = tiny_vit(depth=2, **options).train()
    images = torch.randn(2, 3, 32, 32)
    fused = plan(model, images)
    with sdpa_kernel(SDPBackend.MATH):
        report = assert_planned_as_measured(model, images)
    assert report.attention_kernels == ("math",)
    # The matrix of attention is kept, which the fused kernel computes again; with dropout, it is kept anyway.
    assert (report.activations > fused.activations) == (fused.attention_kernels == ("flash_attention_for_cpu",))


def watched(**options):
    watch = KernelWatch()
    with FakeTensorMode(), watch:
        q = torch.empty(8, 2, 65, 16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, **options)
    return watch


def test_kernels__planned_ones_run():
    watch = watched()
    with FakeTensorMode(), watch:
        q = torch.empty(8, 2, 65, 16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(65, 65))
        F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=0.1)
    assert len(watch.kernels) == 3
    assert watch.differences() == []


def test_kernels__another_one_than_planned():
    watch = watched()
    (call,) = watch.kernels
    watch.kernels[call] = "flash_attention"
    assert watch.differences() == [
        "Planned with the attention kernel flash_attention for [8, 2, 65, 16] torch.float32, but "
        "flash_attention_for_cpu runs here: the bytes of these attentions differ."
    ]


def test_kernels__planned_while_only_the_mathematical_one_was_allowed():
    with sdpa_kernel(SDPBackend.MATH):
        watch = watched()
        assert watch.differences() == []
    (difference,) = watch.differences()
    assert difference.startswith("Planned with the attention kernel math for [8, 2, 65, 16]")


def test_plan__notes_another_kernel(monkeypatch):
    monkeypatch.setattr(KernelWatch, "differences", lambda self: [f"{len(self.kernels)} kind of attention differs."])
    report = plan(tiny_vit(depth=2), (2, 3, 32, 32), optimizer=torch.optim.LBFGS([torch.zeros(1)]))
    assert len(report.notes) == 2
    assert report.notes[1] == "1 kind of attention differs."
