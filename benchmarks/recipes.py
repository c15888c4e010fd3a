"""What each published recipe needs with each way of fine-tuning, planned for its whole batch; nothing is trained.

    python benchmarks/recipes.py

Takes the configurations below ``examples/recipes`` as ``lightning-bsr fit`` does, with made-up pictures and random
weights, which change no figure, and plans one training step of each recipe with each method on tensors without data.
Prints a Markdown table for each model. Needs no data, no weights and no GPU, and the memory of one model.
"""

import argparse
import logging
import os
import warnings
from pathlib import Path

import yaml

from lightning_bsr.cli import BSRCLI
from lightning_bsr.memory import MIB, MemoryReport
from lightning_bsr.planning import FitPlanner

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
MODELS = ("vit_base", "deit_small")
DATA = ("cifar10", "cifar100", "pets", "flowers", "food101")
METHODS = ("full", "head", "bitfit", "lora", "int8_activations", "sparse_activations", "side_network", "bsr")
DRY = [
    "--data.synthetic=true",
    "--data.num_workers=0",
    "--data.batch_size=2",  # one small batch tells what batches are like; the plan is for a whole one
    "--model.pretrained=false",
    "--model.model_kwargs={weight_init: skip}",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def plan(model: str, data: str, method: str) -> MemoryReport:
    """Plan the first training step of a recipe with a method."""
    recipe = RECIPES / model / f"{data}.yaml"
    batch_size = yaml.safe_load(recipe.read_text())["data"]["init_args"]["batch_size"]
    cli = BSRCLI([f"--config={recipe}", f"--config={RECIPES / 'methods' / method}.yaml", *DRY], run=False)
    planner = FitPlanner(lambda step: step.plan(batch_size))
    cli.trainer.callbacks.append(planner)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert planner.result is not None
    return planner.result


def spread(values: list[float], spec: str) -> str:
    """Write one number, or two where the data sets differ in what is shown."""
    shown = dict.fromkeys(format(value, spec) for value in (min(values), max(values)))
    return " to ".join(shown)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    args = parser.parse_args()
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    for model in args.models:
        print(f"\n{model}\n")
        columns = ["method", "activations, MiB / image", "GFLOP / image", "peak, MiB"]
        print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
        for method in METHODS:
            reports = [plan(model, data, method) for data in DATA]
            kept = spread([report.activations / report.batch_size / MIB for report in reports], ".2f")
            flops = spread([sum(report.flops) / report.batch_size / 1e9 for report in reports], ".1f")
            peak = spread([report.peak / MIB for report in reports], ",.0f")
            print(f"| {' | '.join([method, kept, flops, peak])} |", flush=True)


if __name__ == "__main__":
    main()
