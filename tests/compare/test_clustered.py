"""Clustered effects: what is known of their interval, their test and their power."""

import math

import numpy as np
import pytest

from pipeline.compare.clustered import clustered_effect, detectable, holm, sign_flip_test, trend


def drawn(rng: np.random.Generator, effect: float, between: float, layers: int = 10, units: int = 6) -> tuple:
    """Values of units whose layers differ by `between`, with their layer and network."""
    of_layers = effect + between * rng.normal(size=layers)
    values = (of_layers[:, None] + rng.normal(size=(layers, units))).ravel()
    clusters = np.repeat(np.arange(layers), units).tolist()
    return values, clusters, [cluster % 2 for cluster in clusters]


def layer_medians(rng: np.random.Generator, effect: float) -> np.ndarray:
    """The medians of ten layers."""
    return np.median(drawn(rng, effect, 1.0)[0].reshape(10, -1), axis=1)


def test_the_effect_is_the_mean_of_the_medians_of_the_layers() -> None:
    values = np.array([1.0, 2.0, 30.0, -4.0, np.nan, -6.0])
    found = clustered_effect(values, ["a", "a", "a", "b", "b", "b"])
    assert found.value == (2 - 5) / 2 and found.units == 5 and found.clusters == 2
    assert clustered_effect(np.array([np.nan]), ["a"]).units == 0


def test_the_interval_covers_the_effect_and_independent_units_would_not() -> None:
    """Layers that differ as much as units do: 95 % of intervals hold the effect, those over units alone far fewer."""
    rng = np.random.default_rng(0)
    covered = alone = 0
    for _ in range(60):
        values, clusters, strata = drawn(rng, 0.5, 1.0)
        found = clustered_effect(values, clusters, strata)
        covered += found.low <= 0.5 <= found.high
        naive = clustered_effect(values, list(range(len(values))), strata)
        alone += naive.low <= 0.5 <= naive.high
    assert 0.85 <= covered / 60 <= 1 and alone / 60 < 0.7


def test_without_an_effect_one_test_in_twenty_finds_one() -> None:
    rng = np.random.default_rng(1)
    found = [sign_flip_test(layer_medians(rng, 0.0)) < 0.05 for _ in range(300)]
    assert 0.01 < np.mean(found) < 0.1


def test_signs_are_tried_in_all_combinations_or_drawn() -> None:
    assert sign_flip_test(np.ones(10)) == 2 / 2**10
    assert sign_flip_test(np.array([1.0, -1.0])) == 1
    assert math.isnan(sign_flip_test(np.array([])))
    rng = np.random.default_rng(2)
    values = rng.normal(0.5, 1, 14)
    exact = sign_flip_test(values)
    more = sign_flip_test(np.append(values, 0.0))  # 15 are drawn at random; a zero changes nothing
    assert more == pytest.approx(exact, abs=0.01)


def test_holm_is_as_published() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.01, math.nan, 0.5])
    assert corrected[0] == 0.02 and math.isnan(corrected[1]) and corrected[2] == 0.5
    assert holm([0.9, 0.8]) == [1, 1]


def test_the_detectable_effect_is_found_in_four_of_five_studies() -> None:
    rng = np.random.default_rng(3)
    least = np.median([detectable(clustered_effect(*drawn(rng, 0.0, 1.0))) for _ in range(50)])
    found = [sign_flip_test(layer_medians(rng, float(least))) < 0.05 for _ in range(300)]
    assert 0.7 < np.mean(found) < 0.9
    one = clustered_effect(*drawn(rng, 0.0, 1.0))
    assert detectable(one, tests=10) > detectable(one)


def test_a_trend_is_the_rank_correlation_with_depth() -> None:
    rising, falling = np.array([1.0, 2, 3, 4, 9]), np.array([5.0, 4, 3, 2, 1])
    assert trend([rising, rising])[0] == 1 and trend([falling])[0] == -1
    assert trend([rising, rising])[1] < 0.001 and trend([rising, falling])[0] == 0
    assert trend([rising])[1] == pytest.approx(2 / math.factorial(5), abs=0.004)
    assert math.isnan(trend([np.array([1.0])])[0])
