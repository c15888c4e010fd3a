"""What a step with released gradients holds: planned, measured, and in a real step that shares no code with these."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_bsr.models  # noqa: F401  # registers the micro ViT
from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_checkpointing, install_token_drop, select_blocks_
from lightning_bsr.functional._release import release_gradients_
from lightning_bsr.memory import measure, plan
from lightning_bsr.memory._optimizer import alone_temporaries, optimizer_cost
from plain_modules import tiny_vit

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
MODELS = {"test_vit": (160, [1, -1], [1, 3]), "vit_micro_patch4_32": (32, [3, 7, 11], [3, 6, 9])}


class LiveStorages(TorchDispatchMode):
    """After each operation, adds up all storages ever seen that are still there."""

    def __init__(self, tensors):
        super().__init__()
        self.peak = 0
        self.seen = {}
        self.look_at(tensors)

    def look_at(self, tensors):
        for storage in (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)):
            self.seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.seen = {key: entry for key, entry in self.seen.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.seen.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.look_at(tree_leaves(out))
        return out


class Case:
    """A model that trains and drops like the method of the paper, with its optimizer and a batch."""

    def __init__(self, model_name, optimizer_name, precision, batch_size=2):
        size, trained, drops = MODELS[model_name]
        self.model = timm.create_model(model_name, num_classes=10)
        select_blocks_(self.model, trained)
        install_token_drop(self.model, drops, 0.5)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[optimizer_name](self.trained)
        self.inputs = torch.randn(batch_size, 3, size, size), torch.randint(10, (batch_size,))
        self.precision = precision

    def loss(self, images, labels):
        return F.cross_entropy(self.model(images), labels)

    def report(self, look, release_gradients=True):
        return look(
            self.model,
            *self.inputs,
            forward=self.loss,
            optimizer=self.optimizer,
            precision=self.precision,
            release_gradients=release_gradients,
        )

    def live_peak(self):
        release_gradients_(self.optimizer)
        for step in range(3):
            if step == 2:
                there = [self.model.state_dict(), dict(self.optimizer.state), self.inputs]
                live = LiveStorages(tree_leaves(there))
                live.__enter__()
            with torch.autocast("cpu", torch.bfloat16, self.precision == "bf16-mixed", cache_enabled=False):
                loss = self.loss(*self.inputs)
            loss.backward()
            self.optimizer.step()
        live.__exit__(None, None, None)
        return live.peak


@pytest.mark.parametrize(
    ("model", "optimizer", "precision"),
    [
        ("test_vit", "SGD", "32-true"),
        ("test_vit", "AdamW", "bf16-mixed"),
        pytest.param("test_vit", "SGD", "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("test_vit", "AdamW", "32-true", marks=pytest.mark.slow),
        pytest.param("vit_micro_patch4_32", "AdamW", "32-true", marks=pytest.mark.slow),
        pytest.param("vit_micro_patch4_32", "AdamW", "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("vit_micro_patch4_32", "SGD", "32-true", marks=pytest.mark.slow),
        pytest.param("vit_micro_patch4_32", "SGD", "bf16-mixed", marks=pytest.mark.slow),
    ],
)
def test_released__planned_is_measured_and_what_lives(model, optimizer, precision):
    case = Case(model, optimizer, precision)
    planned, measured = case.report(plan), case.report(measure)
    assert planned == measured
    ordinary = case.report(plan, release_gradients=False)
    assert ordinary.gradients == sum(p.nbytes for p in case.trained)
    assert planned.gradients < 0.3 * ordinary.gradients
    assert planned.peak < ordinary.peak
    assert planned.optimizer_state == ordinary.optimizer_state
    assert planned.activations == ordinary.activations
    assert case.live_peak() == planned.peak


def test_released__with_blocks_computed_again():
    case = Case("test_vit", "SGD", "32-true")
    install_checkpointing(case.model)
    planned = case.report(plan)
    assert planned == case.report(measure)
    assert case.live_peak() == planned.peak


def test_released__in_low_precision_weights():
    model = tiny_vit()
    optimizer = torch.optim.AdamW(model.parameters())
    planned = plan(model, (2, 3, 32, 32), optimizer=optimizer, precision="bf16-true", release_gradients=True)
    model.to(torch.bfloat16)
    images = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    assert planned == measure(model, images, optimizer=optimizer, precision="bf16-true", release_gradients=True)


def test_released__what_no_optimizer_holds_stays():
    model = tiny_vit()
    last = list(model.blocks[-1].parameters())
    optimizer = torch.optim.SGD(last, lr=0.1)
    report = plan(model, (2, 3, 32, 32), optimizer=optimizer, release_gradients=True)
    kept = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in last)
    assert report.gradients == kept
    assert report == measure(model, torch.randn(2, 3, 32, 32), optimizer=optimizer, release_gradients=True)


def test_measure__takes_no_step_where_gradients_are_released():
    model = tiny_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    release_gradients_(optimizer)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ordinary = measure(model, torch.randn(2, 3, 32, 32), optimizer=optimizer)
    assert ordinary.gradients == sum(p.nbytes for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_alone_temporaries__are_those_of_the_optimizer_of_one(name):
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((100,), (30, 10), (30, 10))]
    frozen = nn.Parameter(torch.zeros(7), requires_grad=False)
    found = alone_temporaries(OPTIMIZERS[name]([*weights, frozen]))
    assert found == {id(p): optimizer_cost(OPTIMIZERS[name]([p])).temporaries for p in weights}


def test_alone_temporaries__unknown():
    weight = nn.Parameter(torch.zeros(4))
    assert alone_temporaries(torch.optim.LBFGS([weight])) == {id(weight): 0}


@pytest.mark.parametrize("look", [plan, measure])
@pytest.mark.parametrize(("accumulate", "count"), [(False, 0), (True, 1)])
def test_released__refuses(look, accumulate, count):
    model = tiny_vit()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)][:count]
    with pytest.raises(ConfigurationError) as error:
        look(model, torch.zeros(1, 3, 32, 32), optimizer=optimizers, accumulate=accumulate, release_gradients=True)
    assert str(error.value) == (
        f"release_gradients is True with accumulate={accumulate} and {count} optimizers, expected no accumulation and "
        "at least one optimizer to release gradients into."
    )
