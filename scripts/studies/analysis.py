"""Tests of a study's hypotheses: clustered effects, corrected for their number, and a verdict by stated rules."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from plan import Hypothesis, Plan

from pipeline.compare.clustered import ClusteredEffect, clustered_effect, detectable, holm, trend

LEVEL = 0.05
UNIT = ["network", "layer", "channel"]

# Verdicts, and the words that begin a finding.
SUPPORTED, SMALL, CONTRADICTED, NONE, OPEN = "supported", "small", "contradicted", "no such effect", "open"
WORDS = {
    SUPPORTED: "Yes",
    SMALL: "Yes, but less than the stated minimum",
    CONTRADICTED: "No, the opposite",
    NONE: "No effect as large as the stated minimum",
    OPEN: "Not decided",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The test of one hypothesis.

    Attributes:
        hypothesis: The hypothesis.
        effect: The effect over all networks; for a ratio, of the logarithm; for a trend, `value` is the correlation.
        networks: The effect in each network.
        p: p value, corrected by Holm's method for all hypotheses of the study.
        detectable: Least effect that would be found in 80 % of such studies; NaN for a trend.
        verdict: The verdict.
    """

    hypothesis: Hypothesis
    effect: ClusteredEffect
    networks: Mapping[str, ClusteredEffect]
    p: float
    detectable: float
    verdict: str

    @property
    def sentence(self) -> str:
        """The finding, without numbers, so that two runs with the same verdict have the same sentence."""
        return f"{WORDS[self.verdict]}: {self.hypothesis.statement[0].lower()}{self.hypothesis.statement[1:]}."


def unit_values(table: pd.DataFrame, arm: str, measure: str) -> pd.Series:
    """Return the mean over seeds of a measure for each unit of an arm."""
    rows = table[table["arm"] == arm]
    if rows.empty:
        raise SystemExit(f"No values of the arm {arm!r}; there are {sorted(table['arm'].unique())}.")
    return rows.groupby(UNIT, sort=False)[measure].mean()


def effects_of_units(table: pd.DataFrame, hypothesis: Hypothesis) -> pd.Series:
    """Return the effect for each unit: difference or logarithm of the quotient; for a trend, the value itself."""
    values = unit_values(table, hypothesis.arm, hypothesis.measure)
    other = hypothesis.against
    if other is None:
        return values
    if isinstance(other, str):
        first, second = values.align(unit_values(table, other, hypothesis.measure), join="inner")
    else:
        first, second = values, pd.Series(float(other), values.index)
    if hypothesis.scale == "ratio":
        positive = (first > 0) & (second > 0)
        return np.log(first.where(positive)) - np.log(second.where(positive))
    return first - second


def _effect(values: pd.Series, cluster: str) -> ClusteredEffect:
    index = values.index.to_frame(index=False)
    columns = ["network", "layer", "channel"] if cluster == "channel" else ["network", "layer"]
    clusters = list(index[columns].itertuples(index=False, name=None))
    return clustered_effect(values.to_numpy(), clusters, list(index["network"]))


def _trend(
    values: pd.Series, order: Mapping[tuple[str, str], int]
) -> tuple[ClusteredEffect, dict[str, ClusteredEffect]]:
    medians = values.groupby(level=["network", "layer"]).median().dropna()
    by_network: dict[str, np.ndarray] = {}
    for network, part in medians.groupby(level="network"):
        by_network[str(network)] = part.to_numpy()[np.argsort([order[key] for key in part.index])]

    def as_effect(parts: list[np.ndarray]) -> ClusteredEffect:
        value, p = trend(parts)
        return ClusteredEffect(value, math.nan, math.nan, p, len(values), sum(map(len, parts)), math.nan)

    return as_effect(list(by_network.values())), {name: as_effect([part]) for name, part in by_network.items()}


def verdict(hypothesis: Hypothesis, effect: ClusteredEffect, networks: Mapping[str, ClusteredEffect], p: float) -> str:
    """Return the verdict by the rules of docs/studies.

    Supported: p below 5 % after Holm's correction, in the expected direction, at least the minimal effect, and in this
    direction in every network. Below the minimal effect: small. Contradicted: p below 5 % and at least the minimal
    effect in the other direction. No such effect: the interval excludes the minimal effect in the expected direction.
    Open: everything else.
    """
    sign = 1 if hypothesis.expected == "higher" else -1
    minimal = math.log1p(hypothesis.minimal) if hypothesis.scale == "ratio" else hypothesis.minimal
    value, most = sign * effect.value, max(sign * effect.low, sign * effect.high)
    if p < LEVEL and value > 0:
        everywhere = all(sign * part.value > 0 for part in networks.values() if not math.isnan(part.value))
        return (SUPPORTED if value >= minimal else SMALL) if everywhere else OPEN
    if p < LEVEL and value <= -minimal:
        return CONTRADICTED
    return NONE if most < minimal else OPEN


def analyze(plan: Plan, table: pd.DataFrame) -> dict[str, Result]:
    """Return the test of each hypothesis of a plan."""
    order = {
        (str(network), str(layer)): int(depth)
        for network, layer, depth in table[["network", "layer", "depth"]].drop_duplicates().itertuples(index=False)
    }
    found: dict[str, tuple[ClusteredEffect, dict[str, ClusteredEffect]]] = {}
    for key, hypothesis in plan.hypotheses.items():
        rows = table[table["layer"].isin(hypothesis.layers)] if hypothesis.layers else table
        values = effects_of_units(rows, hypothesis)
        if hypothesis.against is None:
            found[key] = _trend(values, order)
            continue
        parts = {str(name): _effect(part, plan.cluster) for name, part in values.groupby(level="network")}
        found[key] = _effect(values, plan.cluster), parts
    corrected = holm([effect.p for effect, _ in found.values()])
    results = {}
    for (key, (effect, networks)), p in zip(found.items(), corrected, strict=True):
        hypothesis = plan.hypotheses[key]
        least = math.nan if hypothesis.against is None else detectable(effect, len(found), level=LEVEL)
        results[key] = Result(hypothesis, effect, networks, p, least, verdict(hypothesis, effect, networks, p))
    return results


def medians(plan: Plan, table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per arm: for each measure the mean over layers of each layer's median, with its interval."""
    rows = []
    for arm in dict.fromkeys(table["arm"]):
        row: dict[str, object] = {"arm": f"`{arm}`"}
        for measure, title in plan.measures.items():
            if measure in table:
                effect = _effect(unit_values(table, str(arm), measure), plan.cluster)
                row[title] = (
                    "" if not effect.units else f"{number(effect.value)} [{number(effect.low)}, {number(effect.high)}]"
                )
        rows.append(row)
    return pd.DataFrame(rows)


def number(value: float) -> str:
    """Return a number with three significant digits at most."""
    if math.isnan(value):
        return "–"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if abs(value) >= 0.01 else f"{value:.1g}"
