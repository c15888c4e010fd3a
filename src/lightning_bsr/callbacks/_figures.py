"""Where the figures of callbacks go: to a folder, and to the loggers that show pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 120


def figure_folder(trainer: Trainer, folder: str | Path | None) -> Path:
    """Give the folder for figures, by default the Trainer's log folder. All processes must ask, not the first alone."""
    return log_folder(trainer) if folder is None else Path(folder)


def log_folder(trainer: Trainer) -> Path:
    """Give the Trainer's log folder, or where its checkpoints go if its logger has none. All processes must ask.

    MLflow has none if it writes to a database or a server.
    """
    if trainer.log_dir is not None:
        return Path(trainer.log_dir)
    # As ModelCheckpoint has it.
    logger = trainer.logger
    return Path(trainer.default_root_dir, *(() if logger is None else (str(logger.name), str(logger.version))))


def publish_figure(trainer: Trainer, folder: Path, name: str, figure: "Figure") -> Path:
    """Write a figure as PNG, and send it to the Trainer's TensorBoard, W&B and MLflow loggers. In the first process.

    Args:
        trainer: Whose loggers, and whose step.
        folder: Where to write; it is made if need be. A file that is there is replaced.
        name: The file's name without its ending, and the loggers' key.
        figure: The figure.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=_DPI)
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            with Image.open(path) as image:
                logger.experiment.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step)
        elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
            # Its own key for each step: artifacts replace one another.
            logger.experiment.log_artifact(logger.run_id, str(path), f"figures/step-{step}")
    return path
