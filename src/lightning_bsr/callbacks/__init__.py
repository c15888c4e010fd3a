"""Lightning callbacks: each attaches one lever at the right moment of a run and undoes it afterwards."""

from lightning_bsr.callbacks.activation_checkpoint import ActivationCheckpoint
from lightning_bsr.callbacks.activation_memory_monitor import ActivationMemoryMonitor
from lightning_bsr.callbacks.block_select import BlockSelect, BlockSelectCallback
from lightning_bsr.callbacks.delta_checkpoint import DeltaCheckpoint
from lightning_bsr.callbacks.lean_activations import LeanActivations
from lightning_bsr.callbacks.prefix_cache import PrefixCache
from lightning_bsr.callbacks.quantize_frozen import QuantizeFrozen
from lightning_bsr.callbacks.release_gradients import ReleaseGradients
from lightning_bsr.callbacks.token_drop import TokenDrop, TokenDropCallback
from lightning_bsr.callbacks.token_drop_visualizer import TokenDropVisualizer

__all__ = [
    "ActivationCheckpoint",
    "ActivationMemoryMonitor",
    "BlockSelect",
    "BlockSelectCallback",
    "DeltaCheckpoint",
    "LeanActivations",
    "PrefixCache",
    "QuantizeFrozen",
    "ReleaseGradients",
    "TokenDrop",
    "TokenDropCallback",
    "TokenDropVisualizer",
]
