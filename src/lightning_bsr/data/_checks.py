"""Checks of plain numbers that users give."""

from lightning_bsr._errors import ConfigurationError


def require_whole(name: str, value: object, *, least: int) -> None:
    """Fail unless ``value`` is a whole number, ``least`` or above.

    Raises:
        ConfigurationError: It is not; the message names the argument.
    """
    if type(value) is not int or value < least:
        raise ConfigurationError(f"{name} is {value!r}, expected a whole number, {least} or above.")


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def are_numbers(values: object, count: int) -> bool:
    """Whether ``values`` is a list or tuple of ``count`` numbers."""
    return isinstance(values, list | tuple) and len(values) == count and all(map(is_number, values))
