"""Says in one line what jsonargparse says in many."""

import difflib
import pydoc
import re
from collections.abc import Iterable, Iterator

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

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


def one_line(message: str, command: str = "lightning-bsr", options: Iterable[str] = ()) -> str:
    r"""Reduce a parser's message to the key, what was given and what was expected.

    Args:
        message: The message of a ``jsonargparse.ArgumentError``; other messages pass with their lines joined.
        command: The subcommand that was given, for messages about its options.
        options: The names of the options that it has.

    Example:
        >>> one_line('Parser key "model":\n  - Problem with given class_path \'a.B\':\n      Parser key "lr":\n'
        ...          '        Expected a <class \'float\'>. Got value: abc\n  - Expected a <class \'NoneType\'>')
        'model: a.B: lr: expected a number, got abc'
        >>> one_line("unrecognized arguments: --trainer.max_epch=3", "fit", ["model", "trainer.max_epochs"])
        'no option is known by the name trainer.max_epch; did you mean trainer.max_epochs?'
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
    if match := re.match(
        r"\s*(?:unrecognized arguments: --|Option '|Subcommand '\w+' does not accept option '|"
        r"Group '([\w.]+)' does not accept option ')([\w.]+)",
        message,
    ):
        key = ".".join(filter(None, match.groups()))
        return ": ".join([*where, _unknown_option(key, where, command, list(options))])
    return ": ".join([*where, _reason(message)])


def _unknown_option(key: str, where: list[str], command: str, options: list[str]) -> str:
    if where:
        cls = pydoc.locate(where[-1])
        if not isinstance(cls, type):
            return f"no option is known by the name {key}."
        owner, options = cls.__name__, _options_of(cls)
    else:
        owner = command
    if key in options:
        return f"{key} is an option of {owner}; give it after {owner}."
    parts = key.split(".")
    for depth in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:depth])
        known = sorted({name.removeprefix(prefix).split(".")[0] for name in options if name.startswith(prefix)})
        if parts[depth] not in known:
            break
    close = difflib.get_close_matches(parts[depth], [*known, "init_args"] if where else known, n=1)
    has = f"{prefix[:-1] or owner} has {', '.join(known) or 'none'}."
    hint = f"did you mean {prefix}{close[0]}?" if close else has
    return f"no option is known by the name {prefix}{parts[depth]}; {hint}"


def _options_of(cls: type) -> list[str]:
    if cls in (Callback, LightningModule, LightningDataModule, Optimizer, LRScheduler):
        return ["class_path", "init_args"]  # nothing says which class of this kind is meant
    given_by_lightning = {Optimizer: "params", LRScheduler: "optimizer"}
    skip: set[str | int] = {name for kind, name in given_by_lightning.items() if issubclass(cls, kind)}
    added: list[str] = ArgumentParser(exit_on_error=False).add_class_arguments(cls, skip=skip, fail_untyped=False)
    return added


def _reason(message: str) -> str:
    if match := re.search(r"argument subcommand: invalid choice: '(.+?)' \(choose from (.+)\)", message):
        known = re.findall(r"[\w-]+", match[2])
        close = difflib.get_close_matches(match[1], known, n=1)
        return f"no subcommand is known by the name {match[1]}; " + (
            f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
        )
    if match := re.search(r"Expected a dot import path string: (.+)", message):
        return _unknown_class(match[1])
    if match := re.search(r"Expected a typing\.Literal\[(.+?)\]\.? Got value: (.+)", message):
        return f"expected one of {match[1]}, got {match[2]}"
    if match := re.search(r"Not a valid subclass of (\w+)\. Got value: (\{.+\})", message):
        return f"expected a mapping with class_path, the name of a {match[1]}, got {match[2]}"
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
