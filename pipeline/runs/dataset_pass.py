"""State and tasks of the dataset pass of a run.

It has three rounds: a sample of images sets the ranges of the histograms; the first pass reads all images; the second
pass reads the dataset examples again, for positions, activation maps and crops. Each round needs the complete one
before. Within a round, the order and the size of the tasks do not change the merged result.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.core import hashing
from pipeline.data import image_loading
from pipeline.engine.tasks import DatasetTask, LocalizeTask, RangesTask, SweepTask, Task, localize_digest
from pipeline.examples import label_association, localize
from pipeline.examples import sweep as examples
from pipeline.examples.association import Association
from pipeline.examples.channel_stats import HistogramRange
from pipeline.examples.label_association import LabeledSources
from pipeline.examples.localize import SecondPassIndex, TopExamples
from pipeline.examples.results import DatasetPassResult, PathInputs
from pipeline.examples.sweep import ImageSubsets, PassResult
from pipeline.layers.finding import Layer
from pipeline.planning.plan import Plan
from pipeline.runs.localized_arrays import LocalizedArrays
from pipeline.store import shards
from pipeline.store.shards import DamagedShardError, Shard


class DatasetPass:
    """Finished parts of the dataset pass of a plan, and the tasks of its next round.

    Args:
        plan: The plan.
        folder: Folder of the shards of a run.
        read_only: Whether nothing may be written there: in the folders of other runs, and without the run's lock.
        ignored: Damaged files, which count as absent.

    Attributes:
        read_only: Whether nothing may be written.
        total: Number of dataset images.
        outdated: Parts of the first pass that lack an image that may be readable now; they count as absent.
        digest: Digest of the first pass.
        ranges_digest: Digest of the histogram ranges.
        localize_digest: Digest of the second pass.
        histogram_ranges: Shard of the histogram ranges; None until they are measured.
        swept_ranges: Shards of the first pass by (start, end), without overlap.
        localized_ranges: Shards of the second pass by (start, end), without overlap.
    """

    def __init__(
        self, plan: Plan, folder: Path, read_only: bool = False, ignored: Collection[Path] = frozenset()
    ) -> None:
        self._plan, self.folder, self.read_only, self._ignored = plan, folder, read_only, ignored
        self._config = plan.config.examples
        self.total = len(plan.setup.dataset.images)
        self.digest = plan.examples_digest
        self.layers = plan.layers
        self.ranges_digest = ranges_digest(self.digest)
        self.localize_digest = localize_digest(plan.setup, self.digest, [channels for _, channels in plan.layers])
        path = self.path("ranges", "ranges", self.ranges_digest)
        self.histogram_ranges = None if path in ignored else shards.read(path)
        parts = self._found("examples", self.digest) if self.histogram_ranges else []
        self.outdated = [shard for shard in parts if self._is_outdated(shard)]
        # Parts with other histogram ranges cannot be merged with these.
        self.swept_ranges = without_overlap(
            s for s in parts if s.attributes.get("ranges") == self.content and s not in self.outdated
        )
        second = self._found("localize", self.localize_digest) if not self.outdated else []
        self.localized_ranges = without_overlap(second)

    def _found(self, kind: str, digest: str) -> list[Shard]:
        return [shard for shard in shards.find(self.folder / kind, digest) if shard.path not in self._ignored]

    def _is_outdated(self, shard: Shard) -> bool:
        """Return whether a part of the first pass lacks an image that may be readable now."""
        dataset = self._plan.setup.dataset
        return any(
            image_loading.may_be_readable(dataset, int(index), reason) for index, reason in unreadable_images(shard)
        )

    def paths_of_outdated(self) -> list[Path]:
        """Return the outdated parts of the first pass, and all of the second pass, which depends on them."""
        if not self.outdated:
            return []
        index = self.path("localize", "index", self.localize_digest)
        second = [shard.path for shard in self._found("localize", self.localize_digest)]
        return [*(shard.path for shard in self.outdated), *second, *([index] if index.is_file() else [])]

    def path(self, kind: str, name: str, digest: str) -> Path:
        """Return the path of a shard; `kind` is "ranges", "examples" or "localize"."""
        return shard_path(self.folder, kind, name, digest)

    @property
    def content(self) -> str:
        """Digest of the values of the histogram ranges; empty until they are measured."""
        return str(self.histogram_ranges.attributes["content"]) if self.histogram_ranges else ""

    def paths(self) -> list[Path]:
        """Return all files of the pass."""
        first = [self.histogram_ranges.path] if self.histogram_ranges else []
        index = self.path("localize", "index", self.localize_digest)
        parts = [*self.swept_ranges.values(), *self.localized_ranges.values()]
        stale = bool(self.outdated) or index in self._ignored
        return [*first, *(s.path for s in parts), *([index] if index.is_file() and not stale else [])]

    @property
    def covered(self) -> bool:
        """Whether the first pass has read every image."""
        return self.histogram_ranges is not None and not gaps(self.swept_ranges, self.total)

    @functools.cached_property
    def index(self) -> SecondPassIndex:
        """The images of the second pass, stored so that later runs need not merge the first pass to find them."""
        path = self.path("localize", "index", self.localize_digest)
        shard = shards.read(path) if path not in self._ignored and not self.outdated else None
        if shard is not None:
            return SecondPassIndex.from_arrays(shard.arrays())
        index = SecondPassIndex.of(self.chosen, localize.path_sample(self._plan.setup.dataset))
        if not self.read_only:
            shards.write(path, {"digest": hashing.digest_of(["index", self.localize_digest])}, index.arrays())
        return index

    @property
    def to_localize(self) -> int:
        """Number of images of the second pass; 0 until the first pass is complete."""
        return len(self.index.images) if self.covered else 0

    @property
    def localized(self) -> int:
        """Number of images that the second pass has read."""
        return sum(end - start for start, end in self.localized_ranges)

    @property
    def swept(self) -> int:
        """Number of images that the first pass has read."""
        return sum(end - start for start, end in self.swept_ranges)

    @property
    def complete(self) -> bool:
        """Whether both passes are complete."""
        return self.covered and not gaps(self.localized_ranges, self.to_localize)

    @property
    def identity(self) -> str:
        """Digest of everything that an atlas contains of the pass."""
        return hashing.digest_of([self.content, self.localize_digest])

    def tasks(self, workers: int, excluded: Sequence[Task] = ()) -> Sequence[DatasetTask]:
        """Return the tasks of the next round; none if the pass is complete or cannot go on.

        Args:
            workers: Number of workers.
            excluded: Tasks that were set aside; their images are left out.
        """
        if self.histogram_ranges is None:
            return [] if any(isinstance(task, RangesTask) for task in excluded) else [self._ranges_task()]
        if not self.covered:
            lost = [(task.start, task.end) for task in excluded if isinstance(task, SweepTask)]
            histogram_ranges = shards.to_bytes({}, self.histogram_ranges.arrays())
            todo = gaps([*self.swept_ranges, *lost], self.total)
            return self._plan.examples_tasks(self.folder, todo, workers, histogram_ranges)
        lost = [(task.start, task.end) for task in excluded if isinstance(task, LocalizeTask)]
        return self._localize_tasks(gaps([*self.localized_ranges, *lost], self.to_localize), workers)

    def _ranges_task(self) -> RangesTask:
        sample = tuple(ImageSubsets.of(self._plan.setup.dataset, self._config, 1).sample.tolist())
        path = self.path("ranges", "ranges", self.ranges_digest)
        cost = self._plan.examples_seconds * len(sample) / self.total
        return RangesTask(str(path), self.ranges_digest, cost, sample)

    def _localize_tasks(self, todo: Sequence[tuple[int, int]], workers: int) -> list[LocalizeTask]:
        """Return tasks for (start, end) ranges of the list of images of the second pass."""
        images = self.index.images
        largest = self._config.images_per_task(len(images))
        tasks = []
        for start, stop in even_parts(todo, largest, workers, self._config.batch):
            part = images[start:stop]
            index = shards.to_bytes({}, self.index.for_images(int(part[0]), int(part[-1])).arrays())
            path = self.path("localize", f"{start}-{stop}", self.localize_digest)
            cost = self._plan.examples_seconds * len(part) / self.total
            tasks.append(LocalizeTask(str(path), self.localize_digest, cost, start, stop, tuple(part.tolist()), index))
        return tasks

    @functools.cached_property
    def ranges(self) -> HistogramRange:
        """The histogram ranges and scales of all channels; the first round must be complete."""
        assert self.histogram_ranges is not None
        return HistogramRange(**self.histogram_ranges.arrays())

    @functools.cached_property
    def sweep(self) -> PassResult:
        """The merged first pass, without the histogram bins of single images, which may be too large for memory."""
        pieces = [shard for _, shard in sorted(self.swept_ranges.items())]
        return merged(pieces, self._config.k, self._plan.setup.dataset.sources)

    @functools.cached_property
    def chosen(self) -> list[TopExamples]:
        """The dataset examples of each layer."""
        return localize.select_examples(self.sweep, self._plan.layers, self._plan.setup.dataset, self._config)

    @property
    def localizations(self) -> LocalizedArrays:
        """The arrays of the second pass."""
        return LocalizedArrays([shard for _, shard in sorted(self.localized_ranges.items())])

    @property
    def result(self) -> DatasetPassResult:
        """The result of both passes, as an atlas contains it.

        Raises:
            Damaged: If a shard cannot be read.
        """
        dataset, ranges = self._plan.setup.dataset, self.ranges
        names, _ = dataset.labels
        associations: list[Association | None] = []
        start = 0
        for (layer, _), chosen in zip(self._plan.layers, self.chosen, strict=True):
            associations.append(self._association(layer, start, chosen, ranges) if names else None)
            start += layer.channels
        return DatasetPassResult(
            self.sweep,
            ranges,
            self.chosen,
            self.localizations,
            associations,
            self._config.store,
            self._config.spectrum,
            names,
            PathInputs(
                self._plan.setup.depths,
                self.index.sample,
                dataset.source_numbers,
            ),
            self._device,
        )

    @property
    def _device(self) -> str:
        """Kinds of the devices that images were measured on."""
        first = [self.histogram_ranges] if self.histogram_ranges else []
        return devices_of([*first, *self.swept_ranges.values(), *self.localized_ranges.values()])

    @functools.cached_property
    def _labeled_parts(self) -> list[np.ndarray]:
        """The images with histogram bins, in the order of the shards of the first pass."""
        return [shard.get("codes/index")["codes/index"] for _, shard in sorted(self.swept_ranges.items())]

    @functools.cached_property
    def _labeled_sources(self) -> LabeledSources:
        """The sources of the images with histogram bins; positions are those in the ascending order of images."""
        return LabeledSources.of(self._plan.setup.dataset, np.sort(np.concatenate(self._labeled_parts)))

    def _association(self, layer: Layer, start: int, chosen: TopExamples, ranges: HistogramRange) -> Association:
        """Return the association of a layer's channels with labels; `start` is its first column in the pass."""
        if not self._labeled_sources.sufficient:
            dataset = self._plan.setup.dataset
            return label_association.associate_by_counts(
                chosen.lists["max"][1], dataset.labels[1], dataset.source_numbers
            )
        parts, channels = self._labeled_parts, chosen.channels
        columns = [
            shard.columns("codes/bin", start, start + layer.channels)[:, channels]
            for (_, shard), part in zip(sorted(self.swept_ranges.items()), parts, strict=True)
            if len(part)
        ]
        codes = np.concatenate(columns)[np.argsort(np.concatenate(parts), kind="stable")]
        low, high = ranges.low[start + channels], ranges.high[start + channels]
        return label_association.associate_by_activations(codes, self._labeled_sources, low, high, layer.rectified)


