"""Runs commands of the tutorial in a folder of digits, and draws what they print as SVG, for docs/tutorial.md.

Run it after a change to what is printed, in a checkout::

    python docs/scripts/terminal.py docs/images
"""

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

PAGE = Path(__file__).parents[1] / "tutorial.md"
WIDTH = 100
SHOWN = {"plan": "lightning-bsr plan --config config.yaml", "fit": "lightning-bsr fit --config config.yaml"}
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-HJKhlsu]")  # what moves the cursor, which a picture has not


def block(language: str) -> str:
    """The first fenced block of the tutorial in a language."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def main(images: str) -> None:
    """Write ``images/terminal_<name>.svg`` for each command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(block("yaml"), encoding="utf-8")
        subprocess.run([sys.executable, "-c", block("python")], cwd=folder, check=True)
        environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": f"{WIDTH}"}
        for title, command in SHOWN.items():
            # A progress bar is many lines over each other.
            quiet = ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"] if title == "fit" else []
            done = subprocess.run(
                [sys.executable, "-m", "lightning_bsr", *shlex.split(command)[1:], *quiet],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            console = Console(record=True, width=WIDTH, file=io.StringIO())
            console.print(Text(f"$ {command}", style="bold"))
            console.print(Text.from_ansi(CONTROL.sub("", done.stdout).strip("\n")))
            console.save_svg(str(Path(images, f"terminal_{title}.svg")), title="lightning-bsr")


if __name__ == "__main__":
    main(*sys.argv[1:])
