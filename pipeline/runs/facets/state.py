"""State and tasks of the facets of a run.

They have two rounds: the examples of the units and the responses to them, from one pass over the dataset; and, when it
is complete and the driver has grouped the examples, the images of the facets. The groups are stored.
"""

import functools
import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from pipeline.core import hashing
from pipeline.data import image_loading
from pipeline.engine.tasks import FacetsTask, ResponsesTask, Task, facets_digest, groups_digest, responses_digest
from pipeline.facets.grouping import group_units
from pipeline.facets.results import FacetsResult, LayerFacets, ResponsesPart
from pipeline.layers.finding import Layer
from pipeline.planning.plan import Plan
from pipeline.runs.dataset_pass import devices_of, gaps, shard_path, whole_batches, without_overlap
from pipeline.store import hdf5, shards
from pipeline.store.shards import DamagedShardError, Shard, safe_name

log = logging.getLogger(__name__)

RESPONSES, GROUPS, FACETS = "responses", "facet_groups", "facets"


class FacetsPass:
    """Finished parts of the facets of a plan, and the tasks that are left.

    Args:
        plan: The plan.
        folder: Folder of the shards of a run.
        read_only: Whether nothing may be written there.
        ignored: Damaged files, which count as absent.

    Attributes:
        digest: Digest of the responses; empty if the plan has no facets.
        ranges: Shards of responses by (start, end), without overlap.
        layers: Layers with facets.
    """

    def __init__(
        self, plan: Plan, folder: Path, read_only: bool = False, ignored: Collection[Path] = frozenset()
    ) -> None:
        self._plan, self.folder, self.read_only, self._ignored = plan, folder, read_only, ignored
        self._request = plan.setup.facets
        self._groups: dict[str, tuple[LayerFacets, str]] = {}
        self._images: dict[str, dict[tuple[int, int], Shard]] = {}
        self.layers: tuple[Layer, ...] = self._request.layers if self._request is not None else ()
        self.digest = responses_digest(plan.setup, plan.dataset_fingerprint) if self._request is not None else ""
        found = self._found(folder / RESPONSES, self.digest) if self.digest else []
        self.ranges = without_overlap(shard for shard in found if not self._is_outdated(shard))

    def _found(self, folder: Path, digest: str) -> list[Shard]:
        return [shard for shard in shards.find(folder, digest) if shard.path not in self._ignored]

    def _is_outdated(self, shard: Shard) -> bool:
        """Return whether responses lack an image that may be readable now, or cannot be read: they are made again."""
        try:
            failed = shard.get("failed/index", "failed/reason")
        except DamagedShardError:
            return True
        pairs = zip(failed["failed/index"].tolist(), failed["failed/reason"].tolist(), strict=True)
        dataset = self._plan.setup.dataset
        return any(image_loading.may_be_readable(dataset, int(index), str(reason)) for index, reason in pairs)

    @property
    def total(self) -> int:
        """Number of images whose responses are measured."""
        return self._request.images if self._request is not None else 0

    @property
    def missing(self) -> int:
        """Number of images that are left."""
        return sum(end - start for start, end in gaps(self.ranges, self.total))

    @property
    def complete(self) -> bool:
        """Whether there are facets, and nothing of them is left."""
        return self._request is not None and not self.missing and not any(self.missing_facets.values())

    @property
    def image_seconds(self) -> float:
        """Estimated seconds of one worker for the responses to one image."""
        costs = self._plan.overheads
        return costs.forward.expected + costs.reading.expected if costs is not None else 1.0

    def facet_seconds(self, layer: Layer) -> float:
        """Estimated seconds of one worker for the image of a facet."""
        return self._plan.facet_span(layer).expected

    def paths(self) -> list[Path]:
        """Return all files."""
        known = [layer for layer in self.layers if self._stored(layer) is not None]
        images = [shard.path for layer in known for shard in self.facet_ranges(layer).values()]
        return [*(shard.path for shard in self.ranges.values()), *map(self._group_path, known), *images]

    # Groups

    def _group_path(self, layer: Layer) -> Path:
        return shard_path(
            self.folder, GROUPS, safe_name(layer.name), groups_digest(self._plan.setup, self.digest, layer)
        )

    def _stored(self, layer: Layer) -> tuple[LayerFacets, str] | None:
        """Return the stored facets of a layer and the digest of their values; None if there are none."""
        if layer.name not in self._groups:
            path = self._group_path(layer)
            shard = shards.read(path) if path not in self._ignored else None
            if shard is None:
                return None
            facets = LayerFacets.from_arrays(shard.arrays(), str(shard.attributes["embedding"]))
            self._groups[layer.name] = facets, str(shard.attributes["content"])
        return self._groups[layer.name]

    def facets(self, layer: Layer) -> LayerFacets | None:
        """Return the facets of a layer; None until the responses are complete, or where nothing may be written.

        They are stored, so that later runs continue with the same facets, whatever their linear algebra.
        """
        stored = self._stored(layer)
        if stored is not None or self.missing or self.read_only or self._request is None:
            return stored[0] if stored is not None else None
        request = self._request
        log.info("grouping the examples of %d units of %s", len(request.channels_of(layer)), layer.name)
        number = self.layers.index(layer)
        embedding = request.embedding(layer)
        facets = group_units(
            self._responses,
            number,
            (request.chosen[number], embedding.name),
            request.channels[number],
            request.reference,
            request.images,
            request.config.level,
        )
        content = hashing.digest_of([facets.embedding, hashing.arrays_digest(facets.arrays())])
        digest = groups_digest(self._plan.setup, self.digest, layer)
        attributes = {"digest": digest, "content": content, "embedding": facets.embedding}
        shards.write(self._group_path(layer), attributes, facets.arrays())
        self._groups[layer.name] = facets, content
        return facets

    @functools.cached_property
    def _responses(self) -> ResponsesPart:
        """The responses to the examples of all units."""
        assert self._request is not None
        parts = [ResponsesPart.from_arrays(shard.arrays()) for _, shard in sorted(self.ranges.items())]
        return ResponsesPart.merged(parts, self._request.count, self._plan.setup.dataset.sources)

    # Images

    def facet_ranges(self, layer: Layer) -> dict[tuple[int, int], Shard]:
        """Return the shards with images of the facets of a layer by (start, end), without overlap."""
        if layer.name not in self._images:
            stored = self._stored(layer)
            if stored is None:
                return {}
            digest = facets_digest(self._plan.setup, layer, stored[1])
            self._images[layer.name] = without_overlap(
                self._found(self.folder / FACETS / safe_name(layer.name), digest)
            )
        return self._images[layer.name]

    @property
    def counts(self) -> dict[str, int]:
        """Number of facets of each layer, by name; about, until the examples are grouped."""
        request = self._request
        if request is None:
            return {}
        found = {layer: self.facets(layer) for layer in self.layers}
        return {
            layer.name: facets.facets if facets is not None else request.expected_facets(layer)
            for layer, facets in found.items()
        }

    @property
    def missing_facets(self) -> dict[str, int]:
        """Number of facets of each layer without an image, by name; about, until the examples are grouped."""
        counts = self.counts
        done = {layer.name: sum(end - start for start, end in self.facet_ranges(layer)) for layer in self.layers}
        return {name: max(0, count - done[name]) for name, count in counts.items()}

    # Tasks

    def response_tasks(self, workers: int, excluded: Sequence[Task] = ()) -> list[ResponsesTask]:
        """Return the tasks of the first round.

        Args:
            workers: Number of workers.
            excluded: Tasks that were set aside; their images are left out.
        """
        request, each = self._request, self.image_seconds
        if request is None:
            return []
        lost = [(task.start, task.end) for task in excluded if isinstance(task, ResponsesTask)]
        todo = gaps([*self.ranges, *lost], self.total)
        tasks = []
        for start, end in whole_batches(todo, request.batch, workers, self._longest(each)):
            path = shard_path(self.folder, RESPONSES, f"{start}-{end}", self.digest)
            images = tuple(range(start, end))
            tasks.append(ResponsesTask(str(path), self.digest, each * len(images), start, end, images))
        return tasks

    def facet_tasks(self, workers: int, excluded: Sequence[Task] = ()) -> list[FacetsTask]:
        """Return the tasks of the second round; none before the first is complete. The arguments are as above."""
        if self._request is None or self.missing:
            return []
        tasks = []
        for layer in self.layers:
            facets, each = self.facets(layer), self.facet_seconds(layer)
            if facets is None:
                continue
            targets = facets.targets
            digest = facets_digest(self._plan.setup, layer, self._groups[layer.name][1])
            lost = [(t.start, t.end) for t in excluded if isinstance(t, FacetsTask) and t.layer == layer.name]
            todo = gaps([*self.facet_ranges(layer), *lost], facets.facets)
            batch = self._plan.config.engine.images_per_batch(layer.channels, self._plan.setup.device)
            for start, end in whole_batches(todo, batch, workers, self._longest(each)):
                path = shard_path(self.folder / FACETS, safe_name(layer.name), f"{start}-{end}", digest)
                nearest = facets.nearest[start:end]
                arrays = {
                    "channel": facets.channel[facets.unit[start:end]],
                    "center": targets[start:end],
                    "nearest": nearest,
                    "mean": facets.mean,
                    "deviation": facets.deviation,
                }
                images = tuple(np.unique(nearest[nearest >= 0]).tolist())
                content, cost = shards.to_bytes({}, arrays), each * (end - start)
                tasks.append(FacetsTask(str(path), digest, cost, layer.name, start, end, images, content))
        return tasks

    def _longest(self, each: float) -> float:
        """Return the largest number of items of a task that take `each` seconds."""
        return self._plan.config.engine.task_seconds / max(each, 1e-9)

    # Results

    @property
    def results(self) -> dict[str, FacetsResult]:
        """The facets by layer; all must be complete. Layers without any facet are left out.

        Raises:
            DamagedShardError: If a shard cannot be read, or an image does not match its digest.
        """
        results = {}
        for layer in self.layers:
            facets = self.facets(layer)
            parts = [shard for _, shard in sorted(self.facet_ranges(layer).items())]
            if facets is None or not parts:
                continue
            arrays = [_checked_arrays(part) for part in parts]
            joined = {name: np.concatenate([one[name] for one in arrays]) for name in arrays[0] if name[-3:] != "256"}
            device = devices_of([*self.ranges.values(), *parts])
            results[layer.name] = FacetsResult(
                facets, joined.pop("images")[:, 0], joined.pop("examples", None), **joined, device=device
            )
        return results

    @property
    def identity(self) -> str:
        """Digest of everything that an atlas contains of these results; empty until they are complete."""
        if not self.complete:
            return ""
        parts = [facets_digest(self._plan.setup, layer, self._groups[layer.name][1]) for layer in self.layers]
        return hashing.digest_of([FACETS, *parts])


def _checked_arrays(shard: Shard) -> dict[str, np.ndarray]:
    """Return the arrays of images of facets, which have their digests. Raises `DamagedShardError`."""
    arrays = shard.arrays()
    if not np.array_equal(hdf5.image_digests(arrays["images"]), arrays["images_sha256"]):
        raise DamagedShardError(shard, "the digest of an image does not match its pixels")
    return arrays
