"""Pool of processes that write the chunks of a site; a small site is written by the calling process itself."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

from pipeline.core.machine import available_cores
from pipeline.site.config import SiteConfig
from pipeline.site.media.chunks import Chunk, ChunkResult, ChunkWriter
from pipeline.site.media.size_budget import Sizes

# Number of units that justify one more process: starting it takes a second, as long as a few hundred units.
UNITS_PER_PROCESS = 600
# Number of chunks of one layer per task; a process reads the layer's numbers once for all of them.
CHUNKS_PER_TASK = 4
# Number of files of whole dataset images per task.
IMAGE_FILES_PER_TASK = 64
# Environment variables that linear algebra libraries read when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# Writer of this pool process.
_writer: ChunkWriter | None = None

# A file of whole dataset images: the first position and the indices of the images.
Group = tuple[int, Sequence[int]]


class EncoderPool:
    """Writer of chunks, in the processes of `executor`, or in this process if it is None."""

    def __init__(self, writer: ChunkWriter, executor: Executor | None) -> None:
        self._writer = writer
        self._executor = executor
        self._chunks: list[Chunk] = []
        self._groups: list[Group] = []
        self._chunk_futures: list[Future[list[ChunkResult]]] = []
        self._image_futures: list[Future[int]] = []

    def start(self, chunks: Sequence[Chunk], groups: Sequence[Group]) -> None:
        """Start to write `chunks` and files of whole dataset images."""
        self._chunks, self._groups = list(chunks), list(groups)
        if self._executor is None:
            return
        # The largest tasks first and the images last, so that all processes finish at about the same time.
        tasks = sorted(_tasks(chunks), key=lambda task: task[0].start - task[-1].stop)
        image_tasks = [groups[i : i + IMAGE_FILES_PER_TASK] for i in range(0, len(groups), IMAGE_FILES_PER_TASK)]
        with _spawn_environment():
            self._chunk_futures = [self._executor.submit(_write_chunks, task) for task in tasks]
            self._image_futures = [self._executor.submit(_write_images, task) for task in image_tasks]

    def results(self) -> Iterator[ChunkResult]:
        """Yield the result of each chunk, in any order; after the last one, all dataset images are written too."""
        if self._executor is None:
            yield from map(self._writer.write, self._chunks)
            for group in self._groups:
                self._writer.write_images(*group)
            return
        while self._chunk_futures:
            future = next(as_completed(self._chunk_futures))
            self._chunk_futures.remove(future)  # results are large: release each one as soon as it is consumed
            yield from future.result()
        for image_future in self._image_futures:
            image_future.result()


@contextlib.contextmanager
def open_pool(path: Path, root: Path, config: SiteConfig, sizes: Sizes, units: int) -> Iterator[EncoderPool]:
    """Open a pool that writes `units` units of the atlas at `path` to files below `root`."""
    count = int(config.workers) if config.workers != "auto" else _auto_processes(units)
    with contextlib.closing(ChunkWriter(path, root, config, sizes)) as writer:
        if count < 2:
            yield EncoderPool(writer, None)
            return
        # Spawned, because a forked process would share the locks of HDF5 and Ray with this one.
        executor = ProcessPoolExecutor(count, get_context("spawn"), _initialize, (path, root, config, sizes))
        try:
            yield EncoderPool(writer, executor)
        finally:
            executor.shutdown(cancel_futures=True)


def _auto_processes(units: int) -> int:
    return min(available_cores(), units // UNITS_PER_PROCESS)


@contextlib.contextmanager
def _spawn_environment() -> Iterator[None]:
    """Make processes that are spawned in this context use one thread each and not import the main module.

    There is a process for every core, and the main module of `atlas` imports torch, which no chunk needs.
    """
    main, threads = sys.modules["__main__"], {name: os.environ.get(name) for name in THREAD_VARIABLES}
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in threads.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _tasks(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Group consecutive chunks of a layer into tasks."""
    tasks: list[list[Chunk]] = []
    for chunk in chunks:
        if tasks and tasks[-1][0].layer == chunk.layer and len(tasks[-1]) < CHUNKS_PER_TASK:
            tasks[-1].append(chunk)
        else:
            tasks.append([chunk])
    return tasks


def _initialize(path: Path, root: Path, config: SiteConfig, sizes: Sizes) -> None:
    """Initialize a process of the pool."""
    global _writer
    # Records are trees without reference cycles, so the cyclic garbage collector can run rarely.
    gc.freeze()
    gc.set_threshold(500_000, 20, 100)
    _writer = ChunkWriter(path, root, config, sizes)


def _write_chunks(task: Sequence[Chunk]) -> list[ChunkResult]:
    assert _writer is not None
    return [_writer.write(chunk) for chunk in task]


def _write_images(groups: Sequence[Group]) -> int:
    assert _writer is not None
    return sum(_writer.write_images(*group) for group in groups)
