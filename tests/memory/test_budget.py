import itertools
import json
import re

import pytest
import rich.console
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import cross_entropy

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_token_drop, select_blocks_
from lightning_bsr.memory import MIB, Configuration, fit_budget, format_bytes, measure, plan
from lightning_bsr.memory._budget_search import BudgetSearch
from lightning_bsr.memory._costs import BlockCosts, InputWatch
from lightning_bsr.vit import find_vit
from plain_modules import tiny_vit

WHOLE = ("attn", "mlp")


@pytest.fixture(autouse=True)
def _short_frontier(request):
    if "frontier" not in request.node.name:
        request.getfixturevalue("short_frontier")


def batches(count=2, size=8):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 4) for _ in range(count)]


def loss_of(model):
    return lambda batch: cross_entropy(model(batch[0]), batch[1])


def fit(model, budget, **kwargs):
    return fit_budget(model, batches(), budget, forward=loss_of(model), **{"max_drops": 1, **kwargs})


@pytest.mark.parametrize(("share", "precision"), [(0.1, "32-true"), (0.5, "bf16-mixed")])
def test_fit_budget__activations_measured_are_within_the_budget(share, precision):
    model = tiny_vit(depth=4)
    full = measure(model, batches()[0], forward=loss_of(model), precision=precision).activations
    found = fit(model, int(share * full), kind="activations", precision=precision)
    installed = found.choice.install(model)
    measured = measure(model, batches()[0], forward=loss_of(model), precision=precision)
    installed.remove()
    assert measured.activations_peak == found.report.activations_peak <= share * full
    assert found.full.activations == full
    assert found.choice.blocks


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_fit_budget__whole_step_measured_is_within_the_budget(optimizer):
    model = tiny_vit(depth=4)
    everything = optimizer(model.parameters(), lr=0.1)
    full = measure(model, batches()[0], forward=loss_of(model), optimizer=everything).peak
    found = fit(model, full // 2, optimizer=everything, max_drops=3)
    installed = found.choice.install(model)
    measured = measure(model, batches()[0], forward=loss_of(model), optimizer=everything)
    installed.remove()
    assert measured.peak == found.report.peak <= full // 2
    # AdamW keeps two moments of each parameter that trains, and a number of steps.
    steps = found.report.optimizer_state - 2 * measured.gradients
    assert found.report.optimizer_state == 0 if optimizer is torch.optim.SGD else 0 < steps < 1000


def test_fit_budget__more_memory_is_never_worth_less():
    model = tiny_vit(depth=4)
    full = plan(model, batches()[0], forward=loss_of(model)).activations
    worths = [fit(model, int(share * full), kind="activations").worth for share in (0.1, 0.3, 1.0)]
    assert worths == sorted(worths)
    assert worths[-1] == pytest.approx(1.0, abs=0.02)


def test_fit_budget__without_recomputation_and_drops_only_blocks_are_chosen():
    model = tiny_vit()
    full = plan(model, batches()[0], forward=loss_of(model)).activations
    found = fit(model, full // 4, kind="activations", recompute=False, keep_rates=())
    assert not found.choice.drop
    assert all(set(policies.values()) == {"exact"} for policies in found.choice.lean.values())
    assert max(found.choice.blocks) == 5
    again = fit(model, full // 4, kind="activations", keep_rates=())
    assert again.worth > found.worth


def test_fit_budget__as_many_bytes_as_a_configuration_needs():
    model = tiny_vit(depth=4)
    published = Configuration({1: WHOLE, 3: WHOLE}, {1: 0.5, 2: 0.5, 3: 0.5})
    found = fit(model, published, kind="activations")
    installed = published.install(model)
    needs = plan(model, batches()[0], forward=loss_of(model)).activations
    installed.remove()
    assert found.budget == needs
    assert found.report.activations_peak <= needs


def test_fit_budget__tokens_dropped_already_stay_dropped():
    model = tiny_vit(depth=4)
    handle = install_token_drop(model, [1], 0.5)
    found = fit(model, "0.5MiB", kind="activations")
    assert not found.choice.drop
    assert [line.tokens for line in found.report.by_block][1:4] == [65, 34, 34]
    assert handle.keep_rates == {1: 0.5}


def test_fit_budget__no_class_token():
    model = tiny_vit(depth=4, class_token=False, global_pool="avg")
    found = fit(model, "0.4MiB", kind="activations")
    assert found.report.activations_peak <= 0.4 * MIB
    assert not found.choice.drop or found.choice.drop_options == {"score": "mean"}


def test_fit_budget__plans_for_another_batch_size():
    model = tiny_vit(depth=4)
    found = fit(model, "64MiB", kind="activations", batch_size=1024)
    assert found.report.batch_size == 1024
    assert 32 * MIB < found.report.activations_peak <= 64 * MIB


def test_fit_budget__leaves_the_model_as_it_was():
    model = tiny_vit(depth=4).train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    fit(model, "0.5MiB", kind="activations")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]), name
        assert parameter.requires_grad == before[name][1], name
        assert parameter.grad is None
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(block) for block in model.blocks)


