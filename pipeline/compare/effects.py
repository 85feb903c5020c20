"""Compare the effects of units on the outputs of the network between runs.

Runs that can be compared have the same network and dataset; their effects differ if they were measured over other
images, or on another device. How much they differ says how far the effects of a run can be trusted.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.compare.runs import RunComparison
from pipeline.compare.statistics import Median, median
from pipeline.core.metric_specs import Metric
from pipeline.names.readable import readable_labels
from pipeline.store.effects import UnitEffects, rank_correlation
from pipeline.store.layer_view import LayerView
from pipeline.store.reader import Atlas

# Numbers of units that are compared if the effects of two runs differ, by their names in tables.
MEASURES = {
    "effect": Metric(
        "effect", "mean effect", "effect of the unit on the largest output of each image, by attribution; mean"
    ),
    "effect_size": Metric(
        "effect_size", "effect size", "mean absolute effect on the largest output of each image, by attribution"
    ),
}

# So many outputs are named whose effects changed most.
OUTPUTS = 3


@dataclasses.dataclass(frozen=True)
class EffectsChange:
    """How the effects of one layer's units differ between two runs, over the units that both have.

    Attributes:
        layer: Name of the layer.
        contender: Label of the run.
        against: Label of the run that it is compared with.
        units: Number of units with a mean effect in both runs.
        change: Median of the change of the mean effect, `contender` − `against`.
        size_change: Median of the change of the effect size.
        rank_correlation: Spearman's rank correlation of the mean effects over the units; NaN if it is undefined.
        ablated: Number of units that both runs ablated.
        outputs: Of the mean effects of these units by ablation, the outputs that changed most: name, and mean absolute
            change over the units.
    """

    layer: str
    contender: str
    against: str
    units: int
    change: Median
    size_change: Median
    rank_correlation: float
    ablated: int
    outputs: tuple[tuple[str, float], ...]


def numbers_of(view: LayerView) -> dict[str, np.ndarray]:
    """Return the numbers `MEASURES` of the units of a layer, (C',) each; empty without effects."""
    effects = view.effects()
    return {} if effects is None else {"effect": effects.mean, "effect_size": effects.size}


def compare_effects(inputs: RunComparison) -> tuple[EffectsChange, ...]:
    """Return the changes of effects by layer, from the first run with effects to each other one.

    A run counts once, whatever the number of its presets. Runs with the effects of the first one are left out.
    """
    labels: dict[Atlas, str] = {}
    for contender, atlas in zip(inputs.contenders, inputs.atlases, strict=True):
        if len(atlas.effects_index):
            presets = sum(one is atlas for one in inputs.atlases)
            labels.setdefault(atlas, contender.label if presets == 1 else contender.run)
    runs = list(labels)
    changes: list[EffectsChange] = []
    for atlas in runs[1:]:
        pairs = [
            (name, effects, reference)
            for name in atlas.layers
            if name in runs[0].layers
            and (effects := atlas[name].effects()) is not None
            and (reference := runs[0][name].effects()) is not None
        ]
        if all(_equal(effects, reference) for _, effects, reference in pairs):
            continue
        names = readable_labels(atlas.labels)
        changes += [
            _change(name, (labels[atlas], labels[runs[0]]), effects, reference, names)
            for name, effects, reference in pairs
        ]
    return tuple(changes)


def table(changes: Sequence[EffectsChange]) -> pd.DataFrame:
    """Return the changes as a table with one row per layer and pair of runs: effects.csv."""
    rows = []
    for one in changes:
        row: dict[str, object] = {"layer": one.layer, "contender": one.contender, "against": one.against}
        row |= {"units": one.units, "rank_correlation": one.rank_correlation}
        for name, result in (("effect", one.change), ("effect_size", one.size_change)):
            row |= {f"{name}_change": result.value, f"{name}_low": result.low, f"{name}_high": result.high}
        row["ablated"] = one.ablated
        for number in range(OUTPUTS):
            name, value = one.outputs[number] if number < len(one.outputs) else ("", np.nan)
            row |= {f"output_{number + 1}": name, f"output_{number + 1}_change": value}
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame if any(one.outputs for one in changes) else frame.loc[:, :"effect_size_high"]


def _equal(one: UnitEffects, other: UnitEffects) -> bool:
    same = np.array_equal(one.channels, other.channels) and np.array_equal(one.ablated, other.ablated)
    return same and np.array_equal(one.attribution, other.attribution, equal_nan=True)


def _change(
    layer: str, labels: tuple[str, str], effects: UnitEffects, reference: UnitEffects, names: tuple[str, ...]
) -> EffectsChange:
    """Return the change of a layer; `labels` are those of both runs, `names` the names of the outputs."""
    _, rows, other_rows = np.intersect1d(effects.channels, reference.channels, return_indices=True)
    mean, other = effects.mean[rows].astype(np.float64), reference.mean[other_rows].astype(np.float64)
    known = np.isfinite(mean) & np.isfinite(other)
    sizes = effects.size[rows].astype(np.float64) - reference.size[other_rows]
    correlation = rank_correlation(mean[known], other[known]) if known.sum() > 1 else float("nan")
    _, ablated, other_ablated = np.intersect1d(effects.ablated, reference.ablated, return_indices=True)
    outputs: tuple[tuple[str, float], ...] = ()
    if len(ablated):
        one, two = (x.ablations["mean"]["mean"].astype(np.float64) for x in (effects, reference))
        moved = np.abs(one[ablated] - two[other_ablated]).mean(0)
        order = np.argsort(-moved, kind="stable")[:OUTPUTS].tolist()
        outputs = tuple((names[k] if k < len(names) else str(k), float(moved[k])) for k in order if moved[k] > 0)
    change = median((mean - other)[known])
    return EffectsChange(layer, *labels, change.units, change, median(sizes), correlation, len(ablated), outputs)
