"""Records of units for the pages and the API: plain data, every number exactly as in `atlas.h5`.

`docs/site.md` and `api/v1/schema.json` document the keys.
"""

import base64
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.core.metric_specs import GRID_METRICS, MAIN_METRICS, metric_named
from pipeline.examples.association import Association
from pipeline.judges.judgement import Judgement
from pipeline.names.book import Meaning, UnitName, earned_words, is_shown
from pipeline.site.context.layer_summary import Catalogue, LayerSummary, ShownExamples
from pipeline.site.data.connection_records import attributed_of, wiring_of
from pipeline.site.data.js_shards import rounded_decimals, shortest_decimals
from pipeline.site.media.kernel_images import kernel_views, layer_scale
from pipeline.store.effects import UnitEffects
from pipeline.store.layer_view import Histogram, LayerView, PathCurves

BARS = 64

# Outputs in the record of an ablated unit that it raises most, and that it lowers most.
EFFECTS = 5


# Status of units that are not selected for visualization, in the columns of a layer.
UNSELECTED = "unselected"


def bars(counts: np.ndarray) -> np.ndarray:
    """Sum adjacent bins of histograms, (C', n) → (C', 64); empty bins are appended to fill the last bars."""
    bins_per_bar = -(-counts.shape[1] // BARS)
    padded = np.pad(counts, ((0, 0), (0, bins_per_bar * BARS - counts.shape[1])))
    return padded.reshape(len(counts), BARS, bins_per_bar).sum(2)


def columns(layer: LayerView, facts: LayerSummary, catalogue: Catalogue) -> dict[str, Any]:
    """Return the columns that the grid of a layer is sorted and filtered by: lists in the order of its channels."""
    stats = layer.stats()
    result: dict[str, Any] = {
        key: rounded_decimals(stats[key])
        for key in ("max", "mean", "sparsity", "nonzero")
        # Sparsity and shares above zero are NaN in layers where zero is arbitrary.
        if key in stats and (np.isfinite(stats[key]).any() or not len(stats[key]))
    }
    if facts.rendered:
        numbers = layer.measurements(facts.rendered[0].key)
        main = next((name for name in MAIN_METRICS if name in numbers), "")
        if main:
            result["ratio"] = rounded_decimals(numbers[main][:, 0])
        for name in (metric.name for metric in GRID_METRICS):
            # A measurement can be NaN for all units, as is the agreement of a single variant.
            if name in numbers and np.isfinite(numbers[name][:, 0]).any():
                result[name] = rounded_decimals(numbers[name][:, 0])
        result["status"] = _statuses(layer, numbers["status"])
    labels, words = labels_of(layer, facts, catalogue)
    if words:
        result["label"], result["labels"] = labels, words
    return result


def _statuses(layer: LayerView, status: np.ndarray) -> list[str]:
    """Return the most severe status of each unit, and `UNSELECTED` for those that need no visualization."""
    selected = layer.visualized.tolist()
    return [
        UNSELECTED if one == "missing" and not chosen else one
        for one, chosen in zip(worst(status), selected, strict=True)
    ]


def worst(status: np.ndarray) -> list[str]:
    """Return the most severe status among the variants of each unit, (C', V) → C' strings."""
    severity = {"missing": 4, "failed": 3, "restarted": 2, "retried": 1}
    return [max(map(str, row), key=lambda s: severity.get(s, 0)) for row in status]


def labels_of(layer: LayerView, facts: LayerSummary, catalogue: Catalogue) -> tuple[list[int], list[str]]:
    """Return a word for each unit: its class in a classifier, else the first of its names that are earned.

    Returns:
        For each unit the index of its word, −1 for none; and the sorted list of words.
    """
    if facts.classifier:
        words = [catalogue.classes[c] for c in facts.channels]
    else:
        words = [next(iter(earned_words(names)), "") for names in catalogue.book.names(layer)]
    used = sorted({word for word in words if word})
    place = {word: i for i, word in enumerate(used)}
    return [place.get(word, -1) for word in words], used


# Marks a stored text that is absent: the record has no such key then.
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class TinyPlaces:
    """Places of units in the sheets of tiny images.

    Attributes:
        own: Of each unit of the layer, (C',).
        others: Of the units of the layers that it is wired to, by layer name and channel.
    """

    own: np.ndarray
    others: Mapping[str, Mapping[int, int]]


class Recorder:
    """Makes the records of one layer's units; reads everything except images once, in the constructor.

    Args:
        layer: The layer.
        facts: Facts of the layer.
        catalogue: Dataset images and labels.
        lists: The example lists that the site shows.
        places: Places of its units and of those that it is wired to.
        facets: Returns the record of the facets of a channel (`data.facets`); None without facets.
    """

    def __init__(
        self,
        layer: LayerView,
        facts: LayerSummary,
        catalogue: Catalogue,
        lists: Sequence[ShownExamples],
        places: TinyPlaces,
        facets: Callable[[int], dict[str, Any] | None] | None = None,
    ) -> None:
        self._layer = layer
        self._facts = facts
        self._catalogue = catalogue
        self._lists = lists
        self._ranks = places.own
        self._pictures = {
            r.key: _with_paths(
                _with_judgements(
                    _measurements(layer.measurements(r.key), layer.dataset_max(r.key)), layer.judgements(r.key)
                ),
                layer.path_curves(r.key),
            )
            for r in facts.rendered
        }
        self._visualized = layer.visualized
        self._stats = {k: v.tolist() if v.dtype == bool else shortest_decimals(v) for k, v in layer.stats().items()}
        self._labels = layer.labels()
        self._names, self._meanings = catalogue.book.names(layer), catalogue.book.meanings(layer)
        self._wiring = wiring_of(layer, places.others)
        self._attributed = attributed_of(layer, places.others)
        self._effects = effects_of(layer.effects(), catalogue.classes)
        self._facets = facets
        self._masks = layer.relevance_masks() if any(shown.name == "relevant" for shown in lists) else None
        self._kernels = layer.kernels()
        self._histogram = layer.histogram()
        if self._histogram is not None:
            self._prepare_histogram(self._histogram)
        if self._labels is not None:
            self._lift, self._p = shortest_decimals(self._labels.lift), shortest_decimals(self._labels.p)
            self._best = shortest_decimals(np.stack([self._labels.selectivity, self._labels.auroc], -1))
        # Cached, because units of a layer share positions.
        self._box = functools.lru_cache(maxsize=1 << 16)(layer.crop_box)

    def _prepare_histogram(self, histogram: Histogram) -> None:
        # A bar is a whole number of bins wide, so the bars can extend beyond the last edge.
        bins = histogram.counts.shape[1]
        bins_per_bar = -(-bins // BARS)
        self._bars = bars(histogram.counts)
        self._lows, self._ends = shortest_decimals(histogram.edges[:, 0]), shortest_decimals(histogram.ends)
        self._step = rounded_decimals((histogram.edges[:, -1] - histogram.edges[:, 0]) / bins * bins_per_bar, 7)
        shares = [edge / 100 for edge in self._layer.spectrum_edges]
        quantiles = self._layer.quantiles(shares) if shares else np.zeros((len(self._facts.channels), 0))
        self._quantiles = rounded_decimals(quantiles, 5)

    def units(self, rows: slice, cells: Mapping[tuple[int, int], int]) -> list[dict[str, Any]]:
        """Return the records of the units in `rows`.

        Args:
            rows: Rows of the layer.
            cells: Number of the crop that shows an example, by (row, `named` example).
        """
        facts, classes = self._facts, self._catalogue.classes
        records: list[dict[str, Any]] = []
        entries = {shown.name: self._entries(shown, rows, cells) for shown in self._lists}
        for i, row in enumerate(range(rows.start, rows.stop)):
            channel = facts.channels[row]
            unit: dict[str, Any] = {"channel": channel, "tiny": int(self._ranks[row])}
            if facts.classifier:
                unit["class"] = classes[channel]
            if facts.rendered:
                selected = bool(self._visualized[row])
                unit["pictures"] = {
                    key: measurements[row] if selected else _made(measurements[row])
                    for key, measurements in self._pictures.items()
                }
            if self._kernels is not None:
                unit["kernel"] = _kernel_record(self._kernels, row, self._layer.has_exact_kernels)
            if self._stats:
                unit["stats"] = {key: values[row] for key, values in self._stats.items()}
            if self._histogram is not None:
                unit["histogram"] = self._histogram_record(self._histogram, row)
            if self._lists:
                unit["examples"] = {name: unit_entries[i] for name, unit_entries in entries.items()}
            if self._masks is not None:
                images = [entry[1] for entry in entries["relevant"][i] if entry is not None]
                unit["masks"] = _mask_record(self._masks[row], images)
            if self._labels is not None:
                unit["labels"] = self._labels_record(self._labels, row)
            named = [_name_record(name) for name in self._names[row] if is_shown(name)]
            if named:
                unit["names"] = named
            if self._meanings[row]:
                unit["meanings"] = list(map(_meaning_record, self._meanings[row]))
            if self._wiring is not None:
                unit["wiring"] = self._wiring(row)
            if self._attributed is not None:
                unit["attributed"] = self._attributed(row)
            if self._effects is not None:
                unit["effects"] = self._effects(row)
            facets = self._facets(channel) if self._facets is not None else None
            if facets is not None:
                unit["facets"] = facets
            records.append(unit)
        return records

    def _histogram_record(self, histogram: Histogram, row: int) -> dict[str, Any]:
        return {
            "counts": self._bars[row].tolist(),
            "from": self._lows[row],
            "step": self._step[row],
            "under": int(histogram.under[row]),
            "over": int(histogram.over[row]),
            "ends": self._ends[row],
            "quantiles": self._quantiles[row],
        }

    def _entries(
        self, shown: ShownExamples, rows: slice, cells: Mapping[tuple[int, int], int]
    ) -> list[list[list[Any] | None]]:
        """Return the examples of each unit in `rows` as [value, image, y, x, heat map, crop, left, top, right, bottom].

        The box is the receptive field in pixels of the network's input, and omitted if it is the whole input. In the
        spectrum the position of an example encodes its bin, so a missing example is None there.
        """
        is_spectrum = shown.name == "spectrum"
        values = shortest_decimals(shown.value[rows])
        indices, ys, xs, pairs = (array[rows].tolist() for array in (shown.index, shown.y, shown.x, shown.pair))
        result: list[list[list[Any] | None]] = []
        for i, row in enumerate(range(rows.start, rows.stop)):
            entries: list[list[Any] | None] = []
            for value, index, y, x, pair in zip(values[i], indices[i], ys[i], xs[i], pairs[i], strict=True):
                if index >= 0:
                    entry = [value, index, y, x, pair, cells.get((row, example_key(pair, index)), -1)]
                    if not self._facts.sees_whole_input:
                        entry += self._box(y, x) or ()
                    entries.append(entry)
                elif is_spectrum:
                    entries.append(None)
            result.append(entries)
        return result

    def _labels_record(self, labels: Association, row: int) -> dict[str, Any]:
        names = self._catalogue.names
        over = zip(labels.over[row].tolist(), labels.count[row].tolist(), self._lift[row], self._p[row], strict=True)
        record: dict[str, Any] = {
            "over": [[names[label], count, lift, p] for label, count, lift, p in over if label >= 0]
        }
        best, chosen = int(labels.best[row]), labels.chosen[row].tolist()
        if best >= 0:
            record["best"] = names[best]
        elif min(chosen) >= 0:
            record["chosen"] = [names[label] for label in chosen]
        if best >= 0 or min(chosen) >= 0:
            record["selectivity"], record["auroc"] = self._best[row]
        return record


def _name_record(name: UnitName) -> dict[str, Any]:
    """Return the record of a name, without what its method does not have."""
    record = {"name": name.name, "author": name.author, "method": name.method, "earned": name.earned}
    numbers = {key: getattr(name, key) for key in ("confidence", "score", "p", "q")}
    counts = {key: getattr(name, key) for key in ("support", "examined") if name.examined}
    said = {"comment": name.comment} if name.comment else {}
    return record | said | counts | {k: float(f"{v:.6g}") for k, v in numbers.items() if v is not None}


def _meaning_record(meaning: Meaning) -> dict[str, Any]:
    """Return the record of what a CLIP model says about a unit; what is not known is null."""
    clarity, polysemanticity, similarity = rounded_decimals(
        np.array([meaning.clarity, meaning.polysemanticity, meaning.similarity])
    )
    similar = None if meaning.similar is None else [*meaning.similar, similarity]
    return {"model": meaning.model, "clarity": clarity, "polysemanticity": polysemanticity, "similar": similar}


def _measurements(numbers: Mapping[str, np.ndarray], natural: np.ndarray) -> list[list[dict[str, Any]]]:
    """Return the measurements of each variant of each unit; seeds are text, because a double cannot hold 63 bits."""
    columns: dict[str, list[list[Any]]] = {}
    for name, array in numbers.items():
        if name == "trace":
            columns[name] = rounded_decimals(array)
        elif array.ndim > 2:
            continue
        elif np.issubdtype(array.dtype, np.floating):
            columns[name] = shortest_decimals(array)
        elif metric_named(name).is_json_text or not np.issubdtype(array.dtype, np.integer):
            columns[name] = [[_ABSENT if value is None else str(value) for value in row] for row in array.tolist()]
        else:
            columns[name] = array.tolist()
    variants = numbers["activation"].shape[1]
    return [
        [
            {"natural": best}
            | {name: column[row][v] for name, column in columns.items() if column[row][v] is not _ABSENT}
            for v in range(variants)
        ]
        for row, best in enumerate(shortest_decimals(natural))
    ]


def _with_judgements(
    pictures: list[list[dict[str, Any]]], judgements: Sequence[Judgement]
) -> list[list[dict[str, Any]]]:
    """Return the measurements of visualizations with the numbers of each judge; unchanged without judges."""
    for judgement in judgements:
        columns = {name: shortest_decimals(values) for name, values in judgement.numbers.items()}
        for row, variants in enumerate(pictures):
            for v, picture in enumerate(variants):
                numbers = {name: column[row][v] for name, column in columns.items()}
                picture.setdefault("judges", {})[judgement.judge] = numbers
    return pictures


def _made(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the visualizations of a unit that is not selected for any: none, or those of a former run."""
    return variants if any(variant["status"] != "missing" for variant in variants) else []


def _kernel_record(kernels: np.ndarray, row: int, exact: bool) -> dict[str, Any]:
    """Return the record of one of the kernels (C', I, k, k') of a layer that is linear in the pixels."""
    kernel = kernels[row]
    return {
        "size": list(kernel.shape[1:]),
        "scale": float(f"{np.abs(kernel).max():.4g}"),
        "exact": exact,
        "views": [list(view) for view in kernel_views(kernel, layer_scale(kernels))],
    }


def _with_paths(pictures: list[list[dict[str, Any]]], curves: PathCurves | None) -> list[list[dict[str, Any]]]:
    """Return the measurements of visualizations with the path similarity at each layer; unchanged without any."""
    if curves is None:
        return pictures
    similarity, natural, random = map(rounded_decimals, (curves.similarity, curves.natural, curves.random))
    for row, variants in enumerate(pictures):
        for v, picture in enumerate(variants):
            picture["path"] = {"similarity": similarity[row][v], "natural": natural[row], "random": random[row]}
    return pictures


def example_key(pair: int, index: int) -> int:
    """Return the key of an example within its unit: the number of its heat map, or −2 − the row of its image."""
    return pair if pair >= 0 else -2 - index


def _mask_record(masks: np.ndarray, images: Sequence[int]) -> dict[str, Any]:
    """Return the masks (k, h, w) of the images that use a unit as base64 bytes, by row of the image in the dataset."""
    coded = {str(i): base64.b64encode(mask.tobytes()).decode() for i, mask in zip(images, masks, strict=False)}
    return {"size": list(masks.shape[1:]), "values": coded}


def effects_of(effects: UnitEffects | None, classes: Sequence[str]) -> Callable[[int], dict[str, Any]] | None:
    """Return a function from a row to the effects of its unit on the outputs, or None if the atlas has none.

    Args:
        effects: Effects of the units of a layer.
        classes: Names of the outputs; without, they are numbered.
    """
    if effects is None:
        return None
    mean, size = shortest_decimals(effects.mean), shortest_decimals(effects.size)
    ablated = set(effects.ablated.tolist())

    def name(output: int) -> str:
        return classes[output] if output < len(classes) else str(output)

    def record_of(row: int) -> dict[str, Any]:
        channel = int(effects.channels[row])
        record: dict[str, Any] = {"mean": mean[row], "size": size[row], "images": effects.attribution.shape[1]}
        if channel in ablated:
            table = effects.on_outputs(channel)
            values = [rounded_decimals(table[key].to_numpy()) for key in ("effect", "low", "high")]
            entries = [
                [name(output), *numbers] for output, *numbers in zip(table["output"].tolist(), *values, strict=True)
            ]
            count = min(EFFECTS, len(entries) // 2)
            record |= {"raises": entries[:count], "lowers": entries[::-1][:count]}
            record["rank_correlation"] = None if np.isnan(effects.rank_correlation) else effects.rank_correlation
        return record

    return record_of