def test_fit_budget__report_and_frontier():
    model = tiny_vit(depth=4)
    found = fit(model, "0.6MiB", kind="activations")
    console = rich.console.Console(width=160)
    with console.capture() as capture:
        console.print(found.table())
    text = capture.get()
    assert "What 614.4 KiB of activations can buy, beside other budgets" in text
    assert f"chosen: {found.choice}" in text
    numbers = json.loads(json.dumps(found.to_dict()))
    assert numbers["choice"]["blocks"] == {str(i): list(parts) for i, parts in found.choice.blocks.items()}
    assert found.choice in [point.configuration for point in found.frontier]
    figures = [(p.activations, sum(p.flops), -p.worth) for p in found.frontier if p.configuration != found.choice]
    for one in figures:
        assert not any(all(a <= b for a, b in zip(other, one, strict=True)) and other != one for other in figures)
    for point in found.frontier:
        installed = point.configuration.install(model)
        planned = plan(model, batches()[0], forward=loss_of(model))
        installed.remove()
        assert (planned.activations_peak, planned.peak, planned.flops) == (point.activations, point.peak, point.flops)


def test_fit_budget__says_what_it_does():
    lines = []
    fit(tiny_vit(depth=2), "1MiB", kind="activations", on_progress=lines.append)
    assert [re.sub(r"\d+\.$", "N.", line) for line in lines] == [
        "Probing the worth of training each half of 2 blocks, and of 4 single drops, with 16 images.",
        "Planning single blocks.",
        "Searching what to train and to compute again; ways to drop tokens: N.",
        "Searching what other budgets would buy.",
    ]
    fit(tiny_vit(depth=2), "1MiB", kind="activations", keep_rates=(), on_progress=lines.append)
    assert lines[4::2] == [
        "Probing the worth of training each half of 2 blocks, with 16 images.",
        "Searching what to train and to compute again; ways to drop tokens: 1.",
    ]


def test_fit_budget__nothing_fits_is_said_before_the_batches_are_looked_at():
    model = tiny_vit(depth=4)

    def only_planned(batch):
        assert isinstance(batch[0], FakeTensor)
        return loss_of(model)(batch)

    def said(budget, **options):
        with pytest.raises(ConfigurationError) as error:
            fit_budget(model, batches(), budget, forward=only_planned, **options)
        return str(error.value)

    head_only = select_blocks_(model, [])
    needs = plan(model, batches()[0], forward=loss_of(model)).peak
    dropping = install_token_drop(model, [0, 1, 2], 0.5)
    with_drops = plan(model, batches()[0], forward=loss_of(model)).activations
    dropping.remove()
    head_only.remove()
    too_small = "but fine-tuning the ViT (VisionTransformer) takes"
    assert said("1KiB", keep_rates=()) == (
        f"budget is 1.0 KiB of memory, {too_small} {format_bytes(needs)} at least (train the head only); give "
        "more, or a smaller batch."
    )
    assert said("1KiB", kind="activations") == (
        f"budget is 1.0 KiB of activations, {too_small} more than {format_bytes(with_drops)}, whatever is chosen; give "
        "more, or a smaller batch."
    )


def test_fit_budget__nothing_fits_but_with_drops_that_the_loss_forbids():
    model = tiny_vit(depth=4)

    def loss_by_tokens(batch):
        features = model.forward_features(batch[0])
        return cross_entropy(model.forward_head(features), batch[1]) * (17 / features.shape[1]) ** 4

    head_only = select_blocks_(model, [])
    needs = plan(model, batches()[0], forward=loss_by_tokens).activations
    head_only.remove()
    with pytest.raises(ConfigurationError) as error:
        fit_budget(model, batches(), needs - 1, kind="activations", forward=loss_by_tokens, max_drops=1)
    assert str(error.value).endswith(
        f"takes {format_bytes(needs)} at least (train the head only); give more, or a smaller batch."
    )


