"""Handling of Ctrl-C, SIGTERM and SIGHUP: raise at once, and keep a flag in case the exception is lost.

Python discards an exception that a signal handler raises inside a destructor or a callback of a C library, and the
program would continue. Long-running code therefore calls `check` regularly.
"""

import signal
from typing import Any

_interrupted = False

# The terminal or the connection was closed; Windows has no such signal.
_HANGUP = tuple(getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name))


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal arrived since `InterruptHandlers` was entered."""
    if _interrupted:
        raise KeyboardInterrupt


class InterruptHandlers:
    """Context manager that handles SIGTERM and SIGHUP like Ctrl-C, and records them for `raise_if_interrupted`.

    For the main thread only.
    """

    def __enter__(self) -> None:
        global _interrupted
        _interrupted = False
        self.previous: dict[signal.Signals, Any] = {}

        def stop(*_: object) -> None:
            global _interrupted
            _interrupted = True
            raise KeyboardInterrupt

        for number in (signal.SIGINT, signal.SIGTERM, *_HANGUP):
            if number in _HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the work goes on without a terminal
            try:
                self.previous[number] = signal.signal(number, stop)
            except ValueError:  # not the main thread: a notebook or a test has its own handlers
                return

    def __exit__(self, *_: object) -> None:
        global _interrupted
        _interrupted = False
        for number, handler in self.previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
