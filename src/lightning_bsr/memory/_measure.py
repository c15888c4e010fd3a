"""Measures one training step: on real tensors, or on fake ones that have shapes but no memory."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_map, tree_map_only

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.memory._caches import caches_cleared
from lightning_bsr.memory._kernels import KernelWatch, LayerNormStatistics
from lightning_bsr.memory._optimizer import alone_temporaries
from lightning_bsr.memory._report import MemoryReport
from lightning_bsr.memory._step import Precision, Step
from lightning_bsr.vit import find_vit


def measure(
    module: nn.Module,
    *inputs: Any,
    forward: Callable[..., Any] | None = None,
    loss: Callable[[Any], torch.Tensor] = torch.sum,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    precision: Precision = "32-true",
    accumulate: bool = False,
    release_gradients: bool = False,
    vit: str | None = None,
) -> MemoryReport:
    """Run one forward and backward pass of ``module`` and report what it kept and computed.

    Gradients that the parameters held before are put back, and the state of the random generators too. Buffers are not:
    batch norms in train mode update their running statistics. The optimizer takes no step; its share is found with
    fake tensors. :func:`plan` gives the same report without computing anything.

    The step is Lightning's: the gradients of the step before are alive during the forward pass, and cleared before the
    backward pass.

    Args:
        module: A module that holds a ViT, with selection and dropping as they would be in training.
        *inputs: What its forward takes, such as images ``[B, 3, H, W]``.
        forward: What to call with ``inputs`` instead of ``module``, such as a method of it.
        loss: From the output to a scalar; the sum by default.
        optimizer: Whose state and temporaries are counted; one, or several.
        precision: As the Trainer's; for ``"16-true"`` and ``"bf16-true"`` the module must have that dtype already.
        accumulate: Whether gradients are accumulated over several batches, so that they are alive all the time.
        release_gradients: Whether the optimizer steps each parameter as soon as its gradient is there, as after
            :func:`lightning_bsr.functional.release_gradients_`; the report's ``gradients`` are then the most bytes of
            them at one moment.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        Bytes and floating-point operations of the whole batch.

    Raises:
        ConfigurationError: If the ViT is not found, ``precision`` is unknown, or ``release_gradients`` is given
            without an optimizer or with ``accumulate``.

    Example:
        >>> import timm
        >>> report = measure(timm.create_model("test_vit", num_classes=10), torch.zeros(2, 3, 160, 160))
        >>> [line.tokens for line in report.by_block]
        [101, 101, 101, 101, 101, 101, 101, None]
        >>> report.flops.backward > report.flops.forward
        True
    """
    step = _step(module, forward, loss, _several(optimizer), precision, accumulate, release_gradients, vit)
    with torch.random.fork_rng(), _gradients_set_aside(module), caches_cleared(module):
        return step.run(inputs, KernelWatch())


def plan(
    module: nn.Module,
    *inputs: Any,
    batch_size: int | None = None,
    forward: Callable[..., Any] | None = None,
    loss: Callable[[Any], torch.Tensor] = torch.sum,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    precision: Precision = "32-true",
    accumulate: bool = False,
    release_gradients: bool = False,
    vit: str | None = None,
) -> MemoryReport:
    """Report what one training step of ``module`` would keep and compute, without computing it.

    The very code of :func:`measure` runs, on fake tensors: they have shapes, types and a device, but no memory. So the
    step may be far larger than this machine, and the module itself is not changed. What fake tensors cannot do is to
    look at values: ``forward`` must not (``.item()``, boolean indexing).

    Args:
        module: A module that holds a ViT, with selection and dropping as they would be in training.
        *inputs: What its forward takes: tensors, of which only shape and dtype matter, or shapes such as
            ``(8, 3, 224, 224)``; also nested in lists and mappings.
        batch_size: Plan for this many images; the first dimension of ``inputs`` by default.
        forward: What to call with ``inputs`` instead of ``module``, such as a method of it.
        loss: From the output to a scalar; the sum by default.
        optimizer: Whose state and temporaries are counted; one, or several.
        precision: As the Trainer's.
        accumulate: Whether gradients are accumulated over several batches, so that they are alive all the time.
        release_gradients: Whether the optimizer steps each parameter as soon as its gradient is there, as after
            :func:`lightning_bsr.functional.release_gradients_`; the report's ``gradients`` are then the most bytes of
            them at one moment.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        Bytes and floating-point operations of the whole batch. Its ``notes`` say where another attention kernel would
        run than the one planned with.

    Raises:
        ConfigurationError: If the ViT is not found, ``precision`` is unknown, ``batch_size`` is below 1, or
            ``release_gradients`` is given without an optimizer or with ``accumulate``.

    Example:
        >>> import timm
        >>> report = plan(timm.create_model("test_vit", num_classes=10), (4096, 3, 160, 160))
        >>> f"{report.activations / 2**30:.1f} GiB"
        '9.7 GiB'
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}, expected 1 or more.")
    step = _step(module, forward, loss, _several(optimizer), precision, accumulate, release_gradients, vit)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = next(module.parameters()).device
    floats = step.dtype if precision.endswith("true") else None

    def fake_input(tensor: torch.Tensor) -> torch.Tensor:
        shape = list(tensor.shape)
        if batch_size is not None and shape[:1] == [given]:
            shape[0] = batch_size
        dtype = floats if floats and tensor.is_floating_point() else tensor.dtype
        return torch.empty(shape, dtype=dtype, device=device)

    def fake_weight(tensor: torch.Tensor) -> torch.Tensor:
        fake: torch.Tensor = mode.from_tensor(tensor)
        fake.grad = None
        if floats and tensor.is_floating_point():
            fake = fake.detach().to(floats).requires_grad_(tensor.requires_grad)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    tensors = tree_map(_shape_to_tensor, inputs, is_leaf=_is_shape)
    given = step.batch_size(tensors)
    watch = KernelWatch()
    call = _Inside(module, lambda *fakes: step.run(fakes, watch))
    with caches_cleared(module), mode, LayerNormStatistics():  # type: ignore[no-untyped-call]  # torch has no annotation there
        weights = {name: fake_weight(t) for name, t in (*call.named_parameters(), *call.named_buffers())}
        fakes = tree_map_only(torch.Tensor, fake_input, tensors)
        try:
            report: MemoryReport = torch.func.functional_call(call, weights, fakes)
        except DataDependentOutputException as error:
            if forward is not None:  # whose it is knows better what to say
                raise
            raise ConfigurationError(
                f"{type(module).__name__} looks at values of tensors in its forward pass, and a plan has tensors "
                "without values; use lightning_bsr.memory.measure."
            ) from error
    notes = watch.differences()
    return report.with_notes(notes) if notes else report


