"""What an optimizer keeps and needs, found by letting it take two steps on fake tensors."""

import copy
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from lightning_bsr.memory._live import StepTracker


class OptimizerCost(NamedTuple):
    """Memory of an optimizer.

    Attributes:
        state: Bytes that it keeps between steps.
        temporaries: The most bytes that one step needs beside parameters, gradients and state.
    """

    state: int
    temporaries: int


def optimizers_cost(
    optimizers: Sequence[torch.optim.Optimizer], dtype: torch.dtype | None = None
) -> OptimizerCost | None:
    """Find out the memory of several optimizers, which keep their states together and take their steps in turn.

    Returns:
        The cost; ``None`` if there is no optimizer, or one of which it is not known.
    """
    costs = [optimizer_cost(optimizer, dtype) for optimizer in optimizers]
    known = [cost for cost in costs if cost is not None]
    if not known or len(known) < len(costs):
        return None
    return OptimizerCost(sum(cost.state for cost in known), max(cost.temporaries for cost in known))


def alone_temporaries(optimizer: torch.optim.Optimizer, dtype: torch.dtype | None = None) -> dict[int, int]:
    """Find out what ``optimizer`` needs to step each parameter by itself; it is not touched.

    Args:
        optimizer: As for :func:`optimizer_cost`.
        dtype: As for :func:`optimizer_cost`.

    Returns:
        The most bytes beside parameters, gradients and state, by the ``id`` of each parameter that trains; 0 where it
        is not known.

    Example:
        >>> linear = nn.Linear(256, 128)
        >>> list(alone_temporaries(torch.optim.AdamW(linear.parameters())).values())  # twice the parameter
        [262144, 1024]
    """
    found: dict[int, int] = {}
    known: dict[tuple[object, ...], int] = {}
    alone = copy.copy(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.requires_grad:
                alike = index, parameter.shape, parameter.dtype, parameter.device
                if alike not in known:
                    alone.param_groups = [{**group, "params": [parameter]}]
                    cost = optimizer_cost(alone, dtype)
                    known[alike] = cost.temporaries if cost else 0
                found[id(parameter)] = known[alike]
    return found


def optimizer_cost(optimizer: torch.optim.Optimizer, dtype: torch.dtype | None = None) -> OptimizerCost | None:
    """Find out the memory of ``optimizer``; it is not touched.

    A copy of the optimizer, with its real class and options, takes two steps on fake parameters.

    Args:
        optimizer: Any optimizer of torch's kind, over real parameters.
        dtype: Of the parameters, if they will have another one than now.

    Returns:
        The cost; ``None`` if the optimizer's step looks at values, which fake tensors have not.

    Example:
        >>> linear = nn.Linear(256, 256, bias=False)
        >>> optimizer_cost(torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9))
        OptimizerCost(state=262144, temporaries=0)
    """
    shadow = copy.copy(optimizer)
    shadow.state = defaultdict(dict)
    # One by one, on the CPU, parameters of the same shape cost the same; on other devices torch takes all at once.
    one_by_one = all(
        p.device.type == "cpu" and not group.get("foreach") for group in optimizer.param_groups for p in group["params"]
    )
    fakes: list[nn.Parameter] = []
    times: dict[int, int] = {}
    tracker = StepTracker()
    with FakeTensorMode(), tracker:
        shadow.param_groups = []
        for group in optimizer.param_groups:
            counts = Counter(
                (p.shape, dtype or p.dtype, p.device, 0 if one_by_one else index)
                for index, p in enumerate(group["params"])
                if p.requires_grad
            )
            new = [nn.Parameter(torch.empty(shape, dtype=t, device=device)) for shape, t, device, _ in counts]
            times |= {id(fake): count for fake, count in zip(new, counts.values(), strict=True)}
            fakes += new
            shadow.param_groups.append({**group, "params": new})
        for fake in fakes:
            fake.grad = torch.empty_like(fake)
        tracker.hold(fakes, "parameters")
        tracker.hold([p.grad for p in fakes if p.grad is not None], "gradients")
        resident = sum(tracker.bytes.values())
        try:
            shadow.step()
            states = {p: [t for t in tree_leaves(shadow.state[p]) if isinstance(t, torch.Tensor)] for p in fakes}
            tracker.hold((t for state in states.values() for t in state), "optimizer_state")
            tracker.forget_peak()
            shadow.step()
        except (TypeError, RuntimeError):  # LBFGS wants a closure; Adafactor looks at values
            return None
    temporaries = tracker.peak.bytes - resident - tracker.bytes["optimizer_state"]
    return OptimizerCost(sum(times[id(p)] * t.nbytes for p, state in states.items() for t in state), temporaries)
