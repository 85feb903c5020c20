"""State and tasks of the measurement of effects of a run: it needs the first pass over the dataset, for the means."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from pipeline.core import hashing
from pipeline.effects.results import EffectsPart, EffectsResult, split_by_layer
from pipeline.engine.tasks import EffectsTask, Task, effects_digest
from pipeline.examples.channel_stats import channel_statistics
from pipeline.planning.plan import Plan
from pipeline.runs.dataset_pass import DatasetPass, columns_by_layer, gaps, shard_path, without_overlap
from pipeline.store import shards
from pipeline.store.shards import Shard

KIND = "effects"


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
    """

    def __init__(
        self, plan: Plan, folder: Path, dataset_pass: DatasetPass, ignored: Collection[Path] = frozenset()
    ) -> None:
        self._plan, self.folder, self._dataset_pass = plan, folder, dataset_pass
        self._request = plan.setup.effects
        self.digest = effects_digest(plan.setup, dataset_pass.digest) if self._request is not None else ""
        found = shards.find(folder / KIND, self.digest) if self.digest and not dataset_pass.outdated else []
        self.ranges: dict[tuple[int, int], Shard] = without_overlap(s for s in found if s.path not in ignored)

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self._request.images) if self._request is not None else 0

    @property
    def missing(self) -> int:
        """Number of images that are left."""
        return sum(end - start for start, end in gaps(self.ranges, self.total))

    @property
    def complete(self) -> bool:
        """Whether there are effects, and all images have been measured."""
        return self._request is not None and not self.missing

    @property
    def image_seconds(self) -> float:
        """Estimated seconds of one worker for one image."""
        costs = self._plan.overheads
        if costs is None or self._request is None:
            return 1.0
        return costs.forward.expected * self._request.passes + costs.reading.expected

    def paths(self) -> list[Path]:
        """Return all files."""
        return [shard.path for shard in self.ranges.values()]

    def tasks(self, workers: int, excluded: Sequence[Task] = ()) -> list[EffectsTask]:
        """Return the tasks that are left; none before the first pass is complete.

        Args:
            workers: Number of workers.
            excluded: Tasks that were set aside; their images are left out.
        """
        if self._request is None or not self._dataset_pass.covered:
            return []
        lost = [(task.start, task.end) for task in excluded if isinstance(task, EffectsTask)]
        todo = gaps([*self.ranges, *lost], self.total)
        if not todo:
            return []
        means, tasks = self._means(), []
        size = self._images_per_task(sum(end - start for start, end in todo), workers)
        for begin, end in todo:
            for start in range(begin, end, size):
                part = self._request.images[start : min(start + size, end)]
                path = shard_path(self.folder, KIND, f"{start}-{start + len(part)}", self.digest)
                cost = self.image_seconds * len(part)
                tasks.append(EffectsTask(str(path), self.digest, cost, start, start + len(part), part, means))
        return tasks

    def _images_per_task(self, count: int, workers: int) -> int:
        """Return a multiple of the batch: batches begin at the same images however the work is divided."""
        assert self._request is not None
        batch = self._request.batch
        longest = self._plan.config.engine.task_seconds / max(self.image_seconds, 1e-9)
        return batch * max(1, math.floor(min(longest, count / max(workers, 1)) / batch))

    def _means(self) -> bytes:
        """Return the mean of each channel of each measured layer over the dataset, as bytes of a shard."""
        assert self._request is not None
        swept, layers = self._dataset_pass.sweep, [layer for layer, _ in self._plan.layers]
        columns = sum(layer.channels for layer in layers)
        ranges = self._dataset_pass.ranges
        mean = channel_statistics(swept.tally, ranges, np.zeros(columns, bool))["mean"].astype(np.float32)
        by_name = columns_by_layer(layers, mean)
        return shards.to_bytes({}, {str(i): by_name[layer.name] for i, layer in enumerate(self._request.layers)})

    @property
    def result(self) -> EffectsResult:
        """The effects by layer; all images must have been measured.

        Raises:
            DamagedShardError: If a shard cannot be read.
        """
        request = self._request
        assert request is not None
        parts = [EffectsPart.from_arrays(shard.arrays()) for _, shard in sorted(self.ranges.items())]
        names, channels = [layer.name for layer in request.layers], [layer.channels for layer in request.layers]
        return split_by_layer(EffectsPart.joined(parts), names, channels, request.ablated, request.outputs.name)

    @property
    def identity(self) -> str:
        """Digest of everything that an atlas contains of the effects; empty until they are complete."""
        return hashing.digest_of([KIND, self.digest]) if self.complete else ""
