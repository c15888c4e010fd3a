"""What a training step keeps and computes, block by block: measured, or planned without computing it."""

from lightning_bsr.memory._budget import BudgetKind, BudgetPlan, Candidate, fit_budget
from lightning_bsr.memory._bytes import format_bytes, parse_bytes
from lightning_bsr.memory._configuration import Configuration
from lightning_bsr.memory._largest_batch import largest_batch_size
from lightning_bsr.memory._lean_points import LeanPolicies, fit_lean
from lightning_bsr.memory._measure import measure, plan
from lightning_bsr.memory._recorder import ActivationRecorder
from lightning_bsr.memory._reference import ReferenceReport, reference_accounting
from lightning_bsr.memory._report import MIB, BlockReport, Flops, MemoryReport

__all__ = [
    "MIB",
    "ActivationRecorder",
    "BlockReport",
    "BudgetKind",
    "BudgetPlan",
    "Candidate",
    "Configuration",
    "Flops",
    "LeanPolicies",
    "MemoryReport",
    "ReferenceReport",
    "fit_budget",
    "fit_lean",
    "format_bytes",
    "largest_batch_size",
    "measure",
    "parse_bytes",
    "plan",
    "reference_accounting",
]
