"""Puts tables that benchmarks make into the pages of the documentation."""

from collections.abc import Sequence
from pathlib import Path


def put_table(page: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what stands in ``page`` between ``<!-- name -->`` and the next ``<!-- end -->`` by ``lines``.

    Raises:
        SystemExit: If the page has no such place.
    """
    text = page.read_text()
    before, start, rest = text.partition(f"<!-- {name} -->")
    _, end, after = rest.partition("<!-- end -->")
    if not (start and end):
        raise SystemExit(f"{page} has no place '<!-- {name} --> ... <!-- end -->' for the table.")
    page.write_text("\n".join([before + start, *lines, end + after]))
