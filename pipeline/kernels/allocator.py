"""Memory of a process that allocates large tensors at every step, and what share of the machine's it may take."""

import contextlib
import ctypes
import os
from pathlib import Path

import psutil

# Free memory at the heap's end that glibc gives back when it is more.
TRIM = 1 << 30

# How far the heap is stretched at once: addresses only, memory is taken where they are written to. With the quarter
# that makes it grow this stays below TRIM, or glibc would take the stretch back at once.
STRETCH = 3 << 28


def keep_memory() -> None:
    """Stop glibc from giving large tensors back to the kernel at every step and faulting them in again.

    What the heap grows by is asked for in huge pages, where the kernel leaves that to programs: there are fewer of
    them to find. Measured on two cores: the first saves a third of an image-step in early layers, the second some
    7 % anywhere. Without glibc this does nothing.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for option, value in ((trim_threshold, TRIM), (top_pad, STRETCH), (mmap_threshold, 1 << 30)):
        mallopt(option, value)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    # Larger than what may be free already, so that the heap grows, by the stretch.
    libc.free(libc.malloc(STRETCH // 4))
    with contextlib.suppress(OSError):
        _in_huge_pages(libc)
    mallopt(top_pad, 1 << 26)


def _in_huge_pages(libc: ctypes.CDLL) -> None:
    """Ask for huge pages for the heap as it is now."""
    huge, advice = 1 << 21, 14  # MADV_HUGEPAGE
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            low = -(-low // huge) * huge
            if low < high:
                libc.madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), advice)


def memory_share(threads: int) -> float:
    """Bytes that one worker may take: its share of the cores, of nine tenths of the machine's or container's memory."""
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return 0.9 * total * min(1.0, threads / (os.cpu_count() or 1))
