"""Several data modules as one, each a task, sampled so that small tasks are neither lost nor repeated without end."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.data._base import ClassificationData
from lightning_bsr.data._checks import is_number

_FAR = 1_000_000  # from any epoch that a run counts


class TaskRounds(CombinedLoader):
    """Goes through the loaders of all tasks in rounds; in a round each task gives one batch, or none.

    The largest task, which has the most batches, gives one in every round and is gone through once. A task with a
    share ``s`` of that number gives one in ``s ** alpha`` of the rounds, evenly spaced, at least in one of them, and
    starts over, newly shuffled, when it is used up. So with ``alpha=1`` every task is gone through once, with
    ``alpha=0`` every task gives a batch in every round, and between the two a task is gone through
    ``s ** (alpha - 1)`` times.

    Args:
        loaders: A loader for each task, whose batches are mappings.
        alpha: From 0 to 1.
        joint: Whether the batches of a round come as one, or one after another.

    Example:
        >>> data = {task: [{task: number} for number in range(count)] for task, count in (("large", 8), ("small", 2))}
        >>> rounds = TaskRounds({task: DataLoader(each, batch_size=None) for task, each in data.items()}, alpha=0.5)
        >>> [batch for batch, _, _ in rounds][:4]
        [{'large': 0}, {'large': 1}, {'small': 0}, {'large': 2}]
        >>> len(rounds)  # 8, and (2 / 8) ** 0.5 of them
        12
    """

    def __init__(self, loaders: Mapping[str, Any], alpha: float = 0.5, *, joint: bool = False) -> None:
        super().__init__(dict(loaders), "max_size_cycle")
        self.alpha = alpha
        self.joint = joint
        self._order: Iterator[Any] = iter(())

    @override
    def __iter__(self) -> "TaskRounds":
        super().__iter__()  # marks it as begun for Lightning
        self._order = enumerate(self._batches())
        return self

    @override
    def __next__(self) -> Any:
        index, batch = next(self._order)
        return batch, index, 0

    @override
    def __len__(self) -> int:
        counts = self._counts()
        return max(counts) if self.joint else sum(counts)

    def _counts(self) -> list[int]:
        """How many batches each task gives."""
        lengths = [len(loader) for loader in self.flattened]
        limits = self.limits or lengths
        lengths = [int(min(length, limit)) for length, limit in zip(lengths, limits, strict=True)]
        most = max(lengths)
        return [max(1, round(most * (length / most) ** self.alpha)) if length else 0 for length in lengths]

    def _batches(self) -> Iterator[Any]:
        counts = self._counts()
        most = max(counts)
        sources = [_endless(loader) for loader in self.flattened]
        for number in range(most):
            due = [
                source
                for source, count in zip(sources, counts, strict=True)
                if (number + 1) * count // most > number * count // most
            ]
            if self.joint:
                yield {task: data for source in due for task, data in next(source).items()}
            else:
                yield from map(next, due)


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            # Another order; Lightning sets the epoch anew before the next one.
            sampler.set_epoch(sampler.epoch + _FAR)


class MultiTaskDataModule(LightningDataModule):
    """Several data modules as one: each is a task with a name.

    A batch is a mapping from the name of a task to the batch of its data module, such as
    ``{"digits": (images, labels)}``: of one task each, or with ``joint`` of all tasks at once. Training batches are
    sampled in rounds by the rule of :class:`TaskRounds`. Validation, test and prediction have a loader for each task,
    in the order of ``tasks``.

    ``Trainer(limit_train_batches=...)`` bounds each task, not their sum.

    Args:
        tasks: The data modules by name.
        alpha: How often small tasks come up, from 0, as often as the largest, to 1, by their size.
        joint: Whether a training batch holds a batch of each task that takes part in the round.

    Raises:
        ConfigurationError: There is no task, a value is no LightningDataModule, or ``alpha`` is out of range.

    Example:
        >>> from lightning_bsr import DigitsDataModule
        >>> data = MultiTaskDataModule({"digits": DigitsDataModule(), "again": DigitsDataModule(batch_size=32)})
        >>> data.num_classes
        {'digits': 10, 'again': 10}
        >>> first, second = (batch for (batch, _, _), _ in zip(data.train_dataloader(), range(2)))
        >>> list(first), list(second)
        (['again'], ['digits'])
    """

    def __init__(self, tasks: dict[str, LightningDataModule], alpha: float = 0.5, joint: bool = False) -> None:
        super().__init__()
        if not tasks:
            raise ConfigurationError("tasks is empty, expected a data module for one task or more.")
        for name, module in tasks.items():
            if not isinstance(module, LightningDataModule):
                raise ConfigurationError(
                    f"The task {name!r} is a {type(module).__name__}, expected a LightningDataModule."
                )
        if not is_number(alpha) or not 0 <= alpha <= 1:
            raise ConfigurationError(f"alpha is {alpha!r}, expected a number from 0 to 1.")
        self.tasks = dict(tasks)
        self.alpha = alpha
        self.joint = joint

    @property
    def num_classes(self) -> dict[str, int]:
        """How many classes each task has.

        Raises:
            ConfigurationError: A data module does not say.
        """
        counts: dict[str, int] = {}
        for name, module in self.tasks.items():
            count = getattr(module, "num_classes", None)
            if count is None:
                kind = type(module).__name__
                raise ConfigurationError(f"The data module of the task {name!r} ({kind}) has no num_classes.")
            counts[name] = count
        return counts

    @property
    def class_names(self) -> dict[str, list[str]]:
        """The names of each task's classes, for the tasks whose data modules say."""
        modules = {name: module for name, module in self.tasks.items() if isinstance(module, ClassificationData)}
        return {name: module.class_names for name, module in modules.items()}

    @override
    def prepare_data(self) -> None:
        """Let each task prepare its data."""
        for module in self.tasks.values():
            module.prepare_data()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Let each task set up for ``stage``."""
        for module in self.tasks.values():
            module.trainer = self.trainer
            module.setup(stage)  # type: ignore[arg-type]  # None is every stage

    @override
    def teardown(self, stage: str | None = None) -> None:
        """Let each task tear down."""
        for module in self.tasks.values():
            module.teardown(stage)  # type: ignore[arg-type]  # None is every stage

    @override
    def train_dataloader(self) -> TaskRounds:
        """Rounds of training batches."""
        return TaskRounds(self._loaders("train"), self.alpha, joint=self.joint)

    @override
    def val_dataloader(self) -> dict[str, DataLoader[Any]]:
        """A loader for each task."""
        return self._loaders("val")

    @override
    def test_dataloader(self) -> dict[str, DataLoader[Any]]:
        """A loader for each task."""
        return self._loaders("test")

    @override
    def predict_dataloader(self) -> dict[str, DataLoader[Any]]:
        """A loader for each task."""
        return self._loaders("predict")

    def _loaders(self, stage: Literal["train", "val", "test", "predict"]) -> dict[str, DataLoader[Any]]:
        loaders = {}
        for name, module in self.tasks.items():
            loader = getattr(module, f"{stage}_dataloader")()
            if not isinstance(loader, DataLoader):
                raise ConfigurationError(
                    f"{stage}_dataloader of the task {name!r} ({type(module).__name__}) gave "
                    f"{type(loader).__name__}, expected one DataLoader."
                )
            # In the loader itself, not around it: Lightning has to find its sampler.
            if getattr(loader.collate_fn, "func", None) is not _named:  # a data module may give the same one again
                loader.collate_fn = partial(_named, name, loader.collate_fn)
            loaders[name] = loader
        return loaders


def _named(task: str, collate: Any, samples: list[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    return {task: collate(samples)}