def _step(
    module: nn.Module,
    forward: Callable[..., Any] | None,
    loss: Callable[[Any], torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    precision: Precision,
    accumulate: bool,
    release_gradients: bool,
    vit: str | None,
) -> Step:
    if precision not in get_args(Precision):
        raise ConfigurationError(
            f"precision is {precision!r}, expected one of {', '.join(map(repr, get_args(Precision)))}."
        )
    if release_gradients and (accumulate or not optimizers):
        raise ConfigurationError(
            f"release_gradients is True with accumulate={accumulate} and {len(optimizers)} optimizers, expected no "
            "accumulation and at least one optimizer to release gradients into."
        )
    step = Step(module, find_vit(module, vit), forward or module, loss, optimizers, precision, accumulate, {})
    if not release_gradients:
        return step
    costs = {key: cost for o in optimizers for key, cost in alone_temporaries(o, step.weight_dtype).items()}
    released = {name: costs[id(p)] for name, p in module.named_parameters() if p.requires_grad and id(p) in costs}
    return replace(step, released=released)


class _Inside(nn.Module):
    """Runs a function while the parameters of ``module`` are replaced, by :func:`torch.func.functional_call`."""

    def __init__(self, module: nn.Module, run: Callable[..., MemoryReport]) -> None:
        super().__init__()
        self.module = module
        self._run = run

    def forward(self, *inputs: Any) -> MemoryReport:
        return self._run(*inputs)


@contextlib.contextmanager
def _gradients_set_aside(module: nn.Module) -> Iterator[None]:
    gradients = [(p, p.grad) for p in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _several(optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> Sequence[torch.optim.Optimizer]:
    return [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer


def _is_shape(value: object) -> bool:
    return isinstance(value, (tuple, torch.Size)) and bool(value) and all(type(n) is int for n in value)


def _shape_to_tensor(value: Any) -> Any:
    return torch.empty(value, device="meta") if _is_shape(value) else value
