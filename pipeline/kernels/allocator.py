"""Settings of glibc's allocator for processes that allocate large tensors at every step, and their memory limit."""

import contextlib
import ctypes
from pathlib import Path

# Free bytes at the end of the heap above which glibc returns them to the kernel.
TRIM_THRESHOLD = 1 << 30

# Bytes by which the heap grows at once. Only addresses are reserved; memory is used when it is written to. Together
# with the STRETCH // 4 that triggers the growth this stays below TRIM_THRESHOLD, or glibc would shrink the heap again.
STRETCH = 3 << 28


def retain_freed_memory() -> None:
    """Stop glibc from returning large tensors to the kernel at every step and page-faulting them in again.

    The heap grows in huge pages where the kernel leaves that to programs (`madvise`), which causes fewer page faults.
    Measured on two cores: keeping the memory saves a third of the time of an image-step in early layers, huge pages
    save some 7 % in any layer. Without glibc this does nothing.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for option, value in ((trim_threshold, TRIM_THRESHOLD), (top_pad, STRETCH), (mmap_threshold, 1 << 30)):
        mallopt(option, value)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    # Larger than what may already be free, so that the heap grows, by STRETCH.
    libc.free(libc.malloc(STRETCH // 4))
    with contextlib.suppress(OSError):
        _advise_huge_pages(libc)
    mallopt(top_pad, 1 << 26)


def _advise_huge_pages(libc: ctypes.CDLL) -> None:
    """Request huge pages for the present extent of the heap."""
    page_size, advice = 1 << 21, 14  # MADV_HUGEPAGE
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            start = -(-start // page_size) * page_size
            if start < end:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
