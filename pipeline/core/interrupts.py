"""Ctrl-C and SIGTERM: raised at once, and remembered for where nobody hears an exception.

Python drops an exception that a signal's handler raises inside a destructor or a callback of a C library; a run
would then go on as if nobody had asked it to stop. So whoever works asks `check` now and then.
"""

import signal
from typing import Any

_asked = False


def check() -> None:
    """Raise KeyboardInterrupt if a signal came since `listening` was entered."""
    if _asked:
        raise KeyboardInterrupt


class listening:
    """SIGTERM means what Ctrl-C means, and both are remembered, while this is entered (in the main thread only)."""

    def __enter__(self) -> None:
        global _asked
        _asked = False
        self.old: dict[signal.Signals, Any] = {}

        def stop(*_: object) -> None:
            global _asked
            _asked = True
            raise KeyboardInterrupt

        for kind in (signal.SIGINT, signal.SIGTERM):
            try:
                self.old[kind] = signal.signal(kind, stop)
            except ValueError:  # not the main thread: a notebook or a test has its own handlers
                return

    def __exit__(self, *_: object) -> None:
        global _asked
        _asked = False
        for kind, old in self.old.items():
            signal.signal(kind, old if old is not None else signal.SIG_DFL)
