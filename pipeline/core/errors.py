"""Errors a user can mend, and the nearest-name hints that go into them."""

import difflib
from collections.abc import Iterable


class AtlasError(Exception):
    """Bad input: the message says what is wrong and how to mend it. The command exits with 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where it has none (a bare assertion)."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, valid: Iterable[str], count: int = 4) -> str:
    """Names in `valid` closest to `name`, as the end of an error message.

    Falls back to the first few valid names, so that the reader always learns what would have been right.
    """
    names = sorted(set(map(str, valid)))
    if not names:
        return "There is none to choose from."
    close = difflib.get_close_matches(str(name), names, n=count, cutoff=0.4)
    # A dotted path is often right but for its beginning or end: `conv_dw` for `blocks.0.0.conv_dw`.
    close += [n for n in names if str(name) and str(name) in n and n not in close][: count - len(close)]
    if close:
        return f"Nearest: {', '.join(close)}."
    return f"Valid: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}."
