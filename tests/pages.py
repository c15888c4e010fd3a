"""Reads the pages of the documentation: their fenced blocks of code, and the commands in these."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"  # run as a whole by test_tutorial.py
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
PAGES.remove(TUTORIAL)
FENCE = re.compile(r"^( *)(`{3,})(\w+)[^\n]*\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: (.*) -->\n*\Z")


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    line: int  # of its first line of code
    not_run: bool


def blocks_of(page, *languages):
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            language=match[3],
            code=re.sub(f"^{match[1]}", "", match[4], flags=re.MULTILINE),
            line=text.count("\n", 0, match.start()) + 2,
            not_run=NOT_RUN.search(text, 0, match.start()) is not None,
        )
        for match in FENCE.finditer(text)
        if match[3] in languages
    ]


def configurations_of(page):
    """The configurations of ``lightning-bsr`` that a page shows; its commands call the first one ``config.yaml``."""
    found = [block for block in blocks_of(page, "yaml") if not block.not_run]
    return [block.code for block in found if "trainer" in yaml.safe_load(block.code)]


def commands_in(code):
    """The ``lightning-bsr`` and ``python`` commands of a block, each with its arguments, as bash understands them."""
    note = 'printf "%s\\0" "${FUNCNAME[0]}" "$@"; printf "\\n"; '
    functions = "".join(f"{program}() {{ {note}}}; " for program in ("lightning-bsr", "python"))
    # Nothing else can be found.
    noted = subprocess.run(
        ["/usr/bin/env", "bash", "-c", f"PATH=; {functions}\n{code}"], capture_output=True, text=True, check=False
    )
    return [line.split("\0")[:-1] for line in noted.stdout.splitlines()]
