"""Compare the measures of a finished run with what they were before they were repaired, and count changed verdicts.

scripts/bench measures RUN [--presets NAMES] [--out FILE.md]

RUN is a run folder, --presets a list of presets in place of all. Its atlas is read, and from its shards what an atlas
leaves out: the activations of all channels for dataset images. Only the connectivity needs the network, which is
loaded. Nothing is written but --out. For each measure: the former and the present value by layer and preset (medians),
what follows from each, for how many units that differs, and up to eight of them. The former formulas are in
scripts/benches/former_measures.py. What cannot be computed from a run is left out, and the text says why.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import former_measures as former
import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from scipy import stats
from torch import nn

import pipeline
from pipeline.config.schema import from_tree
from pipeline.core import metric_specs
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.examples.channel_stats import ChannelAccumulator, HistogramRange, standard_deviation
from pipeline.examples.localize import TOP
from pipeline.images import metrics
from pipeline.layers.connections import Connectivity
from pipeline.layers.connectivity import find_connectivity
from pipeline.layers.finding import Layer, capture
from pipeline.layers.selection import list_layers
from pipeline.models.loading import Model, load_model
from pipeline.runs.dataset_pass import gaps, without_overlap
from pipeline.store import shards
from pipeline.store.layer_view import LayerView
from pipeline.store.reader import Atlas
from pipeline.store.shards import DamagedShardError, Shard

# Names of units with a changed verdict, and dataset images whose saturation is measured.
MAX_NAMED, MAX_IMAGES = 8, 200
# Median of saturation over photographs, for atlases that contain no dataset images (`pipeline.images.metrics`).
NATURAL_SATURATION = 0.06

Row = dict[str, object]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclasses.dataclass(frozen=True)
class Values:
    """A measure of n units or visualizations, and what follows from it.

    Attributes:
        value: (n,); NaN where there is none.
        verdict: (n,): 1 for yes, 0 for no, NaN for none.
    """

    value: np.ndarray
    verdict: np.ndarray


def exceeds(value: np.ndarray, bound: np.ndarray | float) -> Values:
    """Return values with the verdict whether they are above a bound; none where either is NaN."""
    value, bound = np.broadcast_arrays(np.asarray(value, float), np.asarray(bound, float))
    verdict = np.where(np.isnan(value) | np.isnan(bound), np.nan, value > bound)
    return Values(value.ravel(), verdict.ravel())


def changed(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return where two verdicts differ, (n,) bool; a yes that is not given any more counts, a no does not."""
    return np.where(np.isnan(new), old == 1, (old != new) & ~np.isnan(old))


def named(names: Sequence[str], chosen: np.ndarray) -> str:
    """Return up to `MAX_NAMED` of the chosen names."""
    found = [name for name, is_chosen in zip(names, chosen.tolist(), strict=True) if is_chosen]
    return ", ".join(found[:MAX_NAMED]) + (" …" if len(found) > MAX_NAMED else "")


@dataclasses.dataclass(frozen=True)
class Share:
    """How many of all."""

    count: int
    total: int

    def __str__(self) -> str:
        return f"{self.count} of {self.total}" if self.total else "–"


def share(chosen: np.ndarray) -> Share:
    return Share(int(chosen.sum()), chosen.size)


