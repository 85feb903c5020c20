"""Capture of work on a GPU as a CUDA graph.

The host needs 2 to 4 ms to launch the hundreds of kernels of an optimization step, as long as the GPU needs to run them
in early layers. A graph is launched at once.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

Work = Callable[[], None]


class _Memory:
    """The memory of captured graphs: one pool, which the last graph keeps alive until the next one has taken it."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.last: torch.cuda.CUDAGraph | None = None


_memory = _Memory()


def capture_graph(work: Work) -> Work:
    """Capture `work` as a graph, without running it, and return a function that runs it once.

    The work must read and write the same tensors at each call, and have been run before: kernels are compiled, and
    libraries initialized, outside of a capture. Only the graph that was captured last may be run.

    Args:
        work: Computations on the current device, without any wait for it.

    Raises:
        RuntimeError: If it cannot be captured.
    """
    if _memory.pool is None:
        _memory.pool = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    # Not the context manager of PyTorch: it empties the cache of the allocator and collects garbage at each capture,
    # which would cost a tenth of the steps of a small layer.
    with torch.cuda.stream(stream), _no_garbage_collection():
        # The default mode forbids other threads what the threads that prepare the next images do.
        graph.capture_begin(pool=_memory.pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    _memory.last = graph
    return graph.replay


def release_graphs() -> None:
    """Free the memory that the last graph holds; it must not be run any more."""
    _memory.last = None


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Prevent that an object that belongs to the GPU, such as another graph, is deleted during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
