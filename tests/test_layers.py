"""Each room of the package imports only the rooms below it, and only some of them know Lightning."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lightning_bsr"
MAY_IMPORT = {
    "vit": {"_errors"},
    "functional": {"_errors", "_version", "vit"},
    "memory": {"_errors", "vit", "functional"},
    "callbacks": {"_errors", "vit", "functional", "memory"},
    "models": {"_errors", "vit", "functional"},
    "data": {"_errors", "memory"},
    "planning": {"_errors", "_cli_configuration", "_version", "vit", "functional", "memory", "callbacks", "methods"},
    "export": {"_errors", "vit", "functional", "callbacks"},
    "comparison": {
        "_errors",
        "_cli_configuration",
        "_cli_errors",
        "_version",
        "memory",
        "callbacks",
        "methods",
        "planning",
    },
}
WITHOUT_LIGHTNING = {"vit", "functional", "memory"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room__imports_only_what_lies_below(room):
    for file in (SOURCE / room).glob("*.py"):
        names = imported(file)
        ours = {name.split(".")[1] for name in names if name.startswith("lightning_bsr.")}
        assert ours <= MAY_IMPORT[room] | {room}, file
        if room in WITHOUT_LIGHTNING:
            assert not {name for name in names if name.split(".")[0] in ("lightning", "pytorch_lightning")}, file


def test_rooms__are_all_listed():
    assert {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()} == set(MAY_IMPORT)