def median(values: np.ndarray) -> float:
    """Return the median of the finite values; NaN if there is none."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def compared(names: Sequence[str], old: Values, new: Values, **extra: object) -> Row:
    """Return the columns that all measures have, and `extra` ones; values that one side lacks count on neither."""
    both = np.isfinite(old.value) & np.isfinite(new.value)
    differs = changed(old.verdict, new.verdict) & both
    return {
        "images": int(both.sum()),
        "former": median(old.value[both]),
        "present": median(new.value[both]),
        **extra,
        "former: yes": share(old.verdict[both] == 1),
        "present: yes": share(new.verdict[both] == 1),
        "verdict changes": share(differs[both]),
        "channels": named(names, differs),
    }


@dataclasses.dataclass(frozen=True)
class DatasetPass:
    """What the shards of a run hold of its dataset pass, and its atlas does not.

    Attributes:
        tally: Sums over all images, of all channels of all layers side by side.
        ranges: Ranges of the histograms.
        responses: Maximum activations for random images, (n, channels).
        parts: Shards of the first pass, which hold the histogram bins of labeled images.
        localized: Shards of the second pass, which hold the activations of layers for dataset examples.
        columns: Columns of each layer, by name.
    """

    tally: ChannelAccumulator
    ranges: HistogramRange
    responses: np.ndarray
    parts: Sequence[Shard]
    localized: Sequence[Shard]
    columns: dict[str, slice]

    def examples(self, layer: LayerView, negative: bool) -> np.ndarray:
        """Return the activations of a layer for the dataset examples of its units, (C', k, C) float32; NaN for none."""
        best = layer.examples("min" if negative else "max")
        number = list(self.columns).index(layer.name)
        found = [shard.get(f"{number}/top", f"{number}/answer") for shard in self.localized]
        index = np.concatenate([arrays[f"{number}/top"] for arrays in found])
        activations = np.concatenate([arrays[f"{number}/answer"] for arrays in found])
        assert best is not None
        return metrics.example_activations(best.index[:, :TOP], index, activations)

    def codes(self, layer: LayerView) -> tuple[np.ndarray, np.ndarray]:
        """Return labeled images, (n,) ascending, and the bins of their maxima for the units of a layer, (n, C')."""
        columns = self.columns[layer.name]
        index = np.concatenate([shard.get("codes/index")["codes/index"] for shard in self.parts])
        bins = [shard.columns("codes/bin", columns.start, columns.stop)[:, layer.channels] for shard in self.parts]
        order = np.argsort(index, kind="stable")
        return index[order], np.concatenate(bins)[order]


def read_pass(folder: Path, atlas: Atlas) -> DatasetPass | None:
    """Return the dataset pass of an atlas from the shards of its run; None if they are not complete."""
    ends = np.cumsum([0, *(layer.total_channels for layer in atlas)])
    columns = {layer.name: slice(int(ends[i]), int(ends[i + 1])) for i, layer in enumerate(atlas)}
    first, second = (_shards(folder / "shards" / kind) for kind in ("examples", "localize"))
    for ranges in _shards(folder / "shards" / "ranges"):
        content = ranges.attributes.get("content")
        for digest in sorted({str(s.attributes["digest"]) for s in first if s.attributes.get("ranges") == content}):
            parts = without_overlap(s for s in first if s.attributes.get("digest") == digest)
            if gaps(parts, len(atlas.dataset())):
                continue
            arrays = [shard.arrays(but=("codes/index", "codes/bin")) for shard in parts.values()]
            tallies = [ChannelAccumulator.from_arrays(_below("tally/", part)) for part in arrays]
            tally = sum(tallies[1:], tallies[0])
            if not _is_of(tally, atlas, columns):
                continue
            order = np.argsort(np.concatenate([part["responses/index"] for part in arrays]), kind="stable")
            responses = np.concatenate([part["responses/peak"] for part in arrays])[order]
            histogram = HistogramRange(**ranges.arrays())
            return DatasetPass(tally, histogram, responses, list(parts.values()), _localized(second, atlas), columns)
    return None


def _localized(second: Sequence[Shard], atlas: Atlas) -> list[Shard]:
    """Return those shards of one second pass that contain the best dataset examples of all units of an atlas."""
    examples = [(f"{i}/top", layer.examples("max"), layer.examples("min")) for i, layer in enumerate(atlas)]
    for digest in sorted({str(shard.attributes["digest"]) for shard in second if "start" in shard.attributes}):
        shards_of_pass = [shard for shard in second if shard.attributes["digest"] == digest]
        complete = True
        for name, *lists in examples:
            stored = np.concatenate([shard.get(name)[name] for shard in shards_of_pass])
            wanted = [found.index[:, :TOP].ravel() for found in lists if found is not None]
            complete = complete and bool(np.isin(np.concatenate(wanted), [*stored.tolist(), -1]).all())
        if complete:
            return shards_of_pass
    raise AtlasError(f"{atlas.path.parent / 'shards' / 'localize'} has no complete second pass of this atlas.")


def _shards(folder: Path) -> list[Shard]:
    found = (shards.read(path) for path in sorted(folder.glob("*.h5")))
    return [shard for shard in found if shard is not None]


def _below(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _is_of(tally: ChannelAccumulator, atlas: Atlas, columns: dict[str, slice]) -> bool:
    """Return whether sums are those that the statistics of an atlas were computed from."""
    if len(tally.max) != max((part.stop for part in columns.values()), default=0):
        return False
    nothing = np.zeros(0)
    maxima = ((tally.max[columns[la.name]][la.channels], la.stats().get("max", nothing)) for la in atlas)
    return all(np.array_equal(own, stored) for own, stored in maxima)


@dataclasses.dataclass(frozen=True)
class Case:
    """The visualizations of one layer by one preset, flat: n = C' · V.

    Attributes:
        layer: The layer.
        preset: Name of the preset.
        negative: Whether they minimize the activation.
        numbers: Measures of the atlas, (n,) by name.
        names: Names of the visualizations: the channel, and the number of the variant if there are several.
    """

    layer: LayerView
    preset: str
    negative: bool
    numbers: dict[str, np.ndarray]
    names: list[str]

    @classmethod
    def of(cls, layer: LayerView, preset: str) -> "Case":
        arrays = layer.measurements(preset)
        variants = arrays["activation"].shape[1]
        names = [str(channel) for channel in layer.channels.tolist() for _ in range(variants)]
        if variants > 1:
            names = [f"{name} ({i % variants})" for i, name in enumerate(names)]
        negative = metric_specs.is_minimized(str(layer.render_attributes(preset).get("natural", "")))
        return cls(layer, preset, negative, {name: array.ravel() for name, array in arrays.items()}, names)

    def number(self, name: str) -> np.ndarray:
        """Return a measure of the atlas, (n,); NaN if it does not have it."""
        return self.numbers.get(name, np.full(len(self.names), np.nan)).astype(float)

    def row(self, old: Values, new: Values, **extra: object) -> Row:
        """Return a row of a table; `extra` columns follow the two values."""
        return {"layer": self.layer.name, "preset": self.preset, **compared(self.names, old, new, **extra)}


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        atlas: Its open atlas.
        dataset_pass: What its shards hold; None if they are not complete.
        presets: Presets to compare; all if empty.
    """

    atlas: Atlas
    dataset_pass: DatasetPass | None
    presets: Sequence[str] = ()

    def cases(self) -> Iterator[Case]:
        for layer in self.atlas:
            for preset in layer.presets:
                if not self.presets or preset in self.presets:
                    yield Case.of(layer, preset)


@dataclasses.dataclass(frozen=True)
class Section:
    """A table about one measure.

    Attributes:
        title: Name of the measure.
        text: The two formulas and the verdict.
        rows: Rows of the table; empty if there is nothing to compare.
        note: What was left out and why, or what the bounds are.
    """

    title: str
    text: str
    rows: Sequence[Row]
    note: str = ""


NO_SHARDS = "The shards of the dataset pass are incomplete or belong to another atlas."


def transfer_section(run: Run, bound: str) -> Section:
    """Compare transfer; `bound` is "floor" or "ceiling"."""
    rows, skipped = [], []
    for case in run.cases():
        responses = case.layer.image_activations(case.preset)
        if run.dataset_pass is None or responses is None or not np.isfinite(case.number("transfer")).any():
            skipped.append(f"{case.layer.name} by {case.preset}")
            continue
        natural = run.dataset_pass.responses[:, run.dataset_pass.columns[case.layer.name]]
        examples = run.dataset_pass.examples(case.layer, case.negative)
        old = former.transfer(responses.astype(np.float32), examples, natural)
        old_bound, new_bound = getattr(old, bound)[:, None], case.number(f"transfer_{bound}")
        bounds = {f"former {bound}": median(old_bound), f"present {bound}": median(new_bound)}
        now = exceeds(case.number("transfer"), new_bound)
        rows.append(case.row(exceeds(old.value, old_bound), now, **bounds))
    verdict = {
        "floor": "more similar to the unit's dataset examples than 95 % of random dataset images are (floor)",
        "ceiling": "more similar to these dataset examples than they are to each other (ceiling)",
    }[bound]
    text = (
        "Former: cosine of the layer's activations for the image and for the unit's 4 best dataset images, without the "
        "mean over the dataset, the unit's own channel included, channels unscaled. Present: without the own channel, "
        f"in standard scores. Verdict: {verdict}. The former measure had no such bound; it is computed by the former "
        f"formula from the same stored activations."
    )
    return Section(f"Transfer against its {bound}", text, rows, left_out(run, skipped))


def left_out(run: Run, skipped: Sequence[str]) -> str:
    """Return why the layers and presets of `skipped` have no transfer."""
    if not skipped:
        return ""
    if run.dataset_pass is None:
        return f"Left out. {NO_SHARDS}"
    return f"Left out, as the atlas has no transfer of them (such as by the objective `energy`): {', '.join(skipped)}."


def ratio_section(run: Run) -> Section:
    rows, skipped = [], []
    for case in run.cases():
        variants = len(case.names) // max(1, len(case.layer.channels))
        activation, best = case.number("activation").reshape(-1, variants), case.layer.dataset_max(case.preset)
        old = exceeds(former.activation_ratio(activation, best, case.negative), 1)
        new = exceeds(case.number("peak_ratio"), 1)
        if not np.isfinite(old.value + new.value).any():
            skipped.append(f"{case.layer.name} by {case.preset}")
            continue
        rows.append(case.row(old, new, **{"Spearman": spearman(old.value, new.value)}))
    text = (
        "Former: objective of the image ÷ best of any dataset image, for channels mean of the map ÷ mean of the map. "
        "Present: largest activation of the map ÷ largest of any dataset image (`peak_ratio`; the former one is "
        "still there as `mean_ratio`). Verdict: above 1, the image excites the unit more than every dataset image. "
        "Spearman: rank correlation of the units by the two."
    )
    note = f"Without a ratio (objective `energy`): {', '.join(skipped)}." if skipped else ""
    return Section("Activation ratio", text, rows, note)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation of the pairs that are known; NaN for fewer than three, or equal values."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return float("nan")
    return float(np.asarray(stats.spearmanr(a[both], b[both]))[0])


def margin_section(run: Run) -> Section:
    rows, skipped = [], []
    for case in run.cases():
        responses = case.layer.image_activations(case.preset)
        if responses is None or not np.isfinite(case.number("margin")).any():
            skipped.append(f"{case.layer.name} by {case.preset}")
            continue
        place = former.rank(responses.astype(np.float32), case.layer.channels).ravel()
        old = Values(place, np.where(np.isnan(place), np.nan, place == 1))
        rows.append(case.row(old, exceeds(case.number("margin"), 0)))
    text = (
        "Former: rank of the unit's channel among the channels of its layer by their largest activation for the image "
        "(`rank`). Present: standard score of the channel − largest standard score of another (`margin`, in standard "
        "deviations). Verdict: rank 1; margin above 0."
    )
    note = f"Without a margin (objective `energy`, negatives): {', '.join(skipped)}." if skipped else ""
    return Section("Rank and margin", text, rows, note)


def saturation_section(run: Run) -> Section:
    natural = dataset_images(run.atlas)
    bounds = [
        median(np.array([former.saturated(image, margin) for image in natural]))
        for margin in (former.SATURATION_MARGIN, metrics.SATURATION_MARGIN)
    ]
    if not natural:
        bounds[1] = NATURAL_SATURATION
    rows = []
    for case in run.cases():
        images = case.layer.stack(case.preset)
        shape = case.layer.images(case.preset).shape[:2]
        old = np.array([former.saturated(images[i, v]) for i, v in np.ndindex(*shape)])
        rows.append(case.row(exceeds(old, bounds[0]), exceeds(case.number("saturation"), bounds[1])))
    text = (
        "Former: share of values within 2/255 of black or white (`saturated`). Present: within 5 % of the range "
        "(`saturation`). Verdict: more than the median dataset image."
    )
    if natural:
        note = (
            f"Medians of {len(natural)} dataset images that the atlas contains: "
            f"{bounds[0]:.4f} within 2/255, {bounds[1]:.4f} within 5 %."
        )
    else:
        note = f"The atlas contains no dataset images: 5 % is compared with {NATURAL_SATURATION}, 2/255 with nothing."
    return Section("Saturation", text, rows, note)


def dataset_images(atlas: Atlas) -> list[np.ndarray]:
    """Return up to `MAX_IMAGES` images of the random subset, as far as the atlas contains them, (H, W, 3) uint8."""
    found: list[np.ndarray] = []
    for index in atlas.responses_index.tolist():
        image = atlas.input_image(index) if len(found) < MAX_IMAGES else None
        if image is not None:
            found.append(np.asarray(image.convert("RGB")))
    return found


def zero_section(run: Run) -> Section:
    """Compare statistics against zero; one row for each layer."""
    rows = []
    for layer in run.atlas if run.dataset_pass else ():
        assert run.dataset_pass is not None
        every = former.zero_statistics(run.dataset_pass.tally, run.dataset_pass.ranges)
        old = {name: array[run.dataset_pass.columns[layer.name]][layer.channels] for name, array in every.items()}
        new = layer.stats()
        verdict = np.where(old["inactive"] | (old["fired"] == 1), 1.0, 0.0)
        kept = verdict if layer.reference == "zero" else np.full(len(verdict), np.nan)
        differs = changed(verdict, kept)
        names = [str(channel) for channel in layer.channels.tolist()]
        row: Row = {"layer": layer.name, "zero is a threshold": "yes" if layer.reference == "zero" else "no"}
        row["units"] = len(names)
        for name, title in (("nonzero", "positions above zero"), ("sparsity", "sparsity")):
            row |= {f"former {title}": median(old[name]), f"present {title}": median(new[name])}
        row |= {"never active": int(old["inactive"].sum()), "active in every image": int((old["fired"] == 1).sum())}
        row |= {"verdict changes": share(differs), "channels": named(names, differs)}
        rows.append(row)
    text = (
        "Former: share of positions above zero, sparsity of the rectified maxima, and the verdicts never active (no "
        "position of any image above zero) and active in every image, in every layer. Present: the same where a "
        "rectifier reads the layer or made it; elsewhere zero is arbitrary, and they are left out, so that the verdict "
        "is withdrawn. The median in place "
        "of zero would say nothing: half of all positions are above it in any channel."
    )
    return Section("Statistics against zero", text, rows, "" if run.dataset_pass else f"Left out. {NO_SHARDS}")


def label_sections(run: Run) -> list[Section]:
    """Compare the best label and the over-represented labels; one row for each layer."""
    best_rows, over_rows = [], []
    names, dataset = run.atlas.dataset_labels, run.atlas.dataset()
    place = {name: i for i, name in enumerate(names)}
    numbers = np.array([place.get(label, -1) for label in dataset["label"]], np.int64)
    for layer in run.atlas if run.dataset_pass and names else ():
        assert run.dataset_pass is not None
        new = layer.labels()
        if new is None or new.method != "responses":
            continue
        index, codes = run.dataset_pass.codes(layer)
        columns, ranges = run.dataset_pass.columns[layer.name], run.dataset_pass.ranges
        low, high = (ends[columns][layer.channels] for ends in (ranges.low, ranges.high))
        best, area = former.best_labels(codes, numbers[index], low, high)
        over, lift = former.over_represented(codes, numbers[index])
        units = [str(channel) for channel in layer.channels.tolist()]
        best_rows.append(label_row(layer.name, units, (best, area), (new.best, new.auroc)))
        over_rows.append(label_row(layer.name, units, (over[:, 0], lift[:, 0]), (new.over[:, 0], new.lift[:, 0])))
    why = NO_SHARDS if run.dataset_pass is None else "Too few images of the dataset share a label."
    note = "" if best_rows else f"Left out. {why}"
    best_text = (
        "Former: label with the largest mean activation over all images, and its AUROC on the same images; every "
        "crop counts as an image, activations are rectified in every layer. Present: a label is chosen in each half of "
        "the source images and its AUROC measured in the other half; a unit has a best label if both halves choose the "
        "same."
    )
    over_text = (
        "Former: label with the largest share among the top 1 % of images ÷ share of all (lift), if two of these "
        "images have it; crops count. Present: only labels that pass a permutation test over all labels (p at most "
        "0.05), and sources count. The value is the lift; medians are of the units that have a label."
    )
    return [
        Section("Best label (value: AUROC)", best_text, best_rows, note),
        Section("Over-represented label (value: lift)", over_text, over_rows, note),
    ]


def label_row(
    layer: str, units: Sequence[str], old: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray]
) -> Row:
    """Return a row from (label, value) of the units, (C',) each; −1 is no label."""
    differs = old[0] != new[0]
    return {
        "layer": layer,
        "units": len(units),
        "former": median(old[1]),
        "present": median(new[1]),
        "former: a label": share(old[0] >= 0),
        "present: a label": share(new[0] >= 0),
        "verdict changes": share(differs),
        "channels": named(units, differs),
    }


def connectivity_section(run: Run) -> Section:
    title = "Connectivity (strongest 8 connections)"
    text = (
        "Former: L2 norms and sums of the unfolded weights; a depthwise convolution between multiplies sums by the "
        "norm of its kernel. Present: effective weights (normalizations folded, sums multiplied by sums), scaled by "
        "the source's deviation over the dataset. The other layer is the nearest convolution or linear layer that "
        "mixes channels. In both: how many of the former strongest 8 are among the present ones (median). "
        "Opposite sign: of these, those whose sum changes its sign, so that excites and inhibits change places. "
        "Verdict: the strongest connection."
    )
    try:
        config = from_tree(yaml.safe_load(run.atlas.config))
        model = load_model(config.model).to("cpu")
    except AtlasError as error:
        return Section(title, text, [], f"Left out: the network cannot be loaded. {error}")
    if model.digest != run.atlas.attributes["weights_sha256"]:
        return Section(title, text, [], "Left out: the network has other weights than that of the atlas.")
    in_atlas = set(run.atlas.layers)
    candidates = [la for la in list_layers(model, config.layers) if la.kind in ("conv", "linear")]
    layers = [la for la in candidates if la.name in in_atlas or not former.is_depthwise(_module(model, la.name))]
    scales = deviations(run)
    links, _ = find_connectivity(model, layers)
    mixing = {name for name in in_atlas & links.keys() if not former.is_depthwise(_module(model, name))}
    sources = {links[name].layer for name in mixing} - scales.keys()
    images = dataset_images(run.atlas) if model.preprocessing.channels == 3 else []
    scales |= measured_deviations(model, [la for la in layers if la.name in sources], images)
    old, new = former.connectivity(model, layers), find_connectivity(model, layers, scales)
    rows = []
    for layer in run.atlas:
        for side, before, now in zip(("inputs", "outputs"), old, new, strict=True):
            if layer.name in before and layer.name in now:
                rows += connectivity_rows(layer, side, before[layer.name], now[layer.name])
    note = "Depthwise layers have a single input for each unit, which is left out."
    if sources and images:
        note += (
            f" Deviations of layers that are not in the run ({', '.join(sorted(sources))}) were measured on "
            f"{len(images)} dataset images that the atlas contains."
        )
    return Section(title, text, rows, note)


def _module(model: Model, layer: str) -> nn.Module:
    return model.module.get_submodule(layer.partition("#")[0])


def deviations(run: Run) -> dict[str, np.ndarray]:
    """Return the standard deviation of every channel over the dataset, (C,), by layer; empty without shards."""
    if run.dataset_pass is None:
        return {}
    every = standard_deviation(run.dataset_pass.tally, run.dataset_pass.ranges)
    return {name: every[columns] for name, columns in run.dataset_pass.columns.items()}


def measured_deviations(model: Model, layers: Sequence[Layer], images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the standard deviation of every channel over all positions of images (H, W, 3) uint8, (C,), by layer."""
    if not layers or not images:
        return {}
    height, width = model.preprocessing.size
    sums = {layer.name: np.zeros((3, layer.channels)) for layer in layers}

    def add(layer: Layer, maps: torch.Tensor) -> None:
        values = maps.double().flatten(2)
        moments = [torch.ones_like(values), values, values.square()]
        sums[layer.name] += torch.stack([part.sum((0, 2)) for part in moments]).numpy()

    with capture(model, layers, each=add) as forward, torch.no_grad():
        for image in images:
            resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            forward(torch.from_numpy(np.asarray(resized, np.float32) / 255).permute(2, 0, 1)[None])
    return {
        name: np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
        for name, (count, total, squares) in sums.items()
    }


def connectivity_rows(layer: LayerView, side: str, old: Connectivity, new: Connectivity) -> list[Row]:
    """Return the row of one side of a layer; none if its units have one connection only."""
    if old.layer != new.layer or not (old.channel[:, 1:] >= 0).any():
        return []
    shared, opposite, first = overlap(old, new)
    at, names = layer.channels, [str(channel) for channel in layer.channels.tolist()]
    differs = first[at]
    return [
        {
            "layer": layer.name,
            "side": side,
            "other layer": new.layer,
            "scaled by": "deviation" if new.scale == "sd" else "nothing",
            "units": len(names),
            "in both": median(shared[at]),
            "opposite sign": Share(int(opposite[at].sum()), int(shared[at].sum())),
            "verdict changes": share(differs),
            "channels": named(names, differs),
        }
    ]


def overlap(old: Connectivity, new: Connectivity) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare the strongest connections of C channels.

    Returns:
        How many are in both lists, of how many of these the sums have opposite signs, and whether the strongest one is
        another, (C,) each.
    """
    same = (old.channel[:, :, None] == new.channel[:, None, :]) & (old.channel >= 0)[:, :, None]
    opposite = same & (old.sum[:, :, None] * new.sum[:, None, :] < 0)
    return same.sum((1, 2)), opposite.sum((1, 2)), old.channel[:, 0] != new.channel[:, 0]


UNCHANGED = Section(
    "Checkerboard",
    "The formula has not changed, so there is nothing to compare. It is a maximum over the strides up to the layer, so "
    "its values rise with depth: compare presets within a layer, not layers.",
    [],
)

SECTIONS: Sequence[Callable[[Run], Section | list[Section]]] = (
    lambda run: transfer_section(run, "floor"),
    lambda run: transfer_section(run, "ceiling"),
    ratio_section,
    margin_section,
    saturation_section,
    zero_section,
    label_sections,
    connectivity_section,
    lambda run: UNCHANGED,
)


def summary(sections: Sequence[Section]) -> Section:
    """Return how many verdicts change by each measure, over all layers and presets."""
    rows: list[Row] = []
    for section in sections:
        changes = [row["verdict changes"] for row in section.rows]
        shares = [change for change in changes if isinstance(change, Share)]
        total = Share(sum(change.count for change in shares), sum(change.total for change in shares))
        rows.append({"measure": section.title, "verdict changes": total})
    text = "Number of visualizations, or of units, for which another verdict follows from the present measure."
    return Section("Changed verdicts", text, rows)


def markdown(section: Section) -> str:
    """Return a section with its table; numbers with two decimals, small ones with four."""
    lines = [f"## {section.title}", "", section.text, ""]
    if section.rows:
        table = pd.DataFrame(section.rows)
        lines += ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
        for row in table.itertuples(index=False):
            lines.append("| " + " | ".join(cell(value) for value in row) + " |")
        lines.append("")
    return "\n".join([*lines, section.note, ""] if section.note else lines)


def cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if np.isnan(value):
        return "–"
    if 0 < abs(value) < 5e-5:
        return "< 0.0001"
    return f"{value:.4f}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def report(folder: Path, presets: Sequence[str] = ()) -> str:
    """Return all sections for a run folder as Markdown; `presets` are those to compare, all if empty."""
    with pipeline.open_atlas(folder) as atlas:
        known = {preset for layer in atlas for preset in layer.presets}
        for name in presets:
            if name not in known:
                raise AtlasError(f"{folder} has no visualizations by {name!r}. {nearest_names(name, known)}")
        run = Run(atlas, read_pass(folder, atlas), presets)
        sections: list[Section] = []
        for make in SECTIONS:
            made = make(run)
            sections += made if isinstance(made, list) else [made]
    return "\n".join(map(markdown, [summary(sections), *sections]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--presets", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        text = report(options.run, [name for name in options.presets.split(",") if name])
    except (AtlasError, DamagedShardError) as error:
        raise SystemExit(str(error)) from error
    say(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
