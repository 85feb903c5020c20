"""Compile the C loops of this package for the present CPU, with any C compiler.

Each loop NAME.c has a PyTorch implementation of the same computation, which is used where nothing can be compiled.
Compiled libraries are stored in the user's cache folder (`cache_folder`), so that a machine compiles each loop once. If
that folder cannot be used, every process compiles anew.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import first_line
from pipeline.core.hashing import digest_of
from pipeline.core.machine import cache_folder, is_private

log = logging.getLogger(__name__)

# -fopenmp: PyTorch has already loaded an OpenMP runtime, and the loops use its threads.
# -ffp-contract=off: no fused multiply-add, so that results are bit-identical with every compiler.
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)

# Lines of /proc/cpuinfo that determine what `-march=native` means.
CPU_FIELDS = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "flags",
    "CPU implementer",
    "CPU part",
    "CPU variant",
    "Features",
)

# Characters of a sha256 in a file name.
DIGEST_LENGTH = 32

# Loops that could not be compiled in this process; only the first is a warning, because all have the same cause.
_failed: set[str] = set()


@functools.cache
def load_library(name: str, fused: bool = False) -> ctypes.CDLL | None:
    """Load NAME.c of this package, compiled by this process or an earlier one.

    Args:
        name: File name of the source, without its suffix.
        fused: Allow fused multiply-add instructions, which round once instead of twice.

    Returns:
        The loaded library, or None if it cannot be compiled; the reason is logged.
    """
    source = Path(__file__).with_name(f"{name}.c")
    try:
        command = [*compiler(), *FLAGS, *(["-ffp-contract=fast"] if fused else [])]
        key = digest_of([source.read_text(), command, _version(compiler()), _cpu()])[:DIGEST_LENGTH]
        try:
            return _load_or_compile(cache_folder("kernels"), key, command, source)
        except OSError as error:  # read-only, full, mounted without permission to execute, of another user
            log.info("the cache of compiled loops cannot be used: %s", first_line(error))
        with tempfile.TemporaryDirectory(prefix="neuron-atlas-") as folder:
            return ctypes.CDLL(str(_compile(command, source, Path(folder))))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        _log_failure(name, error)
        return None


def compiler() -> tuple[str, ...]:
    """Return the command of the C compiler: CC, which may have arguments ("ccache gcc"), or the first one installed.

    Raises:
        ValueError: If CC has an unclosed quotation.
    """
    try:
        command = tuple(shlex.split(os.environ.get("CC", "")))
    except ValueError as error:
        raise ValueError(f"the environment variable CC is not a command: {error}") from error
    return command or (next(filter(shutil.which, ("cc", "gcc", "clang")), "cc"),)


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    """Return the version of a compiler."""
    arguments = [*command, "--version"]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, errors="replace").stdout


@functools.cache
def _cpu() -> list[str]:
    """Return what identifies the type of this processor: users share cache folders between machines."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return list(platform.uname())
    fields = [line for line in first.splitlines() if line.partition(":")[0].strip() in CPU_FIELDS]
    return [platform.machine(), *fields]


def _load_or_compile(folder: Path, key: str, command: Sequence[str], source: Path) -> ctypes.CDLL:
    """Load the library of `key` from `folder`, compiled if it is not there.

    Its file is named SOURCE-KEY-DIGEST.so, with the sha256 of its content: loading a damaged library would abort the
    process instead of raising an error.
    """
    prefix = f"{source.stem}-{key}-"
    for path in sorted(folder.glob(f"{prefix}*.so")):
        if is_private(path.lstat()) and path.name == f"{prefix}{_digest(path)}.so":
            return ctypes.CDLL(str(path))
    # A folder of its own, because several processes may compile the same loop.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as temporary:
        compiled = _compile(command, source, Path(temporary))
        compiled.chmod(0o600)
        path = compiled.replace(folder / f"{prefix}{_digest(compiled)}.so")
    return ctypes.CDLL(str(path))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGEST_LENGTH]


def _compile(command: Sequence[str], source: Path, folder: Path) -> Path:
    """Compile `source` to a library in `folder` and return its path."""
    target = folder / f"{source.stem}.so"
    arguments = [*command, "-o", str(target), str(source), "-lm"]
    subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60, errors="replace")
    return target


def _log_failure(name: str, error: Exception) -> None:
    """Log that a loop cannot be compiled; the first time as a warning that says what to install."""
    reason = (str(getattr(error, "stderr", None) or "").strip() or str(error)).partition("\n")[0]
    if _failed:
        log.info("%s.c cannot be compiled; a slower PyTorch implementation is used: %s", name, reason)
    else:
        log.warning(
            "%s.c cannot be compiled; slower PyTorch implementations are used: %s. Install a C compiler with OpenMP "
            "(Debian and Ubuntu: `apt install gcc libc6-dev`), or set CC to the command of one.",
            name,
            reason,
        )
    _failed.add(name)
