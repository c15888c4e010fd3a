"""Several data modules as one: the sampling rule, and how Lightning drives it."""

from collections import Counter

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from lightning_bsr import ConfigurationError, DigitsDataModule, MultiTaskDataModule
from lightning_bsr.data import EpochSampler, TaskRounds


class Numbers(LightningDataModule):
    """Batches of one number each."""

    def __init__(self, count, first=0, **loader):
        super().__init__()
        self.data = torch.arange(first, first + count)
        self.loader = loader

    def train_dataloader(self):
        return DataLoader(self.data, sampler=EpochSampler(self.data), **self.loader)

    def val_dataloader(self):
        return DataLoader(self.data)

    test_dataloader = predict_dataloader = val_dataloader


class Watches(LightningModule):
    """Remembers its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append({task: int(number) for task, number in batch.items()})
        return self.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append((dataloader_idx, {task: int(number) for task, number in batch.items()}))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def tasks_of(batches):
    return Counter(task for batch in batches for task in batch)


@pytest.mark.parametrize(
    ("alpha", "counts"),
    [
        (0, {"large": 64, "middle": 64, "small": 64}),
        (0.5, {"large": 64, "middle": 32, "small": 8}),
        (1, {"large": 64, "middle": 16, "small": 1}),
    ],
)
@pytest.mark.parametrize("joint", [False, True])
def test_rounds__how_often_each_task_comes_up(alpha, counts, joint):
    data = MultiTaskDataModule({"large": Numbers(64), "middle": Numbers(16), "small": Numbers(1)}, alpha, joint)
    rounds = data.train_dataloader()
    batches = [batch for batch, _, _ in rounds]
    assert tasks_of(batches) == counts
    assert len(batches) == len(rounds) == (64 if joint else sum(counts.values()))
    halves = [tasks_of(part)["middle"] for part in (batches[: len(batches) // 2], batches[len(batches) // 2 :])]
    assert abs(halves[0] - halves[1]) <= 1
    assert {int(batch["large"]) for batch in batches if "large" in batch} == set(range(64))


def test_rounds__a_task_of_the_smallest_size_is_not_lost():
    rounds = MultiTaskDataModule({"large": Numbers(50), "single": Numbers(1)}, 1).train_dataloader()
    assert tasks_of(batch for batch, _, _ in rounds) == {"large": 50, "single": 1}


def test_rounds__a_small_task_starts_over_in_another_order_and_each_epoch_anew(make_trainer):
    data = MultiTaskDataModule({"large": Numbers(40), "small": Numbers(10)}, 0)
    module = Watches()
    make_trainer(max_epochs=2, limit_val_batches=0).fit(module, data)
    small = [batch["small"] for batch in module.seen if "small" in batch]
    passes = [small[start : start + 10] for start in range(0, 80, 10)]
    assert all(sorted(numbers) == list(range(10)) for numbers in passes)
    assert len({tuple(numbers) for numbers in passes}) == 8
    sampler = EpochSampler(range(10))
    sampler.set_epoch(1)
    assert passes[4] == list(sampler)


def test_fit__limits_bound_each_task_and_evaluation_has_a_loader_each(make_trainer):
    data = MultiTaskDataModule({"a": Numbers(30), "b": Numbers(30, first=100)})
    module = Watches()
    make_trainer(limit_train_batches=3, limit_val_batches=2, num_sanity_val_steps=0).fit(module, data)
    trained, validated = module.seen[:6], module.seen[6:]
    assert [[*batch] for batch in trained] == [["a"], ["b"]] * 3
    assert validated == [(0, {"a": 0}), (0, {"a": 1}), (1, {"b": 100}), (1, {"b": 101})]


def test_loaders__with_workers_and_given_twice():
    class Same(Numbers):
        def __init__(self):
            super().__init__(4)
            self.only = super().train_dataloader()

        def train_dataloader(self):
            return self.only

    data = MultiTaskDataModule({"a": Same(), "b": Numbers(4, num_workers=1)}, joint=True)
    for _ in range(2):
        batch, _, _ = next(iter(data.train_dataloader()))
        assert {task: type(value) for task, value in batch.items()} == {"a": torch.Tensor, "b": torch.Tensor}


def test_module__asks_its_tasks():
    data = MultiTaskDataModule({"digits": DigitsDataModule(), "again": DigitsDataModule()})
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == {"digits": 10, "again": 10}
    assert data.class_names["again"] == [str(digit) for digit in range(10)]
    with pytest.raises(ConfigurationError) as error:
        _ = MultiTaskDataModule({"numbers": Numbers(3)}).num_classes
    assert str(error.value) == "The data module of the task 'numbers' (Numbers) has no num_classes."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": {}}, "tasks is empty, expected a data module for one task or more."),
        ({"tasks": {"a": 3}}, "The task 'a' is a int, expected a LightningDataModule."),
        ({"alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1."),
    ],
)
def test_module__refuses(arguments, message):
    with pytest.raises(ConfigurationError) as error:
        MultiTaskDataModule(**{"tasks": {"a": Numbers(2)}, **arguments})
    assert str(error.value) == message


def test_module__refuses_a_task_with_several_loaders():
    class Two(Numbers):
        def val_dataloader(self):
            return [super().val_dataloader()] * 2

    with pytest.raises(ConfigurationError) as error:
        MultiTaskDataModule({"a": Two(2)}).val_dataloader()
    assert str(error.value) == "val_dataloader of the task 'a' (Two) gave list, expected one DataLoader."


def test_rounds__do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    rounds = TaskRounds({"a": Numbers(4).train_dataloader()})
    assert len(rounds) == 4
    assert torch.equal(before, torch.get_rng_state())
