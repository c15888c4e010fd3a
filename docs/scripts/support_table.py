"""Builds every ViT of timm at reduced size, trains it a step with blocks selected and tokens dropped, writes the page.

Run it after a change to the table of block classes or with another version of timm, in a checkout::

    python docs/scripts/support_table.py docs/supported-timm-models.md

Names that are the same architecture at the reduced size, down to each module's settings, share one run.
"""

import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from lightning_bsr import ConfigurationError
from lightning_bsr.functional import install_token_drop, select_blocks_
from lightning_bsr.vit import find_vit

# Modules of timm whose models keep one sequence of tokens from the first block to the last ...
ISOTROPIC = (
    "beit", "cait", "convit", "deepseek_vit", "deit", "eva", "gemma4_vit", "naflexvit", "qwen3_vit",
    "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vitamin",
)  # fmt: skip
# ... and those with windows, stages or channel attention.
OTHERS = (
    "coat", "crossvit", "davit", "gcvit", "hiera", "hieradet_sam2", "levit", "maxxvit", "mvitv2", "nest", "pit",
    "pvt_v2", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt", "twins",
    "vision_transformer_sam", "visformer", "volo", "xcit",
)  # fmt: skip
# What is tried to make a model small, in this order; not every constructor takes everything.
NARROW = ({"embed_dim": 64, "num_heads": 2}, {"embed_dim": 128, "num_heads": 2}, {"embed_dim": 256, "num_heads": 4}, {})
SAPIENS = {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 2}
GEMMA = {"embed_dim": 64, "num_heads": 2, "head_dim": 32, "intermediate_size": 128}
SIZES = (112, 96, 128, None)
KEEP_RATE = 0.5


@dataclass(frozen=True)
class Result:
    """What became of a name: the block class, how tokens are scored, with what argument, or why not."""

    block: str
    score: str = ""
    argument: str = ""
    reason: str = ""


