"""Says in one line what jsonargparse says in many."""

import difflib
import re
from collections.abc import Iterator

from lightning.pytorch import Callback, LightningDataModule, LightningModule

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "Sequence": "a list",
    "list": "a list",
    "Mapping": "a mapping",
    "dict": "a mapping",
    "NoneType": "null",
}


def one_line(message: str) -> str:
    r"""Reduce a parser's message to the key, what was given and what was expected.

    Args:
        message: The message of a ``jsonargparse.ArgumentError``; other messages pass with their lines joined.

    Example:
        >>> one_line('Parser key "model":\n  - Problem with given class_path \'a.B\':\n      Parser key "lr":\n'
        ...          '        Expected a <class \'float\'>. Got value: abc\n  - Expected a <class \'NoneType\'>')
        'model: a.B: lr: expected a number, got abc'
    """
    where: list[str] = []
    while True:
        if match := re.match(r'\s*Parser key "([^"]+)":(.*)', message, re.DOTALL):
            where.append(match[1])
            message = match[2]
        elif match := re.search(
            r"^( *)- Problem with given class_path '([^']+)':\n(.*)", message, re.DOTALL | re.MULTILINE
        ):
            where.append(match[2])
            # What is indented deeper belongs to this class; the rest tells of types that were tried after it.
            message = re.split(rf"\n {{0,{len(match[1])}}}[-A-Z]", match[3])[0]
        else:
            break
    return ": ".join([*where, _reason(message)])


def _reason(message: str) -> str:
    if match := re.search(r"Expected a dot import path string: (.+)", message):
        return _unknown_class(match[1])
    if match := re.search(r"Expected a typing\.Literal\[(.+?)\]\.? Got value: (.+)", message):
        return f"expected one of {match[1]}, got {match[2]}"
    types = dict.fromkeys(
        _TYPES.get(name, name) for name in re.findall(r"Expected an? <class '(?:\w+\.)*(\w+)'>", message)
    )
    given = re.search(r"(?:Given value|Got value): (.+)", message)
    if types and given:
        return f"expected {' or '.join(types)}, got {given[1]}"
    return " ".join(message.split())


def _unknown_class(name: str) -> str:
    known = {cls.__name__: cls for cls in _subclasses(Callback, LightningModule, LightningDataModule)}
    ours = sorted(key for key, cls in known.items() if cls.__module__.startswith("lightning_bsr.") and key[0] != "_")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"this package has {', '.join(ours)}."
    return f"no class is known by the name {name}; {hint} A full import path works too."


def _subclasses(*bases: type) -> Iterator[type]:
    for base in bases:
        yield from base.__subclasses__()
        yield from _subclasses(*base.__subclasses__())
