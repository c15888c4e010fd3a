"""A classifier around a tiny ViT, pictures that it learns, and a Trainer for it."""

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_bsr.models import ViTClassifier

MICRO = "vit_micro_patch4_32"
TINY = {"depth": 3, "embed_dim": 32, "num_heads": 2}


def tiny(**kwargs):
    kwargs = {"model_name": MICRO, "num_classes": 4, "pretrained": False, "model_kwargs": TINY, **kwargs}
    return ViTClassifier(**kwargs)


def loader(size=16, batch_size=4, shuffle=False):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(size) % 4
    images = torch.randn(size, 3, 32, 32, generator=generator) * 0.3
    images += 3 * torch.eye(4, 3)[targets, :, None, None]  # red, green, blue and grey ones
    return DataLoader(TensorDataset(images, targets), batch_size, shuffle=shuffle)


def trainer(tmp_path, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**defaults, **kwargs})


def write_lightning(model, path):
    """Train a step, and save what Lightning saves."""
    run = trainer(path.parent, fast_dev_run=True)
    run.fit(model, loader())
    run.save_checkpoint(path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")
