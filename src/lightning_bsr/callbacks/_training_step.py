"""Runs a LightningModule's training step outside of a Trainer's loop, without its logging, on its first batches."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torchmetrics import Metric

from lightning_bsr._errors import ConfigurationError


@contextlib.contextmanager
def quiet_training_step(pl_module: LightningModule) -> Iterator[Callable[[Any], torch.Tensor]]:
    """Give a function from a batch to the loss; meanwhile the module logs nothing and its metrics rest.

    Metrics look at values, which fake tensors have not, and would count what they see here.

    Raises:
        ConfigurationError: If the module optimizes by itself, or its training step looks at values while planned; from
            the function, if the training step returns no loss.
    """
    if not pl_module.automatic_optimization:
        raise ConfigurationError(
            f"{type(pl_module).__name__} optimizes by itself, so its training step cannot be run without training; "
            "plan its ViT with lightning_bsr.memory.plan, or choose its blocks with lightning_bsr.memory.fit_budget."
        )
    arguments = (0,) if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2) else ()

    def training_step(batch: Any) -> torch.Tensor:
        output = pl_module.training_step(batch, *arguments)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, torch.Tensor):
            raise ConfigurationError(
                f"training_step of {type(pl_module).__name__} returned {type(output).__name__}, expected a loss tensor "
                "or a mapping with a 'loss'."
            )
        return loss

    silenced: list[tuple[torch.nn.Module, str]] = [(pl_module, "log"), (pl_module, "log_dict")]
    for metric in pl_module.modules():
        if isinstance(metric, Metric):
            silenced += [(metric, "forward"), (metric, "update"), (metric, "compute")]
    before = [vars(module).get(name) for module, name in silenced]
    for module, name in silenced:
        vars(module)[name] = _nothing
    try:
        yield training_step
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ConfigurationError(
            f"The training step of {type(pl_module).__name__} looks at values, which planning has not ({error}); plan "
            "its ViT with lightning_bsr.memory.plan, or measure one step."
        ) from error
    finally:
        for (module, name), own in zip(silenced, before, strict=True):
            if own is None:
                del vars(module)[name]
            else:
                vars(module)[name] = own


def first_batches(trainer: Trainer, pl_module: LightningModule, loaders: Any, count: int) -> list[Any]:
    """Load the first batches as training would see them, on the module's device; fewer if there are not so many.

    Args:
        trainer: The Trainer that will fit.
        pl_module: Its module.
        loaders: One loader of training batches, or a collection of them.
        count: How many batches.
    """
    return list(islice(load_batches(trainer, pl_module, loaders), count))


def load_batches(trainer: Trainer, pl_module: LightningModule, loaders: Any) -> Iterator[Any]:
    """Load batches one by one as the Trainer's loops would; for the arguments see :func:`first_batches`."""
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    plugin, strategy = trainer.precision_plugin, trainer.strategy
    for batch, _, _ in iter(combined):
        yield strategy.batch_to_device(plugin.convert_input(batch), pl_module.device)


def optimizers_over_all(pl_module: LightningModule) -> list[torch.optim.Optimizer]:
    """Let the module configure its optimizers as if everything trained, as a choice may let anything train."""
    flags = [(p, p.requires_grad) for p in pl_module.parameters() if p.is_floating_point()]
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    try:
        return list(_optimizers(pl_module.configure_optimizers()))
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def _optimizers(configured: Any) -> Iterator[torch.optim.Optimizer]:
    """Find the optimizers in whatever form ``configure_optimizers`` may return them."""
    if isinstance(configured, torch.optim.Optimizer):
        yield configured
    elif isinstance(configured, dict):
        yield from _optimizers(configured.get("optimizer"))
    elif isinstance(configured, (list, tuple)):
        for each in configured:
            yield from _optimizers(each)


def _nothing(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.tensor(0.0)  # a constant, whose value fake tensors know too
