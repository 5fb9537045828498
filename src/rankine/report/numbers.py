"""Numbers as people read them; what is unknown is a dash, never "nan"."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from rankine.budget import format_bytes

UNKNOWN = "–"


def real(value: Any) -> float | None:
    """A finite number, or None for anything else (report.json may come from anywhere)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of 400 digits
        return None
    return number if math.isfinite(number) else None


def size(value: Any) -> str:
    """Bytes: "3.20 MB"."""
    number = real(value)
    return UNKNOWN if number is None else format_bytes(number)


def percent(value: Any, digits: int = 1) -> str:
    """A fraction: "70.1 %"."""
    number = real(value)
    return UNKNOWN if number is None else f"{100 * number:.{digits}f} %"


def change(after: Any, before: Any) -> str:
    """Relative change: "+11.2 %", with fewer digits where they would be noise; "" if unknown."""
    new, old = real(after), real(before)
    if new is None or old is None or old == 0:
        return ""
    ratio = new / old
    if ratio >= 10:
        return f"×{ratio:,.0f}"
    rounded = f"{100 * (ratio - 1):+.1f} %"
    return rounded.replace("-", "−")


def perplexity(value: Any) -> str:
    """Four or so digits: "8.12", "123.4", "12,345", "1.2e+07"."""
    number = real(value)
    if number is None:
        return UNKNOWN
    if number < 99.995:
        return f"{number:.2f}"
    if number < 999.95:
        return f"{number:.1f}"
    return f"{number:,.0f}" if number < 1e6 else f"{number:.1e}"


def decimal(value: Any, digits: int = 3) -> str:
    """Significant digits without trailing noise: "0.0312", "4.2"."""
    number = real(value)
    return UNKNOWN if number is None else f"{number:.{digits}g}"


def rate(value: Any) -> str:
    """Tokens per second: "412", "9.3"."""
    number = real(value)
    if number is None:
        return UNKNOWN
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def times(value: Any) -> str:
    """A ratio: "1.04×"."""
    number = real(value)
    return UNKNOWN if number is None else f"{number:.2f}×"


def seconds(value: Any) -> str:
    """Wall time: "0.3 s", "42 s", "3 min 5 s", "2 h 10 min"."""
    number = real(value)
    if number is None:
        return UNKNOWN
    if number < 9.95:
        return f"{number:.1f} s"
    whole = round(number)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(value: Any) -> str:
    """How many: "2.41 million", "1.10 billion"."""
    number = real(value)
    if number is None:
        return UNKNOWN
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,.0f}"
