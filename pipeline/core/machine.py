"""This machine."""

import os


def available_cores() -> int:
    """Return the number of CPU cores that this process may use: of the affinity mask, where the system has one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
