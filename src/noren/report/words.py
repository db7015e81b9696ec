"""Numbers as a reader wants them: three figures and a unit."""

from __future__ import annotations

import math
from collections.abc import Iterable

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NOT_MEASURED = "not measured"


def size(count: float) -> str:
    """Write bytes in powers of 1000, e.g. "152 kB"; 0 or less reads "not measured"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB")) if count > 0 else NOT_MEASURED


def count(number: float) -> str:
    """Write a count, e.g. "3.54 million"."""
    if number >= 999_500:
        return _scaled(number / 1e6, ("million", "billion", "trillion"))
    return f"{number:,.0f}" if number == int(number) or number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """Write a time, e.g. "38 ms", "4.2 s" or "3 min 20 s"."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def decimal(value: float) -> str:
    """Write a loss or a ratio with four figures, e.g. "2.164"."""
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3f}"


def difference(value: float) -> str:
    """Write a difference, small ones as powers of ten, e.g. "2.4 x 10^-7" with its proper signs; exact zero as "0"."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"  # noqa: RUF001


def ranges(numbers: Iterable[int]) -> str:
    """Write layers as ranges, e.g. [0, 1, 6, 7] as "0-1, 6-7" with en dashes."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs) or "none"  # noqa: RUF001


def listed(names: Iterable[str]) -> str:
    """Write names as a list in a sentence, e.g. "a, b and c"."""
    *most, last = [*names] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {units[-1]}"
