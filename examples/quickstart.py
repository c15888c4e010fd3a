"""Fine-tune the bundled micro ViT on scikit-learn's digits from Python, with no download.

python examples/quickstart.py
"""

import argparse

from lightning.pytorch import Trainer, seed_everything

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, DigitsDataModule, TokenDrop, ViTClassifier


def main() -> None:
    """Train and test; ViTClassifier may be any LightningModule that holds a ViT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs

    seed_everything(0)
    data = DigitsDataModule()
    model = ViTClassifier("vit_micro_patch4_32.cifar100", num_classes=data.num_classes, lr=4.5e-3, warmup_epochs=2)
    trainer = Trainer(
        max_epochs=epochs,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        callbacks=[
            BlockSelect(blocks=[3, 7, 11]),
            TokenDrop(blocks=[3, 6, 9], keep_rate=0.5),
            ActivationMemoryMonitor(),
        ],
    )
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
