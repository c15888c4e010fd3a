"""Compares ways of fine-tuning on one model and data set: which runs that takes, running them, tables and plots."""

from lightning_bsr.comparison._cli import CompareCommand
from lightning_bsr.comparison._compare import compare
from lightning_bsr.comparison._settings import Settings

__all__ = ["CompareCommand", "Settings", "compare"]
