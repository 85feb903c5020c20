"""Loops in C, compiled for this very processor by whatever C compiler there is; None where there is none.

A module with such a loop has it in a file of its own name (reduction.py, reduction.c) and the same lines in PyTorch
beside it, which run where nothing can be compiled. It takes half a second, so every process does it anew.
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

# Its threads are PyTorch's own: the symbols of OpenMP are there already. Nothing is contracted, so that a loop gives
# the same bits with every compiler.
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
def library(name: str, fused: bool = False) -> ctypes.CDLL | None:
    """NAME.c of this package, compiled; None where that does not work, which the log says.

    `fused` lets a product and a sum be one instruction that rounds once, where there is one.
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
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        log.info("%s.c stays uncompiled, and its work takes longer: %s", name, said[0])
        return None
