"""How many bytes a training step keeps, block by block."""

from lightning_bsr.memory._measure import measure
from lightning_bsr.memory._recorder import ActivationRecorder
from lightning_bsr.memory._report import MIB, BlockReport, Flops, MemoryReport

__all__ = ["MIB", "ActivationRecorder", "BlockReport", "Flops", "MemoryReport", "measure"]
