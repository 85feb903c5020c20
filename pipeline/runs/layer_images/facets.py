"""State and tasks of the facets of a run.

Their rounds are the examples of the units and the responses to them, from one pass over the dataset, and the images of
the facets; the driver groups the examples in between.
"""

import functools
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.core import hashing
from pipeline.engine.tasks import FacetsTask, ResponsesTask, Task, facets_digest, groups_digest, responses_digest
from pipeline.facets.grouping import group_units
from pipeline.facets.request import FacetsRequest
from pipeline.facets.responses import ResponsesPart
from pipeline.facets.results import FacetsResult, LayerFacets
from pipeline.layers.finding import Layer
from pipeline.runs.dataset_pass import devices_of
from pipeline.runs.layer_images.rounds import TwoRounds
from pipeline.store import shards
from pipeline.store.shards import Shard

log = logging.getLogger(__name__)

RESPONSES, GROUPS, FACETS = "responses", "facet_groups", "facets"


class FacetsPass(TwoRounds[LayerFacets]):
    """Finished parts of the facets of a plan, and the tasks that are left; see `TwoRounds`."""

    noun = "facets"
    identified_as = FACETS
    folders = RESPONSES, GROUPS, FACETS

    @property
    def _request(self) -> FacetsRequest | None:
        return self._plan.setup.facets

    def _planned_layers(self) -> tuple[Layer, ...]:
        return self._request.layers if self._request is not None else ()

    def _first_digest(self) -> str:
        return responses_digest(self._plan.setup, self._plan.dataset_fingerprint)

    def _items_digest(self, layer: Layer) -> str:
        return groups_digest(self._plan.setup, self.digest, layer)

    def _images_digest(self, layer: Layer, content: str) -> str:
        return facets_digest(self._plan.setup, layer, content)

    @property
    def total(self) -> int:
        """Number of images whose responses are measured."""
        return self._request.images if self._request is not None else 0

    def item_seconds(self, layer: Layer) -> float:
        """Estimated seconds of one worker for the image of a facet."""
        return self._plan.facet_span(layer).expected

    def _read(self, shard: Shard) -> LayerFacets:
        return LayerFacets.from_arrays(shard.arrays(), str(shard.attributes["embedding"]))

    def _compute(self, layer: Layer) -> tuple[LayerFacets, str, dict[str, object]]:
        request, number = self._request, self.layers.index(layer)
        assert request is not None
        log.info("grouping the examples of %d units of %s", len(request.channels_of(layer)), layer.name)
        facets = group_units(
            self._responses,
            number,
            (request.chosen[number], request.embedding(layer).name),
            request.channels[number],
            request.reference,
            request.images,
            request.config.level,
        )
        content = hashing.digest_of([facets.embedding, hashing.arrays_digest(facets.arrays())])
        return facets, content, {"embedding": facets.embedding}

    def _arrays(self, items: LayerFacets) -> Mapping[str, np.ndarray]:
        return items.arrays()

    def _count(self, items: LayerFacets) -> int:
        return items.facets

    def _expected(self, layer: Layer) -> int:
        assert self._request is not None
        return self._request.expected_facets(layer)

    @functools.cached_property
    def _responses(self) -> ResponsesPart:
        """The responses to the examples of all units."""
        assert self._request is not None
        parts = [ResponsesPart.from_arrays(shard.arrays()) for _, shard in sorted(self.ranges.items())]
        return ResponsesPart.merged(parts, self._request.count, self._plan.setup.dataset.sources)

    def image_tasks(self, workers: int, excluded: Sequence[Task] = ()) -> list[ResponsesTask]:
        """Return the tasks of the first round.

        Args:
            workers: Number of workers.
            excluded: Tasks that were set aside; their images are left out.
        """
        request = self._request
        if request is None:
            return []
        lost = [(task.start, task.end) for task in excluded if isinstance(task, ResponsesTask)]
        parts = self._parts(range(request.images), request.batch, workers, lost)
        return [ResponsesTask(*part) for part in parts]

    def item_tasks(self, workers: int, excluded: Sequence[Task] = ()) -> list[FacetsTask]:
        """Return the tasks of the second round; none before the first is complete. The arguments are as above."""
        tasks = []
        for facets, part in self._item_parts(workers, excluded, FacetsTask):
            rows = slice(*part[-2:])
            nearest = facets.nearest[rows]
            arrays = {
                "channel": facets.channel[facets.unit[rows]],
                "center": facets.targets[rows],
                "nearest": nearest,
                "mean": facets.mean,
                "deviation": facets.deviation,
            }
            images = tuple(np.unique(nearest[nearest >= 0]).tolist())
            tasks.append(FacetsTask(*part, images, shards.to_bytes({}, arrays)))
        return tasks

    @property
    def results(self) -> dict[str, FacetsResult]:
        """The facets by layer; all must be complete. Layers without any facet are left out.

        Raises:
            DamagedShardError: If a shard cannot be read, or an image does not match its digest.
        """
        results = {}
        for layer in self.layers:
            facets, (parts, arrays) = self.items(layer), self._parts_of_images(layer)
            if facets is None or not parts:
                continue
            images, examples = arrays.pop("images")[:, 0], arrays.pop("examples", None)
            device = devices_of([*self.ranges.values(), *parts])
            results[layer.name] = FacetsResult(facets, images, examples, **arrays, device=device)
        return results
