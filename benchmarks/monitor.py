"""What ActivationMemoryMonitor costs: the same training with and without it, in one run.

    python benchmarks/monitor.py

Rounds with and without the monitor take turns; the ratio of their times is the median over the rounds. Validation,
logging and checkpoints are off in both.
"""

import argparse
import statistics
import time
import warnings

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, TokenDrop, ViTClassifier


def seconds(steps: int, batch_size: int, *, monitored: bool) -> float:
    """Train the micro ViT for ``steps`` steps and return the time from the second step to the last."""
    torch.manual_seed(0)
    count = batch_size * 4
    images = TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(10, (count,)))
    model = ViTClassifier(num_classes=10)
    stamps: list[float] = []
    model.on_before_zero_grad = lambda *_: stamps.append(time.perf_counter())  # type: ignore[method-assign]
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BlockSelect([3, 7, 11]), TokenDrop([3, 6, 9], 0.5)]
        + ([ActivationMemoryMonitor()] if monitored else []),
    )
    trainer.fit(model, DataLoader(images, batch_size))
    return stamps[-1] - stamps[0]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=101, help="the monitor measures at steps 1, 51 and 101")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    seconds(3, args.batch_size, monitored=True)
    pairs = [
        [seconds(args.steps, args.batch_size, monitored=monitored) for monitored in (True, False)]
        for _ in range(args.rounds)
    ]
    ratios = [with_monitor / without for with_monitor, without in pairs]
    print(f"micro ViT, batch {args.batch_size}, {args.steps} steps a round, {args.rounds} rounds")
    print(
        f"time with the monitor / without: median {statistics.median(ratios):.3f}, all {[round(r, 3) for r in ratios]}"
    )


if __name__ == "__main__":
    main()
