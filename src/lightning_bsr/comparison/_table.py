"""Prints the rows as a table, and writes them as Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich
from rich.box import SIMPLE
from rich.measure import Measurement
from rich.table import Table

from lightning_bsr.comparison._rows import Row
from lightning_bsr.comparison._schedule import Progress, in_words, write_atomically
from lightning_bsr.memory import MIB

_ANY_WIDTH = 10_000
_COSTS = {
    "trained parameters": "trained\nparameters",
    "activations planned, MiB/image": "planned\nMiB/image",
    "activations measured, MiB/image": "measured\nMiB/image",
    "peak planned, MiB": "planned\npeak MiB",
    "GFLOP/image": "GFLOP\n/image",
    "step, ms": "step\nms",
    "step, ratio": "step\nratio",
}
_RESULTS = {"lr": "lr", "equal length": "at equal length", "equal time": "at equal time"}
_SHORT_HEADINGS = {"method": "method"} | _COSTS | _RESULTS


def _cells(row: Row) -> dict[str, str]:
    """What the reader sees, by heading."""
    return {
        "method": row.method,
        "trained parameters": _format(row.trained_parameters, ","),
        "activations planned, MiB/image": _format(row.planned_activations, ".3f", MIB),
        "activations measured, MiB/image": _format(row.measured_activations, ".3f", MIB),
        "with recomputation, MiB/image": _format(row.planned_activations_peak, ".3f", MIB),
        "peak planned, MiB": _format(row.planned_peak, ".1f", MIB),
        "GFLOP/image": _format(row.flops, ".3f", 1e9),
        "step, ms": _format(row.step_seconds, ".1f", 1e-3),
        "step, ratio": _format(row.step_ratio, ".2f"),
        "lr": _format(row.lr, "g") + (" (edge)" if row.lr_at_edge else ""),
        "equal length": "-" if row.equal_length is None else str(row.equal_length),
        "equal time": "-"
        if row.equal_time is None
        else f"{row.equal_time} ({in_words(row.equal_time.length, row.equal_time.unit)})",
        "notes": "; ".join(row.notes),
    }


def _format(value: float | None, spec: str, unit: float = 1) -> str:
    return "-" if value is None else format(value if unit == 1 else value / unit, spec)


def _title(progress: Progress) -> str:
    settings = progress.settings
    rates = {method: ", ".join(f"{lr:g}" for lr in settings.lrs_of(method)) for method in settings.methods}
    lrs = ", or ".join(dict.fromkeys(rates.values()))
    chosen = any(len(settings.lrs_of(method)) > 1 for method in settings.methods)
    return (
        f"{settings.test_metric} over seeds {', '.join(map(str, settings.seeds))}, mean ± sample deviation; "
        f"{in_words(progress.length, progress.unit)}; learning rate of {lrs}"
        + f" chosen by {settings.monitor} ({settings.mode}) with seed {settings.seeds[0]}"
        * chosen
    )


def to_markdown(rows: Sequence[Row], progress: Progress) -> str:
    """Draw the rows as a Markdown table with a line above it that says how they came about.

    Args:
        rows: The rows.
        progress: What they were made from.
    """
    cells = [_cells(row) for row in rows]
    lines = [list(cells[0]), ["---"] * len(cells[0])] + [
        [text.replace("|", "\\|") for text in row.values()] for row in cells
    ]
    return f"{_title(progress)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_csv(rows: Sequence[Row]) -> str:
    """Write the rows as numbers in base units, with scores as mean, deviation, length and number of seeds.

    Args:
        rows: The rows.
    """
    text = io.StringIO()
    flat = []
    for row in rows:
        values = {key: value for key, value in asdict(row).items() if key not in ("equal_length", "equal_time")}
        for name, score in (("equal_length", row.equal_length), ("equal_time", row.equal_time)):
            values[f"{name}_mean"] = None if score is None else score.mean
            values[f"{name}_deviation"] = None if score is None else score.deviation
            values[f"{name}_length"] = None if score is None else score.length
            values[f"{name}_seeds"] = 0 if score is None else len(score.values)
        flat.append(values | {"notes": "; ".join(row.notes)})
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def to_json(rows: Sequence[Row], progress: Progress) -> str:
    """Write settings and rows, with every seed's value.

    Args:
        rows: The rows.
        progress: What they were made from.
    """

    def plain(row: Row) -> dict[str, Any]:
        scores = {"equal_length": row.equal_length, "equal_time": row.equal_time}
        return asdict(row) | {
            name: None if score is None else asdict(score) | {"mean": score.mean, "deviation": score.deviation}
            for name, score in scores.items()
        }

    settings = asdict(progress.settings) | {
        "output": str(progress.settings.output),
        "length": progress.length,
        "unit": progress.unit,
    }
    return json.dumps({"settings": settings, "rows": [plain(row) for row in rows]}, indent=1, ensure_ascii=False) + "\n"


def write_tables(rows: Sequence[Row], progress: Progress, folder: Path) -> None:
    """Write ``table.md``, ``table.csv`` and ``table.json``.

    Args:
        rows: The rows.
        progress: What they were made from.
        folder: Where to.
    """
    write_atomically(folder / "table.md", to_markdown(rows, progress))
    write_atomically(folder / "table.csv", to_csv(rows))
    write_atomically(folder / "table.json", to_json(rows, progress))


def print_table(rows: Sequence[Row], progress: Progress) -> None:
    """Print the rows, in two parts where the terminal is narrow; the notes come below, where they have room.

    Args:
        rows: The rows.
        progress: What they were made from.
    """
    console = rich.get_console()
    whole = _draw(rows, list(_SHORT_HEADINGS))
    print(_title(progress))
    if Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), whole).maximum <= console.width:
        console.print(whole)
    else:
        console.print(_draw(rows, ["method", *_COSTS]), _draw(rows, ["method", *_RESULTS]))
    for row in rows:
        for note in row.notes:
            print(f"{row.method}: {note}")


def _draw(rows: Sequence[Row], headings: Sequence[str]) -> Table:
    table = Table(box=SIMPLE, padding=0)
    for heading in headings:
        table.add_column(_SHORT_HEADINGS[heading], justify="left" if heading == "method" else "right")
    for row in rows:
        cells = _cells(row)
        table.add_row(*(cells[heading] for heading in headings))
    return table
