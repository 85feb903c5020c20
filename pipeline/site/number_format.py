"""Formatting of numbers on pages: a short text for readers and the exact value for programs."""

import dataclasses
import math

import numpy as np

NONE = "—"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Value:
    """A formatted number.

    Attributes:
        text: About three significant digits.
        exact: Decimal text that parses back to the stored number; empty if there is no number.
    """

    text: str
    exact: str


def number(value: float) -> Value:
    """Format a measured float32."""
    value = float(value)
    if not math.isfinite(value):
        return Value(NONE, "")
    return Value(_digits(value), str(np.float32(value)))


def count(value: int) -> Value:
    """Format a count."""
    return Value(f"{int(value):,}", str(int(value)))


def share(value: float) -> Value:
    """Format a fraction between 0 and 1 as a percentage."""
    value = float(value)
    if not math.isfinite(value):
        return Value(NONE, "")
    exact = str(np.float32(value))
    if 0 < value < 0.0005:
        return Value("< 0.1%", exact)
    # A value below 1 must not be rounded up to 100%.
    digits = f"{min(100 * value, 99.9) if value < 1 else 100 * value:.1f}"
    return Value(digits.removesuffix(".0") + "%", exact)


def _digits(value: float) -> str:
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e7 or size < 0.001:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(_RAISED)}"
    elif size >= 100:
        text = f"{size:,.0f}"
    else:
        text = f"{size:.{1 if size >= 10 else 2 if size >= 1 else 3}f}"
    return f"−{text}" if value < 0 else text
