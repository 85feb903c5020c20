"""Who makes the pieces of a site: this process, or a few beside it where the work is worth it."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

from pipeline.site.config import SiteConfig
from pipeline.site.media.chunks import Made, Maker, Piece
from pipeline.site.media.size_budget import Sizes

# Another process takes a second to begin: as long as a few hundred units take.
WORTH = 600
# Pieces of one layer that go to the same process, which reads the layer's numbers once for all of them.
TOGETHER = 4
# Photographs of one errand.
MANY = 64
# What libraries of linear algebra read when they are loaded.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_maker: Maker | None = None

# The first place and the indices of the photographs of a file.
Group = tuple[int, Sequence[int]]


class Workshop:
    """Makes what was begun, in any order of finishing. With an `executor` it does so beside this process."""

    def __init__(self, maker: Maker, executor: Executor | None) -> None:
        self._maker = maker
        self._executor = executor
        self._pieces: list[Piece] = []
        self._groups: list[Group] = []
        self._making: list[Future[list[Made]]] = []
        self._showing: list[Future[int]] = []

    def begin(self, pieces: Sequence[Piece], groups: Sequence[Group]) -> None:
        """Start on `pieces`, and on whole pictures: (place of the first, indices) for each file or sheet."""
        self._pieces, self._groups = list(pieces), list(groups)
        if self._executor is None:
            return
        # The largest first and the photographs last, so that all processes end together.
        errands = sorted(_errands(pieces), key=lambda errand: errand[0].start - errand[-1].stop)
        cut = [groups[i : i + MANY] for i in range(0, len(groups), MANY)]
        with _bare():
            self._making = [self._executor.submit(_make, errand) for errand in errands]
            self._showing = [self._executor.submit(_photographs, some) for some in cut]

    def made(self) -> Iterator[Made]:
        """Each piece, when it is finished; at the end the photographs are there, too."""
        if self._executor is None:
            yield from map(self._maker.make, self._pieces)
            for group in self._groups:
                self._maker.photographs(*group)
            return
        while self._making:
            future = next(as_completed(self._making))
            self._making.remove(future)  # what was made is large: keep none of it longer than needed
            yield from future.result()
        for done in self._showing:
            done.result()


@contextlib.contextmanager
def opened(path: Path, root: Path, config: SiteConfig, sizes: Sizes, units: int) -> Iterator[Workshop]:
    """A workshop for the atlas at `path` that has `units` to make, below `root`."""
    count = min(len(os.sched_getaffinity(0)), units // WORTH) if config.workers == "auto" else int(config.workers)
    with contextlib.closing(Maker(path, root, config, sizes)) as maker:
        if count < 2:
            yield Workshop(maker, None)
            return
        # A fresh process: one that was forked would share HDF5's and Ray's locks with this one.
        pool = ProcessPoolExecutor(count, get_context("spawn"), _begin, (path, root, config, sizes))
        try:
            yield Workshop(maker, pool)
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _bare() -> Iterator[None]:
    """Processes that begin meanwhile have one thread each, for there is one for every core, and no main module.

    They would import that again, and `atlas` brings torch, which no piece needs.
    """
    main, threads = sys.modules["__main__"], {name: os.environ.get(name) for name in THREADS}
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in threads.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _errands(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces by layer, a few together."""
    found: list[list[Piece]] = []
    for piece in pieces:
        if found and found[-1][0].layer == piece.layer and len(found[-1]) < TOGETHER:
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


def _begin(path: Path, root: Path, config: SiteConfig, sizes: Sizes) -> None:
    global _maker
    # Records are trees: there are no cycles in them to be looked for.
    gc.freeze()
    gc.set_threshold(500_000, 20, 100)
    _maker = Maker(path, root, config, sizes)


def _make(errand: Sequence[Piece]) -> list[Made]:
    assert _maker is not None
    return [_maker.make(piece) for piece in errand]


def _photographs(groups: Sequence[Group]) -> int:
    assert _maker is not None
    return sum(_maker.photographs(*group) for group in groups)
