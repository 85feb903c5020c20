"""The error for invalid user input, and hints on similar names for its messages."""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class AtlasError(Exception):
    """Invalid input. The message states the problem and how to fix it.

    Attributes:
        exit_code: Exit code of a command that ends with this error.
    """

    exit_code: ClassVar[int] = 2


class TryAgainError(AtlasError):
    """A fault outside of the input that may pass, such as the loss of the cluster.

    The message states that finished work is kept: the same command continues when the fault has passed. The exit code
    is EX_TEMPFAIL of sysexits.h.
    """

    exit_code: ClassVar[int] = 75


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest_names(name: str, valid: Iterable[str], count: int = 4) -> str:
    """Return a sentence with the names in `valid` closest to `name`, to end an error message with.

    If none is close, the sentence lists the first twelve valid names.

    Args:
        name: The name that was not found.
        valid: All valid names.
        count: Maximum number of close names.
    """
    names = sorted(set(map(str, valid)))
    if not names:
        return "There is none to choose from."
    close = difflib.get_close_matches(str(name), names, n=count, cutoff=0.4)
    # Part of a dotted path is often correct: `conv_dw` for `blocks.0.0.conv_dw`.
    close += [n for n in names if str(name) and str(name) in n and n not in close][: count - len(close)]
    if close:
        return f"Nearest: {', '.join(close)}."
    return f"Valid: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}."
