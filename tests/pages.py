"""Reads the pages of the documentation: their fenced blocks of code, and the commands in these."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
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


def commands_in(code):
    """The arguments of each ``lightning-bsr`` command, whose lines may be continued with a backslash."""
    for command in code.replace("\\\n", " ").splitlines():
        if command.startswith("lightning-bsr "):
            yield shlex.split(command)[1:]
