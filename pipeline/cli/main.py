"""The command line: `atlas VERB [group=choice] [key=value] …`.

Hydra composes the configuration. Exit codes: 0 complete, 1 some results are missing or wrong, 2 bad input, 70 a fault
of this program, 75 a fault that may pass (the cluster was lost or gave no worker, a disk failed), 130 interrupted.
"""

import argparse
import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from pipeline import __version__
from pipeline.cli.compose import request_of
from pipeline.cli.overrides import (
    as_text,
    composed,
    conf_folder,
    explain,
    reference,
    settable,
    split_options,
    to_overrides,
)
from pipeline.cli.verbs import VERBS
from pipeline.core import interrupts
from pipeline.core.errors import AtlasError, TryAgainError, first_line, nearest_names
from pipeline.data.storage_errors import StorageError, is_device_error
from pipeline.planning.request import Request
from pipeline.runs.runner import BAD_INPUT, COMPLETE, CRASHED, INTERRUPTED

log = logging.getLogger("pipeline")

EPILOG = (
    "`atlas run --help` lists all settings. The verbs from site to export also take the folder of a run: "
    "atlas verify runs/NAME."
)


# Errors of places where this user, or nobody, may write.
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)

# Exit code of a process whose output nobody reads: 128 + SIGPIPE, as of other programs.
BROKEN_PIPE = 141


