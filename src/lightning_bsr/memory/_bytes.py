"""Reads and writes numbers of bytes as people do."""

import re

from lightning_bsr._errors import ConfigurationError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(value: int | str, argument: str = "memory_budget") -> int:
    """Turn ``"512MiB"``, ``"1.5 GB"`` or a number into bytes.

    Args:
        value: A whole number of bytes, or a number and a unit: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB
            (powers of 1024); case does not matter.
        argument: The name of the user's argument, for the message.

    Raises:
        ConfigurationError: If it is none of these, or not above 0.

    Example:
        >>> parse_bytes("512MiB"), parse_bytes("1.5 gb"), parse_bytes(4096)
        (536870912, 1500000000, 4096)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(value))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or isinstance(value, bool) or not (num_bytes := round(float(match[1]) * unit)):
        raise ConfigurationError(
            f"{argument} is {value!r}, expected a number of bytes above 0, or a number and a unit such as '512MiB' or "
            "'1.5GB'."
        )
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """Write bytes with a unit that suits them.

    Example:
        >>> format_bytes(536870912), format_bytes(1536), format_bytes(12)
        ('512.0 MiB', '1.5 KiB', '12 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
