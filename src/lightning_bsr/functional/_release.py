"""Lets an optimizer step each parameter as soon as its gradient is there, so that gradients do not live together."""

import contextlib
import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bsr._errors import ConfigurationError

_RELEASED = WeakTensorKeyDictionary()
_TRIAL_STEPS = 3
_suspended = False


class ReleasedGradients:
    """What :func:`release_gradients_` did to an optimizer, and the way back.

    Attributes:
        optimizer: The optimizer.
        parameters: The parameters that it steps one by one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters: list[torch.Tensor] = []
        self._stepped: set[int] = set()
        self._hooks = [optimizer.register_step_post_hook(self._end_step)]
        for index, group in enumerate(optimizer.param_groups):
            for parameter in _trained(group):
                # The group's position: load_state_dict makes new groups.
                hook = functools.partial(self._release, index)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
                self.parameters.append(parameter)
                _RELEASED[parameter] = True

    def remove(self) -> None:
        """Let gradients stay until ``optimizer.step()`` again; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters if self._hooks else ():
            del _RELEASED[parameter]
        self._hooks = []

    def __str__(self) -> str:
        name = type(self.optimizer).__name__
        return f"{name} steps each of {len(self.parameters)} parameters as soon as its gradient is there"

    def _release(self, group: int, parameter: torch.Tensor) -> None:
        if _suspended:
            return
        if id(parameter) in self._stepped:
            raise ConfigurationError(
                f"A parameter of shape {list(parameter.shape)} got a second gradient before optimizer.step(), but the "
                f"first is gone already: it was released into {type(self.optimizer).__name__}. Expected "
                "optimizer.step() after each backward pass; to accumulate gradients, do not release them."
            )
        self._stepped.add(id(parameter))
        _step_alone(self.optimizer, group, parameter)

    def _end_step(self, *_: object) -> None:
        self._stepped.clear()


def release_gradients_(optimizer: Optimizer) -> ReleasedGradients:
    """Let ``optimizer`` step each parameter in the backward pass, as soon as its gradient is there, and free that.

    Gradients then never live all together (arXiv 2306.09782). Weights and state are bit for bit those of the ordinary
    step, because autograd hands out the gradient of a parameter only when all operations that it comes from are
    through, also those of a parameter that is used several times or inside a checkpointed region. The optimizer remains
    the same object: its state, ``state_dict()`` and learning rate schedulers work as before. Call ``optimizer.step()``
    after each backward pass as ever; it steps what else has a gradient and runs the optimizer's hooks.

    What reads gradients between backward and step finds none: clipping, gradient scaling, accumulation, averaging over
    processes. A second backward pass before ``optimizer.step()`` raises an error; the others do their work on nothing
    or on too late a gradient, so do not use them. The same holds for a weight that the loss depends on outside of the
    graph, such as by ``weight.detach()``: autograd raises an error if it finds such a weight changed, but a
    checkpointed region would be computed again with it. A backward pass that fails half-way has stepped some weights.

    Args:
        optimizer: Any optimizer that steps each parameter by that parameter's gradient and state alone; this is tried
            on copies of some of its parameters.

    Returns:
        A handle; its ``remove()`` undoes everything.

    Raises:
        ConfigurationError: If ``optimizer`` is none of ``torch.optim.Optimizer``, needs a closure, wraps another one,
            steps parameters by what others do, holds no parameter that trains or parameters on several devices, or if
            gradients of its parameters are released already. Nothing has changed then. Later, from backward, if a
            parameter gets a second gradient before ``optimizer.step()``.

    Example:
        >>> linear = nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(linear.parameters())
        >>> handle = release_gradients_(optimizer)
        >>> print(handle)
        AdamW steps each of 2 parameters as soon as its gradient is there
        >>> linear(torch.ones(1, 4)).sum().backward()
        >>> linear.weight.grad is None, float(optimizer.state[linear.weight]["step"])
        (True, 1.0)
        >>> optimizer.step()  # nothing is left to do
        >>> float(optimizer.state[linear.weight]["step"])
        1.0
        >>> handle.remove()
    """
    _check(optimizer)
    return ReleasedGradients(optimizer)


@contextlib.contextmanager
def releases_suspended() -> Iterator[None]:
    """Let all gradients stay meanwhile, for a backward pass that belongs to no training step."""
    global _suspended
    before, _suspended = _suspended, True
    try:
        yield
    finally:
        _suspended = before


