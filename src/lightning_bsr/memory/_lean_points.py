"""Chooses which half-blocks to compute again, so that a step fits in a budget of memory."""

from collections.abc import Callable, Collection
from typing import get_args

from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional import LeanPolicy, install_lean_activations
from lightning_bsr.functional._forward import Half
from lightning_bsr.memory._budget import BUDGETED, BudgetKind
from lightning_bsr.memory._bytes import format_bytes, parse_bytes
from lightning_bsr.memory._report import MemoryReport
from lightning_bsr.vit import find_vit

LeanPolicies = dict[int, dict[Half, LeanPolicy]]
_HALVES: tuple[Half, ...] = get_args(Half)


def fit_lean(
    module: nn.Module,
    plan_step: Callable[[], MemoryReport],
    budget: int | str,
    *,
    kind: BudgetKind = "total",
    vit: str | None = None,
) -> LeanPolicies:
    """Choose the half-blocks to compute again, and let the others be lean exactly, so that a step fits in a budget.

    What is computed again is as little as the budget asks for: those half-blocks first that save the most bytes for
    each operation. What trains and where tokens are dropped stays as it is, and gradients are the same. Every choice
    is planned as a whole.

    Args:
        module: Any module that holds a ViT.
        plan_step: Plans the training step of ``module`` as it is, see :func:`lightning_bsr.memory.plan`.
        budget: Bytes, or a number and a unit such as ``"512MiB"``.
        kind: What is bounded: ``"total"``, the peak of the whole step; or ``"activations"``, the bytes kept for
            backward, at most at one moment.
        vit: Dotted path of the ViT, for when ``module`` holds several.

    Returns:
        A policy for each half of each block, as :func:`lightning_bsr.functional.install_lean_activations` takes them.

    Raises:
        ConfigurationError: If nothing fits in the budget (the message says what the least is), or it is no number of
            bytes.

    Example:
        >>> import timm
        >>> from lightning_bsr.memory import plan
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> policies = fit_lean(model, lambda: plan(model, (8, 3, 160, 160)), "15MiB", kind="activations")
        >>> policies[5]
        {'attn': 'exact', 'mlp': 'exact'}
    """
    limit = parse_bytes(budget, "budget")
    if kind not in get_args(BudgetKind):
        raise ConfigurationError(f"kind is {kind!r}, expected one of {', '.join(map(repr, get_args(BudgetKind)))}.")
    view = find_vit(module, vit)

    def policies(again: Collection[tuple[int, Half]]) -> LeanPolicies:
        return {
            index: {half: "recompute" if (index, half) in again else "exact" for half in _HALVES}
            for index in range(len(view.blocks))
        }

    def planned(again: Collection[tuple[int, Half]]) -> MemoryReport:
        handle = install_lean_activations(module, policies(again), vit=vit)
        try:
            return plan_step()
        finally:
            handle.remove()

    def fits(report: MemoryReport) -> bool:
        return _bytes_of(report, kind) <= limit

    exact = planned(())
    if fits(exact):
        return policies(())
    attention = [(index, _HALVES[0]) for index in range(len(view.blocks))]
    everything = [(index, half) for index in range(len(view.blocks)) for half in _HALVES]
    most, attention_only = planned(everything), planned(attention)
    if not fits(most):
        raise ConfigurationError(
            f"budget is {format_bytes(limit)} of {BUDGETED[kind]}, but the least that the {view.name} can do with, all "
            f"half-blocks computed again, is {format_bytes(_bytes_of(most, kind))}; give more, train less, drop more "
            "tokens, or take a smaller batch."
        )
    order = _by_bytes_for_each_operation(exact, attention_only, most)
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(planned(order[:middle])) else (middle, high)
    return policies(order[:high])


def _by_bytes_for_each_operation(
    exact: MemoryReport, attention_only: MemoryReport, most: MemoryReport
) -> list[tuple[int, Half]]:
    value: dict[tuple[int, Half], float] = {}
    lines = zip(exact.by_block[1:-1], attention_only.by_block[1:-1], most.by_block[1:-1], strict=True)
    for index, (kept, attn, both) in enumerate(lines):
        assert kept.flops is not None
        assert attn.flops is not None
        assert both.flops is not None
        saved = {"attn": kept.attn - attn.attn, "mlp": kept.mlp - both.mlp}
        again = {"attn": attn.flops.backward - kept.flops.backward, "mlp": both.flops.backward - attn.flops.backward}
        for half in _HALVES:
            if saved[half] > 0:
                value[index, half] = saved[half] / max(again[half], 1)
    return sorted(value, key=lambda key: value[key], reverse=True)


def _bytes_of(report: MemoryReport, kind: BudgetKind) -> int:
    return (report.peak or 0) if kind == "total" else (report.activations_peak or report.activations)
