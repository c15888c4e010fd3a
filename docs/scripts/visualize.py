"""Makes the pictures of docs/guides/visualize.md: what the bundled micro ViT drops of pictures in class folders.

Run it after a change to the figures, in a checkout::

    python docs/scripts/visualize.py path/to/cifar10 docs/images
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from lightning_bsr.cli import main as lightning_bsr

COLOURS = 255  # as many as a palette holds, which makes the files a third of the size


def main(root: str, images: str) -> None:
    """Draw the validation pictures of ``root`` with ``lightning-bsr visualize``, as ``images/visualize_<name>.png``."""
    callbacks = [
        *("--trainer.callbacks+=BlockSelect", "--trainer.callbacks.blocks=[3,7,11]"),
        *("--trainer.callbacks+=TokenDrop", "--trainer.callbacks.blocks=[3,6,9]", "--trainer.callbacks.keep_rate=0.5"),
    ]
    data = [
        *("--data=ImageFolderDataModule", f"--data.root={root}", "--data.img_size=32", "--data.num_workers=0"),
        *("--data.mean=[0.5071,0.4866,0.4409]", "--data.std=[0.2673,0.2564,0.2762]", "--data.check_files=false"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--output={folder}", "--num_images=4"]
        lightning_bsr(["visualize", *options, *callbacks, *data])
        for file in Path(folder).iterdir():
            name = file.stem.removesuffix("-val").replace("-", "_")
            with Image.open(file) as picture:
                small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            small.save(Path(images, f"visualize_{name}.png"), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
