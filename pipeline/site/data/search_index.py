"""What the pages' script knows of the whole atlas: layers, words to search, the map, families, each a shard."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.site.config import SiteConfig
from pipeline.site.context.families import Family
from pipeline.site.context.layer_summary import Catalogue, Facts
from pipeline.site.data.js_shards import put, text
from pipeline.site.data.unit_records import columns, labels_of
from pipeline.site.media.chunks import SUFFIX, showing_of, table_of
from pipeline.site.media.size_budget import Sizes
from pipeline.site.media.sprites import side
from pipeline.site.output import write
from pipeline.store.reader import Atlas, LayerView


@dataclasses.dataclass(frozen=True)
class Map:
    """Where each unit of the atlas lies, (units, 2) whole numbers up to 4095, by `method`, for the responses `key`.

    `ranks` (units,) are the places in the sheets of its layer's small pictures, from the same responses.
    """

    key: str
    method: str
    places: np.ndarray
    ranks: np.ndarray

    def state(self) -> dict[str, Any]:
        """As plain data, for the next build."""
        return {"key": self.key, "method": self.method, "places": self.places.tolist(), "ranks": self.ranks.tolist()}

    @staticmethod
    def again(state: Mapping[str, Any]) -> "Map":
        """Back from `state`."""
        return Map(state["key"], state["method"], *(np.asarray(state[name], int) for name in ("places", "ranks")))


def write_all(
    root: Path,
    atlas: Atlas,
    layers: Sequence[Facts],
    catalogue: Catalogue,
    groups: Sequence[Family],
    sizes: Sizes,
    config: SiteConfig,
    ranks: Sequence[np.ndarray],
    plan: Map | None,
    digests: Mapping[str, str],
    kept: Collection[str],
) -> None:
    """Write the shards `index`, `search`, `families`, `map`, and two for each layer that was not `kept`."""
    attributes = atlas.attributes
    photographs = len(table_of(atlas))
    listed = [[f.name, f.slug, f.kind, runs(f.channels), digests[f.name][:8], f.total] for f in layers]
    index = {
        "title": config.title,
        "model": str(attributes.get("model", "")),
        "identity": str(attributes.get("identity", ""))[:12],
        "suffix": SUFFIX[config.format],
        "photo_suffix": SUFFIX[config.photo_format],
        "licence": config.licence,
        "layers": listed,
        "families": [[family.name, family.href, len(family.present)] for family in groups],
        "aliases": dict(config.aliases),
        "sizes": {
            "shard": sizes.per_shard, "heat": sizes.per_heat,
            "photo": [sizes.per_photo, side(sizes.per_photo), photographs],
            "thumb": [sizes.per_thumb, side(sizes.per_thumb), sizes.thumb_px],
            "tiny": [sizes.per_tiny, side(sizes.per_tiny), sizes.tiny_px],
        },
    }  # fmt: skip
    _shard(root, "index", index)
    vocabulary: dict[str, int] = {}
    search = []
    store, boxes = atlas.examples_store, bool(table_of(atlas))
    for facts, rank in zip(layers, ranks, strict=True):
        layer = atlas[facts.name].keep()
        places, names = labels_of(layer, facts, catalogue)
        numbers = [vocabulary.setdefault(name, len(vocabulary)) for name in names]
        search.append([numbers[i] if i >= 0 else -1 for i in places] if names else [])
        if facts.name not in kept:
            celled = showing_of(store, boxes, max(facts.aperture), config, sizes).celled
            _shard(root, f"{facts.slug}/layer", _layer(layer, facts, celled, sizes, config, rank))
            _shard(root, f"{facts.slug}/grid", columns(layer, facts, catalogue))
    _shard(root, "search", {"words": list(vocabulary), "units": search})
    members: dict[str, list[int]] = {}
    for number, family in enumerate(groups):
        for member in family.present:
            members.setdefault(member.name, []).append(number)
    _shard(root, "families", members)
    if plan is not None:
        tiny = [rank.tolist() for rank in ranks]
        found = {"method": plan.method, "x": plan.places[:, 0].tolist(), "y": plan.places[:, 1].tolist(), "tiny": tiny}
        _shard(root, "map", found)


def _layer(
    layer: LayerView,
    facts: Facts,
    celled: Sequence[str],
    sizes: Sizes,
    config: SiteConfig,
    rank: np.ndarray,
) -> dict[str, Any]:
    """What its units' pages need to know of the layer; what its grid sorts by is a shard of its own."""
    lists = {"max": config.examples, "min": config.least, "spectrum": config.per_bin}
    counts = {}
    for name, most in lists.items():
        held = layer.examples(name) if most else None
        if held is not None:
            bins = max(1, len(layer.spectrum_edges) - 1)
            counts[name] = bins * min(most, held.index.shape[1] // bins) if name == "spectrum" else min(
                most, held.index.shape[1]
            )  # fmt: skip
    each = sum(counts.get(name, 0) for name in celled)
    found: dict[str, Any] = {
        "name": facts.name,
        "kind": facts.kind,
        "map": facts.map_size,
        "field": facts.seen,
        "input": facts.input_size,
        "whole": facts.whole,
        "edges": layer.spectrum_edges,
        "crops": [sizes.per_crops(each), each, side(sizes.per_crops(each) * each), sizes.example_px] if each else None,
        "heat": layer.heat_maps() is not None and config.licence != "ids",
        "tiny": rank.tolist(),
        "rendered": [],
    }
    for r in facts.rendered:
        height, width = sizes.picture(r.height, r.width)
        per = sizes.per_picture(height, width, r.variants)
        found["rendered"].append(
            {
                "key": r.key, "title": r.title, "objective": r.objective, "preset": r.preset, "digest": r.digest,
                "natural": r.natural, "sheet": [per, r.variants, side(per * r.variants), width, height],
                "stored": [r.height, r.width],
            }
        )  # fmt: skip
    return found


def _shard(root: Path, name: str, value: Any) -> None:
    write(root, f"data/{name}.js", put(name, text(value)))


def runs(channels: Sequence[int]) -> list[list[int]]:
    """Channels as [first, last] runs: [0, 1, 2, 5] → [[0, 2], [5, 5]]."""
    found: list[list[int]] = []
    for channel in channels:
        if found and channel == found[-1][1] + 1:
            found[-1][1] = channel
        else:
            found.append([channel, channel])
    return found
