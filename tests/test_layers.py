"""Each room of the package imports only the rooms below it, and only some of them know Lightning."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lightning_bsr"
# What every room may import, and no diagram shows: errors, the version, and how configurations are read.
EVERYWHERE = {"_errors", "_version", "_cli_configuration", "_cli_errors"}
ROW = re.compile(r"^\| `(\w+)` \|[^|]*\| *((?:`\w+`(?:, )?)*) *\|$", re.MULTILINE)
WITHOUT_LIGHTNING = {"vit", "functional", "memory", "drawing"}


def documented() -> dict[str, set[str]]:
    """The table of docs/architecture.md: what each room imports, in the order of the lines."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return {room: set(re.findall(r"\w+", imports)) for room, imports in ROW.findall(page)}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", documented())
def test_room__imports_what_the_architecture_page_says(room):
    names = set().union(*map(imported, (SOURCE / room).glob("*.py")))
    ours = {name.split(".")[1] for name in names if name.startswith("lightning_bsr.")}
    assert ours - EVERYWHERE - {room} == documented()[room]
    if room in WITHOUT_LIGHTNING:
        assert not {name for name in names if name.split(".")[0] in ("lightning", "pytorch_lightning")}


def test_page__lists_every_room_below_what_it_imports():
    rooms = documented()
    assert {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()} == set(rooms)
    above = set()
    for room, imports in rooms.items():
        assert imports <= above
        above.add(room)
