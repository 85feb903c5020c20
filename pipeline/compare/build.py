"""Build the comparison site: tables, data shards, sheets of images and pages, in one folder that opens from disk."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.compare.alignment import Comparison, Part, align
from pipeline.compare.contact_sheets import choose, per_thumb, shapes, write_sheets
from pipeline.compare.effects import table
from pipeline.compare.examples import LayerExamples, write_examples
from pipeline.compare.pages import Pages, code
from pipeline.compare.runs import RunComparison
from pipeline.core.hashing import digest_of
from pipeline.core.metric_specs import Metric
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Catalogue, LayerSummary, summarize
from pipeline.site.data.js_shards import rounded_decimals, shard_script, shortest_decimals, to_json
from pipeline.site.data.search_index import runs
from pipeline.site.data.unit_records import labels_of
from pipeline.site.hosting import hosts
from pipeline.site.media.chunks import SUFFIX
from pipeline.site.media.size_budget import Sizes
from pipeline.site.media.sprites import side
from pipeline.site.output import replacing, write
from pipeline.store.shards import safe_name


@dataclasses.dataclass(frozen=True)
class Compared:
    """Result of a build: the comparison, and the size of its folder."""

    comparison: Comparison
    host: hosts.Report


@dataclasses.dataclass(frozen=True)
class BuildContext:
    """Inputs that all steps of one build share.

    Attributes:
        root: Folder that the site is written to.
        inputs: The open runs.
        config: Configuration of the site.
        sizes: Sizes of images and numbers of units per file.
    """

    root: Path
    inputs: RunComparison
    config: SiteConfig
    sizes: Sizes


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What was written of a layer.

    Attributes:
        part: Numbers of the layer, with the distances between images.
        facts: Summary of the layer.
        labels: Label of each unit, or an empty string.
        digest: Digest of the layer's files.
    """

    part: Part
    facts: LayerSummary
    labels: list[str]
    digest: str