def ranges_digest(digest: str) -> str:
    """Return the digest of the histogram ranges of the first pass with this digest."""
    return hashing.digest_of(["ranges", digest])


def shard_path(folder: Path, kind: str, name: str, digest: str) -> Path:
    """Return the path of a shard of the dataset pass below `folder`."""
    return folder / kind / f"{name}-{digest[:12]}.h5"


def merged(pieces: Sequence[Shard], k: int, sources: np.ndarray | None) -> PassResult:
    """Return parts of the first pass as one, without the histogram bins of single images.

    Args:
        pieces: Parts in the order of their images.
        k: Length of the lists.
        sources: Source of every image of the dataset; None if each image is its own source.

    Raises:
        DamagedShardError: If a part can't be read.
    """
    bins = ("codes/index", "codes/bin")

    def part(shard: Shard) -> PassResult:
        arrays = shard.arrays(but=bins)
        empty = np.zeros((0, len(arrays["tops/max"])), np.uint8)
        return PassResult.from_arrays(arrays | {"codes/index": np.zeros(0, np.int32), "codes/bin": empty})

    return examples.merge(map(part, pieces), k, sources)


def devices_of(parts: Iterable[Shard]) -> str:
    """Return the kinds of devices that parts were measured on, such as "cpu cuda"; parts of former versions lack it."""
    return " ".join(sorted({kind for part in parts for kind in str(part.attributes.get("device", "")).split()}))


