"""State and tasks of the measurement of effects of a run.

It has two rounds: effects and relevance of all units, which need the first pass over the dataset for the means; and the
images with the largest relevance for each unit, of which positions and masks are measured. Connections between units
are measured beside both.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.core import hashing
from pipeline.effects.connections import merged
from pipeline.effects.relevance import RelevanceIndex, select_relevant
from pipeline.effects.request import EffectsRequest
from pipeline.effects.results import EffectsPart, EffectsResult, RelevantImages, split_by_layer
from pipeline.engine.tasks import (
    ConnectionsTask,
    EffectsTask,
    RelevanceTask,
    Task,
    connections_digest,
    effects_digest,
    relevance_digest,
)
from pipeline.examples.channel_stats import channel_statistics
from pipeline.planning.plan import Plan
from pipeline.runs.dataset_pass import (
    DatasetPass,
    columns_by_layer,
    devices_of,
    even_parts,
    gaps,
    shard_path,
    whole_batches,
    without_overlap,
)
from pipeline.runs.localized_arrays import LocalizedArrays
from pipeline.store import shards
from pipeline.store.shards import Shard

KIND, RELEVANCE, CONNECTIONS = "effects", "relevance", "connections"

BatchedTask = TypeVar("BatchedTask", EffectsTask, ConnectionsTask)


@dataclasses.dataclass(frozen=True)
class _BatchedWork:
    """A round over images, whose batches begin at the same images however it is divided.

    Attributes:
        folder: Folder of its shards.
        digest: Digest of its results.
        images: Its images.
        ranges: Its shards by (start, end) in `images`.
        seconds: Estimated seconds of one worker for an image.
    """

    folder: str
    digest: str
    images: tuple[int, ...]
    ranges: Mapping[tuple[int, int], Shard]
    seconds: float


class EffectsPass:
    """Finished parts of the effects of a plan, and the tasks that are left.

    Args:
        plan: The plan.
        folder: Folder of the shards of a run.
        dataset_pass: The dataset pass in the same folder.
        ignored: Damaged files, which count as absent.

    Attributes:
        digest: Digest of the results; empty if the plan measures no effects.
        ranges: Shards by (start, end) in the list of images, without overlap.
        relevance_digest: Digest of the second round; empty if there is none.
        relevance_ranges: Its shards by (start, end) in `index.images`, without overlap.
        connections_digest: Digest of the connections; empty if none are measured.
        connection_ranges: Their shards by (start, end) in the list of their images, without overlap.
    """

    def __init__(
        self, plan: Plan, folder: Path, dataset_pass: DatasetPass, ignored: Collection[Path] = frozenset()
    ) -> None:
        self._plan, self.folder, self._dataset_pass, self._ignored = plan, folder, dataset_pass, ignored
        self._request = plan.setup.effects
        self.digest = effects_digest(plan.setup, dataset_pass.digest) if self._request is not None else ""
        listed = self._request is not None and self._request.examples > 0
        self.relevance_digest = relevance_digest(plan.setup, dataset_pass.digest) if listed else ""
        connected = self._request is not None and self._request.connected
        self.connections_digest = connections_digest(plan.setup, dataset_pass.digest) if connected else ""
        self.ranges = self._found(KIND, self.digest)
        self.connection_ranges = self._found(CONNECTIONS, self.connections_digest)
        self.relevance_ranges = self._found(RELEVANCE, self.relevance_digest)

    def _found(self, kind: str, digest: str) -> dict[tuple[int, int], Shard]:
        found = shards.find(self.folder / kind, digest) if digest and not self._dataset_pass.outdated else []
        return without_overlap(shard for shard in found if shard.path not in self._ignored)

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self._request.images) if self._request is not None else 0

    @property
    def missing(self) -> int:
        """Number of images that are left in the first round."""
        return sum(end - start for start, end in gaps(self.ranges, self.total))

    @property
    def relevant(self) -> int:
        """Number of images of the second round; an upper bound until the first one is complete."""
        if self._request is None or not self.relevance_digest:
            return 0
        known = not self.missing and self._dataset_pass.covered
        return len(self.index.images) if known else self._request.relevant_images

    @property
    def relevant_missing(self) -> int:
        """Number of images that are left in the second round."""
        return sum(end - start for start, end in gaps(self.relevance_ranges, self.relevant))

    @property
    def connected(self) -> int:
        """Number of images for connections."""
        return len(self._request.connected) if self._request is not None else 0

    @property
    def connected_missing(self) -> int:
        """Number of images for connections that are left."""
        return sum(end - start for start, end in gaps(self.connection_ranges, self.connected))

    @property
    def nothing_missing(self) -> bool:
        """Whether all images have been measured, or there are none."""
        return not (self.missing or self.relevant_missing or self.connected_missing)

    @property
    def complete(self) -> bool:
        """Whether there are effects, and all images have been measured."""
        return self._request is not None and self.nothing_missing

    @property
    def image_seconds(self) -> float:
        """Estimated seconds of one worker for one image."""
        return self._seconds(lambda request: request.passes)

    @property
    def connection_seconds(self) -> float:
        """Estimated seconds of one worker for the connections of one image."""
        return self._seconds(lambda request: request.connection_passes)

    @property
    def relevance_seconds(self) -> float:
        """Estimated seconds of one worker for one image of the second round."""
        return self._seconds(lambda request: request.relevance_passes)

    def _seconds(self, passes: Callable[[EffectsRequest], float]) -> float:
        """Return the estimated seconds of one worker for an image that takes so many forward passes."""
        costs = self._plan.overheads
        if costs is None or self._request is None:
            return 1.0
        return costs.forward.expected * passes(self._request) + costs.reading.expected

    def paths(self) -> list[Path]:
        """Return all files."""
        index = self._index_path
        parts = [shard.path for shard in (*self.ranges.values(), *self.relevance_ranges.values())]
        parts += [shard.path for shard in self.connection_ranges.values()]
        return [*parts, *([index] if index.is_file() and index not in self._ignored else [])]

    @property
    def _index_path(self) -> Path:
        return shard_path(self.folder, RELEVANCE, "index", self.relevance_digest)

    @functools.cached_property
    def index(self) -> RelevanceIndex:
        """What the second round measures, stored so that later runs need not read the first round to find it."""
        shard = shards.read(self._index_path) if self._index_path not in self._ignored else None
        if shard is not None:
            return RelevanceIndex.from_arrays(shard.arrays())
        assert self._request is not None
        lists = [index for _, index in self._lists]
        channels = [np.array(own, np.int32) for own in self._request.channels]
        index = RelevanceIndex.of(channels, lists, self._dataset_pass.index.shown)
        if not self._dataset_pass.read_only:
            attributes = {"digest": hashing.digest_of(["index", self.relevance_digest])}
            shards.write(self._index_path, attributes, index.arrays())
        return index

    @functools.cached_property
    def _lists(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Values and images with the largest relevance for the units of the atlas, (C', k) for each layer."""
        request, effects = self._request, self._first_round
        assert request is not None
        return [
            select_relevant(effects.layers[layer.name].relevance[list(own)], effects.index, request.examples)
            for layer, own in zip(request.layers, request.channels, strict=True)
        ]

    def tasks(
        self, workers: int, excluded: Sequence[Task] = ()
    ) -> Sequence[EffectsTask | RelevanceTask | ConnectionsTask]:
        """Return the tasks of the next round, and those of connections; none before the first pass is complete.

        Args:
            workers: Number of workers.
            excluded: Tasks that were set aside; their images are left out.
        """
        if self._request is None or not self._dataset_pass.covered:
            return []
        request = self._request
        connected = _BatchedWork(
            CONNECTIONS, self.connections_digest, request.connected, self.connection_ranges, self.connection_seconds
        )
        connections = self._batched_tasks(ConnectionsTask, connected, workers, excluded)
        if not self.missing:
            return [*self._relevance_tasks(workers, excluded), *connections]
        measured = _BatchedWork(KIND, self.digest, request.images, self.ranges, self.image_seconds)
        return [*self._batched_tasks(EffectsTask, measured, workers, excluded), *connections]

    def _batched_tasks(
        self, kind: type[BatchedTask], work: _BatchedWork, workers: int, excluded: Sequence[Task]
    ) -> list[BatchedTask]:
        """Return the tasks of a round whose batches begin at the same images however it is divided."""
        assert self._request is not None
        lost = [(task.start, task.end) for task in excluded if isinstance(task, kind)]
        todo = gaps([*work.ranges, *lost], len(work.images))
        longest = self._plan.config.engine.task_seconds / max(work.seconds, 1e-9)
        means, tasks = self._means if todo else b"", []
        for start, end in whole_batches(todo, self._request.batch, workers, longest):
            path = shard_path(self.folder, work.folder, f"{start}-{end}", work.digest)
            cost = work.seconds * (end - start)
            tasks.append(kind(str(path), work.digest, cost, start, end, work.images[start:end], means))
        return tasks

    def _relevance_tasks(self, workers: int, excluded: Sequence[Task]) -> list[RelevanceTask]:
        lost = [(task.start, task.end) for task in excluded if isinstance(task, RelevanceTask)]
        todo = gaps([*self.relevance_ranges, *lost], self.relevant)
        longest = self._plan.config.engine.task_seconds / max(self.relevance_seconds, 1e-9)
        tasks = []
        for start, stop in even_parts(todo, max(1, math.floor(longest)), workers):
            images = self.index.images[start:stop]
            index = shards.to_bytes({}, self.index.for_images(int(images[0]), int(images[-1])).arrays())
            path = shard_path(self.folder, RELEVANCE, f"{start}-{stop}", self.relevance_digest)
            cost = self.relevance_seconds * len(images)
            numbers = tuple(images.tolist())
            tasks.append(RelevanceTask(str(path), self.relevance_digest, cost, start, stop, numbers, index))
        return tasks

    @functools.cached_property
    def _means(self) -> bytes:
        """The mean of each channel of each measured layer over the dataset, as bytes of a shard."""
        assert self._request is not None
        swept, layers = self._dataset_pass.sweep, [layer for layer, _ in self._plan.layers]
        columns = sum(layer.channels for layer in layers)
        ranges = self._dataset_pass.ranges
        mean = channel_statistics(swept.tally, ranges, np.zeros(columns, bool))["mean"].astype(np.float32)
        by_name = columns_by_layer(layers, mean)
        return shards.to_bytes({}, {str(i): by_name[layer.name] for i, layer in enumerate(self._request.layers)})

    @functools.cached_property
    def _first_round(self) -> EffectsResult:
        """The effects by layer, without lists by relevance."""
        request = self._request
        assert request is not None
        part = EffectsPart.joined([EffectsPart.from_arrays(shard.arrays()) for _, shard in sorted(self.ranges.items())])
        names, channels = [layer.name for layer in request.layers], [layer.channels for layer in request.layers]
        return split_by_layer(part, names, channels, request.ablated, request.outputs.name)

    @property
    def result(self) -> EffectsResult:
        """The effects by layer; all images must have been measured.

        Raises:
            DamagedShardError: If a shard cannot be read.
        """
        parts = [*self.ranges.values(), *self.relevance_ranges.values(), *self.connection_ranges.values()]
        connections = merged(
            [shard.arrays() for _, shard in sorted(self.connection_ranges.items())], list(self._first_round.layers)
        )
        result = dataclasses.replace(self._first_round, device=devices_of(parts), connections=connections)
        if not self.relevance_ranges:  # no lists were asked for, or no unit has a positive relevance
            return result
        relevant = dict(zip(result.layers, self._relevant_images(), strict=True))
        crops = self.more_images if self._stores_crops else None
        return dataclasses.replace(result, relevant=relevant, crops=crops)

    @property
    def _stores_crops(self) -> bool:
        return self._plan.config.examples.store == "crops"

    def _relevant_images(self) -> list[RelevantImages]:
        """Return the lists by relevance of each layer, with the positions and masks of the second round."""
        measured, result = self.more_images, []
        for i, (value, index) in enumerate(self._lists):
            pairs, place, mask = (measured[f"{i}/{name}"] for name in ("pairs", "place", "mask"))
            places = np.zeros((*index.shape, 2), np.int16)
            masks = np.zeros((*index.shape, *mask.shape[1:]), np.uint8)
            crops = np.full(index.shape, -1, np.int32)
            where = {pair: n for n, pair in enumerate(map(tuple, pairs.tolist()))}
            for row, k in np.argwhere(index >= 0).tolist():
                n = where.get((int(index[row, k]), row))
                if n is not None:
                    places[row, k], masks[row, k], crops[row, k] = place[n], mask[n], n
            numbers = crops if self._stores_crops else None
            result.append(RelevantImages(value, index, places[..., 0], places[..., 1], masks, numbers))
        return result

    @property
    def more_images(self) -> LocalizedArrays:
        """The arrays of the second round, among them copies of images that the dataset pass does not show."""
        return LocalizedArrays([shard for _, shard in sorted(self.relevance_ranges.items())])

    @property
    def identity(self) -> str:
        """Digest of everything that an atlas contains of the effects; empty until they are complete."""
        connections = [self.connections_digest] if self.connections_digest else []
        return hashing.digest_of([KIND, self.digest, self.relevance_digest, *connections]) if self.complete else ""
