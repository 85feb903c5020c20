"""Numbers on a page: what a person reads, and beside it what a program reads."""

import dataclasses
import math

import numpy as np

NONE = "—"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Value:
    """`text` has about three digits; `exact` reads back as the stored number, and is empty without one."""

    text: str
    exact: str


def number(value: float) -> Value:
    """A measured float32."""
    value = float(value)
    if not math.isfinite(value):
        return Value(NONE, "")
    return Value(_digits(value), str(np.float32(value)))


def whole(value: int) -> Value:
    """A count."""
    return Value(f"{int(value):,}", str(int(value)))


def share(value: float) -> Value:
    """A share between 0 and 1, as a percentage."""
    value = float(value)
    if not math.isfinite(value):
        return Value(NONE, "")
    exact = str(np.float32(value))
    if 0 < value < 0.0005:
        return Value("< 0.1%", exact)
    # Ninety-nine point nine nine is not all: only what is complete may say 100%.
    digits = f"{min(100 * value, 99.9) if value < 1 else 100 * value:.1f}"
    return Value(digits.removesuffix(".0") + "%", exact)


def ratio(activation: float, natural: float) -> Value:
    """Achieved ÷ natural; nothing where no photograph reached above zero."""
    activation, natural = float(activation), float(natural)
    if not math.isfinite(activation) or not natural > 0:
        return Value(NONE, "")
    return Value(_digits(activation / natural), f"{activation / natural:.6g}")


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