def unreadable_images(shard: Shard) -> list[tuple[int, str]]:
    """Return (index, reason) of the images that a part of the first pass could not read; empty for other shards."""
    if not {"start", "ranges"} <= shard.attributes.keys():
        return []
    try:
        return list(_recorded_failures(shard.path, shard.path.stat().st_mtime_ns))
    except (OSError, DamagedShardError):
        return []  # found where all of it is read


@functools.lru_cache(maxsize=65536)
def _recorded_failures(path: Path, _: int) -> tuple[tuple[int, str], ...]:
    """Return the failures of a shard, which are read once for each time of modification."""
    failed = Shard(path, {}).get("failed/index", "failed/reason")
    return tuple(zip(failed["failed/index"].tolist(), map(str, failed["failed/reason"].tolist()), strict=True))


def columns_by_layer(layers: Sequence[Layer], values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the values of each layer's channels, (C,) by name, from those of all layers side by side."""
    ends = np.cumsum([layer.channels for layer in layers]).tolist()
    return {layer.name: values[end - layer.channels : end] for layer, end in zip(layers, ends, strict=True)}


def without_overlap(parts: Iterable[Shard]) -> dict[tuple[int, int], Shard]:
    """Return shards whose (start, end) ranges do not overlap, the longest first, in the order of their ranges.

    Tasks that were divided differently at another time leave overlapping ranges; an image must count once.
    """
    chosen: dict[tuple[int, int], Shard] = {}
    ranges = {(int(s.attributes["start"]), int(s.attributes["end"])): s for s in parts}
    for start, end in sorted(ranges, key=lambda r: (r[0] - r[1], r)):
        if all(end <= a or b <= start for a, b in chosen):
            chosen[start, end] = ranges[start, end]
    return dict(sorted(chosen.items()))


def even_parts(
    ranges: Iterable[tuple[int, int]], largest: int, workers: int, batch: int = 1
) -> Iterator[tuple[int, int]]:
    """Cut each (start, end) range into even parts of at most `largest`, and at least one for each worker.

    Args:
        ranges: The ranges.
        largest: Largest length of a part.
        workers: Number of workers; there are fewer parts if these would be shorter than a batch.
        batch: Length of a batch.
    """
    for begin, end in ranges:
        count = end - begin
        parts = max(math.ceil(count / largest), min(workers, math.ceil(count / batch)))
        yield from itertools.pairwise(np.linspace(begin, end, parts + 1).astype(int).tolist())


def whole_batches(
    ranges: Sequence[tuple[int, int]], batch: int, workers: int, longest: float
) -> Iterator[tuple[int, int]]:
    """Cut (start, end) ranges into parts whose lengths are multiples of a batch, but for the last of a range.

    Batches begin at the same items however the work is divided.

    Args:
        ranges: The ranges.
        batch: Items in a batch.
        workers: Number of workers.
        longest: Largest number of items of a part, unless that is less than a batch.
    """
    count = sum(end - start for start, end in ranges)
    size = batch * max(1, math.floor(min(longest, count / max(workers, 1)) / batch))
    for begin, end in ranges:
        yield from ((start, min(start + size, end)) for start in range(begin, end, size))


def gaps(ranges: Iterable[tuple[int, int]], total: int) -> list[tuple[int, int]]:
    """Return the (start, end) ranges of 0 … `total` - 1 that `ranges` do not cover."""
    missing, position = [], 0
    for start, end in [*sorted(ranges), (total, total)]:
        if start > position:
            missing.append((position, min(start, total)))
        position = max(position, end)
    return missing
