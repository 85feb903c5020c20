"""The classes of an atlas: the unit of the classifier for each, the units of each layer that belong to it or move its
output, and the connections among them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.site.context.layer_summary import Catalogue, LayerSummary
from pipeline.site.data.js_shards import rounded_decimals, shortest_decimals
from pipeline.store import LayerView
from pipeline.store.effects import UnitEffects, half_interval

# Classes in one shard.
PER_SHARD = 100

# Smaller changes of an output are not listed: float32 logits have errors of about 10⁻⁶, which can be the same in each
# image.
SMALLEST = 1e-4

# So many units of a layer that move the output of a class, and connections between two layers, are listed.
MOVING = 6
CONNECTIONS = 12


@dataclasses.dataclass(frozen=True)
class ClassEntry:
    """A class, or a label of the dataset that is no class of the network.

    Attributes:
        name: Its name, as pages show it.
        unit: Number of the layer and channel of the unit of the classifier; empty without one.
        layers: For each layer with units whose best label it is, its number and (channel, place among the small
            images, AUROC, selectivity) of each, the highest AUROC first.
        effects: For each layer with ablated units, its number and (channel, place, effect, lower and upper end of the
            interval) of those that move the output of the class most, the largest effect first. Only effects whose
            interval does not contain 0.
        connections: For each two layers with connections among all units above, the numbers of the source and of the
            reading layer, and (channel, place, channel, place, sum of the weights, strength) of the strongest.
    """

    name: str
    unit: tuple[int, ...] = ()
    layers: list[tuple[int, list[list[Any]]]] = dataclasses.field(default_factory=list)
    effects: list[tuple[int, list[list[Any]]]] = dataclasses.field(default_factory=list)
    connections: list[tuple[int, int, list[list[Any]]]] = dataclasses.field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        return {
            "name": self.name,
            "unit": list(self.unit),
            "layers": [list(layer) for layer in self.layers],
            "effects": [list(layer) for layer in self.effects],
            "connections": [list(pair) for pair in self.connections],
        }

    def members(self) -> dict[int, set[int]]:
        """Return the channels of all units of the entry, by number of the layer."""
        channels = {order: {unit[0] for unit in units} for order, units in self.layers}
        for order, units in self.effects:
            channels.setdefault(order, set()).update(unit[0] for unit in units)
        if self.unit:
            channels.setdefault(self.unit[0], set()).add(self.unit[1])
        return channels


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
    keys = [_key(name) for name in catalogue.names]
    for view, facts, places in zip(views, layers, ranks, strict=True):
        labels = view.labels()
        if labels is None or labels.method != "responses":
            continue
        auroc, selectivity = shortest_decimals(labels.auroc), shortest_decimals(labels.selectivity)
        found: dict[str, list[list[Any]]] = {}
        for row in np.argsort(-np.nan_to_num(labels.auroc), kind="stable").tolist():
            best = int(labels.best[row])
            if best >= 0:
                if keys[best] not in entries:
                    entries[keys[best]] = ClassEntry(catalogue.names[best])
                unit = [facts.channels[row], int(places[row]), auroc[row], selectivity[row]]
                found.setdefault(keys[best], []).append(unit)
        for key, units in found.items():
            entries[key].layers.append((facts.order, units))
    for view, facts, places in zip(views, layers, ranks, strict=True):
        effects = view.effects()
        if effects is not None and len(effects.ablated) and catalogue.classes:
            moving = _moving_units(effects, dict(zip(facts.channels, places.tolist(), strict=True)))
            for name, units in zip(catalogue.classes, moving, strict=False):
                if units:
                    entries.setdefault(_key(name), ClassEntry(name)).effects.append((facts.order, units))
    _connect(entries, views, layers, ranks)
    return [entries[key] for key in sorted(entries)]


def _moving_units(effects: UnitEffects, places: dict[int, int]) -> Iterator[list[list[Any]]]:
    """Yield for each output the units of a layer that move it most, as in `ClassEntry.effects`."""
    arrays = effects.ablations["mean"]
    mean, half = arrays["mean"], half_interval(arrays["sd"], arrays["top"].shape[1])
    size = np.where(np.abs(mean) > np.maximum(half, SMALLEST), np.abs(mean), 0)
    order = np.argsort(-size, axis=0, kind="stable")[:MOVING]
    values = [rounded_decimals(array) for array in (mean, mean - half, mean + half)]
    for output in range(mean.shape[1]):
        rows = [row for row in order[:, output].tolist() if size[row, output] > 0]
        channels = effects.ablated[rows].tolist()
        yield [
            [channel, places[channel], *(value[row][output] for value in values)]
            for row, channel in zip(rows, channels, strict=True)
        ]


def _connect(
    entries: dict[str, ClassEntry],
    views: Sequence[LayerView],
    layers: Sequence[LayerSummary],
    ranks: Sequence[np.ndarray],
) -> None:
    """Add to each entry the connections among its units, of those that the atlas stores."""
    by_name = {facts.name: facts for facts in layers}
    members = {key: entry.members() for key, entry in entries.items()}
    for view, reader in zip(views, layers, strict=True):
        wiring = view.connectivity("inputs")
        source = by_name.get(wiring.layer) if wiring is not None else None
        if wiring is None or source is None:
            continue
        rows = {channel: row for row, channel in enumerate(reader.channels)}
        source_rows = {channel: row for row, channel in enumerate(source.channels)}
        total, strength = shortest_decimals(wiring.sum), shortest_decimals(wiring.strength)
        for key, channels in members.items():
            sources, found = channels.get(source.order, set()), []
            for channel in sorted(channels.get(reader.order, set())) if sources else ():
                row = rows[channel]
                for k, other in enumerate(wiring.channel[row].tolist()):
                    if other in sources:
                        start = [other, int(ranks[source.order][source_rows[other]])]
                        end = [channel, int(ranks[reader.order][row])]
                        found.append([*start, *end, total[row][k], strength[row][k]])
            if found:
                found.sort(key=lambda one: -one[5])
                entries[key].connections.append((source.order, reader.order, found[:CONNECTIONS]))


def _key(name: str) -> str:
    """Return what the names of a class and of a label of the dataset have in common."""
    return name.split(",")[0].strip().lower()
