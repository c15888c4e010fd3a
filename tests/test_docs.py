"""The documentation's code: Python blocks run, configurations parse; its commands are run by test_commands.py.

A block is left out by a comment directly above it that says why: ``<!-- not run: needs a download -->``.
"""

import pytest

import lightning_bsr.vit._blocks as blocks_table
from lightning_bsr.cli import main
from pages import PAGES, ROOT, blocks_of, commands_in, configurations_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # with pytest's sys.argv
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",  # the CSV logger is meant
    "ignore:Checkpoint directory .* exists and is not empty",  # pages that resume a run
    "ignore:You defined a `validation_step` but have no `val_dataloader`",  # pages that only train
)


def pages_with(*languages):
    pages = [page for page in PAGES if any(not block.not_run for block in blocks_of(page, *languages))]
    return pytest.mark.parametrize("page", pages, ids=[page.relative_to(ROOT).as_posix() for page in pages])


def parse(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pages_with("python")
@pytest.mark.usefixtures("short_frontier")
def test_python_blocks__run_in_their_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(blocks_table, "_REGISTRY", dict(blocks_table._REGISTRY))
    namespace = {"__name__": "docs_page"}
    for block in blocks_of(page, "python"):
        if not block.not_run:
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if configurations_of(page)], ids=lambda page: page.name)
def test_yaml_blocks__parse(page, tmp_path, capsys):
    for number, configuration in enumerate(configurations_of(page)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(configuration)
        assert parse(["fit", f"--config={path}", "--print_config"]) == 0, capsys.readouterr().err


def test_blocks_of__finds_code_and_what_is_not_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\na = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\nb = 2\n```\n\n"
        "- item\n\n  ```python\n  if a:\n      c = 3\n  ```\n"
    )
    found = blocks_of(page, "python")
    assert [(block.code, block.line, block.not_run) for block in found] == [
        ("a = 1\n", 4, False),
        ("b = 2\n", 9, True),
        ("if a:\n    c = 3\n", 15, False),
    ]


def test_commands_in__are_what_bash_runs():
    code = (
        "COMMON=\"lightning-bsr fit --config a.yaml\"\n$COMMON --lr 1 \\\n  --options '{a: {b: 2}}'\n"
        "pip install timm\nfor name in x y; do\n  python benchmarks/$name.py\ndone\n"
    )
    assert commands_in(code) == [
        ["lightning-bsr", "fit", "--config", "a.yaml", "--lr", "1", "--options", "{a: {b: 2}}"],
        ["python", "benchmarks/x.py"],
        ["python", "benchmarks/y.py"],
    ]
