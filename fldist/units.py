"""Bytes and seconds as people write and read them. Decimal units: 1 kB is 1000 B."""

from __future__ import annotations

import math
import re
from typing import Any

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def bytes_text(count: float) -> str:
    """Bytes in decimal units: 1 kB is 1000 B."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def seconds_text(seconds: float) -> str:
    """Seconds, minutes or hours, as suits."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def joules_text(joules: float) -> str:
    """Joules in decimal units."""
    for unit in ("J", "kJ", "MJ"):
        if joules < 1000:
            return f"{joules:.3g} {unit}"
        joules /= 1000
    return f"{joules:.4g} GJ"


def to_bytes(value: Any) -> int:
    """`1500000`, `1.5 MB` or `2GiB` in bytes; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("it must be a number of bytes, such as 1500000 or 1.5 MB")
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE]\+?[0-9]+)?)\s*([a-zA-Z]*)\s*", str(value))
    if match is None or match[2] not in _UNITS:
        raise ValueError("it must be a number of bytes, such as 1500000 or 1.5 MB (units: B, kB, MB, GB, TB, KiB ...)")
    count = float(match[1]) * _UNITS[match[2]]
    if not math.isfinite(count):
        raise ValueError("it must be a number of bytes, such as 1500000 or 1.5 MB; this one is too large")
    return round(count)


_BITS = {"": 1, "bit/s": 1, "kbit/s": 10**3, "Mbit/s": 10**6, "Gbit/s": 10**9, "kbps": 10**3, "Mbps": 10**6}
_BITS |= {"bps": 1, "Gbps": 10**9}


def to_bits_per_second(value: Any) -> float:
    """`100000000`, `100 Mbit/s` or `1 Gbps` in bits per second; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("it must be a number of bits per second, such as 100000000 or 100 Mbit/s")
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE]\+?[0-9]+)?)\s*([a-zA-Z/]*)\s*", str(value))
    if match is None or match[2] not in _BITS:
        raise ValueError(
            "it must be a number of bits per second, such as 100000000 or 100 Mbit/s (units: bit/s, kbit/s, Mbit/s, "
            "Gbit/s, and bps, kbps, Mbps, Gbps)"
        )
    return float(match[1]) * _BITS[match[2]]


def bandwidth_text(bits: float) -> str:
    """Bits per second in decimal units."""
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if bits < 1000:
            return f"{bits:.4g} {unit}"
        bits /= 1000
    return f"{bits:.4g} Gbit/s"
