"""What a run will do: the table of layers and channels, the tasks, and how long they may take."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch

from pipeline.acceleration.batchnorm_folding import fold, foldable
from pipeline.acceleration.cpu_lowering import precision_of
from pipeline.acceleration.variants import layers_without_gradient, verified_variants
from pipeline.config.schema import Config
from pipeline.core.config_files import loaded
from pipeline.core.errors import AtlasError
from pipeline.data import datasets
from pipeline.engine.inline import WorkerPool, local_resources, size_pool
from pipeline.engine.tasks import Setup, Task, examples_digest, render_digest
from pipeline.kernels.allocator import keep_memory
from pipeline.layers import selection
from pipeline.layers.finding import Layer, ReceptiveField
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, load
from pipeline.runs import manifest
from pipeline.runs.base_run import based_on, check
from pipeline.runs.cost_model import NONE, PlanRow, Span, estimate, reading
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest, network_digest
from pipeline.runs.overheads import Amount, Lap, Overheads, looked_at, own_start
from pipeline.runs.unit_selection import Units, selected
from pipeline.runs.validation import channels_to_render, choose_canvas_sizes, validate_request, with_labels
from pipeline.store import shards
from pipeline.store.shards import safe

log = logging.getLogger(__name__)

# A task takes one in so many parts of the work that is left for each worker; and, on CPUs, not under so many seconds.
SHARE = 4
LEAST_SECONDS = 2.0

# A first check of the network's variant that takes less than so many seconds is mostly a warm-up of about a second.
MOSTLY_WARM_UP = 1.5


@dataclasses.dataclass(frozen=True)
class ExistingWork:
    """What is finished of a plan before it begins: photographs of its dataset pass, and pictures.

    `where` says in words where they are.
    """

    where: str
    photographs: int
    pictures: int


@dataclasses.dataclass(frozen=True)
class RemainingWork:
    """What of a plan is still to be made.

    `channels` counts those without pictures, by layer and preset; `photographs` are to be swept, and `looks` of those
    that were are to be looked at again, as far as that is known yet. `held` says where the rest is, `why` in words why
    a base does not lend its dataset pass.
    """

    channels: Mapping[tuple[str, str], int]
    photographs: int
    looks: int = 0
    held: tuple[ExistingWork, ...] = ()
    why: str = ""

    @property
    def nothing(self) -> bool:
        """Whether all is finished."""
        return not (self.photographs or self.looks or any(self.channels.values()))


@dataclasses.dataclass(frozen=True)
class Unrendered:
    """A layer that gets dataset examples but no visualizations, with its channels and the reason."""

    layer: Layer
    channels: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole run: rows by preset, in the order of computation, and what workers need.

    `unrendered` are layers without rows, for which only the dataset pass is made. `network` is the digest that
    receptive fields are known again by. `left` is what was still to be made when the plan was: all of it, where nobody
    looked. `examples_seconds` are one worker's for all photographs; `overheads` are None where nothing was timed.
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

    @property
    def inputs(self) -> Manifest:
        """What this plan was made from, to be kept beside it."""
        return Manifest(self.setup.weights, self.dataset_fingerprint, self.network, self.recipe, self.layers)

    @property
    def layers(self) -> tuple[tuple[Layer, tuple[int, ...]], ...]:
        """Each layer once, with its channels."""
        main = self.config.render.name
        channels = {row.layer.name: row.channels for row in self.rows if row.preset == main}
        channels |= {one.layer.name: one.channels for one in self.unrendered}
        return tuple((layer, channels[layer.name]) for layer in self.setup.layers)

    @property
    def units(self) -> int:
        """Number of units (layer:channel pairs) that get visualizations."""
        return sum(len(row.channels) for row in self.rows if row.preset == self.config.render.name)

    @property
    def work(self) -> int:
        """Number of units to be rendered: each counts once for every preset."""
        return sum(len(row.channels) for row in self.rows)

    @functools.cached_property
    def span(self) -> Span:
        """Seconds of all that is left, with their range: pictures, photographs, workers' starts, atlas.h5 and site."""
        amount = self._amount
        pictures = sum((row.span(self._left(row)) for row in self.rows), NONE) * (1 / self.pool.workers)
        if self.overheads is None:
            return pictures + Span.sure(self._examples_seconds)
        costs = self.overheads
        return pictures + costs.examples(amount) + costs.workers(amount) + costs.finish(amount)

    @property
    def eta(self) -> float:
        """Estimated seconds of all that is left."""
        return self.span.expected

    @property
    def finish_seconds(self) -> float:
        """Estimated seconds from the last picture to the last page."""
        return self.overheads.finish(self._amount).expected if self.overheads else 0.0

    @property
    def _amount(self) -> Amount:
        left, engine, examples = self.left, self.config.engine, self.config.examples
        total = len(self.setup.dataset.photos)
        return Amount(
            workers=self.pool.workers,
            ray=engine.name != "inline",
            joins=engine.address is not None,
            sample=min(examples.sample, total) if left.photographs == total else 0,
            photographs=left.photographs,
            looks=looked_at(total, self.units, examples) if left.photographs else left.looks,
            rendered=sum(left.channels.values()),
            units=self.units,
            batch=examples.batch,
            apart=bool(self.setup.begins),
        )

    @property
    def _examples_seconds(self) -> float:
        """Estimated seconds of all workers for what is left of the dataset pass."""
        if self.overheads is not None:
            return self.overheads.examples(self._amount).expected
        share = (self.left.photographs + self.left.looks) / len(self.setup.dataset.photos)
        return self.examples_seconds * share / self.pool.workers

    @property
    def pictures(self) -> int:
        """Number of pictures of the whole run."""
        return sum(len(row.channels) * self.config.preset(row.preset).variants for row in self.rows)

    @property
    def pictures_left(self) -> int:
        """Number of pictures that are still to be rendered."""
        return sum(n * self.config.preset(preset).variants for (_, preset), n in self.left.channels.items())

    def outlook(self) -> list[str]:
        """What is there, and where, and what is to be made in how long, a line each."""
        lines = [
            f"{held.where}: examples of {held.photographs:,} photographs, "
            f"{held.pictures:,} of {self.pictures:,} pictures"
            for held in self.left.held
        ]
        if self.left.nothing:
            return [*lines, "to do: nothing is missing"]
        if self.left.why:
            lines.append(f"the dataset pass is made anew: {self.left.why}")
        again = f" ({self.left.looks:,} looked at again)" if self.left.looks else ""
        todo = f"to do: examples of {self.left.photographs:,} photographs{again}, {self.pictures_left:,} pictures; "
        size = f"{self.pool.workers} × {self.pool.threads} threads on {self.pool.device}"
        return [*lines, f"{todo}about {self.span.text()} with {size}"]

    def _left(self, row: PlanRow) -> int:
        """How many channels of a row are left."""
        return self.left.channels[row.layer.name, row.preset]

    def written(self) -> pd.DataFrame:
        """The table as it goes into plan.csv: the layers, what comes beside pictures, and the total."""
        layers = self.table()
        photographs = len(self.setup.dataset.photos)
        rows: list[dict[str, object]] = [
            {"kind": "photographs", "units": photographs, "seconds": round(self._examples_seconds, 1)},
            {"kind": "total", "units": self.work, "seconds": round(self.eta, 1)},
        ]
        if self.overheads is not None:
            beside = self.overheads.workers(self._amount).expected + self.finish_seconds
            rows.insert(0, {"kind": "workers, atlas.h5 and site", "units": self.units, "seconds": round(beside, 1)})
        ends = pd.DataFrame(rows)
        return pd.concat([layers, ends], ignore_index=True)

    def table(self) -> pd.DataFrame:
        """One row a layer and preset, as it is printed; seconds are those of what is left.

        Layers without visualizations have a row under the main preset, with no units.
        """
        records = [
            _record(
                row.layer,
                preset=row.preset,
                units=len(row.channels),
                canvas=row.canvas[0] if row.canvas[0] == row.canvas[1] else "x".join(map(str, row.canvas)),
                seconds=round(row.cost(self._left(row)) / self.pool.workers, 1),
                channel_list=" ".join(map(str, row.channels)),
            )
            for row in self.rows
        ]
        main = sum(row.preset == self.config.render.name for row in self.rows)
        without = [
            _record(one.layer, preset=self.config.render.name, units=0, canvas="none", seconds=0.0, channel_list="")
            for one in self.unrendered
        ]
        return pd.DataFrame(records[:main] + without + records[main:])

    def render_tasks(self, folder: Path, done: Mapping[PlanRow, set[int]], workers: int = 0) -> list[Task]:
        """Tasks for the channels of rows that no finished shard holds yet, the dearest rows first.

        Cut from estimated cost for `workers` (this machine's, if none are given): see `portions`.
        """
        engine = self.config.engine
        missing = {row: [c for c in row.channels if c not in done[row]] for row in self.rows}
        each = {row: row.cost(1) for row in self.rows}
        left = sum(each[row] * len(channels) for row, channels in missing.items())
        tasks = []
        for row in sorted(self.rows, key=lambda row: -each[row]):
            own, cost = missing[row], each[row]
            batch = max(1, engine.batch // self.config.preset(row.preset).variants)
            # A GPU takes as long for one picture as for a batch; a core does not.
            least = batch if self.pool.gpus else min(batch, math.ceil(LEAST_SECONDS / cost))
            digest = render_digest(self.setup, row.layer, row.canvas, row.preset)
            for count in portions(
                len(own), cost, left, workers or self.pool.workers, engine.task_seconds, batch, least
            ):
                part, own = tuple(own[:count]), own[count:]
                left -= cost * count
                name = f"{part[0]}-{part[-1]}-{count}-{digest[:12]}.h5"
                path = folder / "render" / safe(row.layer.name) / name
                tasks.append(
                    Task("render", str(path), digest, cost * count, row.layer.name, part, row.canvas, row.preset)
                )
        return tasks

    def examples_tasks(
        self, folder: Path, todo: Sequence[tuple[int, int]], workers: int, given: bytes = b""
    ) -> list[Task]:
        """Tasks for the (start, end) ranges of photographs that no finished shard covers yet; `given` the ranges.

        How they are cut changes nothing in what they give when they are merged.
        """
        digest, count = self.examples_digest, len(self.setup.dataset.photos)
        each, examples = self.examples_seconds / count, self.config.examples
        left = each * sum(end - start for start, end in todo)
        longest = min(self.config.engine.task_seconds, each * examples.portion(count))
        tasks = []
        for start, end in todo:
            for size in portions(
                end - start, each, left, workers or self.pool.workers, longest, examples.batch, examples.batch
            ):
                path = folder / "examples" / f"{start}-{start + size}-{digest[:12]}.h5"
                tasks.append(
                    Task("examples", str(path), digest, each * size, start=start, end=start + size, given=given)
                )
                start, left = start + size, left - each * size
        return tasks

    @property
    def examples_digest(self) -> str:
        """Digest of everything that changes examples and statistics."""
        return examples_digest(self.setup, self.dataset_fingerprint)


def portions(
    count: int, each: float, left: float, workers: int, longest: float, batch: int, least: int
) -> Iterator[int]:
    """Cut `count` things of `each` seconds, with `left` seconds of work in all from here on for `workers`.

    Guided self-scheduling (Polychronopoulos & Kuck, IEEE Trans. Computers 1987): a portion is a fixed part of
    the work left for each worker, so that portions shrink towards the end and nobody is waited for long. None
    takes over `longest` seconds; all but small ones are whole batches; and none is under `least`.
    """
    while count:
        size = int(min(longest, left / (SHARE * workers)) / each + 1e-9)
        if size > batch:
            size -= size % batch
        # The estimate may know no better than that a single one takes longer than that.
        size = min(count, max(size, min(least, max(1, int(longest / each)))))
        yield size
        count, left = count - size, left - size * each


def _record(layer: Layer, **settings: Any) -> dict[str, Any]:
    """One row of the plan's table."""
    described = {
        "layer": layer.name,
        "preset": settings.pop("preset"),
        "kind": layer.kind,
        "channels": layer.channels,
        "map": f"{layer.height}x{layer.width}",
        "receptive_field": _field(layer),
        "stride": layer.field.stride[0] if layer.field else "",
    }
    return described | settings


def _field(layer: Layer) -> str:
    return "whole image" if layer.field is None else "x".join(map(str, layer.field.size))


def make_plan(
    config: Config, timed: bool = True, look: Callable[[Plan], RemainingWork] | None = None, units: Units | None = None
) -> Plan:
    """Load the network, find and choose layers, list photographs, and estimate: seconds, not minutes.

    `look` says what of the plan is still to be made: no time is spent on estimates of anything else. With
    `timed=False` nothing is timed, and every picture costs a second: for what wants no estimate. `units` says which
    channels of which layers, whatever the configuration chooses.

    Raises `AtlasError` for everything that is wrong with the input, before any work starts.
    """
    if config.model.folder is None:
        # Workers may stand in another folder.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, folder=str(Path.cwd())))
    keep_memory()
    started, loading = own_start(), Lap()
    with loading:
        model = load(config.model).to("cpu")
    dataset = datasets.listing(config.data, model.recipe.channels)
    fingerprint = shards.digest_of(datasets.fingerprint(dataset, model.recipe))
    base = based_on(config)
    if base is not None:
        check(base, config, model, fingerprint)
    candidates = selection.found_layers(model, config.layers, config.model.aliases)
    asked = _asked(config, model, candidates, base) if units is None else units
    chosen = [layer for layer in candidates if layer.name in asked]
    heads = selection.logit_layers(model, candidates)
    model = with_labels(model, heads, given=config.model.labels is not None)
    config = dataclasses.replace(
        config,
        render=loaded(config.render, "render"),
        also=tuple(loaded(preset, f"also.{preset.name}") for preset in config.also),
    )
    others = validate_request(config, model, candidates, chosen, heads)
    channels = {layer.name: channels_to_render(layer, asked[layer.name], config) for layer in chosen}
    empty = [name for name, numbers in channels.items() if not numbers]
    if len(empty) == len(chosen):
        raise AtlasError(f"layers.channels={config.layers.channels} leaves no channel in any layer.")
    for name in empty:
        log.warning("%s has none of the channels %s and is left out", name, config.layers.channels)
    chosen = [layer for layer in chosen if channels[layer.name]]
    reasons = layers_without_gradient(model, chosen)
    for name, reason in reasons.items():
        log.warning("%s gets dataset examples but no visualizations: %s", name, reason)
    cpus, gpus = local_resources()
    pictures = sum(len(channels[layer.name]) for layer in chosen if layer.name not in reasons) * len(config.presets)
    team = size_pool(config.engine, [(cpus, gpus)], pictures)
    torch.set_num_threads(cpus)
    pairs = functools.cache(loading.timed(lambda: foldable(model)))
    folded = functools.cache(lambda: fold(model, pairs()))
    network = network_digest(model, config.model)
    fields: dict[str, ReceptiveField | None] = {}
    for folder in (base.path if base else None, config.folder):
        known = manifest.read(folder) if folder else None
        fields |= known.fields(network, chosen) if known else {}
    unknown = [layer for layer in chosen if layer.name not in fields]
    fields |= receptive_fields(folded(), unknown) if unknown else {}
    chosen = [dataclasses.replace(layer, field=fields[layer.name]) for layer in chosen]
    unrendered = tuple(Unrendered(la, channels[la.name], reasons[la.name]) for la in chosen if la.name in reasons)
    rendered = [layer for layer in chosen if layer.name not in reasons]
    canvases = {preset.name: choose_canvas_sizes(model, rendered, preset) for preset in config.presets}
    torch.set_num_threads(min(team.threads, cpus))
    rows = tuple(
        PlanRow(la, channels[la.name], sizes[la.name], len(channels[la.name]), name)
        for name, sizes in canvases.items()
        for la in rendered
    )
    setup = Setup(config, model.digest, tuple(chosen), dataset, team.threads, team.device, others)
    if any(preset.needs_examples for preset in config.presets):
        setup = dataclasses.replace(setup, begins=examples_digest(setup, fingerprint))
    everything = RemainingWork({(row.layer.name, row.preset): len(row.channels) for row in rows}, len(dataset.photos))
    made = Plan(
        config, rows, setup, team, len(dataset.photos), model.labels, model.recipe, fingerprint, network, everything,
        unrendered=unrendered,
    )  # fmt: skip
    made = made if look is None else dataclasses.replace(made, left=look(made))
    if not timed or made.left.nothing:
        return made
    here = team.device if not team.device.startswith("cuda") or torch.cuda.is_available() else "cpu"
    open_rows = [row for row in rows if made.left.channels[row.layer.name, row.preset]]
    deepest = max(open_rows, key=lambda row: row.layer.cost, default=None)
    read_layers = [*([deepest.layer] if deepest else chosen[-1:]), *others]
    precision = precision_of(config.engine.precision, torch.device(here).type)
    torch.set_num_threads(cpus)
    verified = functools.partial(
        verified_variants, model.to(here), pairs(), read_layers, precision, deepest.canvas if deepest else None
    )
    began = perf_counter()
    variants = verified()
    if perf_counter() - began < MOSTLY_WARM_UP:
        # Much of so short a time is a warm-up, which must not be counted once for each layer.
        began = perf_counter()
        verified()
    variant = perf_counter() - began
    torch.set_num_threads(min(team.threads, cpus))
    if variants.reason:
        log.info("steps run on the %s network: %s", variants.level, variants.reason)
    # A worker does the same for every layer, as far as that layer, with the threads that it has.
    variant *= cpus / min(team.threads, cpus)
    variant /= max(1.0, deepest.layer.cost if deepest else 1.0)
    found, timings = estimate(variants.folded, chosen, open_rows, config, others, variants.steps)
    # Photographs are decoded by as many threads as a worker has.
    to_read = made.left.photographs or made.left.looks
    read = reading(dataset, model.recipe) * (1 / team.threads) if to_read else NONE
    costs = Overheads(started, Span.sure(loading.seconds), Span.sure(timings.warm_up), timings.forward, read)
    better = {
        (row.layer.name, row.preset): dataclasses.replace(row, seconds=row.seconds + variant * row.layer.cost)
        for row in found
    }
    return dataclasses.replace(
        made,
        rows=tuple(better.get((row.layer.name, row.preset), row) for row in rows),
        examples_seconds=costs.photograph * len(dataset.photos),
        overheads=costs,
    )


def _asked(config: Config, model: Model, candidates: Sequence[Layer], base: RunFolder | None) -> Units:
    """Channels by layer as the configuration chooses them: by table and condition, or else by policy."""
    wanted = config.layers
    listed = selected(config.units, config.only, base.path if base else None, config.render.name, candidates)
    if listed is None:
        return {
            layer.name: selection.channels_of(layer, wanted.channels)
            for layer in selection.choose(model, candidates, wanted)
        }
    within = selection.narrowed([layer for layer in candidates if layer.name in listed], candidates, wanted)
    if not within:
        raise AtlasError("layers.include and layers.exclude leave none of the layers that units and only choose.")
    return {layer.name: listed[layer.name] for layer in within}
