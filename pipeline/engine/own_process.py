"""A function in a process of its own, which ends with it and takes along what it held of a GPU.

A context on a GPU cannot be given back by the process that opened it: it would keep memory beside the workers, and on
a GPU in exclusive mode no worker could start.
"""

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import ModuleType
from typing import ParamSpec, TypeVar

from pipeline.core import plugins
from pipeline.core.errors import AtlasError

P = ParamSpec("P")
T = TypeVar("T")


class OwnProcessError(Exception):
    """The process died, or the function raised another error than `AtlasError`; the message has its text."""


def in_own_process(function: Callable[P, T], *arguments: P.args, **settings: P.kwargs) -> T:
    """Return `function(*arguments)`, computed in a new process.

    Args:
        function: A function of a module of this project.
        arguments: Its arguments, which are pickled; classes of the user's code go along.
        settings: Its named arguments.

    Raises:
        AtlasError: If the function raised it.
        OwnProcessError: If the function raised anything else, or the process died.
    """
    from ray import cloudpickle  # only for runs on Ray: whoever works inline has no other process

    for module in plugins.modules():
        cloudpickle.register_pickle_by_value(module)
    call = cloudpickle.dumps((function, arguments, settings))  # pyright: ignore[reportPrivateImportUsage]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs,), daemon=True)
    with _without_main_module():
        process.start()
    theirs.close()
    try:
        ours.send_bytes(call)
        result, error = ours.recv()
    except (EOFError, OSError):
        process.join()
        raise OwnProcessError(f"the process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise error
    return result


def _answer(driver: Connection) -> None:
    """Receive a function and its arguments, call it, and send (its result, None) or (None, its error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends this process
    try:
        function, arguments, settings = driver.recv()
        driver.send((function(*arguments, **settings), None))
    except AtlasError as error:
        driver.send((None, error))
    except Exception as error:
        driver.send((None, OwnProcessError(f"{type(error).__name__}: {error}")))


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep processes that are spawned in this context from importing the main module, which may be a script."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
