"""What activation atlases and facets of a run have in common: two rounds, with a result of the driver in between.

The first round reads dataset images, for all layers at once. When it is complete, the driver computes from it which
*items* each layer has, such as the cells of its activation atlas, and stores this. The second round visualizes them.
"""

import abc
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np

from pipeline.core import hashing
from pipeline.data import image_loading
from pipeline.engine.tasks import Task
from pipeline.layers.finding import Layer
from pipeline.planning.folder import RunFolder
from pipeline.planning.plan import Plan
from pipeline.runs.dataset_pass import gaps, shard_path, whole_batches, without_overlap
from pipeline.store import hdf5, shards
from pipeline.store.shards import DamagedShardError, Shard, safe_name

log = logging.getLogger(__name__)

# What the driver computes for a layer, and the state of one kind of images.
Items = TypeVar("Items")
State = TypeVar("State", bound="TwoRounds")

Range = tuple[int, int]


class TwoRounds(abc.ABC, Generic[Items]):
    """Finished parts of both rounds of a plan.

    Args:
        plan: The plan.
        folder: Folder of the shards of a run.
        read_only: Whether nothing may be written there.
        ignored: Damaged files, which count as absent.

    Attributes:
        noun: What is made, for messages.
        identified_as: What is made, in `identity`.
        folders: Names of the folders of the first round, of what the driver computes, and of the second round.
        layers: Its layers; none if the plan asks for nothing.
        digest: Digest of the first round; empty if there is none.
        ranges: Shards of the first round by (start, end) in the list of images, without overlap.
    """

    noun: ClassVar[str]
    identified_as: ClassVar[str]
    folders: ClassVar[tuple[str, str, str]]

    def __init__(
        self, plan: Plan, folder: Path, read_only: bool = False, ignored: Collection[Path] = frozenset()
    ) -> None:
        self._plan, self.folder, self.read_only, self._ignored = plan, folder, read_only, ignored
        self._known: dict[str, tuple[Items, str]] = {}
        self._item_ranges: dict[str, dict[Range, Shard]] = {}
        self.layers = self._planned_layers()
        self.digest = self._first_digest() if self.layers else ""
        parts = self._found(folder / self.folders[0], self.digest) if self.digest else []
        self.ranges = without_overlap(shard for shard in parts if not self._is_outdated(shard))

    @abc.abstractmethod
    def _planned_layers(self) -> tuple[Layer, ...]:
        """Return the layers that the plan asks for."""

    @abc.abstractmethod
    def _first_digest(self) -> str:
        """Return the digest of the first round."""

    @abc.abstractmethod
    def _items_digest(self, layer: Layer) -> str:
        """Return the digest of what the driver computes for a layer."""

    @abc.abstractmethod
    def _images_digest(self, layer: Layer, content: str) -> str:
        """Return the digest of the images of a layer, of whose items `content` is the digest."""

    @abc.abstractmethod
    def _read(self, shard: Shard) -> Items:
        """Return the items that a shard of the driver holds."""

    @abc.abstractmethod
    def _compute(self, layer: Layer) -> tuple[Items, str, dict[str, object]]:
        """Return the items of a layer, the digest of their values, and attributes of their shard."""

    @abc.abstractmethod
    def _arrays(self, items: Items) -> Mapping[str, np.ndarray]:
        """Return the arrays of items, as their shard stores them."""

    @abc.abstractmethod
    def _count(self, items: Items) -> int:
        """Return the number of items."""

    @abc.abstractmethod
    def _expected(self, layer: Layer) -> int:
        """Return about how many items a layer has, before they are computed."""

    @property
    @abc.abstractmethod
    def total(self) -> int:
        """Number of images of the first round."""

    @abc.abstractmethod
    def item_seconds(self, layer: Layer) -> float:
        """Estimated seconds of one worker for the image of an item."""

    def _found(self, folder: Path, digest: str) -> list[Shard]:
        return [shard for shard in shards.find(folder, digest) if shard.path not in self._ignored]

    def _is_outdated(self, shard: Shard) -> bool:
        """Return whether a part lacks an image that may be readable now, or cannot be read: it is made again."""
        try:
            failed = shard.get("failed/index", "failed/reason")
        except DamagedShardError:
            return True
        pairs = zip(failed["failed/index"].tolist(), failed["failed/reason"].tolist(), strict=True)
        dataset = self._plan.setup.dataset
        return any(image_loading.may_be_readable(dataset, int(index), str(reason)) for index, reason in pairs)

    @property
    def missing(self) -> int:
        """Number of images of the first round that are left."""
        return sum(end - start for start, end in gaps(self.ranges, self.total))

    @property
    def complete(self) -> bool:
        """Whether the plan asks for anything, and nothing of it is left."""
        return bool(self.layers) and self.nothing_missing

    @property
    def nothing_missing(self) -> bool:
        """Whether nothing is left of both rounds."""
        return not self.missing and not any(self.missing_items.values())

    @property
    def image_seconds(self) -> float:
        """Estimated seconds of one worker for one image of the first round."""
        costs = self._plan.overheads
        return costs.forward.expected + costs.reading.expected if costs is not None else 1.0

    def paths(self) -> list[Path]:
        """Return all files."""
        known = [layer for layer in self.layers if self._stored(layer) is not None]
        images = [shard.path for layer in known for shard in self.item_ranges(layer).values()]
        return [*(shard.path for shard in self.ranges.values()), *map(self._items_path, known), *images]

    def _items_path(self, layer: Layer) -> Path:
        return shard_path(self.folder, self.folders[1], safe_name(layer.name), self._items_digest(layer))

    def _stored(self, layer: Layer) -> tuple[Items, str] | None:
        """Return the stored items of a layer and the digest of their values; None if there are none."""
        if layer.name not in self._known:
            path = self._items_path(layer)
            shard = shards.read(path) if path not in self._ignored else None
            if shard is None:
                return None
            self._known[layer.name] = self._read(shard), str(shard.attributes["content"])
        return self._known[layer.name]

    def items(self, layer: Layer) -> Items | None:
        """Return the items of a layer; None until the first round is complete, or where nothing may be written.

        They are stored, so that later runs continue with the same items, whatever libraries they have.
        """
        stored = self._stored(layer)
        if stored is not None or self.missing or self.read_only or not self.layers:
            return stored[0] if stored is not None else None
        items, content, described = self._compute(layer)
        attributes = {"digest": self._items_digest(layer), "content": content, **described}
        shards.write(self._items_path(layer), attributes, dict(self._arrays(items)))
        self._known[layer.name] = items, content
        return items

    def _digest_of_images(self, layer: Layer) -> str:
        """Return the digest of the images of a layer whose items are known."""
        return self._images_digest(layer, self._known[layer.name][1])

    def item_ranges(self, layer: Layer) -> dict[Range, Shard]:
        """Return the shards with images of the items of a layer by (start, end), without overlap."""
        if layer.name not in self._item_ranges:
            if self._stored(layer) is None:
                return {}
            folder = self.folder / self.folders[2] / safe_name(layer.name)
            self._item_ranges[layer.name] = without_overlap(self._found(folder, self._digest_of_images(layer)))
        return self._item_ranges[layer.name]

    @property
    def counts(self) -> dict[str, int]:
        """Number of items of each layer, by name; about, until they are computed."""
        known = {layer: self.items(layer) for layer in self.layers}
        return {
            layer.name: self._count(items) if items is not None else self._expected(layer)
            for layer, items in known.items()
        }

    @property
    def missing_items(self) -> dict[str, int]:
        """Number of items of each layer without an image, by name; about, until they are computed."""
        done = {layer.name: sum(end - start for start, end in self.item_ranges(layer)) for layer in self.layers}
        return {name: max(0, count - done[name]) for name, count in self.counts.items()}

    @property
    def missing_seconds(self) -> float:
        """Estimated seconds of one worker for the images that are left of the second round."""
        left = self.missing_items
        return sum(left[layer.name] * self.item_seconds(layer) for layer in self.layers)

    # Tasks

    def _parts(
        self, images: Sequence[int], batch: int, workers: int, lost: Sequence[Range]
    ) -> Iterator[tuple[str, str, float, int, int, tuple[int, ...]]]:
        """Yield path, digest, cost, start, end and images of the tasks of the first round.

        Args:
            images: All its images.
            batch: Images in one forward pass.
            workers: Number of workers.
            lost: Ranges of tasks that were set aside, which are left out.
        """
        each = self.image_seconds
        todo = gaps([*self.ranges, *lost], self.total)
        for start, end in whole_batches(todo, batch, workers, self._longest(each)):
            path = shard_path(self.folder, self.folders[0], f"{start}-{end}", self.digest)
            yield str(path), self.digest, each * (end - start), start, end, tuple(images[start:end])

    def _item_parts(
        self, workers: int, excluded: Sequence[Task], kind: type[Task]
    ) -> Iterator[tuple[Items, tuple[str, str, float, str, int, int]]]:
        """Yield the items of a layer, and path, digest, cost, layer, start and end of the tasks of the second round.

        There are none before the first round is complete.

        Args:
            workers: Number of workers.
            excluded: Tasks that were set aside; their items are left out.
            kind: Type of the tasks.
        """
        for layer in self.layers if not self.missing else ():
            items, each = self.items(layer), self.item_seconds(layer)
            if items is None:
                continue
            digest = self._digest_of_images(layer)
            lost = [(t.start, t.end) for t in excluded if isinstance(t, kind) and t.layer == layer.name]  # type: ignore[union-attr]
            todo = gaps([*self.item_ranges(layer), *lost], self._count(items))
            batch = self._plan.config.engine.images_per_batch(layer.channels, self._plan.setup.device)
            for start, end in whole_batches(todo, batch, workers, self._longest(each)):
                path = shard_path(self.folder / self.folders[2], safe_name(layer.name), f"{start}-{end}", digest)
                yield items, (str(path), digest, each * (end - start), layer.name, start, end)

    def _longest(self, each: float) -> float:
        """Return the largest number of images of a task that take `each` seconds."""
        return self._plan.config.engine.task_seconds / max(each, 1e-9)

    # Results

    def _parts_of_images(self, layer: Layer) -> tuple[list[Shard], dict[str, np.ndarray]]:
        """Return the shards of the second round of a layer in order, and their arrays but digests, joined.

        Raises:
            DamagedShardError: If a shard cannot be read, or an image does not match its digest.
        """
        parts = [shard for _, shard in sorted(self.item_ranges(layer).items())]
        arrays = [_checked_arrays(part) for part in parts]
        names = [name for name in arrays[0] if not name.endswith("_sha256")] if arrays else []
        return parts, {name: np.concatenate([one[name] for one in arrays]) for name in names}

    @property
    def identity(self) -> str:
        """Digest of everything that atlas.h5 contains of these results; empty until they are complete."""
        if not self.complete:
            return ""
        return hashing.digest_of([self.identified_as, *map(self._digest_of_images, self.layers)])


