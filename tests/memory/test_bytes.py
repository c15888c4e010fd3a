import pytest

from lightning_bsr import ConfigurationError
from lightning_bsr.memory import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        ("12", 12),
        ("12B", 12),
        ("3 kb", 3_000),
        ("1.5MB", 1_500_000),
        ("2GB", 2 * 10**9),
        ("1tb", 10**12),
        ("1 KiB", 2**10),
        (" 24.1 MiB ", round(24.1 * 2**20)),
        ("2.gib", 2**31),
        ("0.5TiB", 2**39),
    ],
)
def test_parse_bytes(value, expected):
    assert parse_bytes(value) == expected


@pytest.mark.parametrize("value", ["", "MiB", "-1MiB", "12 PiB", "1,5GB", "1 MiB 2", 0, "0 GB", -3, True, None, "inf"])
def test_parse_bytes__no_size(value):
    with pytest.raises(ConfigurationError) as error:
        parse_bytes(value, "budget")
    assert str(error.value) == (
        f"budget is {value!r}, expected a number of bytes above 0, or a number and a unit such as '512MiB' or '1.5GB'."
    )


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (-(2**20), "-1.0 MiB"),
        (1.25 * 2**30, "1.2 GiB"),
        (2**40, "1.0 TiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_format_bytes(num_bytes, expected):
    assert format_bytes(num_bytes) == expected


@pytest.mark.parametrize("num_bytes", [1, 2**10, 3 * 2**20, 2**35, 2**43])
def test_format_bytes__can_be_read_again(num_bytes):
    assert parse_bytes(format_bytes(num_bytes)) == num_bytes
