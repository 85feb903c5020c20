"""The dataset pass as the driver sees it: its three rounds, and what a folder holds of them.

First a sample of photographs sets the ranges of histograms, then all photographs are swept, then the winners are
looked at again. Each round builds on the whole of the one before; within a round, order and portions do not matter.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.engine.tasks import Task, winners_digest
from pipeline.examples import label_association, localize
from pipeline.examples import sweep as examples
from pipeline.examples.channel_stats import HistogramRange
from pipeline.examples.label_association import Association
from pipeline.examples.localize import SecondPassIndex, TopExamples
from pipeline.examples.results import DatasetPassResult
from pipeline.examples.sweep import ImageSubsets, PassResult
from pipeline.layers.finding import Layer
from pipeline.runs.planner import Plan
from pipeline.store import shards
from pipeline.store.shards import Shard


class DatasetPass:
    """What is finished of a plan's dataset pass below `folder` (the run's shards), and what is next.

    With `keep=False` nothing is ever written there: for folders of other runs, and before a run has its lock.
    """

    def __init__(self, made: Plan, folder: Path, keep: bool = True) -> None:
        self._made, self.folder, self._keep = made, folder, keep
        self._config = made.config.examples
        self.total = len(made.setup.dataset.photos)
        self.digest = made.examples_digest
        self.layers = made.layers
        self.scale_digest = shards.digest_of(["ranges", self.digest])
        self.shown_digest = winners_digest(made.setup, self.digest, [channels for _, channels in made.layers])
        self.scale = shards.read(self.path("ranges", "ranges", self.scale_digest))
        found = shards.find(folder / "examples", self.digest) if self.scale else []
        # Pieces that were measured with other ranges can't be added to these.
        self.ranges = chosen_ranges(s for s in found if s.attributes.get("ranges") == self.content)
        self.looks = chosen_ranges(shards.find(folder / "winners", self.shown_digest))

    def path(self, kind: str, name: str, digest: str) -> Path:
        """Where a piece of the pass lies: `kind` is ranges, examples or winners."""
        return self.folder / kind / f"{name}-{digest[:12]}.h5"

    @property
    def content(self) -> str:
        """Digest of the ranges that all pieces of the pass were measured with."""
        return str(self.scale.attributes["content"]) if self.scale else ""

    def paths(self) -> list[Path]:
        """All files of the pass."""
        scale = [self.scale.path] if self.scale else []
        table = self.path("winners", "table", self.shown_digest)
        pieces = [*self.ranges.values(), *self.looks.values()]
        return [*scale, *(s.path for s in pieces), *([table] if table.is_file() else [])]

    @property
    def covered(self) -> bool:
        """Whether every photograph was swept."""
        return self.scale is not None and not gaps(self.ranges, self.total)

    @functools.cached_property
    def table(self) -> SecondPassIndex:
        """Who is looked at again; kept beside the looks, so that a later run need not merge the pass to know."""
        shard = shards.read(self.path("winners", "table", self.shown_digest))
        if shard is not None:
            return SecondPassIndex.from_arrays(shard.arrays())
        table = SecondPassIndex.of(self.chosen)
        path = self.path("winners", "table", self.shown_digest)
        if self._keep:
            shards.write(path, {"digest": shards.digest_of(["table", self.shown_digest])}, table.arrays())
        return table

    @property
    def shown(self) -> int:
        """How many photographs are looked at again; 0 while that is not known."""
        return len(self.table.images) if self.covered else 0

    @property
    def looked(self) -> int:
        """How many of them were."""
        return sum(end - start for start, end in self.looks)

    @property
    def swept(self) -> int:
        """How many photographs were swept."""
        return sum(end - start for start, end in self.ranges)

    @property
    def complete(self) -> bool:
        """Whether nothing of the pass is missing."""
        return self.covered and not gaps(self.looks, self.shown)

    @property
    def identity(self) -> str:
        """Digest of all that the pass puts into an atlas."""
        return shards.digest_of([self.content, self.shown_digest])

    def tasks(self, workers: int, known: Sequence[Task] = ()) -> list[Task]:
        """Tasks of the next round, without what the `known` ones are about; none when it is complete or stuck."""
        lost = {stage: [(t.start, t.end) for t in known if t.stage == stage] for stage in ("examples", "winners")}
        if self.scale is None:
            if any(task.stage == "ranges" for task in known):
                return []
            sample = tuple(ImageSubsets.of(self._made.setup.dataset, self._config).sample.tolist())
            path = self.path("ranges", "ranges", self.scale_digest)
            cost = self._made.examples_seconds * len(sample) / self.total
            return [Task("ranges", str(path), self.scale_digest, cost, photographs=sample)]
        if not self.covered:
            given = shards.image({}, self.scale.arrays())
            todo = gaps([*self.ranges, *lost["examples"]], self.total)
            return self._made.examples_tasks(self.folder, todo, workers, given)
        return self._look_tasks(gaps([*self.looks, *lost["winners"]], self.shown), workers)

    def _look_tasks(self, todo: Sequence[tuple[int, int]], workers: int) -> list[Task]:
        images = self.table.images
        tasks = []
        most = self._config.portion(len(images))
        for begin, end in todo:
            pieces = max(-(-(end - begin) // most), min(workers, -(-(end - begin) // self._config.batch)))
            cuts = np.linspace(begin, end, pieces + 1).astype(int).tolist()
            for a, b in itertools.pairwise(cuts):
                own = images[a:b]
                given = shards.image({}, self.table.part(int(own[0]), int(own[-1])).arrays())
                path = self.folder / "winners" / f"{a}-{b}-{self.shown_digest[:12]}.h5"
                cost = self._made.examples_seconds * len(own) / self.total
                tasks.append(
                    Task(
                        "winners",
                        str(path),
                        self.shown_digest,
                        cost,
                        start=a,
                        end=b,
                        photographs=tuple(own.tolist()),
                        given=given,
                    )
                )
        return tasks

    @functools.cached_property
    def sweep(self) -> PassResult:
        """The whole pass in one, but for the bins of single images, of which there may be too many for memory."""
        nothing = {"codes/index": np.zeros(0, np.int32), "codes/bin": np.zeros((0, self._channels), np.uint8)}
        parts = (
            PassResult.from_arrays(shard.arrays(but=tuple(nothing)) | nothing)
            for _, shard in sorted(self.ranges.items())
        )
        return examples.merge(parts, self._config.k, self._made.setup.dataset.sources)

    @property
    def _channels(self) -> int:
        return sum(layer.channels for layer in self._made.setup.layers)

    @functools.cached_property
    def chosen(self) -> list[TopExamples]:
        """The examples of every layer of the plan."""
        return localize.choose(self.sweep, self._made.layers, self._made.setup.dataset, self._config)

    @property
    def result(self) -> DatasetPassResult:
        """What an atlas keeps. Raises `Damaged` for a shard that can't be read."""
        assert self.scale is not None
        dataset = self._made.setup.dataset
        ranges = HistogramRange(**self.scale.arrays())
        pieces = [shard.arrays() for _, shard in sorted(self.looks.items())]
        names, of = dataset.labels
        associations: list[Association | None] = []
        start = 0
        for (layer, _), own in zip(self._made.layers, self.chosen, strict=True):
            associations.append(self._association(layer, start, own, of, ranges) if names else None)
            start += layer.channels
        return DatasetPassResult(
            self.sweep,
            ranges,
            self.chosen,
            _joined(pieces),
            associations,
            self._config.store,
            self._config.spectrum,
            names,
        )

    def _association(
        self, layer: Layer, start: int, chosen: TopExamples, of: np.ndarray, ranges: HistogramRange
    ) -> Association:
        parts = [shard.get("codes/index")["codes/index"] for _, shard in sorted(self.ranges.items())]
        index = np.concatenate(parts)
        if not label_association.enough(of[index]):
            return label_association.by_counts(chosen.lists["max"][1], of)
        own = chosen.channels
        columns = [
            shard.columns("codes/bin", start, start + layer.channels)[:, own]
            for (_, shard), part in zip(sorted(self.ranges.items()), parts, strict=True)
            if len(part)
        ]
        order = np.argsort(index, kind="stable")
        codes = np.concatenate(columns)[order]
        return label_association.by_responses(
            codes, of[index[order]], ranges.low[start + own], ranges.high[start + own]
        )


