"""Files of the similar units of all units, which are apart from those of the layers: they depend on every layer.

A shard has the units of `PER_SHARD` consecutive units of the atlas, whatever their layer, so that a change of the
activations of one layer makes these few small files again, and no layer.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.core.hashing import digest_of
from pipeline.core.source import package_digest
from pipeline.site import output
from pipeline.site.context.layer_summary import LayerSummary
from pipeline.site.data.js_shards import shard_script, to_json
from pipeline.site.layout import embedding
from pipeline.site.layout.similarity import most_similar
from pipeline.store import Atlas

FOLDER = "data/similar"
API_FILE = "api/v1/similar.json"
STATISTIC = "Pearson correlation of the per-image maximum activations, over the images /dataset/responses of atlas.h5"
# Units per shard, and bytes of a similar unit beyond those that are counted for its unit already.
PER_SHARD = 1024
BYTES = 8
# Least correlation of similar units: with a few hundred images, those of unrelated units are below it.
LEAST = 0.2


@dataclasses.dataclass(frozen=True)
class SimilarUnits:
    """What the files of similar units are made from.

    Attributes:
        atlas: The atlas.
        layers: Summaries of all layers.
        ranks: Places of each layer's units in its sheets of small images.
        count: Number of similar units per unit; 0 for none.
        key: Digest of all that determines the files; "" if there are none.
    """

    atlas: Atlas
    layers: Sequence[LayerSummary]
    ranks: Sequence[np.ndarray]
    count: int
    key: str

    @staticmethod
    def of(
        atlas: Atlas, layers: Sequence[LayerSummary], ranks: Sequence[np.ndarray], responses: Sequence[str], count: int
    ) -> "SimilarUnits":
        """Return the inputs; `responses` are the fingerprints of the activations of each layer."""
        known = count > 0 and bool(responses) and all(responses)
        units = [[facts.name, facts.channels, rank.tolist()] for facts, rank in zip(layers, ranks, strict=True)]
        key = digest_of([responses, units, count, package_digest()]) if known else ""
        return SimilarUnits(atlas, layers, ranks, count, key)

    def index(self) -> dict[str, object]:
        """Return what the pages need to find a shard; empty if there are none."""
        return {"similar": [PER_SHARD, LEAST, self.key[:8]]} if self.key else {}

    def write(self, root: Path, target: Path, previous: str) -> None:
        """Write the files below `root`, or take them over from the site `target` if `previous` is their digest."""
        if not self.key:
            return
        if previous == self.key and (target / API_FILE).is_file() and output.adopt(target, root, FOLDER):
            output.write(root, API_FILE, (target / API_FILE).read_bytes())
            return
        vectors = embedding.unit_vectors([layer.dataset_activations() for layer in self.atlas])
        found = None if vectors is None else most_similar(vectors, self.count, LEAST)
        names = [facts.name for facts in self.layers]
        orders = [order for order, facts in enumerate(self.layers) for _ in facts.channels]
        channels = [channel for facts in self.layers for channel in facts.channels]
        ranks = [rank for part in self.ranks for rank in part.tolist()]
        flat: list[list[float]] = []
        listed: list[str] = []
        for unit, (similar, values) in enumerate(_found(found, len(channels))):
            others = [
                (orders[other], channels[other], value, ranks[other])
                for other, value in zip(similar, values, strict=True)
            ]
            flat.append([number for other in others for number in other])
            told = [[names[order], channel, value] for order, channel, value, _ in others]
            listed.append(f"{to_json(f'{names[orders[unit]]}:{channels[unit]}')}:{to_json(told)}")
        for start in range(0, len(flat), PER_SHARD):
            name = f"similar/{start}"
            output.write(root, f"data/{name}.js", shard_script(name, to_json(flat[start : start + PER_SHARD])))
        head = to_json({"statistic": STATISTIC, "least": LEAST})[:-1]
        output.write(root, API_FILE, f'{head},"units":{{{",".join(listed)}}}}}\n')


def _found(found: tuple[np.ndarray, np.ndarray] | None, units: int) -> Iterator[tuple[list[int], list[float]]]:
    """Yield the similar units of each unit and their correlations."""
    if found is None:
        yield from (([], []) for _ in range(units))
        return
    for numbers, values in zip(found[0].tolist(), found[1].tolist(), strict=True):
        count = sum(number >= 0 for number in numbers)
        yield numbers[:count], values[:count]


def files_for(units: int) -> int:
    """Return the number of files of so many units."""
    return math.ceil(units / PER_SHARD) + 1