@pytest.mark.parametrize("kind", ["total", "activations"])
def test_floor__is_no_more_than_any_drops_of_the_head_alone(kind):
    model = tiny_vit(depth=4)

    def bytes_of(report):
        return report.peak if kind == "total" else report.activations_peak or report.activations

    search = BudgetSearch(
        model,
        find_vit(model),
        lambda: plan(model, batches()[0], forward=loss_of(model)),
        bytes_of,
        optimizers=[],
        weights_count=kind == "total",
        autocast=None,
        keep_rates=(0.7, 0.5),
        max_drops=2,
        recompute=True,
    )
    floor = bytes_of(search.plan(search.floor()))
    for count in range(3):
        for blocks in itertools.combinations(range(4), count):
            for rate in (0.7, 0.5):
                assert floor <= bytes_of(search.plan(Configuration({}, dict.fromkeys(blocks, rate))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "much"}, "budget is 'much', expected a number of bytes above 0"),
        ({"kind": "some"}, "kind is 'some', expected one of 'total', 'activations'."),
        ({"batches": []}, "batches has 0 batches, expected two images or more"),
        ({"batches": batches(1, 1)}, "batches has 1 batches, expected two images or more"),
        ({"max_drops": -1}, "max_drops is -1, expected 0 or more"),
        ({"forward": lambda batch: batch[0]}, "The module's output is no scalar"),
    ],
)
def test_fit_budget__mistakes(change, message):
    model = tiny_vit(depth=4)
    arguments = {"batches": batches(), "budget": "1MiB", "forward": loss_of(model)} | change
    with pytest.raises(ConfigurationError, match=message):
        fit_budget(model, arguments.pop("batches"), arguments.pop("budget"), **arguments)


def test_fit_budget__whatever_the_budget_what_is_found_fits():
    # Where the single blocks foretell a little too little, the search must go on to smaller ones, not give up.
    model = tiny_vit()
    everything = torch.optim.AdamW(model.parameters())
    worths = []
    for budget in range(600_000, 2_600_000, 500_000):
        found = fit(model, budget, optimizer=everything, batch_size=1, keep_rates=())
        assert found.report.peak <= budget
        worths.append(found.worth)
    assert worths == sorted(worths)
    assert worths[0] < 0.6 < 0.99 < worths[-1]


def test_fit_budget__one_batch_is_split():
    model = tiny_vit(depth=4)
    found = fit_budget(model, batches(1), "0.5MiB", kind="activations", forward=loss_of(model), max_drops=0)
    assert found.report.batch_size == 8


def test_fit_budget__loss_that_tells_nothing():
    model = tiny_vit(depth=4)
    with pytest.raises(ConfigurationError, match="The loss of the training batches is nan, expected a finite number"):
        fit_budget(model, batches(), "1MiB", forward=lambda batch: loss_of(model)(batch) * float("nan"))
    assert not any(block._forward_pre_hooks or "forward" in vars(block) for block in model.blocks)


def test_fit_budget__refuses_a_model_with_blocks_selected_already():
    model = tiny_vit()
    select_blocks_(model, [5])
    with pytest.raises(ConfigurationError, match="has its blocks selected already"):
        fit(model, "1MiB")


def test_block_costs__add_up_to_the_whole_model():
    model = tiny_vit()
    view = find_vit(model)
    with InputWatch(view) as watch:
        plan(model, batches()[0], forward=loss_of(model))
    costs = BlockCosts(view, watch.inputs, None, {})
    exact, again = {"attn": "exact", "mlp": "exact"}, {"attn": "exact", "mlp": "recompute"}
    lean = {2: exact, 3: exact, 4: again, 5: again}
    configuration = Configuration({2: ("mlp",), 3: ("attn",), 5: WHOLE}, {3: 0.5}, lean)
    installed = configuration.install(model)
    lines = plan(model, batches()[0], forward=loss_of(model)).by_block
    installed.remove()
    frozen, trained, first = 0, 1, 2
    expected = {
        "2": costs(2, 65, None).mlp[first],
        "3": costs(3, 65, 0.5).attn[trained] + costs(3, 65, 0.5).mlp[frozen],
        "4": costs(4, 34, None).attn[frozen] + costs(4, 34, None).kept_again[1],
        "5": costs(5, 34, None).attn[trained] + costs(5, 34, None).kept_again[1],
    }
    assert {line.name: line.activations for line in lines[3:7]} == expected
    backward = {line.name: line.flops.backward for line in lines}
    cost = costs(5, 34, None)
    assert backward["5"] == cost.inputs + sum(cost.weights) + cost.again[1]
    cost = costs(3, 65, 0.5)
    assert backward["3"] == cost.inputs + cost.weights[0]