def _checked_arrays(shard: Shard) -> dict[str, np.ndarray]:
    """Return the arrays of a shard whose images have their digests.

    Raises:
        DamagedShardError: If it cannot be read, or an image does not match its digest.
    """
    arrays = shard.arrays()
    if not np.array_equal(hdf5.image_digests(arrays["images"]), arrays["images_sha256"]):
        raise DamagedShardError(shard, "the digest of an image does not match its pixels")
    return arrays


# Other runs

Make = Callable[[Path], State]


def elsewhere(make: Make[State], others: Iterable[RunFolder]) -> Iterator[tuple[RunFolder, State]]:
    """Yield the other runs with parts of the same first round.

    Args:
        make: Returns the state in a folder of shards, in which nothing may be written.
        others: Other runs.
    """
    for candidate in others:
        state = make(candidate.shards)
        if state.ranges:
            yield candidate, state


def remaining(own: State, make: Make[State], others: Iterable[RunFolder]) -> tuple[int, dict[str, int]]:
    """Return the images of the first round that no run has, and the items of each layer that no run has an image of.

    Args:
        own: The state of the run; the other arguments are those of `elsewhere`.
    """
    left = own.missing_items
    if own.nothing_missing:
        return 0, left
    states = [own, *(state for _, state in elsewhere(make, others))]
    ranges = without_overlap(shard for state in states for shard in state.ranges.values())
    for state in states:
        left = {name: min(left[name], count) for name, count in state.missing_items.items()}
    return sum(end - start for start, end in gaps(ranges, own.total)), left


def reuse(folder: RunFolder, make: Make[State], others: Iterable[RunFolder], link: Callable[[Path, Path], int]) -> None:
    """Link shards of the same results of other runs.

    Args:
        folder: Folder of the run.
        make: As in `elsewhere`.
        others: Other runs.
        link: Links a file, and returns 1 if it did.
    """
    own = make(folder.shards)
    if not own.layers or own.nothing_missing:
        return
    for candidate, state in elsewhere(make, others):
        count = sum(link(path, folder.shards / path.relative_to(state.folder)) for path in state.paths())
        if count:
            log.info("Reusing the %s of %s (%d shards)", own.noun, candidate.path, count)
