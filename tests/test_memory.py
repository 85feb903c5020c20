"""The heap keeps what was freed, in huge pages where the kernel gives them; a worker's share of all memory."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.engine.resources import memory_share

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

LARGE = """
import resource
from pathlib import Path
from pipeline.engine.resources import memory_share
from pipeline.kernels.allocator import keep_memory
{call}
held = b"x" * (64 << 20)
print(Path("/proc/self/smaps_rollup").read_text())
del held
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    held = b"x" * (64 << 20)
    del held
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def told(call: str) -> tuple[int, int]:
    """(bytes in huge pages, faults of ten large pieces of memory one after another) in a process of its own."""
    done = subprocess.run([sys.executable, "-c", LARGE.format(call=call)], capture_output=True, text=True, check=True)
    (pages,), (faults,) = (re.findall(p, done.stdout) for p in (r"AnonHugePages: +(\d+) kB", r"faults (-?\d+)"))
    return int(pages) * 1024, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
def test_what_is_freed_is_not_given_back() -> None:
    pages, faults = told("keep_memory()")
    assert faults < 100 < 10_000 < told("")[1]
    if PAGES.exists() and "[never]" not in PAGES.read_text():
        assert pages >= 48 << 20


def test_memory_is_shared_by_cores() -> None:
    cores = os.cpu_count() or 1
    whole = memory_share(cores)
    assert 0 < whole <= 0.9 * psutil.virtual_memory().total
    assert memory_share(1) == pytest.approx(whole / cores) and memory_share(2 * cores) == whole
