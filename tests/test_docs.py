"""The documentation's code: Python blocks run, configurations and commands parse.

A block is left out by a comment directly above it that says why: ``<!-- not run: needs a download -->``.
"""

import pytest
import yaml

import lightning_bsr.vit._blocks as blocks_table
from lightning_bsr.cli import main
from pages import ROOT, blocks_of, commands_in

TUTORIAL = ROOT / "docs" / "tutorial.md"  # run as a whole by test_tutorial.py
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
PAGES.remove(TUTORIAL)

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # with pytest's sys.argv
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",  # the CSV logger is meant
    "ignore:Checkpoint directory .* exists and is not empty",  # pages that resume a run
    "ignore:You defined a `validation_step` but have no `val_dataloader`",  # pages that only train
)


def pages_with(*languages):
    pages = [page for page in PAGES if any(not block.not_run for block in blocks_of(page, *languages))]
    return pytest.mark.parametrize("page", pages, ids=[page.relative_to(ROOT).as_posix() for page in pages])


def configurations_of(page):
    found = [block for block in blocks_of(page, "yaml") if not block.not_run]
    return [block.code for block in found if "trainer" in yaml.safe_load(block.code)]


def commands_of(page):
    for block in blocks_of(page, "bash"):
        if not block.not_run:
            yield from commands_in(block.code)


def parse(arguments, monkeypatch):
    # lightning 2.6 calls add_instantiator, which jsonargparse deprecates with a warning too long for a filter.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
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
def test_yaml_blocks__parse(page, tmp_path, monkeypatch, capsys):
    for number, configuration in enumerate(configurations_of(page)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(configuration)
        assert parse(["fit", f"--config={path}", "--print_config"], monkeypatch) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", [page for page in PAGES if [*commands_of(page)]], ids=lambda page: page.name)
def test_commands__parse(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for configuration in configurations_of(page)[:1]:
        (tmp_path / "config.yaml").write_text(configuration)  # as a page calls the configuration that it shows
    for arguments in commands_of(page):
        ending = [] if {"--help", "--print_config"} & {*arguments} else ["--print_config"]
        assert parse([*arguments, *ending], monkeypatch) == 0, (arguments, capsys.readouterr().err)


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
