"""Compile the C loops of this package for the present CPU, with any C compiler.

Each loop NAME.c has a PyTorch implementation of the same computation, which is used where nothing can be compiled.
Compiling takes about half a second, so every process compiles anew.
"""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

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


@functools.cache
def load_library(name: str, fused: bool = False) -> ctypes.CDLL | None:
    """Compile and load NAME.c of this package.

    Args:
        name: File name of the source, without its suffix.
        fused: Allow fused multiply-add instructions, which round once instead of twice.

    Returns:
        The loaded library, or None if it cannot be compiled; the reason is logged.
    """
    source = Path(__file__).with_name(f"{name}.c")
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")
    try:
        with tempfile.TemporaryDirectory(prefix="neuron-atlas-") as folder:
            target = Path(folder, f"{name}.so")
            contract = ["-ffp-contract=fast"] if fused else []
            command = [compiler, *FLAGS, *contract, "-o", str(target), str(source), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        messages = str(getattr(error, "stderr", None) or error).strip().splitlines()
        log.info("%s.c cannot be compiled; a slower PyTorch implementation is used: %s", name, messages[0])
        return None
