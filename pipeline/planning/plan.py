"""The plan of a run: its layers and channels, its tasks, and the estimate of its time."""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.config.schema import Config
from pipeline.core.registry import registered_name
from pipeline.engine.resources import WorkerPool
from pipeline.engine.tasks import RenderTask, Setup, SweepTask, device_kind, examples_digest, render_digest
from pipeline.judges.judgement import Kind
from pipeline.judges.ridge import MIN_IMAGES
from pipeline.layers.finding import Layer
from pipeline.models.config import Preprocessing
from pipeline.planning.cost_model import ZERO_SPAN, PlanRow, Span
from pipeline.planning.folder import RunFolder
from pipeline.planning.judging import PlannedJudge, judged_as
from pipeline.planning.manifest import Manifest
from pipeline.planning.overheads import Amount, Overheads, expected_second_pass_images
from pipeline.store.shards import safe_name

log = logging.getLogger(__name__)

# A task is this part of the work that is left for each worker and, on CPUs, takes at least this many seconds.
SHARE = 4
MIN_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class ExistingWork:
    """Results of a plan that exist before it begins.

    Attributes:
        where: Where they are, in words.
        photographs: Number of dataset images in the first pass.
        pictures: Number of visualizations.
    """

    where: str
    photographs: int
    pictures: int


@dataclasses.dataclass(frozen=True)
class RemainingWork:
    """Work that a plan still has to do.

    Attributes:
        channels: Number of channels without a visualization, by (layer, preset).
        images: Dataset images that the first pass has not read.
        localizations: Images that the second pass has to read; 0 until the first pass is complete.
        effects: Images for which effects are not measured.
        relevant: Images in lists by relevance that are not measured.
        connected: Images for which connections are not measured.
        samples: Images that activation atlases have not sampled.
        cells: Number of cells of activation atlases without a visualization, by layer; about, until the samples are
            laid out.
        responses: Images whose responses have not been measured for facets.
        facets: Number of facets without an image, by layer; about, until the examples are grouped.
        existing: Results that are already available.
        reuse_blocker: Why the dataset pass of the base run cannot be reused; empty if it can.
    """

    channels: Mapping[tuple[str, str], int]
    images: int
    localizations: int = 0
    existing: tuple[ExistingWork, ...] = ()
    reuse_blocker: str = ""
    effects: int = 0
    relevant: int = 0
    connected: int = 0
    samples: int = 0
    cells: Mapping[str, int] = dataclasses.field(default_factory=dict)
    responses: int = 0
    facets: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def reads(self) -> int:
        """Number of dataset images that are still to be read, in all passes."""
        passes = self.images + self.localizations + self.effects + self.relevant + self.connected
        return passes + self.samples + self.responses

    @property
    def nothing(self) -> bool:
        """Whether all results exist."""
        made = (self.channels, self.cells, self.facets)
        return not (self.reads or any(any(counts.values()) for counts in made))