def build(
    inputs: RunComparison,
    out: Path,
    config: SiteConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compared:
    """Compare runs, and write compare.parquet, compare.csv, summary.csv, effects.csv and the site to `out`.

    An existing comparison is replaced once everything is written. The same atlases give the same bytes.

    Args:
        inputs: The open runs.
        out: Folder to write.
        config: Configuration of the site.
        progress: Function that is called with (units done, units in all) as the site is built.

    Raises:
        AtlasError: If `out` contains files that are not a site of this program.
    """
    comparison = align(inputs)
    sizes = choose(inputs, comparison.layers, config)
    total, done = sum(len(part.channels) for part in comparison.layers), 0
    with replacing(out) as root:
        context = BuildContext(root, inputs, config, sizes)
        results = []
        for order, part in enumerate(comparison.layers):
            results.append(_write_layer(context, comparison.measures, part, order))
            done += len(part.channels)
            progress(done, total)
        comparison = dataclasses.replace(comparison, layers=tuple(result.part for result in results))
        digests = [result.digest for result in results]
        effects = [str(one) for one in comparison.effects]
        identity = digest_of([digests, [contender.label for contender in comparison.contenders], effects, code()])[:12]
        _write_indices(context, comparison, results, identity)
        _write_tables(root, comparison)
        pages = Pages(root, inputs, comparison, [result.facts for result in results], config, identity)
        pages.write_static()
        pages.write()
        return Compared(comparison, hosts.weighed(root))


def _write_tables(root: Path, comparison: Comparison) -> None:
    units = comparison.units()
    units.to_parquet(root / "compare.parquet", index=False)
    units.to_csv(root / "compare.csv", index=False)
    comparison.summary().to_csv(root / "summary.csv", index=False)
    if comparison.effects:
        table(comparison.effects).to_csv(root / "effects.csv", index=False)


def _facts(inputs: RunComparison, part: Part, order: int) -> LayerSummary:
    """Return the summary of a layer, with the units that at least one contender has."""
    atlas = next(atlas for atlas in inputs.atlases if part.name in atlas.layers)
    facts = summarize(atlas[part.name], order, atlas.labels)
    return dataclasses.replace(facts, channels=tuple(part.channels.tolist()), rendered=())


def _labels(inputs: RunComparison, part: Part) -> list[str]:
    """Return the label of each unit from the first run that has one, or an empty string."""
    labels: dict[int, str] = {}
    for atlas in dict.fromkeys(inputs.atlases):
        if part.name in atlas.layers:
            layer, catalogue = atlas[part.name], Catalogue.of(atlas)
            indices, words = labels_of(layer, summarize(layer, 0, catalogue.classes), catalogue)
            for channel, index in zip(layer.channels.tolist(), indices, strict=True):
                if index >= 0:
                    labels.setdefault(channel, words[index])
    return [labels.get(channel, "") for channel in part.channels.tolist()]


def _write_layer(context: BuildContext, measures: Sequence[Metric], part: Part, order: int) -> LayerResult:
    """Write the sheets and shards of one layer and of its units."""
    facts = _facts(context.inputs, part, order)
    sheets = write_sheets(context.root, context.inputs, part, facts.slug, context.sizes, context.config)
    part = dataclasses.replace(part, difference=sheets.difference)
    labels = _labels(context.inputs, part)
    examples = write_examples(context.root, context.inputs, part, facts.slug, context.sizes, context.config)
    layer = {
        "name": part.name,
        "tiny": list(range(len(part.channels))),
        "sheets": [shape and shape.sheet(context.sizes) for shape in shapes(context.inputs, part.name)],
        "examples": examples.groups,
    }
    units = _unit_records(context.inputs, measures, part, labels, examples)
    per_shard = context.sizes.per_shard
    shards: dict[str, Any] = {"layer": layer}
    for start in range(0, len(units), per_shard):
        shards[f"u{start}"] = {"units": units[start : start + per_shard]}
    digest = hashlib.sha256((sheets.digest + examples.digest).encode())
    for name, value in shards.items():
        content = to_json(value)
        digest.update(content.encode())
        write(context.root, f"data/{facts.slug}/{name}.js", shard_script(f"{facts.slug}/{name}", content))
    return LayerResult(part, facts, labels, digest.hexdigest())


def _unit_records(
    inputs: RunComparison, measures: Sequence[Metric], part: Part, labels: Sequence[str], examples: LayerExamples
) -> list[dict[str, Any]]:
    """Return the JSON record of each unit of a layer."""
    images = _image_records(inputs, part)
    values = {measure.name: [shortest_decimals(row) for row in part.of(measure.name)] for measure in measures}
    dataset_max, difference = [shortest_decimals(row) for row in part.dataset_max], shortest_decimals(part.difference)
    units = []
    for row, channel in enumerate(part.channels.tolist()):
        unit: dict[str, Any] = {
            "channel": channel,
            "values": {name: [numbers[row] for numbers in rows] for name, rows in values.items()},
            "natural": [numbers[row] for numbers in dataset_max],
            "difference": difference[row],
            "pictures": [records.get(channel) for records in images],
        }
        if examples.records:
            unit["examples"] = [by_channel.get(channel, []) for by_channel in examples.records]
        if labels[row]:
            unit["label"] = labels[row]
        units.append(unit)
    return units


def _image_records(inputs: RunComparison, part: Part) -> list[Mapping[int, list[dict[str, Any]]]]:
    """Return status, seed and activation of each feature visualization, by channel, for each contender."""
    contender_records = []
    for atlas, contender in zip(inputs.atlases, inputs.contenders, strict=True):
        by_channel: dict[int, list[dict[str, Any]]] = {}
        if part.name in atlas.layers and contender.preset in atlas[part.name].presets:
            layer = atlas[part.name]
            numbers = layer.measurements(contender.preset)
            for row, channel in enumerate(layer.channels.tolist()):
                activations = shortest_decimals(numbers["activation"][row])
                seeds = numbers.get("seed", np.full(numbers["status"].shape, "", object))[row]
                by_channel[channel] = [
                    {"status": str(status), "seed": str(seed), "activation": activation}
                    for status, seed, activation in zip(numbers["status"][row], seeds, activations, strict=True)
                ]
        contender_records.append(by_channel)
    return contender_records


def _write_indices(
    context: BuildContext, comparison: Comparison, results: Sequence[LayerResult], identity: str
) -> None:
    """Write the shards that belong to no layer: the index, the search index, and the values of each measure."""
    shards: dict[str, Any] = {
        "index": _index(context, comparison, results, identity),
        "search": _search_index(results),
    }
    for measure in comparison.measures:
        values = [[rounded_decimals(row) for row in part.of(measure.name)] for part in comparison.layers]
        shards[f"measures/{safe_name(measure.name)}"] = values
    shards["difference"] = [rounded_decimals(part.difference) for part in comparison.layers]
    for name, value in shards.items():
        write(context.root, f"data/{name}.js", shard_script(name, to_json(value)))


def _index(
    context: BuildContext, comparison: Comparison, results: Sequence[LayerResult], identity: str
) -> dict[str, Any]:
    """Return the index that the scripts of all pages read: layers, contenders, measures and sizes."""
    sizes, config = context.sizes, context.config
    count = len(comparison.contenders)
    thumbs = per_thumb(sizes, count)
    layers = []
    for result in results:
        facts = result.facts
        layers.append([facts.name, facts.slug, facts.kind, runs(facts.channels), result.digest[:8], facts.total])
    return {
        "title": config.title,
        "model": str(context.inputs.first.attributes.get("model", "")),
        "identity": identity,
        "suffix": SUFFIX[config.format],
        "photo_suffix": SUFFIX[config.photo_format],
        "layers": layers,
        "families": [],
        "aliases": {},
        "contenders": [{"label": c.label, "run": c.run, "preset": c.preset} for c in comparison.contenders],
        "measures": [_measure_entry(comparison, measure) for measure in comparison.measures],
        "main": comparison.main.name,
        "sizes": {
            "shard": sizes.per_shard,
            "thumb": [thumbs, side(thumbs * count), sizes.thumb_px],
            "tiny": [sizes.per_tiny, side(sizes.per_tiny), sizes.tiny_px],
        },
    }


def _measure_entry(comparison: Comparison, measure: Metric) -> dict[str, Any]:
    contenders = range(len(comparison.contenders))
    return {
        "name": measure.name,
        "title": measure.title,
        "better": measure.better,
        "says": measure.description,
        "signs": [comparison.better(measure, at) for at in contenders],
        "alike": [[comparison.comparable(measure, a, b) for b in contenders] for a in contenders],
    }


def _search_index(results: Sequence[LayerResult]) -> dict[str, Any]:
    """Return all labels, and for each layer the label index of each unit, −1 for none; empty without labels."""
    vocabulary: dict[str, int] = {}
    units = []
    for result in results:
        indices = [vocabulary.setdefault(label, len(vocabulary)) if label else -1 for label in result.labels]
        units.append(indices if any(index >= 0 for index in indices) else [])
    return {"words": list(vocabulary), "units": units}
