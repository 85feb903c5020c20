"""The classes of an atlas: the unit of the classifier for each, and the units of each layer that belong to it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.site.context.layer_summary import Catalogue, LayerSummary
from pipeline.site.data.js_shards import shortest_decimals
from pipeline.store import LayerView

# Classes in one shard.
PER_SHARD = 250


@dataclasses.dataclass(frozen=True)
class ClassEntry:
    """A class, or a label of the dataset that is no class of the network.

    Attributes:
        name: Its name, as pages show it.
        unit: Number of the layer and channel of the unit of the classifier; empty without one.
        layers: For each layer with units whose best label it is, its number and (channel, place among the small
            images, AUROC, selectivity) of each, the highest AUROC first.
    """

    name: str
    unit: tuple[int, ...] = ()
    layers: list[tuple[int, list[list[Any]]]] = dataclasses.field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        return {"name": self.name, "unit": list(self.unit), "layers": [list(layer) for layer in self.layers]}


def class_entries(
    views: Sequence[LayerView], layers: Sequence[LayerSummary], ranks: Sequence[np.ndarray], catalogue: Catalogue
) -> list[ClassEntry]:
    """Return the classes that the atlas has something to show of, in the order of their names.

    A unit belongs to its best label, which has the highest mean activation in both halves of the dataset
    (`Association.best`). Units without one belong to no class.

    Args:
        views: The layers of the atlas.
        layers: Their summaries.
        ranks: For each layer, the place of each unit in the sheets of small images, (C',).
        catalogue: Labels and classes.
    """
    entries: dict[str, ClassEntry] = {}
    for facts in layers:
        for channel in facts.channels if facts.classifier else ():
            name = catalogue.classes[channel]
            entries.setdefault(_key(name), ClassEntry(name, (facts.order, channel)))
    for view, facts, places in zip(views, layers, ranks, strict=True):
        labels = view.labels()
        if labels is None or labels.method != "responses":
            continue
        auroc, selectivity = shortest_decimals(labels.auroc), shortest_decimals(labels.selectivity)
        found: dict[str, list[list[Any]]] = {}
        for row in np.argsort(-np.nan_to_num(labels.auroc), kind="stable").tolist():
            best = int(labels.best[row])
            if best >= 0:
                name = catalogue.names[best]
                entries.setdefault(_key(name), ClassEntry(name))
                unit = [facts.channels[row], int(places[row]), auroc[row], selectivity[row]]
                found.setdefault(_key(name), []).append(unit)
        for key, units in found.items():
            entries[key].layers.append((facts.order, units))
    return [entries[key] for key in sorted(entries)]


def _key(name: str) -> str:
    """Return what the names of a class and of a label of the dataset have in common."""
    return name.split(",")[0].strip().lower()
