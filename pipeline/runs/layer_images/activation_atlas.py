"""State and tasks of the activation atlases of a run.

Their rounds are activations at random positions of dataset images, and visualizations of cells; the driver lays out the
samples in between.
"""

import functools
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.activation_atlas.layout import lay_out
from pipeline.activation_atlas.request import ActivationAtlasRequest
from pipeline.activation_atlas.results import AtlasLayout, AtlasResult, SamplesPart
from pipeline.core import hashing
from pipeline.engine.tasks import CellsTask, SamplesTask, Task, cells_digest, layout_digest, samples_digest
from pipeline.layers.finding import Layer
from pipeline.runs.dataset_pass import devices_of
from pipeline.runs.layer_images.rounds import TwoRounds
from pipeline.store import shards
from pipeline.store.shards import Shard

log = logging.getLogger(__name__)

SAMPLES, LAYOUTS, CELLS = "samples", "layouts", "cells"


class ActivationAtlasPass(TwoRounds[AtlasLayout]):
    """Finished parts of the activation atlases of a plan, and the tasks that are left; see `TwoRounds`."""

    noun = "activation atlas"
    identified_as = LAYOUTS
    folders = SAMPLES, LAYOUTS, CELLS

    @property
    def _request(self) -> ActivationAtlasRequest | None:
        return self._plan.setup.activation_atlas

    def _planned_layers(self) -> tuple[Layer, ...]:
        return self._request.layers if self._request is not None else ()

    def _first_digest(self) -> str:
        return samples_digest(self._plan.setup, self._plan.dataset_fingerprint)

    def _items_digest(self, layer: Layer) -> str:
        return layout_digest(self._plan.setup, self.digest, layer)

    def _images_digest(self, layer: Layer, content: str) -> str:
        return cells_digest(self._plan.setup, layer, content)

    @property
    def total(self) -> int:
        """Number of images that are sampled."""
        return len(self._request.images) if self._request is not None else 0

    def item_seconds(self, layer: Layer) -> float:
        """Estimated seconds of one worker for the visualization of a cell."""
        return self._plan.cell_span(layer).expected

    def _read(self, shard: Shard) -> AtlasLayout:
        return AtlasLayout.from_arrays(shard.arrays(), shard.attributes)

    def _compute(self, layer: Layer) -> tuple[AtlasLayout, str, dict[str, object]]:
        assert self._request is not None
        config = self._request.config
        log.info("laying out %d samples of %s", self._request.samples(layer), layer.name)
        layout = lay_out(self._samples, self.layers.index(layer), config.grid, config.min_count)
        if not layout.cells:
            log.warning("%s gets no activation atlas: no cell has enough samples with an activation", layer.name)
        content = hashing.digest_of([layout.method, layout.grid, hashing.arrays_digest(layout.arrays())])
        return layout, content, layout.attributes()

    def _arrays(self, items: AtlasLayout) -> Mapping[str, np.ndarray]:
        return items.arrays()

    def _count(self, items: AtlasLayout) -> int:
        return items.cells

    def _expected(self, layer: Layer) -> int:
        assert self._request is not None
        return self._request.expected_cells(layer)

    @functools.cached_property
    def _samples(self) -> SamplesPart:
        """All samples."""
        return SamplesPart.joined([SamplesPart.from_arrays(shard.arrays()) for _, shard in sorted(self.ranges.items())])

    def image_tasks(self, workers: int, excluded: Sequence[Task] = ()) -> list[SamplesTask]:
        """Return the tasks of the first round.

        Args:
            workers: Number of workers.
            excluded: Tasks that were set aside; their images are left out.
        """
        request = self._request
        if request is None:
            return []
        lost = [(task.start, task.end) for task in excluded if isinstance(task, SamplesTask)]
        parts = self._parts(request.images, request.batch, workers, lost)
        return [SamplesTask(*part) for part in parts]

    def item_tasks(self, workers: int, excluded: Sequence[Task] = ()) -> list[CellsTask]:
        """Return the tasks of the second round; none before the first is complete. The arguments are as above."""
        tasks = []
        for layout, part in self._item_parts(workers, excluded, CellsTask):
            directions = shards.to_bytes({}, {"directions": layout.direction[slice(*part[-2:])]})
            tasks.append(CellsTask(*part, directions))
        return tasks

    @property
    def results(self) -> dict[str, AtlasResult]:
        """The activation atlases by layer; all must be complete. Layers without any cell are left out.

        Raises:
            DamagedShardError: If a shard cannot be read, or an image does not match its digest.
        """
        results = {}
        for layer in self.layers:
            layout, (parts, arrays) = self.items(layer), self._parts_of_images(layer)
            if layout is not None and parts:
                device = devices_of([*self.ranges.values(), *parts])
                images, activation, failed = (arrays[name] for name in ("images", "activation", "failed"))
                results[layer.name] = AtlasResult(layout, images[:, 0], activation, failed, device)
        return results
