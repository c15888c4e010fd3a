"""Forward and backward time of attention on the CPU, by kernel and number of tokens.

    python benchmarks/attention.py

PyTorch's fused kernel, its plain matrix products (which keep N x N matrices for backward), and the fused kernel with
this package's backward pass (``install_attention_by_products``), in turns. Prints a Markdown table; ``--document`` puts
it into a page, where ``<!-- attention -->`` stands.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from documents import put_table
from lightning_bsr.functional._attention_backward import AttentionByProducts
from step import processor


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def _by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with AttentionByProducts():
        return F.scaled_dot_product_attention(q, k, v)


KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "fused": _fused,
    "matrix products": _math,
    "fused, backward by products": _by_products,
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 100, 52, 28])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--document", type=Path, help="put the table into this page")
    args = parser.parse_args()

    columns = [f"{name}, {way}" for name in KERNELS for way in ("forward", "backward")]
    lines = [
        f"{args.batch_size} images, {args.heads} heads of {args.width}, torch {torch.__version__}, {processor()}, "
        f"{torch.get_num_threads()} threads, ms:",
        "",
        f"| precision | tokens | {' | '.join(columns)} |",
        f"|---|{'---:|' * (len(columns) + 1)}",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in args.tokens:
            # As a ViT has them: views of one tensor.
            qkv = torch.randn(args.batch_size, tokens, 3, args.heads, args.width, dtype=dtype, requires_grad=True)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            grad = torch.randn(args.batch_size, tokens, args.heads, args.width, dtype=dtype).transpose(1, 2)
            seconds: dict[str, list[float]] = {column: [] for column in columns}
            for turn in range(args.turns + 1):
                for name, kernel in KERNELS.items():
                    started = time.perf_counter()
                    out = kernel(q, k, v)
                    between = time.perf_counter()
                    torch.autograd.grad(out, (q, k, v), grad)
                    ended = time.perf_counter()
                    if turn:
                        seconds[f"{name}, forward"].append(between - started)
                        seconds[f"{name}, backward"].append(ended - between)
            cells = [f"{1e3 * statistics.median(values):.1f}" for values in seconds.values()]
            lines.append(f"| {'bf16' if dtype is torch.bfloat16 else 'fp32'} | {tokens} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if args.document:
        put_table(args.document, "attention", lines)


if __name__ == "__main__":
    main()
