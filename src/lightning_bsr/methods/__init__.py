"""Every way of fine-tuning a ViT under one name, with its published defaults: as a function and as a callback."""

from lightning_bsr.methods._apply import MethodHandle, apply_method_
from lightning_bsr.methods._fine_tune import FineTune
from lightning_bsr.methods._table import METHODS, FullTraining, Method

__all__ = ["METHODS", "FineTune", "FullTraining", "Method", "MethodHandle", "apply_method_"]
