"""Data of the pages as scripts that register themselves: the one way that works from disk as well as from a host.

A shard is `ATLAS.put("name", {…});`. Pages opened from disk may not fetch, but they may add a script.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

# From so many numbers on they are turned into decimals together.
MANY = 48


def text(value: Any) -> str:
    """Compact JSON in ASCII with no `<`: nothing in it can end a script element, whoever pastes it where."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def put(name: str, body: str) -> str:
    """A shard under `name`, from JSON that `text` made."""
    return f"ATLAS.put({text(name)},{body});\n"


def exact(values: np.ndarray) -> list[Any]:
    """Floats as the shortest decimals that read back as the same float32; None where there is no finite number.

    Arrays of any shape, as nested lists.
    """
    given = np.asarray(values, np.float32)
    if given.size < MANY:
        return _nested([float(str(v)) if math.isfinite(v) else None for v in given.ravel()], given.shape)
    wide = given.astype(np.float64)
    finite = np.isfinite(wide)
    found = np.where(finite, wide, 0.0)
    # A float32 needs 6 to 9 digits. Powers of ten up to 10^22 are whole doubles, and a whole number below 2^53 over
    # one of them is the double nearest to that decimal: the one that is read from it.
    size = np.abs(found)
    usual = (size > 1e-12) & (size < 1e15)
    exponent = np.floor(np.log10(np.where(usual, size, 1.0)))
    left = usual.copy()
    for digits in (6, 7, 8, 9):
        short = _to_digits(wide, exponent, digits)
        fits = left & (short.astype(np.float32) == given)
        found[fits] = short[fits]
        left &= ~fits
        if not left.any():
            break
    return _filled(found, finite, left | (finite & ~usual & (size > 0)), lambda v: float(str(np.float32(v))))


def rounded(values: np.ndarray, digits: int = 4) -> list[Any]:
    """Floats of so many significant digits, for what is only drawn; None where there is no finite number.

    Arrays of any shape, as nested lists.
    """
    given = np.asarray(values, np.float64)

    def one(value: float) -> float:
        return float(f"{value:.{digits}g}")

    if given.size < MANY:
        return _nested([one(v) if math.isfinite(v) else None for v in given.ravel().tolist()], given.shape)
    finite = np.isfinite(given)
    found = np.where(finite, given, 0.0)
    size = np.abs(found)
    usual = (size > 1e-12) & (size < 1e15)
    short = _to_digits(found, np.floor(np.log10(np.where(usual, size, 1.0))), digits)
    found[usual] = short[usual]
    return _filled(found, finite, finite & ~usual & (size > 0), one)


def _to_digits(values: np.ndarray, exponent: np.ndarray, digits: int) -> np.ndarray:
    """float64 `values` of the order 10^`exponent` to so many significant digits, as the doubles nearest to these."""
    place = digits - 1 - exponent
    with np.errstate(invalid="ignore", over="ignore"):
        power = 10.0 ** np.clip(np.abs(place), 0, 22)
        return np.where(place >= 0, np.rint(values * power) / power, np.rint(values / power) * power)


def _filled(found: np.ndarray, finite: np.ndarray, rare: np.ndarray, one: Callable[[float], float]) -> list[Any]:
    """`found` as nested lists, with `one` of what is `rare` and None of what is not `finite`."""
    flat = found.ravel().tolist()
    for i in np.flatnonzero(rare).tolist():
        flat[i] = one(flat[i])
    for i in np.flatnonzero(~finite).tolist():
        flat[i] = None
    return _nested(flat, found.shape)


def _nested(flat: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """A flat list cut to a shape of one or more axes."""
    for length in reversed(shape[1:]):
        flat = [flat[i : i + length] for i in range(0, len(flat), length)] if length else []
    return flat if len(shape) < 2 or math.prod(shape[1:]) else [[] for _ in range(shape[0])]