def _joined(pieces: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Pieces of the second look as one: rows one after the other, offsets going on where the last piece ended."""
    found: dict[str, np.ndarray] = {}
    for name in pieces[0] if pieces else ():
        arrays = [piece[name] for piece in pieces]
        if name.endswith("/offset"):
            ends = np.cumsum([0, *(a[-1] for a in arrays)])
            arrays = [arrays[0][:1], *(a[1:] + end for a, end in zip(arrays, ends, strict=False))]
        found[name] = np.concatenate(arrays)
    return found


def chosen_ranges(found: Iterable[Shard]) -> dict[tuple[int, int], Shard]:
    """Shards of the dataset pass that do not overlap, the longest first, by range and in order.

    Work cut in other portions at another time leaves ranges that overlap; a photograph must count once.
    """
    kept: dict[tuple[int, int], Shard] = {}
    ranges = {(int(s.attributes["start"]), int(s.attributes["end"])): s for s in found}
    for start, end in sorted(ranges, key=lambda r: (r[0] - r[1], r)):
        if all(end <= a or b <= start for a, b in kept):
            kept[start, end] = ranges[start, end]
    return dict(sorted(kept.items()))


def gaps(ranges: Iterable[tuple[int, int]], total: int) -> list[tuple[int, int]]:
    """What of 0 … total - 1 is in none of the (start, end) ranges."""
    found, at = [], 0
    for start, end in [*sorted(ranges), (total, total)]:
        if start > at:
            found.append((at, min(start, total)))
        at = max(at, end)
    return found