def _trained(group: dict[str, Any]) -> list[torch.Tensor]:
    return [p for p in group["params"] if p.requires_grad]


def _step_alone(optimizer: Optimizer, group: int, parameter: torch.Tensor) -> None:
    """Take one step of ``optimizer`` on ``parameter`` only, without the optimizer's hooks, and free its gradient."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[group], "params": [parameter]}]
    try:
        _unhooked_step(optimizer)(optimizer)
    finally:
        optimizer.param_groups = groups
    parameter.grad = None


def _unhooked_step(optimizer: Optimizer) -> Callable[[Optimizer], Any]:
    step: Any = type(optimizer).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


def _check(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    expected = "expected one that steps each parameter by its own gradient, such as SGD, RMSprop, Adam or AdamW"
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(f"optimizer is a {name}, expected a torch.optim.Optimizer.")
    closure = inspect.signature(_unhooked_step(optimizer)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigurationError(
            f"Gradients cannot be released into {name}, whose step computes the loss again and needs all gradients at "
            f"once; {expected}."
        )
    for attribute, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            raise ConfigurationError(
                f"Gradients cannot be released into {name}, which wraps {type(value).__name__} as its {attribute}; "
                f"{expected}."
            )
    trained = [p for group in optimizer.param_groups for p in _trained(group)]
    if not trained:
        raise ConfigurationError(f"{name} holds no parameter that trains, so there is no gradient to release.")
    devices = {str(p.device) for p in trained}
    if len(devices) > 1:
        raise ConfigurationError(
            f"{name} holds parameters on {', '.join(sorted(devices))}, expected one device to release gradients on."
        )
    if any(p in _RELEASED for p in trained):
        raise ConfigurationError(f"Gradients of parameters of {name} are released already; remove that first.")
    try:
        differs = _steps_depend_on_each_other(optimizer)
    except Exception as error:
        raise ConfigurationError(
            f"Gradients cannot be released into {name}, which does not step copies of its parameters ({error}); "
            f"{expected}."
        ) from error
    if differs:
        raise ConfigurationError(
            f"Gradients cannot be released into {name}, which steps a parameter otherwise when it is alone than "
            f"together with others; {expected}."
        )


def _steps_depend_on_each_other(optimizer: Optimizer) -> bool:
    """Try on copies whether parameters that are stepped one by one go where they go together."""
    together, alone = _stand_in(optimizer), _stand_in(optimizer)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for number in range(_TRIAL_STEPS):
            for stand_in in (together, alone):
                for group in stand_in.param_groups:
                    for p in group["params"]:
                        ramp = torch.linspace(-9, 9, p.numel(), device=p.device, dtype=p.dtype)
                        p.grad = ramp.roll(number).view_as(p)
            _unhooked_step(together)(together)
            # As backward does: the last first.
            for index, group in reversed(list(enumerate(alone.param_groups))):
                for p in reversed(group["params"]):
                    _step_alone(alone, index, p)
    pairs = zip(together.param_groups, alone.param_groups, strict=True)
    return any(not torch.equal(a, b) for x, y in pairs for a, b in zip(x["params"], y["params"], strict=True))


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """Copy ``optimizer`` and its state, over copies of the two smallest parameters of each group."""
    stand_in: Optimizer = object.__new__(type(optimizer))
    # Else the parameters would be copied, wherever the optimizer mentions them.
    memo = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for name, value in vars(optimizer).items():
        shared = name.startswith("_") or callable(value)
        if name not in ("state", "param_groups"):
            vars(stand_in)[name] = value if shared else copy.deepcopy(value, memo)
    stand_in.state = defaultdict(dict)
    stand_in.param_groups = []
    for group in optimizer.param_groups:
        options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        if "lr" in options:
            options["lr"] = 0.1  # it may be zero now, in a warm-up
        copies = []
        for parameter in sorted(_trained(group), key=torch.numel)[:2]:
            copies.append(nn.Parameter(parameter.detach().clone()))
            if parameter in optimizer.state:
                stand_in.state[copies[-1]] = copy.deepcopy(optimizer.state[parameter])
        stand_in.param_groups.append({**options, "params": copies})
    return stand_in
