"""Who makes the pieces of a site: this process, or a few beside it where the work is worth it."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from pipeline.site.pieces import Made, Maker, Piece
from pipeline.site.settings import SiteConfig
from pipeline.site.sizes import Sizes

# Another process takes a second or two to begin: as long as so many units take.
WORTH = 1000

_maker: Maker | None = None


class Workshop:
    """Makes pieces, in any order of finishing. With an `executor` it does so beside this process."""

    def __init__(self, maker: Maker, executor: Executor | None) -> None:
        self._maker = maker
        self._executor = executor

    def pieces(self, wanted: Sequence[Piece]) -> Iterator[Made]:
        """Each piece, when it is finished."""
        if self._executor is None:
            yield from map(self._maker.make, wanted)
            return
        futures: list[Future[Made]] = [self._executor.submit(_make, piece) for piece in wanted]
        for future in as_completed(futures):
            futures.remove(future)  # what was made is large: keep none of it longer than needed
            yield future.result()

    def photographs(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Whole pictures: (place of the first, indices) for each file or sheet."""
        if self._executor is None:
            for start, indices in groups:
                self._maker.photographs(start, indices)
        else:
            list(self._executor.map(_photographs, groups, chunksize=max(1, min(32, len(groups) // 8))))


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


def _begin(path: Path, root: Path, config: SiteConfig, sizes: Sizes) -> None:
    global _maker
    _maker = Maker(path, root, config, sizes)


def _make(piece: Piece) -> Made:
    assert _maker is not None
    return _maker.make(piece)


def _photographs(group: tuple[int, Sequence[int]]) -> int:
    assert _maker is not None
    return _maker.photographs(*group)