def build(name: str) -> tuple[nn.Module, int]:
    """Build a model with two blocks, as narrow as its constructor lets it be, and say for which size of images."""
    narrow = (GEMMA, *NARROW) if name.startswith("gemma") else (SAPIENS, *NARROW) if "sapiens" in name else NARROW
    errors = []
    # Never as wide and as deep as it is: some would take all memory.
    for depth, widths in (({"depth": 2}, narrow), ({}, narrow[:-1])):
        for width in widths:
            for size in SIZES:
                options = {**width, **depth, **({} if size is None else {"img_size": size})}
                try:
                    model = timm.create_model(name, num_classes=10, **options)
                    pixels = size or model.default_cfg["input_size"][-1]
                    with torch.no_grad():
                        model.eval()(torch.zeros(1, 3, pixels, pixels))
                except (AssertionError, ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
                    errors.append(f"{options}: {error}")
                    continue
                return model, pixels
    raise RuntimeError(f"{name} was not built: {'; '.join(errors)}")


def architecture(model: nn.Module, pixels: int) -> str:
    """Describe a model in all that its function depends on but the values of its weights."""
    plain = (bool, int, float, str, tuple, type(None))
    settings = [
        (name, sorted((key, repr(value)) for key, value in vars(module).items() if isinstance(value, plain)))
        for name, module in model.named_modules()
    ]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    return repr((pixels, type(model), str(model), settings, shapes))


def train(model: nn.Module, pixels: int, *, restore: bool) -> str:
    """Train a step with two blocks selected and tokens dropped in two; give how they were scored."""
    view = find_vit(model)
    selection = select_blocks_(model, [0, -1])
    drop_blocks = [0, 1] if len(view.blocks) == 2 else [0, -2]
    handle = install_token_drop(model, drop_blocks, KEEP_RATE, restore=restore)
    tokens: list[int] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: tokens.append(out.shape[1])) for block in view.blocks]
    hooks.append(view.blocks[0].register_forward_pre_hook(lambda _m, inputs: tokens.append(inputs[0].shape[1])))
    model(torch.randn(2, 3, pixels, pixels)).square().sum().backward()
    counts = handle.num_tokens(tokens[0] - view.num_prefix_tokens)
    if restore:  # those that are gone are carried along, and are back behind the last block
        assert tokens[-1] == tokens[0] == counts[-1] > min(counts), tokens
    else:
        assert tokens[1:] == counts, tokens
        assert tokens[-1] < tokens[0]
    for index in (0, -1):
        gradients = [p.grad for p in view.blocks[index].parameters() if p.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
    # Any other is refused where no query and key were seen.
    score = handle.forwards[0].score
    assert score != "random"
    for hook in hooks:
        hook.remove()
    handle.remove()
    selection.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    return score


def check(name: str, known: dict[str, Result]) -> Result:
    """Try one name, or take over the result of the same architecture."""
    model, pixels = build(name)
    key = architecture(model, pixels)
    if key not in known:
        block = type(find_vit(model).blocks[0]).__qualname__
        try:
            known[key] = Result(block, train(model, pixels, restore=False))
        except ConfigurationError as error:
            if "restore=True" in str(error):
                known[key] = Result(block, train(build(name)[0], pixels, restore=True), "restore=True")
            else:
                known[key] = Result(block, reason=str(error))
    return known[key]


def check_isotropic(names: list[str]) -> dict[str, Result]:
    """Try each name."""
    known: dict[str, Result] = {}
    results = {}
    for name in names:
        results[name] = check(name, known)
        print(name, results[name], flush=True)
    return results


def check_other(name: str) -> Result:
    """Select blocks, on a model without data, and ask why its tokens stay."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    try:
        view = find_vit(model)
    except ConfigurationError:
        return Result("", reason="has no blocks of a class that is known")
    select_blocks_(model, [0, -1]).remove()
    try:
        install_token_drop(model, [0], KEEP_RATE).remove()
    except ConfigurationError as error:
        return Result(type(view.blocks[0]).__qualname__, reason=str(error).split(") ", 2)[-1].rstrip("."))
    return Result(type(view.blocks[0]).__qualname__, score="any")


def page(isotropic: dict[str, dict[str, Result]], others: dict[str, dict[str, Result]]) -> str:
    """Write the page."""
    results = [result for found in isotropic.values() for result in found.values()]
    passed = sum(bool(result.score) for result in results)
    lines = [
        "# Every ViT of timm",
        "",
        f"What became of each name of timm {timm.__version__} (torch {torch.__version__.split('+')[0]}): built with "
        "few blocks and channels and a small image, the first and the last block selected, tokens dropped in two "
        f"blocks at keep rate {KEEP_RATE}, one forward and backward pass. A model passes if the counts of tokens are "
        "those announced, the gradients of the selected blocks are finite, the scores come from its own attention, and "
        "nothing is left behind. Names that are one architecture at that size share a run. Written by "
        "`docs/scripts/support_table.py`.",
        "",
        f"**{passed} of {len(results)} names of isotropic ViTs drop tokens ({100 * passed / len(results):.1f} %); "
        'blocks can be selected in all of them.** `cls` and `mean` are the scores that `score="auto"` takes.',
        "",
        "| module | block | score | names | drop tokens |",
        "|---|---|---|---|---|",
    ]
    for module, found in isotropic.items():
        rows = Counter((r.block, r.score or "none") for r in found.values())
        for (block, score), count in rows.items():
            dropped = count if score != "none" else 0
            lines.append(f"| `{module}` | `{block}` | {score} | {count} | {dropped} |")
    lines += ["", "## Those that drop no tokens", ""]
    reasons = defaultdict(list)
    for found in isotropic.values():
        for name, result in found.items():
            if result.reason:
                reasons[result.reason].append(name)
    for reason, names in reasons.items():
        lines += [f"- {', '.join(f'`{name}`' for name in names)}: {reason}"]
    lines += ["", "## Names of isotropic ViTs", ""]
    for module, found in isotropic.items():
        groups = defaultdict(list)
        for name, result in found.items():
            note = f", with `{result.argument}`" if result.argument else ""
            groups[f"`{result.block}`, {result.score or 'no tokens dropped'}{note}"].append(name)
        lines += [f"<details><summary>{module}: {len(found)}</summary>", ""]
        lines += [f"- {group}: {', '.join(f'`{name}`' for name in names)}" for group, names in groups.items()]
        lines += ["", "</details>", ""]
    lines += [
        "## Models with windows, stages or channel attention",
        "",
        "Their blocks can be selected; their tokens stay, for the reason given.",
        "",
        "| module | first block | names | why tokens stay |",
        "|---|---|---|---|",
    ]
    for module, found in others.items():
        for (block, reason), count in Counter((r.block, r.reason) for r in found.values()).items():
            lines.append(f"| `{module}` | `{block}` | {count} | {reason} |")
    lines.append("")
    for module, found in others.items():
        lines += [f"<details><summary>{module}: {len(found)}</summary>", "", ", ".join(f"`{n}`" for n in found)]
        lines += ["", "</details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def main(path: str) -> None:
    """Try every name and write the page to ``path``."""
    warnings.filterwarnings("ignore")  # of timm, about names that it deprecates
    torch.manual_seed(0)
    others = {m: {name: check_other(name) for name in timm.list_models(module=m)} for m in OTHERS}
    isotropic = {m: check_isotropic(timm.list_models(module=m)) for m in ISOTROPIC}
    Path(path).write_text(page(isotropic, others), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
