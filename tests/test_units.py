"""Bytes and seconds as people write and read them."""

from __future__ import annotations

import pytest

from fldist.units import bytes_text, seconds_text, to_bytes


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [(1500, 1500), ("1500", 1500), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("3 kB", 3000), (2.6, 3), ("1e6", 10**6)],
)
def test_bytes_are_read(given, bytes_):
    assert to_bytes(given) == bytes_


@pytest.mark.parametrize("given", ["much", "1 MBit", "-3", "", None, True, [1], "nan", "inf", "1e400", "1e308 TB"])
def test_what_is_no_number_of_bytes_is_refused(given):
    with pytest.raises(ValueError, match=r"number of bytes, such as 1500000 or 1\.5 MB"):
        to_bytes(given)


def test_bytes_and_seconds_are_written():
    assert [bytes_text(n) for n in (0, 999, 1000, 1_234_567, 5e9, 2e12)] == [
        "0 B", "999 B", "1 kB", "1.23 MB", "5 GB", "2 TB",
    ]  # fmt: skip
    assert [seconds_text(s) for s in (0.123, 12.3, 600, 7200)] == ["0.12 s", "12 s", "10 min", "2.0 h"]
