"""Pool of processes that write the chunks of a site; a small site is written by a thread of the calling process."""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pipeline.core.machine import available_cores
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Catalogue
from pipeline.site.data import api
from pipeline.site.media.chunks import Chunk, ChunkResult, ChunkWriter
from pipeline.site.media.size_budget import Sizes
from pipeline.store.reader import open_atlas

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

# Of a layer and of its activations.
Fingerprints = tuple[str, str]

Task = TypeVar("Task")
Result = TypeVar("Result")


class EncoderPool:
    """Writer of whole dataset images and chunks, beside the calling thread.

    It has processes if there is much to write, which are started with the first task, or else one thread: most of its
    time is spent in decoding and encoding, which leave the other threads alone.
    """

    def __init__(self, path: Path, root: Path, config: SiteConfig, sizes: Sizes, catalogue: Catalogue) -> None:
        self._inputs = (path, root, config, sizes)
        self._catalogue = catalogue
        self._executor: Executor | None = None
        self._writer: ChunkWriter | None = None
        self._chunk_futures: list[Future[list[ChunkResult]]] = []
        self._image_futures: list[Future[int]] = []

    def write_images(self, groups: Sequence[Group], units: int) -> None:
        """Start to write files of whole dataset images; about `units` units follow."""
        tasks = [groups[i : i + IMAGE_FILES_PER_TASK] for i in range(0, len(groups), IMAGE_FILES_PER_TASK)]
        if tasks:
            self._image_futures = self._submit(_write_images, tasks, units)

    def write_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Start to write chunks."""
        # The largest tasks first, so that all processes finish at about the same time.
        tasks = sorted(_tasks(chunks), key=lambda task: task[0].start - task[-1].stop)
        self._chunk_futures = self._submit(_write_chunks, tasks, sum(chunk.stop - chunk.start for chunk in chunks))

    def results(self) -> Iterator[ChunkResult]:
        """Yield the result of each chunk, in any order; after the last one, all dataset images are written too."""
        while self._chunk_futures:
            future = next(as_completed(self._chunk_futures))
            self._chunk_futures.remove(future)  # results are large: release each one as soon as it is consumed
            yield from future.result()
        for image_future in self._image_futures:
            image_future.result()

    def close(self) -> None:
        """Stop, without the tasks that have not begun."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        if self._writer is not None:
            self._writer.close()

    def _submit(
        self, work: Callable[[ChunkWriter, Task], Result], tasks: Sequence[Task], units: int
    ) -> list[Future[Result]]:
        if self._executor is None:
            config = self._inputs[2]
            count = int(config.workers) if config.workers != "auto" else _auto_processes(units)
            self._executor = self._processes(count) if count > 1 else ThreadPoolExecutor(1)
            if count < 2:
                self._writer = ChunkWriter(*self._inputs, self._catalogue)
        if self._writer is not None:
            return [self._executor.submit(work, self._writer, task) for task in tasks]
        with _spawn_environment():
            return [self._executor.submit(_in_process, work, task) for task in tasks]

    def _processes(self, count: int) -> Executor:
        # Spawned, because a forked process would share the locks of HDF5 and Ray with this one.
        return ProcessPoolExecutor(count, get_context("spawn"), _initialize, self._inputs)


class AtlasReader:
    """Reader of what needs nothing but the atlas at `path`, beside the calling thread: in a process if it is large."""

    def __init__(self, path: Path, units: int) -> None:
        self._path = path
        is_large = units >= 2 * UNITS_PER_PROCESS
        self._executor = ProcessPoolExecutor(1, get_context("spawn")) if is_large else ThreadPoolExecutor(1)
        with _spawn_environment():
            self._fingerprints = self._executor.submit(_fingerprints, path)
        self._table: Future[None] | None = None

    def fingerprints(self) -> list[Fingerprints]:
        """Return the fingerprint of each layer and that of its activations."""
        return self._fingerprints.result()

    def write_table(self, root: Path) -> None:
        """Start to write the table of all units below `root`."""
        self._table = self._executor.submit(_write_table, self._path, root)

    def finish(self) -> None:
        """Wait until the table is written."""
        if self._table is not None:
            self._table.result()

    def close(self) -> None:
        """Stop."""
        self._executor.shutdown(cancel_futures=True)


def _fingerprints(path: Path) -> list[Fingerprints]:
    with open_atlas(path) as atlas:
        return [(layer.fingerprint(), layer.fingerprint("responses")) for layer in atlas]


def _write_table(path: Path, root: Path) -> None:
    with open_atlas(path) as atlas:
        api.write_table(root, atlas)


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


def _in_process(work: Callable[[ChunkWriter, Task], Result], task: Task) -> Result:
    """Do a task in a process of the pool."""
    assert _writer is not None
    return work(_writer, task)


def _write_chunks(writer: ChunkWriter, task: Sequence[Chunk]) -> list[ChunkResult]:
    return [writer.write(chunk) for chunk in task]


def _write_images(writer: ChunkWriter, groups: Sequence[Group]) -> int:
    return sum(writer.write_images(*group) for group in groups)
