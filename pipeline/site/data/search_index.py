"""Data about the whole atlas for the scripts of the pages: layers, words to search, the map, families; a shard each."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.hashing import digest_of
from pipeline.core.metric_specs import GRID_METRICS, METRICS, UNIT_METRICS
from pipeline.core.units import Unit
from pipeline.names.book import earned_words
from pipeline.site.config import SiteConfig
from pipeline.site.context.families import Family
from pipeline.site.context.layer_summary import Catalogue, LayerSummary, PresetSummary, list_limits
from pipeline.site.data.class_index import PER_SHARD, class_entries
from pipeline.site.data.js_shards import shard_script, to_json
from pipeline.site.data.unit_records import columns, labels_of
from pipeline.site.media import map_tiles
from pipeline.site.media.chunks import SUFFIX, choose_showing, image_table
from pipeline.site.media.size_budget import Sizes
from pipeline.site.media.sprites import side
from pipeline.site.output import write
from pipeline.store import Atlas, LayerView


@dataclasses.dataclass(frozen=True)
class UnitMap:
    """The map of units.

    Attributes:
        key: Digest of the activations that the map was computed from.
        method: Name of the projection.
        places: Coordinates of each unit, (units, 2) int, 0 … 4095.
        ranks: Place of each unit in the sheets of its layer's tiny images, from the same activations, (units,).
    """

    key: str
    method: str
    places: np.ndarray
    ranks: np.ndarray

    def state(self) -> dict[str, Any]:
        """Return the map as plain data, for the next build."""
        return {"key": self.key, "method": self.method, "places": self.places.tolist(), "ranks": self.ranks.tolist()}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "UnitMap":
        """Return the map with the given `state`."""
        places, ranks = np.asarray(state["places"], int), np.asarray(state["ranks"], int)
        return UnitMap(state["key"], state["method"], places, ranks)


@dataclasses.dataclass(frozen=True)
class IndexInputs:
    """The inputs of `write_all`.

    Attributes:
        atlas: The atlas.
        layers: Facts of all layers, in order.
        catalogue: Dataset images and labels.
        families: Families of units.
        sizes: Sizes of images, and numbers of units per file.
        config: Settings of the site.
        ranks: For each layer, the place of each unit in the sheets of tiny images, (C',).
        unit_map: The map of units, or None if there is none.
        digests: Digest of each layer's files, by layer name.
        reused: Names of the layers whose files were taken over from the previous build.
        similar: What the pages need to find the similar units.
    """

    atlas: Atlas
    layers: Sequence[LayerSummary]
    catalogue: Catalogue
    families: Sequence[Family]
    sizes: Sizes
    config: SiteConfig
    ranks: Sequence[np.ndarray]
    unit_map: UnitMap | None
    digests: Mapping[str, str]
    reused: Collection[str]
    similar: Mapping[str, object] = dataclasses.field(default_factory=dict)


def write_all(root: Path, inputs: IndexInputs) -> int:
    """Write the shards `index`, `search`, `families`, `classes` and `map`, and two for each layer that is not reused.

    Returns:
        The number of classes.
    """
    views = [inputs.atlas[facts.name].with_cache() for facts in inputs.layers]
    search = _write_layers(root, inputs, views)
    entries = class_entries(views, inputs.layers, inputs.ranks, inputs.catalogue)
    for start in range(0, len(entries), PER_SHARD):
        _shard(root, f"classes/{start}", [entry.record() for entry in entries[start : start + PER_SHARD]])
    search["classes"] = [entry.name for entry in entries]
    _shard(root, "search", search)
    concepts = _concepts(inputs)
    if concepts:
        _shard(root, "concepts", concepts)
    versions = {"words": digest_of(search)[:8], "concepts": digest_of(concepts)[:8] if concepts else ""}
    _shard(root, "index", _index(inputs, len(entries)) | {key: value for key, value in versions.items() if value})
    family_numbers: dict[str, list[int]] = {}
    for number, family in enumerate(inputs.families):
        for member in family.present:
            family_numbers.setdefault(member.name, []).append(number)
    _shard(root, "families", family_numbers)
    if inputs.unit_map is not None:
        x, y = inputs.unit_map.places[:, 0].tolist(), inputs.unit_map.places[:, 1].tolist()
        tiny = [rank.tolist() for rank in inputs.ranks]
        tiles = {
            "levels": map_tiles.levels_for(len(x)),
            "many": map_tiles.MANY,
            "tile": map_tiles.TILE,
            "cell": map_tiles.CELL_PX,
        }
        _shard(root, "map", {"method": inputs.unit_map.method, "x": x, "y": y, "tiny": tiny, "tiles": tiles})
    return len(entries)


def _concepts(inputs: IndexInputs) -> dict[str, Any]:
    """Return words and the units nearest to each in the space of the first CLIP model; empty without one.

    A word has the number of the layer, the row and the cosine in thousandths of each unit, one after the other.
    """
    if not inputs.catalogue.book.clip:
        return {}
    found = inputs.catalogue.book.clip[0]
    known = {
        Unit(facts.name, channel): (facts.order, row)
        for facts in inputs.layers
        for row, channel in enumerate(facts.channels)
    }
    places = [known.get(found.unit(number)) for number in range(len(found.layer))]
    units = []
    for numbers, cosines in zip(found.search_units.tolist(), found.search_cosines.tolist(), strict=True):
        shown = [(places[n], cosine) for n, cosine in zip(numbers, cosines, strict=True) if n >= 0]
        units.append([value for place, cosine in shown if place for value in (*place, round(1000 * cosine))])
    return {"model": found.model, "words": list(found.search_words), "units": units}


def _index(inputs: IndexInputs, classes: int) -> dict[str, Any]:
    """Return what every page needs: the layers, the families, the number of classes, and how images are in files."""
    attributes, config, sizes, digests = inputs.atlas.attributes, inputs.config, inputs.sizes, inputs.digests
    images = len(image_table(inputs.atlas))
    return {
        "title": config.title,
        "model": str(attributes.get("model", "")),
        "identity": str(attributes.get("identity", ""))[:12],
        "suffix": SUFFIX[config.format],
        "photo_suffix": SUFFIX[config.photo_format],
        "licence": config.licence,
        **({"url": config.url} if config.url else {}),
        "images": len(inputs.catalogue.paths),
        "sources": inputs.catalogue.sources,
        "classes": classes,
        **inputs.similar,
        "layers": [[f.name, f.slug, f.kind, runs(f.channels), digests[f.name][:8], f.total] for f in inputs.layers],
        "families": [[family.name, family.href, len(family.present)] for family in inputs.families],
        "aliases": dict(config.aliases),
        "metrics": {
            metric.name: {"title": metric.title, "explanation": metric.explanation, "percent": metric.percent}
            for metric in METRICS
        },
        "quality": [metric.name for metric in UNIT_METRICS],
        "grid": [metric.name for metric in GRID_METRICS],
        "sizes": {
            "shard": sizes.per_shard,
            "heat": sizes.per_heat,
            "photo": [sizes.per_photo, side(sizes.per_photo), images],
            "thumb": [sizes.per_thumb, side(sizes.per_thumb), sizes.thumb_px],
            "tiny": [sizes.per_tiny, side(sizes.per_tiny), sizes.tiny_px],
            "classes": PER_SHARD,
        },
    }


def _write_layers(root: Path, inputs: IndexInputs, views: Sequence[LayerView]) -> dict[str, Any]:
    """Write two shards for each layer that is not reused; return the words of all units for the search.

    A unit has the index of its word, −1 for none; a layer without any word has an empty list. `more` has the other
    names that are earned: number of the layer, row of the unit and index of the word, one after the other.
    """
    vocabulary: dict[str, int] = {}
    word_numbers, more = [], []
    store, boxes = inputs.atlas.examples_store, bool(image_table(inputs.atlas))
    for layer, facts, rank in zip(views, inputs.layers, inputs.ranks, strict=True):
        places, words = labels_of(layer, facts, inputs.catalogue)
        numbers = [vocabulary.setdefault(word, len(vocabulary)) for word in words]
        word_numbers.append([numbers[i] if i >= 0 else -1 for i in places] if words else [])
        for row, names in enumerate(inputs.catalogue.book.names(layer)):
            title = words[places[row]] if places[row] >= 0 else ""
            for word in earned_words(names):
                if word != title:
                    more += [facts.order, row, vocabulary.setdefault(word, len(vocabulary))]
        if facts.name not in inputs.reused:
            showing = choose_showing(store, boxes, max(facts.aperture), inputs.config, inputs.sizes)
            _shard(root, f"{facts.slug}/layer", _layer(layer, facts, showing.celled, inputs, rank))
            _shard(root, f"{facts.slug}/grid", columns(layer, facts, inputs.catalogue))
    return {"words": list(vocabulary), "units": word_numbers, "more": more}


def _layer(
    layer: LayerView, facts: LayerSummary, celled: Sequence[str], inputs: IndexInputs, rank: np.ndarray
) -> dict[str, Any]:
    """Return what the pages of a layer's units need; the columns that its grid is sorted by are a separate shard.

    `celled` are the example lists with crops of their own.
    """
    sizes, config = inputs.sizes, inputs.config
    counts = _example_counts(layer, config)
    cells = sum(counts.get(name, 0) for name in celled)
    crops = [sizes.per_crops(cells), cells, side(sizes.per_crops(cells) * cells), sizes.example_px] if cells else None
    return {
        "name": facts.name,
        "kind": facts.kind,
        "reference": facts.reference,
        "map": facts.map_size,
        "field": facts.receptive_field,
        "grid": layer.receptive_field_grid,
        "input": facts.input_size,
        "whole": facts.sees_whole_input,
        "edges": layer.spectrum_edges,
        "crops": crops,
        "heat": layer.heat_maps() is not None and config.licence != "ids",
        "tiny": rank.tolist(),
        "rendered": [_rendered(rendered, sizes) for rendered in facts.rendered],
        "absent": _absent(layer, facts),
    }


def _absent(layer: LayerView, facts: LayerSummary) -> list[int]:
    """Return the rows of the units without the first visualization: their small images show something else."""
    if not facts.rendered:
        return []
    status = layer.measurements(facts.rendered[0].key, ("status",))["status"][:, 0]
    return np.flatnonzero(status == "missing").tolist()


def _example_counts(layer: LayerView, config: SiteConfig) -> dict[str, int]:
    """Return the number of examples per unit that the site shows, by list."""
    counts = {}
    for name, limit in list_limits(layer, config).items():
        examples = layer.examples(name)
        if examples is None:
            continue
        bins = max(1, len(layer.spectrum_edges) - 1) if name == "spectrum" else 1
        counts[name] = bins * min(limit, examples.index.shape[1] // bins)
    return counts


def _rendered(rendered: PresetSummary, sizes: Sizes) -> dict[str, Any]:
    height, width = sizes.picture(rendered.height, rendered.width)
    per_sheet = sizes.per_picture(height, width, rendered.variants)
    return {
        "key": rendered.key,
        "title": rendered.title,
        "objective": rendered.objective,
        "preset": rendered.preset,
        "digest": rendered.digest,
        "natural": rendered.natural,
        "sheet": [per_sheet, rendered.variants, side(per_sheet * rendered.variants), width, height],
        "stored": [rendered.height, rendered.width],
        "masked": rendered.masked,
        "path": list(rendered.path_layers),
        "display": rendered.display
        and {
            "digest": rendered.display.digest,
            "size": [rendered.display.width, rendered.display.height],
            "channels": rendered.display.channels,
        },
    }


def _shard(root: Path, name: str, value: Any) -> None:
    write(root, f"data/{name}.js", shard_script(name, to_json(value)))


def runs(channels: Sequence[int]) -> list[list[int]]:
    """Return channels as [first, last] ranges: [0, 1, 2, 5] → [[0, 2], [5, 5]]."""
    ranges: list[list[int]] = []
    for channel in channels:
        if ranges and channel == ranges[-1][1] + 1:
            ranges[-1][1] = channel
        else:
            ranges.append([channel, channel])
    return ranges
