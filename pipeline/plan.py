"""What a run will do: the table of layers and channels, the tasks, and how long they may take."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from pipeline import datasets, policies, shards
from pipeline.config import Config
from pipeline.engine import Crew, crew, local_resources
from pipeline.errors import AtlasError
from pipeline.estimates import Row, estimate
from pipeline.feasibility import check_labels, fitting, refuse_nonsense, units_of
from pipeline.fields import receptive_fields
from pipeline.files import loaded
from pipeline.folding import fold
from pipeline.layers import Layer
from pipeline.models import load
from pipeline.policies import LayersConfig
from pipeline.recipes import Recipe
from pipeline.shards import safe
from pipeline.tasks import Setup, Task, examples_digest, render_digest
from pipeline.worker import keep_memory

log = logging.getLogger(__name__)

# A task takes one in so many parts of the work that is left for each worker; and, on CPUs, not under so many seconds.
SHARE = 4
LEAST_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole run: rows by preset, in the order of computation, and what workers need."""

    config: Config
    rows: tuple[Row, ...]
    setup: Setup
    crew: Crew
    examples_seconds: float
    labels: tuple[str, ...]
    recipe: Recipe
    dataset_fingerprint: str

    @property
    def layers(self) -> tuple[tuple[Layer, tuple[int, ...]], ...]:
        """Each layer once, with its channels."""
        main = self.config.render.name
        return tuple((row.layer, row.channels) for row in self.rows if row.preset == main)

    @property
    def units(self) -> int:
        """Number of units (layer:channel pairs)."""
        return sum(len(channels) for _, channels in self.layers)

    @property
    def work(self) -> int:
        """Number of units to be rendered: each counts once for every preset."""
        return sum(len(row.channels) for row in self.rows)

    @property
    def eta(self) -> float:
        """Estimated seconds of the whole run, examples included."""
        return (sum(row.seconds for row in self.rows) + self.examples_seconds) / self.crew.workers

    def written(self) -> pd.DataFrame:
        """The table as it goes into plan.csv: the layers, the dataset pass and the total."""
        layers = self.table()
        examples = round(self.examples_seconds / self.crew.workers, 1)
        ends = pd.DataFrame(
            [
                {"kind": "photographs", "units": len(self.setup.dataset.photos), "seconds": examples},
                {"kind": "total", "units": self.work, "seconds": round(self.eta, 1)},
            ]
        )
        return pd.concat([layers, ends], ignore_index=True)

    def table(self) -> pd.DataFrame:
        """One row a layer, as it is printed."""
        return pd.DataFrame(
            [
                {
                    "layer": row.layer.name,
                    "preset": row.preset,
                    "kind": row.layer.kind,
                    "channels": row.layer.channels,
                    "map": f"{row.layer.height}x{row.layer.width}",
                    "receptive_field": _field(row.layer),
                    "stride": row.layer.field.stride[0] if row.layer.field else "",
                    "units": len(row.channels),
                    "canvas": row.canvas[0] if row.canvas[0] == row.canvas[1] else "x".join(map(str, row.canvas)),
                    "seconds": round(row.seconds / self.crew.workers, 1),
                    "channel_list": " ".join(map(str, row.channels)),
                }
                for row in self.rows
            ]
        )

    def render_tasks(self, folder: Path, done: Mapping[Row, set[int]], workers: int = 0) -> list[Task]:
        """Tasks for the channels of rows that no finished shard holds yet, the dearest rows first.

        Cut from estimated cost for `workers` (this machine's, if none are given): see `portions`.
        """
        engine = self.config.engine
        missing = {row: [c for c in row.channels if c not in done[row]] for row in self.rows}
        each = {row: row.seconds / len(row.channels) for row in self.rows}
        left = sum(each[row] * len(channels) for row, channels in missing.items())
        tasks = []
        for row in sorted(self.rows, key=lambda row: -each[row]):
            own, cost = missing[row], each[row]
            batch = max(1, engine.batch // self.config.preset(row.preset).variants)
            # A GPU takes as long for one picture as for a batch; a core does not.
            least = batch if self.crew.gpus else min(batch, math.ceil(LEAST_SECONDS / cost))
            digest = render_digest(self.setup, row.layer, row.canvas, row.preset)
            for count in portions(
                len(own), cost, left, workers or self.crew.workers, engine.task_seconds, batch, least
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
                end - start, each, left, workers or self.crew.workers, longest, examples.batch, examples.batch
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


def _field(layer: Layer) -> str:
    return "whole image" if layer.field is None else "x".join(map(str, layer.field.size))


def make_plan(config: Config, timed: bool = True) -> Plan:
    """Load the network, find and choose layers, list photographs, and estimate: seconds, not minutes.

    With `timed=False` nothing is timed, and every picture costs a second: for what wants no estimate.

    Raises `AtlasError` for everything that is wrong with the input, before any work starts.
    """
    if config.model.folder is None:
        # Workers may stand in another folder.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, folder=str(Path.cwd())))
    model = load(config.model).to("cpu")
    dataset = datasets.listing(config.data, model.recipe.channels)
    wanted = config.layers
    candidates = policies.found_layers(model, wanted, config.model.aliases)
    chosen = policies.choose(model, candidates, wanted)
    heads = policies.choose(model, candidates, LayersConfig("logits"))
    if config.model.labels is not None:
        check_labels(model, heads)
    config = dataclasses.replace(
        config,
        render=loaded(config.render, "render"),
        also=tuple(loaded(preset, f"also.{preset.name}") for preset in config.also),
    )
    others = refuse_nonsense(config, model, candidates, chosen, heads)
    channels = {layer.name: units_of(layer, config) for layer in chosen}
    empty = [name for name, numbers in channels.items() if not numbers]
    if len(empty) == len(chosen):
        raise AtlasError(f"layers.channels={config.layers.channels} leaves no channel in any layer.")
    for name in empty:
        log.warning("%s has none of the channels %s and is left out", name, config.layers.channels)
    chosen = [layer for layer in chosen if channels[layer.name]]
    cpus, gpus = local_resources()
    pictures = sum(map(len, channels.values())) * len(config.presets)
    team = crew(config.engine, [(cpus, gpus)], pictures)
    torch.set_num_threads(cpus)
    keep_memory()
    folded = fold(model)
    fields = receptive_fields(folded, chosen)
    chosen = [dataclasses.replace(layer, field=fields[layer.name]) for layer in chosen]
    canvases = {preset.name: fitting(folded, chosen, preset) for preset in config.presets}
    torch.set_num_threads(min(team.threads, cpus))
    here = team.device if not team.device.startswith("cuda") or torch.cuda.is_available() else "cpu"
    if timed:
        rows, per_photo = estimate(folded.to(here), chosen, channels, canvases, config, others)
    else:
        rows = [
            Row(la, channels[la.name], sizes[la.name], len(channels[la.name]), name)
            for name, sizes in canvases.items()
            for la in chosen
        ]
        per_photo = 1.0
    setup = Setup(config, model.digest, tuple(chosen), dataset, team.threads, team.device, others)
    fingerprint = shards.digest_of(datasets.fingerprint(dataset, model.recipe))
    if any(preset.needs_examples for preset in config.presets):
        setup = dataclasses.replace(setup, begins=examples_digest(setup, fingerprint))
    return Plan(
        config, tuple(rows), setup, team, per_photo * len(dataset.photos), model.labels, model.recipe, fingerprint
    )
