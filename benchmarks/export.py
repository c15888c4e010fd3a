"""Latency of exported models, with and without the token drop, at batch 1 and 8.

    python benchmarks/export.py --models deit_small_patch16_224 vit_base_patch16_224

Each model is exported whole and dropping to ``torch.export`` and to ONNX. All of one batch size then take turns, so
that a machine that slows down slows all of them; times are medians, and the ratio is the median over the turns of
dropping to whole. ``--compile`` adds the ``.pt2`` compiled by AOTInductor, which needs a C++ compiler. Prints a
Markdown table; with ``--output`` it writes JSON, and with ``--document docs/benchmarks.md`` it puts the table into that
page, where ``<!-- export -->`` stands.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from torch import Tensor, nn

from documents import put_table
from lightning_bsr.export import export_model
from lightning_bsr.functional import install_token_drop
from step import processor

BLOCKS, KEEP_RATE = [3, 6, 9], 0.5
Run = Callable[[], Any]


def onnx_run(path: Path, images: Tensor, threads: int) -> Run:
    """Load an ONNX file and give what runs it on ``images``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed)


def runs_of(model: nn.Module, images: Tensor, folder: Path, args: argparse.Namespace) -> tuple[dict[str, Run], int]:
    """Export ``model`` and give what runs it in each way, and the bytes of its ONNX file."""
    pt2, onnx = folder / "model.pt2", folder / "model.onnx"
    # Pictures would be no faster; the tests compare on some.
    export_model(model, images, pt2, overwrite=True)
    size = export_model(model, images, onnx, overwrite=True).num_bytes
    program = torch.export.load(pt2)
    module = program.module()
    runs: dict[str, Run] = {"eager": lambda: model(images), "torch.export": lambda: module(images)}
    if args.compile:
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "compiled.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        runs["AOTInductor"] = lambda: compiled(images)
    runs["ONNX Runtime"] = onnx_run(onnx, images, args.threads)
    return runs, size


@torch.inference_mode()
def seconds_of(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Time the runs in turns, after one turn that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_small_patch16_224"], help="timm ViTs of depth 12")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15, help="timed turns, after one that is not timed")
    parser.add_argument("--compile", action="store_true", help="also compile with AOTInductor")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--document", type=Path, help="put the table into this page")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.models:
        for batch_size in args.batch_sizes:
            images = torch.randn(batch_size, *timm.get_pretrained_cfg(name).input_size)
            with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as dropping:
                model, other = (timm.create_model(name, num_classes=10).eval() for _ in range(2))
                install_token_drop(other, BLOCKS, KEEP_RATE)
                runs, num_bytes = runs_of(model, images, Path(whole), args)
                dropped, _ = runs_of(other, images, Path(dropping), args)
                pairs = {(way, drops): run for way in runs for drops, run in ((False, runs[way]), (True, dropped[way]))}
                seconds = seconds_of(pairs, args.repeats)
            for way in runs:
                one, two = seconds[way, True], seconds[way, False]
                rows.append(
                    {
                        "model": name,
                        "batch_size": batch_size,
                        "way": way,
                        "seconds_whole": statistics.median(two),
                        "seconds_dropping": statistics.median(one),
                        "ratio": statistics.median(mine / its for mine, its in zip(one, two, strict=True)),
                        "onnx_bytes": num_bytes,
                    }
                )

    title = (
        f"Blocks {', '.join(map(str, BLOCKS))} keep {KEEP_RATE:g}, torch {torch.__version__}, ONNX Runtime "
        f"{onnxruntime.__version__}, {processor()}, {args.threads} threads, median of {args.repeats} turns"
    )
    columns = "| model | batch | run by | whole, ms | dropping, ms | ratio |"
    lines = [f"{title}:", "", columns, "|---|---:|---|---:|---:|---:|"]
    for row in rows:
        times = f"{row['seconds_whole'] * 1e3:.1f} | {row['seconds_dropping'] * 1e3:.1f} | {row['ratio']:.2f}"
        lines.append(f"| {row['model']} | {row['batch_size']} | {row['way']} | {times} |")
    print("\n".join(lines))
    if args.document:
        put_table(args.document, "export", lines)
    if args.output:
        args.output.write_text(json.dumps({"title": title, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
