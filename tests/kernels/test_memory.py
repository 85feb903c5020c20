"""The heap keeps what was freed, in huge pages where the kernel gives them; a worker's share of all memory."""

import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import grimp
import psutil
import pytest

from pipeline.engine.resources import memory_share
from pipeline.kernels import allocator

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

LARGE = """
import ctypes
import resource
from pathlib import Path
from pipeline.kernels.allocator import retain_freed_memory
{setting}
tensor = b"x" * (64 << 20)
print(Path("/proc/self/smaps_rollup").read_text())
del tensor
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    tensor = b"x" * (64 << 20)
    del tensor
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# As some versions of glibc do, refuse M_MMAP_THRESHOLD above 32 MiB.
OLDER_GLIBC = """
class Older(ctypes.CDLL):
    def __getattr__(self, name):
        function = super().__getattr__(name)
        if name != "mallopt":
            return function
        return lambda option, value: 0 if option == -3 and value > 32 << 20 else function(option, value)
ctypes.CDLL = Older
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")


def measure(setting: str) -> tuple[int, int]:
    """(bytes in huge pages, page faults of ten large allocations one after another) in a process of its own."""
    code = LARGE.format(setting=setting)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    (pages,), (faults,) = (re.findall(p, output) for p in (r"AnonHugePages: +(\d+) kB", r"faults (-?\d+)"))
    return int(pages) * 1024, int(faults)


@glibc
@pytest.mark.parametrize(
    "before", [pytest.param("import torch", marks=pytest.mark.long), OLDER_GLIBC], ids=["this glibc", "older glibc"]
)
def test_what_is_freed_is_not_returned_to_the_kernel(before: str) -> None:
    pages, faults = measure(f"{before}\nretain_freed_memory()")
    assert faults < 100
    if PAGES.exists() and "[never]" not in PAGES.read_text():
        assert pages >= 48 << 20


@glibc
def test_an_import_leaves_the_allocator_as_it_is() -> None:
    assert measure("")[1] > 10_000


def test_a_library_that_refuses_every_setting_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = types.SimpleNamespace(mallopt=lambda option, value: 0)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: library)
    with caplog.at_level("INFO", logger="pipeline"):
        allocator.retain_freed_memory()
    assert "refuses to keep freed memory" in caplog.text


def test_only_commands_and_workers_change_the_allocator() -> None:
    """A notebook that imports or plans keeps its own settings."""
    graph = grimp.build_graph("pipeline", cache_dir=None)
    importers = graph.find_modules_that_directly_import("pipeline.kernels.allocator")
    assert importers == {"pipeline.cli.verbs", "pipeline.engine.worker"}


def test_memory_is_shared_by_cores() -> None:
    cores = os.cpu_count() or 1
    whole = memory_share(cores)
    assert 0 < whole <= 0.9 * psutil.virtual_memory().total
    assert memory_share(1) == pytest.approx(whole / cores) and memory_share(2 * cores) == whole