class _Stderr(logging.Handler):
    """Writes to the current standard error, so that messages stay above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        sys.stderr.write(f"{prefix}{self.format(record)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script `atlas` and return its exit code."""
    try:
        code = _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has gone, as in `atlas --help | head -1`. Python would report it again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _main(arguments: Sequence[str] | None) -> int:
    if os.name == "nt":
        return _refuse("Windows is supported through WSL only: https://learn.microsoft.com/windows/wsl/install")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "-sc" in arguments:
        if _complete_verb(arguments):
            return COMPLETE
        arguments = arguments if arguments[0] in VERBS else ["run", *arguments]
    parser = _parser()
    if not arguments:
        parser.print_help()
        return BAD_INPUT
    if arguments[0] == "help":
        arguments = ["--help"]
    if not arguments[0].startswith("-") and arguments[0] not in VERBS:
        return _refuse(f"There is no verb {arguments[0]!r}. {nearest_names(arguments[0], VERBS)}")
    try:
        parsed, unparsed = parser.parse_known_args(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    return _execute(parsed.verb, [*unparsed, *parsed.arguments])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("atlas", epilog=EPILOG, usage="atlas VERB [group=choice] [key=value] …")
    parser.add_argument("--version", action="version", version=f"atlas {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, title="verbs", metavar="")
    for name, verb in VERBS.items():
        # Hydra answers `atlas VERB --help` with all settings.
        verbs.add_parser(name, help=verb.help.replace("%", "%%"), add_help=False).add_argument(
            "arguments", nargs=argparse.REMAINDER
        )
    return parser


def _execute(name: str, arguments: Sequence[str]) -> int:
    """Compose the configuration and execute a verb."""
    verb = VERBS[name]
    options, rest = split_options(name, arguments, verb.keys, verb.flags)
    overrides = to_overrides(rest, verb.on_folder)
    codes: list[int] = []
    composing = True

    def task(config: DictConfig) -> None:
        nonlocal composing
        composing = False
        codes.append(_guarded(lambda: verb.work(_request(config, overrides), options)))
        if codes[-1] == INTERRUPTED:
            raise KeyboardInterrupt

    try:
        with interrupts.InterruptHandlers():
            _compose(overrides, task)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not composing:  # an error of the work itself is a fault of this program: show its traceback
            raise
        return _refuse(explain(error, overrides))
    finally:
        GlobalHydra.instance().clear()
    return max(codes, default=COMPLETE)


def _compose(overrides: Sequence[str], task: Callable[[DictConfig], None]) -> None:
    """Call `task` with the composed configuration."""
    if any(override.startswith("-") for override in overrides):
        with _hydra_arguments([settable(override) for override in overrides]), _unfinished_help():
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(task)()
        return
    task(composed(overrides))


@contextlib.contextmanager
def _hydra_arguments(overrides: Sequence[str]) -> Iterator[None]:
    """Pass arguments to `hydra.main`, which reads them from `sys.argv`; only flags (--multirun, --cfg) need it.

    HYDRA_FULL_ERROR makes it raise composition errors; by default it prints them and exits with code 1.
    """
    saved, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [saved[0], *overrides], "1"
    try:
        yield
    finally:
        sys.argv = saved
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


@contextlib.contextmanager
def _unfinished_help() -> Iterator[None]:
    """Let Hydra 1.3 build its parser on Python 3.14, where argparse checks help texts: one of Hydra's is none yet."""
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check is None:  # Python 3.13 and earlier
        yield
        return

    def lenient(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            check(parser, action)

    setattr(argparse.ArgumentParser, "_check_help", lenient)  # noqa: B010
    try:
        yield
    finally:
        delattr(argparse.ArgumentParser, "_check_help")


def _complete_verb(arguments: Sequence[str]) -> bool:
    """Complete the verb of a shell completion; return False for Hydra to complete what follows the verb."""
    line = os.environ.get("COMP_LINE", "").split(" ")
    if not any(argument.startswith("query=") for argument in arguments):
        return False
    if len(line) < 3 and (len(line) < 2 or line[1] not in VERBS):
        print(" ".join(VERBS))
        return True
    os.environ["COMP_LINE"] = " ".join([line[0], *line[2:]])  # Hydra reads the line from here
    return False


def _request(config: DictConfig, overrides: Sequence[str]) -> Request:
    """Return `request_of(config)`; errors say how to type the argument that caused them."""
    try:
        return request_of(config)
    except AtlasError as error:
        hint = as_text(str(error), overrides)
        if not hint:
            raise
        raise AtlasError(f"{error} {hint}") from error
    except (InterpolationResolutionError, GrammarParseError) as error:
        raise AtlasError(reference(error, overrides)) from error


def _guarded(work: Callable[[], int]) -> int:
    """Call `work` with logging to standard error, and report errors of the input as messages."""
    handler = _Stderr()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        return work()
    except AtlasError as error:
        failed = error.__cause__ is not None and is_device_error(error.__cause__)
        return _refuse(str(error), TryAgainError.exit_code if failed else error.exit_code)
    except StorageError as error:
        return _refuse(str(error), TryAgainError.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. Finished work is kept; the same command continues from here.\n")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename is not None:
            return _refuse(f"{error.filename}: {error.strerror}. Choose a folder that is writable: run.root=…")
        if _is_gpu_lost(error):
            return _refuse(
                f"The GPU failed: {first_line(error)} Finished work is kept; the same command continues from here.",
                TryAgainError.exit_code,
            )
        if is_device_error(error):
            return _refuse(
                f"A disk or file server failed: {first_line(error)}. Finished work is kept; the same command continues "
                "from here once it is back.",
                TryAgainError.exit_code,
            )
        traceback.print_exc()
        sys.stderr.write(
            "atlas: This is a fault of Neuron Atlas, or of a library or machine below it: please report the lines "
            "above. Finished work is kept; the same command continues from here.\n"
        )
        return CRASHED
    finally:
        log.removeHandler(handler)
        log.propagate = True


def _is_gpu_lost(error: Exception) -> bool:
    """Return whether this process has lost its GPU; without PyTorch it has used none."""
    if "torch" not in sys.modules:
        return False
    from pipeline.kernels.device_errors import is_device_lost

    return is_device_lost(error)


def _refuse(message: str, code: int = BAD_INPUT) -> int:
    sys.stderr.write(f"atlas: {message}\n")
    return code
