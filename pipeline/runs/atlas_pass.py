"""State and tasks of the activation atlases of a run.

They have two rounds: activations at random positions of dataset images; and, when these are complete and laid out, the
visualizations of the cells. The driver lays out the samples in between, once, and stores the layout.
"""

import functools
import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from pipeline.activation_atlas.layout import lay_out
from pipeline.activation_atlas.results import AtlasLayout, AtlasResult, SamplesPart
from pipeline.core import hashing
from pipeline.data import image_loading
from pipeline.engine.tasks import CellsTask, SamplesTask, Task, cells_digest, layout_digest, samples_digest
from pipeline.layers.finding import Layer
from pipeline.planning.plan import Plan
from pipeline.runs.dataset_pass import devices_of, gaps, shard_path, whole_batches, without_overlap
from pipeline.store import hdf5, shards
from pipeline.store.shards import DamagedShardError, Shard, safe_name

log = logging.getLogger(__name__)

SAMPLES, LAYOUTS, CELLS = "samples", "layouts", "cells"


class ActivationAtlasPass:
    """Finished parts of the activation atlases of a plan, and the tasks that are left.

    Args:
        plan: The plan.
        folder: Folder of the shards of a run.
        read_only: Whether nothing may be written there.
        ignored: Damaged files, which count as absent.

    Attributes:
        digest: Digest of the samples; empty if the plan makes no activation atlas.
        ranges: Shards of samples by (start, end) in the list of images, without overlap.
        layers: Layers with an activation atlas.
    """

    def __init__(
        self, plan: Plan, folder: Path, read_only: bool = False, ignored: Collection[Path] = frozenset()
    ) -> None:
        self._plan, self.folder, self.read_only, self._ignored = plan, folder, read_only, ignored
        self._request = plan.setup.activation_atlas
        self._layouts: dict[str, tuple[AtlasLayout, str]] = {}
        self._cells: dict[str, dict[tuple[int, int], Shard]] = {}
        self.layers: tuple[Layer, ...] = self._request.layers if self._request is not None else ()
        self.digest = samples_digest(plan.setup, plan.dataset_fingerprint) if self._request is not None else ""
        found = self._found(folder / SAMPLES, self.digest) if self.digest else []
        self.ranges = without_overlap(shard for shard in found if not self._is_outdated(shard))

    def _found(self, folder: Path, digest: str) -> list[Shard]:
        return [shard for shard in shards.find(folder, digest) if shard.path not in self._ignored]

    def _is_outdated(self, shard: Shard) -> bool:
        """Return whether samples lack an image that may be readable now, or cannot be read: they are made again."""
        try:
            failed = shard.get("failed/index", "failed/reason")
        except DamagedShardError:
            return True
        pairs = zip(failed["failed/index"].tolist(), failed["failed/reason"].tolist(), strict=True)
        dataset = self._plan.setup.dataset
        return any(image_loading.may_be_readable(dataset, int(index), str(reason)) for index, reason in pairs)

    @property
    def total(self) -> int:
        """Number of images that are sampled."""
        return len(self._request.images) if self._request is not None else 0

    @property
    def missing(self) -> int:
        """Number of images that are left."""
        return sum(end - start for start, end in gaps(self.ranges, self.total))

    @property
    def complete(self) -> bool:
        """Whether there are activation atlases, and nothing of them is left."""
        return self._request is not None and not self.missing and not any(self.missing_cells.values())

    @property
    def image_seconds(self) -> float:
        """Estimated seconds of one worker for the samples of one image."""
        costs = self._plan.overheads
        return costs.forward.expected + costs.reading.expected if costs is not None else 1.0

    def cell_seconds(self, layer: Layer) -> float:
        """Estimated seconds of one worker for the visualization of a cell."""
        return self._plan.cell_span(layer).expected

    def paths(self) -> list[Path]:
        """Return all files."""
        known = [layer for layer in self.layers if self._stored_layout(layer) is not None]
        cells = [shard.path for layer in known for shard in self.cell_ranges(layer).values()]
        return [*(shard.path for shard in self.ranges.values()), *map(self._layout_path, known), *cells]

    # Layout

    def _layout_path(self, layer: Layer) -> Path:
        digest = layout_digest(self._plan.setup, self.digest, layer)
        return shard_path(self.folder, LAYOUTS, safe_name(layer.name), digest)

    def _stored_layout(self, layer: Layer) -> tuple[AtlasLayout, str] | None:
        """Return the stored layout of a layer and the digest of its values; None if there is none."""
        if layer.name not in self._layouts:
            path = self._layout_path(layer)
            shard = shards.read(path) if path not in self._ignored else None
            if shard is None:
                return None
            layout = AtlasLayout.from_arrays(shard.arrays(), shard.attributes)
            self._layouts[layer.name] = layout, str(shard.attributes["content"])
        return self._layouts[layer.name]

    def layout(self, layer: Layer) -> AtlasLayout | None:
        """Return the layout of the samples of a layer; None until they are complete, or where nothing may be written.

        It is stored, so that later runs continue with the same cells, whichever methods are installed then.
        """
        stored = self._stored_layout(layer)
        if stored is not None or self.missing or self.read_only or self._request is None:
            return stored[0] if stored is not None else None
        config = self._request.config
        log.info("laying out %d samples of %s", self._request.samples(layer), layer.name)
        layout = lay_out(self._samples, self.layers.index(layer), config.grid, config.min_count)
        if not layout.cells:
            log.warning("%s gets no activation atlas: no cell has enough samples with an activation", layer.name)
        content = hashing.digest_of([layout.method, layout.grid, hashing.arrays_digest(layout.arrays())])
        digest = layout_digest(self._plan.setup, self.digest, layer)
        attributes = {"digest": digest, "content": content, **layout.attributes()}
        shards.write(self._layout_path(layer), attributes, layout.arrays())
        self._layouts[layer.name] = layout, content
        return layout

    @functools.cached_property
    def _samples(self) -> SamplesPart:
        """All samples."""
        return SamplesPart.joined([SamplesPart.from_arrays(shard.arrays()) for _, shard in sorted(self.ranges.items())])

    # Cells

    def cell_ranges(self, layer: Layer) -> dict[tuple[int, int], Shard]:
        """Return the shards with visualizations of the cells of a layer by (start, end), without overlap."""
        if layer.name not in self._cells:
            stored = self._stored_layout(layer)
            if stored is None:
                return {}
            digest = cells_digest(self._plan.setup, layer, stored[1])
            self._cells[layer.name] = without_overlap(self._found(self.folder / CELLS / safe_name(layer.name), digest))
        return self._cells[layer.name]

    @property
    def cells(self) -> dict[str, int]:
        """Number of cells of each layer, by name; about, until the samples are laid out."""
        request = self._request
        if request is None:
            return {}
        layouts = {layer: self.layout(layer) for layer in self.layers}
        return {
            layer.name: found.cells if found is not None else request.expected_cells(layer)
            for layer, found in layouts.items()
        }

    @property
    def missing_cells(self) -> dict[str, int]:
        """Number of cells of each layer that are left, by name; about, until the samples are laid out."""
        cells = self.cells
        done = {layer.name: sum(end - start for start, end in self.cell_ranges(layer)) for layer in self.layers}
        return {name: max(0, count - done[name]) for name, count in cells.items()}

    # Tasks

    def sample_tasks(self, workers: int, excluded: Sequence[Task] = ()) -> list[SamplesTask]:
        """Return the tasks of the first round.

        Args:
            workers: Number of workers.
            excluded: Tasks that were set aside; their images are left out.
        """
        request, each = self._request, self.image_seconds
        if request is None:
            return []
        lost = [(task.start, task.end) for task in excluded if isinstance(task, SamplesTask)]
        todo = gaps([*self.ranges, *lost], self.total)
        tasks = []
        for start, end in whole_batches(todo, request.batch, workers, self._longest(each)):
            path = shard_path(self.folder, SAMPLES, f"{start}-{end}", self.digest)
            images = request.images[start:end]
            tasks.append(SamplesTask(str(path), self.digest, each * len(images), start, end, images))
        return tasks

    def cell_tasks(self, workers: int, excluded: Sequence[Task] = ()) -> list[CellsTask]:
        """Return the tasks of the second round; none before the first is complete. The arguments are as above."""
        if self._request is None or self.missing:
            return []
        tasks = []
        for layer in self.layers:
            layout, each = self.layout(layer), self.cell_seconds(layer)
            if layout is None:
                continue
            digest = cells_digest(self._plan.setup, layer, self._layouts[layer.name][1])
            lost = [(t.start, t.end) for t in excluded if isinstance(t, CellsTask) and t.layer == layer.name]
            todo = gaps([*self.cell_ranges(layer), *lost], layout.cells)
            batch = self._plan.config.engine.images_per_batch(layer.channels, self._plan.setup.device)
            for start, end in whole_batches(todo, batch, workers, self._longest(each)):
                path = shard_path(self.folder / CELLS, safe_name(layer.name), f"{start}-{end}", digest)
                directions = shards.to_bytes({}, {"directions": layout.direction[start:end]})
                cost = each * (end - start)
                tasks.append(CellsTask(str(path), digest, cost, layer.name, start, end, directions))
        return tasks

    def _longest(self, each: float) -> float:
        """Return the largest number of items of a task that take `each` seconds."""
        return self._plan.config.engine.task_seconds / max(each, 1e-9)

    # Results

    @property
    def results(self) -> dict[str, AtlasResult]:
        """The activation atlases by layer; all must be complete. Layers without any cell are left out.

        Raises:
            DamagedShardError: If a shard cannot be read, or an image does not match its digest.
        """
        results = {}
        for layer in self.layers:
            layout = self.layout(layer)
            parts = [shard for _, shard in sorted(self.cell_ranges(layer).items())]
            if layout is None or not parts:
                continue
            arrays = [_checked_arrays(part) for part in parts]
            images, activation, failed = (
                np.concatenate([one[name] for one in arrays]) for name in ("images", "activation", "failed")
            )
            device = devices_of([*self.ranges.values(), *parts])
            results[layer.name] = AtlasResult(layout, images[:, 0], activation, failed, device)
        return results

    @property
    def identity(self) -> str:
        """Digest of everything that an atlas contains of these results; empty until they are complete."""
        if not self.complete:
            return ""
        parts = [cells_digest(self._plan.setup, layer, self._layouts[layer.name][1]) for layer in self.layers]
        return hashing.digest_of([LAYOUTS, *parts])


def _checked_arrays(shard: Shard) -> dict[str, np.ndarray]:
    """Return the arrays of visualizations of cells, whose images have their digests. Raises `DamagedShardError`."""
    arrays = shard.arrays()
    if not np.array_equal(hdf5.image_digests(arrays["images"]), arrays["images_sha256"]):
        raise DamagedShardError(shard, "the digest of an image does not match its pixels")
    return arrays
