"""How rows are drawn; that they are right is tested with the whole comparison."""

import csv
import io
import json

import pytest
from rich.console import Console

from lightning_bsr.comparison._rows import Row, Score
from lightning_bsr.comparison._schedule import Progress
from lightning_bsr.comparison._table import print_table, to_csv, to_json, to_markdown


@pytest.fixture
def progress(make_settings):
    return Progress(make_settings(methods=("int8_activations", "lora")), 20, {}, {}, {})


@pytest.fixture
def rows():
    return [
        Row(
            method="int8_activations",
            summary="Everything trains.",
            trained_parameters=86_567_656,
            planned_activations=123.456 * 2**20,
            measured_activations=123.456 * 2**20,
            planned_peak=12_345 * 2**20,
            flops=105.25e9,
            step_seconds=1.2345,
            step_ratio=1.0,
            lr=1e-3,
            lr_at_edge=True,
            validation=0.9,
            equal_length=Score(20, (0.5, 0.7)),
            equal_time=Score(31, (0.25,)),
        ),
        Row(method="lora", summary="Adapters train.", notes=("failed: no | here",)),
    ]


@pytest.mark.parametrize("width", [80, 200])
def test_print__cuts_no_number(width, rows, progress, monkeypatch, capsys):
    monkeypatch.setattr("rich.get_console", lambda: Console(width=width))
    print_table(rows, progress)
    said = capsys.readouterr().out
    for text in (
        "86,567,656",
        "123.456",
        "12345.0",
        "105.250",
        "1234.5",
        "0.001 (edge)",
        "0.6000 ± 0.1414",
        "(31 epochs)",
    ):
        assert text in said, text
    assert said.count("int8_activations") == (2 if width == 80 else 1)
    assert "…" not in said
    assert said.endswith("lora: failed: no | here\n")


def test_markdown__has_a_line_for_each_method_and_the_recipe(rows, progress):
    title, _, heading, _, *lines = to_markdown(rows, progress).splitlines()
    assert title == (
        "test/accuracy over seeds 0, 1, mean ± sample deviation; 20 epochs; learning rate of 0.001, 0.01 chosen by "
        "val/accuracy (max) with seed 0"
    )
    assert heading.count("|") == lines[0].count("|") == 14
    assert lines[1] == "| lora | - | - | - | - | - | - | - | - | - | - | - | failed: no \\| here |"


def test_csv_and_json__have_base_units(rows, progress):
    first, second = csv.DictReader(io.StringIO(to_csv(rows)))
    assert float(first["planned_peak"]) == 12_345 * 2**20
    assert (first["equal_time_length"], first["equal_time_seeds"], first["equal_time_deviation"]) == ("31", "1", "")
    assert (second["lr"], second["equal_length_seeds"]) == ("", "0")
    content = json.loads(to_json(rows, progress))
    assert content["rows"][0]["equal_length"]["values"] == [0.5, 0.7]
    assert content["settings"]["length"] == 20
    assert content["settings"]["lrs"] == [0.001, 0.01]
