"""What ``lightning-bsr plan`` prints of a result, in a file."""

import io

from rich.console import Console

from lightning_bsr.memory import MIB, BlockReport, BudgetPlan, Candidate, Configuration, Flops, MemoryReport
from lightning_bsr.planning._result import PlanResult


def test_print__in_a_file_is_at_most_120_columns_wide_and_cuts_nothing():
    halves = {i: {"attn": "recompute", "mlp": "exact"} for i in range(24)}
    choice = Configuration(dict.fromkeys(range(24), ("attn",)), {1: 0.5, 2: 0.5}, halves)
    report = MemoryReport(
        5000 * MIB, 0, 0, 0, (BlockReport("0", 197, 9, 9, 5000 * MIB),), peak=6000 * MIB, flops=Flops(10**12, 10**12)
    )
    point = Candidate(choice, 5000 * MIB, 6000 * MIB, Flops(10**12, 10**12), 0.87)
    plan = BudgetPlan(8000 * MIB, "total", choice, report, report, 0.87, (point,), 4321 * MIB, {}, {})
    file = io.StringIO()
    PlanResult(report, None, "cpu", 2**34, choice=plan, budget=8000 * MIB).print(Console(file=file))
    tables = file.getvalue().partition("Chosen for")[0].splitlines()
    assert max(map(len, tables)) == 120
    words = " ".join(" ".join(tables).replace("│", " ").split())
    assert "…" not in words
    assert "23 (mlp)" in words
    for word in ("configuration", "activations", "4.9 GiB", "5.9 GiB", "100%", "0.87", "4.2 GiB"):
        assert word in words