@dataclasses.dataclass(frozen=True)
class Unrendered:
    """A layer that gets dataset examples but no visualizations.

    Attributes:
        layer: The layer.
        channels: Its channels.
        reason: Why it cannot be visualized.
    """

    layer: Layer
    channels: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a run computes, and what its workers need.

    Attributes:
        config: The configuration.
        rows: One row for each preset and layer, preset by preset, in the order of the network.
        setup: What workers need besides their tasks.
        pool: Number and size of the workers.
        examples_seconds: Estimated seconds of one worker for the first pass over all images.
        labels: Names of the classes.
        recipe: Preprocessing of images.
        dataset_fingerprint: Digest of the dataset and the preprocessing.
        network: Digest of what receptive fields depend on.
        left: Work that is still to be done; all of it if existing results were not looked for.
        overheads: Estimated time of everything but the optimization; None if nothing was timed.
        unrendered: Layers that get dataset examples only.
        class_layers: Names of the layers whose channels are the classes in `labels`.
        judges: The other networks that visualizations are shown to.
        network_layers: All layers that units could be chosen from, in the order of the network.
        timed_on: Device that the estimates were measured on, for example "cpu"; empty if nothing was timed.
        channels: Channels of each layer, by its name; those of the rows get visualizations.
    """

    config: Config
    rows: tuple[PlanRow, ...]
    setup: Setup
    pool: WorkerPool
    examples_seconds: float
    labels: tuple[str, ...]
    recipe: Preprocessing
    dataset_fingerprint: str
    network: str
    left: RemainingWork
    overheads: Overheads | None = None
    unrendered: tuple[Unrendered, ...] = ()
    class_layers: tuple[str, ...] = ()
    judges: tuple[PlannedJudge, ...] = ()
    network_layers: tuple[Layer, ...] = ()
    timed_on: str = ""
    channels: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> Manifest:
        """The record of what this plan was made from."""
        depths = tuple(depth.name for depth in self.setup.depths)
        return Manifest(self.setup.weights, self.dataset_fingerprint, self.network, self.recipe, self.layers, depths)

    @property
    def layers(self) -> tuple[tuple[Layer, tuple[int, ...]], ...]:
        """Each layer with its channels."""
        return tuple((layer, self.channels[layer.name]) for layer in self.setup.layers)

    @property
    def units(self) -> int:
        """Number of units (layer:channel pairs) that get visualizations."""
        return sum(len(row.channels) for row in self.rows if row.preset == self.config.render.name)

    @property
    def work(self) -> int:
        """Number of (unit, preset) pairs."""
        return sum(len(row.channels) for row in self.rows)

    @functools.cached_property
    def span(self) -> Span:
        """Estimated seconds of all remaining work, from the start of workers to the site, with their range."""
        amount = self._amount
        pictures = sum((row.span(self._left(row)) for row in self.rows), ZERO_SPAN) * (1 / self.pool.workers)
        pictures += self.judge_span + self.effects_span + self.activation_atlas_span + self.facets_span
        if self.overheads is None:
            return pictures + Span.exact(self._examples_seconds)
        costs = self.overheads
        return pictures + costs.examples(amount) + costs.workers(amount) + costs.finish(amount)

    @property
    def eta(self) -> float:
        """Estimated seconds of all remaining work."""
        return self.span.expected

    @property
    def finish_seconds(self) -> float:
        """Estimated seconds of the work after the last visualization: atlas.h5 and site."""
        return self.overheads.finish(self._amount).expected + self.judge_span.expected if self.overheads else 0.0

    @functools.cached_property
    def judge_span(self) -> Span:
        """Estimated seconds in which the judges look at the visualizations that are left and at dataset images.

        They look at them in the driver, one after the other. Visualizations that exist and that they have not seen are
        not included.
        """
        images = self._judged_images
        reading = self.overheads.reading if self.overheads else ZERO_SPAN
        total = ZERO_SPAN
        for judge in self.judges:
            dataset_images = self._judged_dataset_images(judge)
            total += judge.span(images + dataset_images) + reading * dataset_images
        return total

    @functools.cached_property
    def effects_span(self) -> Span:
        """Estimated seconds in which all workers measure the effects that are left."""
        request, costs, total = self.setup.effects, self.overheads, ZERO_SPAN
        if request is None or costs is None:
            return total
        for images, passes in (
            (self.left.effects, request.passes),
            (self.left.relevant, request.relevance_passes),
            (self.left.connected, request.connection_passes),
        ):
            if images:
                forward = costs.batched or costs.forward
                total += (forward * passes + costs.reading) * (images / min(self.pool.workers, images))
        return total

    @functools.cached_property
    def activation_atlas_span(self) -> Span:
        """Estimated seconds in which all workers make what is left of the activation atlases."""
        request, costs, total = self.setup.activation_atlas, self.overheads, ZERO_SPAN
        if request is None or costs is None:
            return total
        if self.left.samples:
            total += (costs.forward + costs.reading) * (self.left.samples / min(self.pool.workers, self.left.samples))
        for layer in request.layers:
            count = self.left.cells.get(layer.name, 0)
            batch = self.config.engine.images_per_batch(layer.channels, self.setup.device)
            total += self.cell_span(layer) * (count / max(1, min(self.pool.workers, math.ceil(count / batch))))
        return total

    def cell_span(self, layer: Layer) -> Span:
        """Estimated seconds of one worker for the visualization of a cell of the activation atlas of a layer.

        They follow from a step of the main preset for the layer, if one was timed, else from a forward pass.
        """
        request, costs, preset = self.setup.activation_atlas, self.overheads, self.config.render
        if request is None or costs is None:
            return Span.exact(1.0)
        for row in self.rows:
            if (row.layer.name, row.preset) == (layer.name, preset.name) and self._left(row):
                pixels = (row.canvas[0] + 2 * preset.margin) * (row.canvas[1] + 2 * preset.margin)
                share = request.config.steps * request.pixels(preset, layer) / (preset.steps * pixels)
                return row.span(1) * (share / preset.variants)
        return costs.forward * request.cell_passes(preset, layer)

    @functools.cached_property
    def facets_span(self) -> Span:
        """Estimated seconds in which all workers make what is left of the facets."""
        request, costs, total = self.setup.facets, self.overheads, ZERO_SPAN
        if request is None or costs is None:
            return total
        if self.left.responses:
            workers = min(self.pool.workers, self.left.responses)
            total += (costs.forward + costs.reading) * (self.left.responses / workers)
        for layer in request.layers:
            count = self.left.facets.get(layer.name, 0)
            batch = self.config.engine.images_per_batch(layer.channels, self.setup.device)
            total += self.facet_span(layer) * (count / max(1, min(self.pool.workers, math.ceil(count / batch))))
        return total

    def facet_span(self, layer: Layer) -> Span:
        """Estimated seconds of one worker for the image of a facet of a layer, from a forward pass."""
        request, costs = self.setup.facets, self.overheads
        if request is None or costs is None:
            return Span.exact(1.0)
        return costs.forward * request.passes(self.config.render, layer)

    @property
    def _judged_images(self) -> float:
        """Visualizations that are left for a judge, in images of the size of the input of the network."""
        height, width = self.recipe.size
        total = 0.0
        for row in self.rows:
            kind, preset = self._judged_as(row), self.config.preset_for(row.preset, row.layer)
            count = self._left(row) * preset.variants
            if kind == "class":
                total += count
            elif kind == "unit" and preset.objective.raises_activation:
                total += count * row.canvas[0] * row.canvas[1] / (height * width)
        return total

    def _judged_dataset_images(self, judge: PlannedJudge) -> int:
        """Dataset images that a judge has to see: none if it has seen them, or if no hidden unit is left."""
        if not any(self._judged_as(row) == "unit" and self._left(row) for row in self.rows):
            return 0
        folder = RunFolder(self.config.folder).shards / "judges" / safe_name(judge.name)
        seen = not self.left.images and any(folder.glob("features-*.h5"))
        return 0 if seen else min(self.config.examples.subset, len(self.setup.dataset.images))

    def _judged_as(self, row: PlanRow) -> Kind | None:
        """Return which measure of judges applies to the visualizations of a row."""
        if row.display:
            return None
        kind = judged_as(self.config.preset_for(row.preset, row.layer), row.layer.name in self.class_layers)
        enough = min(self.config.examples.subset, len(self.setup.dataset.images)) >= MIN_IMAGES
        return kind if kind != "unit" or enough else None

    @property
    def _timed_elsewhere(self) -> bool:
        """Whether the estimates were measured on another kind of device than that of the workers."""
        return bool(self.timed_on) and device_kind(self.timed_on) != device_kind(self.pool.device)

    @property
    def _amount(self) -> Amount:
        left, engine, examples = self.left, self.config.engine, self.config.examples
        total = len(self.setup.dataset.images)
        return Amount(
            workers=self.pool.workers,
            ray=engine.name != "inline",
            joins_cluster=engine.address is not None,
            sample=min(examples.sample, total) if left.images == total else 0,
            images=left.images,
            second_pass_images=expected_second_pass_images(total, self.units, examples)
            if left.images
            else left.localizations,
            rendered_units=sum(left.channels.values()),
            units=self.units,
            batch=examples.batch,
            render_after_pass=bool(self.setup.begins),
        )

    @property
    def _examples_seconds(self) -> float:
        """Estimated seconds until the rest of the dataset pass is finished by all workers."""
        if self.overheads is not None:
            return self.overheads.examples(self._amount).expected
        share = (self.left.images + self.left.localizations) / len(self.setup.dataset.images)
        return self.examples_seconds * share / self.pool.workers

    @property
    def pictures(self) -> int:
        """Number of visualizations of the whole run."""
        return sum(len(row.channels) * self.config.preset(row.preset).variants for row in self.rows)

    @property
    def pictures_left(self) -> int:
        """Number of visualizations that are still to be made."""
        return sum(n * self.config.preset(preset).variants for (_, preset), n in self.left.channels.items())

    def outlook(self) -> list[str]:
        """Return existing results, remaining work and its estimated time, as lines of text."""
        lines = [
            f"{work.where}: first pass over {work.photographs:,} images, "
            f"{work.pictures:,} of {self.pictures:,} visualizations"
            for work in self.left.existing
        ]
        if self.left.nothing:
            return [*lines, "to do: nothing is missing"]
        if self.left.reuse_blocker:
            lines.append(f"the dataset pass cannot be reused: {self.left.reuse_blocker}")
        second = f" (second pass: {self.left.localizations:,})" if self.left.localizations else ""
        todo = f"to do: dataset pass over {self.left.images:,} images{second}, {self.pictures_left:,} visualizations; "
        size = f"{self.pool.workers} × {self.pool.threads} threads on {self.pool.device}"
        elsewhere = f", as timed on {self.timed_on}" if self._timed_elsewhere else ""
        if self.config.engine.address is not None:
            elsewhere += "; the workers of the cluster may be more, and faster"
        lines.append(f"{todo}about {self.span.text()} with {size}{elsewhere}")
        if self.judge_span.expected:
            lines.append(f"of this, judges ({', '.join(j.name for j in self.judges)}): about {self.judge_span.text()}")
        if self.effects_span.expected:
            images = self.left.effects or self.left.relevant or self.left.connected
            lines.append(f"of this, effects over {images:,} images: about {self.effects_span.text()}")
        if self.activation_atlas_span.expected:
            cells = ", ".join(f"{count:,} cells of {name}" for name, count in self.left.cells.items() if count)
            images = f"{self.left.samples:,} images" if self.left.samples else ""
            what = "; ".join(filter(None, [images, cells and f"about {cells}"]))
            lines.append(f"of this, activation atlas ({what}): about {self.activation_atlas_span.text()}")
        if self.facets_span.expected:
            facets = ", ".join(f"{count:,} of {name}" for name, count in self.left.facets.items() if count)
            images = f"{self.left.responses:,} images" if self.left.responses else ""
            what = "; ".join(filter(None, [images, facets and f"about {facets}"]))
            lines.append(f"of this, facets ({what}): about {self.facets_span.text()}")
        return lines

    def _left(self, row: PlanRow) -> int:
        """Return the number of channels of a row without a visualization."""
        return self.left.channels[row.layer.name, row.preset]

    def written(self) -> pd.DataFrame:
        """Return the table of plan.csv: the layers, the work besides visualizations, and the total."""
        layers = self.table()
        photographs = len(self.setup.dataset.images)
        rows: list[dict[str, object]] = [
            {"kind": "photographs", "units": photographs, "seconds": round(self._examples_seconds, 1)},
            {"kind": "total", "units": self.work, "seconds": round(self.eta, 1)},
        ]
        if self.overheads is not None:
            judges = self.judge_span.expected
            effects = self.effects_span.expected
            atlas, facets = self.activation_atlas_span.expected, self.facets_span.expected
            if facets:
                count = sum(self.left.facets.values())
                rows.insert(0, {"kind": "facets", "units": count, "seconds": round(facets, 1)})
            if atlas:
                cells = sum(self.left.cells.values())
                rows.insert(0, {"kind": "activation atlas", "units": cells, "seconds": round(atlas, 1)})
            if effects:
                rows.insert(0, {"kind": "effects", "units": self.units, "seconds": round(effects, 1)})
            if judges:
                rows.insert(0, {"kind": "judges", "units": self.units, "seconds": round(judges, 1)})
            beside = self.overheads.workers(self._amount).expected + self.finish_seconds - judges
            rows.insert(0, {"kind": "workers, atlas.h5 and site", "units": self.units, "seconds": round(beside, 1)})
        ends = pd.DataFrame(rows)
        return pd.concat([layers, ends], ignore_index=True)

    def table(self) -> pd.DataFrame:
        """Return one row for each layer and preset, with the estimated seconds of what is left.

        Layers without visualizations have a row under the main preset, with no units.
        """
        records = [
            _record(
                row.layer,
                preset=row.preset,
                objective=registered_name(self.config.preset_for(row.preset, row.layer).objective),
                units=len(row.channels),
                canvas=row.canvas[0] if row.canvas[0] == row.canvas[1] else "x".join(map(str, row.canvas)),
                seconds=round(row.cost(self._left(row)) / self.pool.workers, 1),
                channel_list=" ".join(map(str, row.channels)),
            )
            for row in self.rows
        ]
        main = sum(row.preset == self.config.render.name for row in self.rows)
        without = [
            _record(
                one.layer,
                preset=self.config.render.name,
                objective="",
                units=0,
                canvas="none",
                seconds=0.0,
                channel_list="",
            )
            for one in self.unrendered
        ]
        return pd.DataFrame(records[:main] + without + records[main:])

    def render_tasks(self, folder: Path, done: Mapping[PlanRow, set[int]], workers: int = 0) -> list[RenderTask]:
        """Return tasks for all channels without a visualization, the most expensive rows first; see `portions`.

        Args:
            folder: Folder of the run's shards.
            done: Finished channels of each row.
            workers: Number of workers; 0 for that of the plan.
        """
        engine = self.config.engine
        missing = {row: [c for c in row.channels if c not in done[row]] for row in self.rows}
        each = {row: row.cost(1) for row in self.rows}
        left = sum(each[row] * len(channels) for row, channels in missing.items())
        tasks = []
        for row in sorted(self.rows, key=lambda row: -each[row]):
            channels, cost = missing[row], each[row]
            batch = self.config.channels_per_batch(
                self.config.preset(row.preset), row.layer.channels, self.setup.device
            )
            # A GPU takes as long for one image as for a batch; a core does not.
            least = batch if self.pool.gpus else min(batch, math.ceil(MIN_SECONDS / cost))
            digest = render_digest(self.setup, row.layer, row.canvas, row.preset)
            # Seconds of the CPU of a head without a GPU must not divide the batches of its workers.
            longest = max(engine.task_seconds, least * cost) if self._timed_elsewhere else engine.task_seconds
            for count in portions(len(channels), cost, left, workers or self.pool.workers, longest, batch, least):
                part, channels = tuple(channels[:count]), channels[count:]
                left -= cost * count
                name = f"{part[0]}-{part[-1]}-{count}-{digest[:12]}.h5"
                path = folder / "render" / safe_name(row.layer.name) / name
                tasks.append(RenderTask(str(path), digest, cost * count, row.layer.name, part, row.canvas, row.preset))
        return tasks

    def examples_tasks(
        self, folder: Path, todo: Sequence[tuple[int, int]], workers: int, histogram_ranges: bytes = b""
    ) -> list[SweepTask]:
        """Return tasks of the first pass; how images are divided into tasks does not change the merged result.

        Args:
            folder: Folder of the run's shards.
            todo: (start, end) ranges of images that no finished shard covers.
            workers: Number of workers; 0 for that of the plan.
            histogram_ranges: Ranges of the histograms, as bytes of a shard.
        """
        digest, count = self.examples_digest, len(self.setup.dataset.images)
        each, examples = self.examples_seconds / count, self.config.examples
        left = each * sum(end - start for start, end in todo)
        longest = min(self.config.engine.task_seconds, each * examples.images_per_task(count))
        tasks = []
        for start, end in todo:
            for size in portions(
                end - start, each, left, workers or self.pool.workers, longest, examples.batch, examples.batch
            ):
                path = folder / "examples" / f"{start}-{start + size}-{digest[:12]}.h5"
                tasks.append(SweepTask(str(path), digest, each * size, start, start + size, histogram_ranges))
                start, left = start + size, left - each * size
        return tasks

    @property
    def examples_digest(self) -> str:
        """Digest of everything that changes the first pass."""
        return examples_digest(self.setup, self.dataset_fingerprint)


def portions(
    count: int, each: float, left: float, workers: int, longest: float, batch: int, least: int
) -> Iterator[int]:
    """Yield sizes of tasks that together cover `count` items, by guided self-scheduling.

    Each task is a fixed part of the remaining work of each worker, so that tasks shrink towards the end and no worker
    waits long for the last one (Polychronopoulos & Kuck, "Guided Self-Scheduling", IEEE Trans. Computers 1987).

    Args:
        count: Number of items.
        each: Seconds of one item.
        left: Seconds of all remaining work of the stage, of these items and of others.
        workers: Number of workers.
        longest: Upper bound of the seconds of one task.
        batch: All but small tasks are multiples of this.
        least: Lower bound of the number of items, unless they take longer than `longest`.
    """
    while count:
        size = int(min(longest, left / (SHARE * workers)) / each + 1e-9)
        if size > batch:
            size -= size % batch
        # A single item may take longer than `longest`.
        size = min(count, max(size, min(least, max(1, int(longest / each)))))
        yield size
        count, left = count - size, left - size * each


def _record(layer: Layer, **settings: Any) -> dict[str, Any]:
    """Return one row of the table of the plan."""
    columns = {
        "layer": layer.name,
        "preset": settings.pop("preset"),
        "kind": layer.kind,
        "channels": layer.channels,
        "map": f"{layer.height}x{layer.width}",
        "receptive_field": _field(layer),
        "stride": layer.field.stride[0] if layer.field else "",
    }
    return columns | settings


def _field(layer: Layer) -> str:
    return "whole image" if layer.field is None else "x".join(map(str, layer.field.size))
