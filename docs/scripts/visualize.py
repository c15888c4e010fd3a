"""Fine-tunes the bundled micro ViT on pictures in class folders for some epochs, and keeps the figures of the last one.

These are the pictures of docs/guides/visualize.md. Run it after a change to the figures, in a checkout::

    python docs/scripts/visualize.py path/to/cifar10 docs/images
"""

import sys
import tempfile
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from PIL import Image

from lightning_bsr import BlockSelect, ImageFolderDataModule, TokenDrop, TokenDropVisualizer, ViTClassifier

EPOCHS = 2
COLOURS = 255  # as many as a palette holds, which makes the files a third of the size


def main(root: str, images: str) -> None:
    """Train on ``root``, and write the figures as ``images/visualize_<name>.png``."""
    seed_everything(0)
    data = ImageFolderDataModule(
        root,
        img_size=32,
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        scale=(0.5, 1.0),
        num_workers=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        visualizer = TokenDropVisualizer(folder, num_images=4)
        trainer = Trainer(
            callbacks=[BlockSelect([3, 7, 11]), TokenDrop([3, 6, 9], keep_rate=0.5), visualizer],
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(ViTClassifier(lr=4.5e-3, warmup_epochs=1), data)
        print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
        for file in visualizer.files:
            name = file.stem.removesuffix("-val").replace("-", "_")
            with Image.open(file) as picture:
                small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            small.save(Path(images, f"visualize_{name}.png"), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
