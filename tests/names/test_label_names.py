"""Names from labels: right where the truth is planted, absent where labels are shuffled or images too few."""

import math

import numpy as np
import pytest
from scipy.stats import hypergeom

from pipeline.names.label_names import LabelNull, false_discovery_rates, hypergeometric_pmf, name_by_labels


def examples_of(truth: np.ndarray, content: np.ndarray, distance: float, k: int = 16, seed: int = 0) -> np.ndarray:
    """The images with the largest activations of units that respond to one label, (units, k)."""
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(len(truth), len(content))) + distance * (content == truth[:, None])
    return np.argsort(-activations, axis=1)[:, :k]


def test_planted_labels_are_found_and_shuffled_ones_are_not() -> None:
    content = np.repeat(np.arange(50), 30)
    rng = np.random.default_rng(3)
    truth = rng.integers(50, size=100)
    examples = np.concatenate(
        [examples_of(truth[i : i + 25], content, d) for i, d in zip((0, 25, 50, 75), (5, 4, 3, 1.0), strict=True)]
    )
    found = name_by_labels(examples, LabelNull(content, np.arange(len(content))))
    assert found.earned[:50].all()
    assert (found.label == truth)[found.earned].all()
    # One standard deviation is not enough for most of the examples to have the label.
    assert found.earned[75:].sum() <= 5
    names = [
        name_by_labels(examples, LabelNull(rng.permutation(content), np.arange(len(content)))).earned.sum()
        for _ in range(5)
    ]
    assert sum(names) <= 0.05 * 5 * len(truth)


def test_support_confidence_and_p_of_one_unit() -> None:
    """Two labels of equal size: the p value is the probability that either has so many of four random images."""
    labels = np.repeat([0, 1], 20)
    null = LabelNull(labels, np.arange(40))
    found = name_by_labels(np.array([[0, 1, 2, 30], [0, 1, 2, 3]]), null)
    assert found.label.tolist() == [0, 0] and found.support.tolist() == [3, 4] and found.examined.tolist() == [4, 4]
    assert found.confidence.tolist() == [0.75, 1.0]
    all_four = 2 * math.comb(20, 4) / math.comb(40, 4)
    three = 2 * math.comb(20, 3) * 20 / math.comb(40, 4)
    assert found.p == pytest.approx([all_four + three, all_four], abs=0.02)
    assert not found.earned.any()


def test_no_name_from_one_source_however_many_images_of_it() -> None:
    """Eight crops of one image, two images, and three: only the last are enough."""
    labels = np.concatenate([np.zeros(8), [1, 1], [2, 2, 2], np.arange(3, 1000)]).astype(int)
    sources = np.concatenate([np.zeros(8), 1 + np.arange(len(labels) - 8)]).astype(int)
    null = LabelNull(labels, sources)
    found = name_by_labels(np.array([[0, 1, 2, 3, 4], [8, 9, -1, -1, -1], [10, 11, 12, -1, -1]]), null)
    assert found.support.tolist() == [1, 2, 3] and found.examined.tolist() == [1, 2, 3]
    assert found.earned.tolist() == [False, False, True]
    assert found.p[0] == 1 == found.p[1]


def test_a_label_whose_sources_have_many_crops_is_no_discovery() -> None:
    """Label 0 has few sources and most images: random images have it, so a unit with it has no name."""
    labels = np.concatenate([np.repeat(0, 400), np.repeat(np.arange(1, 10), 10)])
    sources = np.concatenate([np.repeat(np.arange(10), 40), 10 + np.arange(90)])
    examples = np.array([[0, 40, 80, 120]])
    assert name_by_labels(examples, LabelNull(labels, sources)).p[0] > 0.3
    even = LabelNull(np.repeat(np.arange(10), 10), np.arange(100))
    assert name_by_labels(np.array([[0, 1, 2, 3]]), even).p[0] < 0.01


def test_units_without_examples_and_images_without_labels() -> None:
    null = LabelNull(np.full(10, -1), np.arange(10))
    found = name_by_labels(np.array([[-1, -1], [0, 1]]), null)
    assert found.label.tolist() == [-1, -1] and found.examined.tolist() == [0, 2] and not found.earned.any()
    assert name_by_labels(np.zeros((0, 4), int), null).earned.tolist() == []


def test_false_discovery_rates() -> None:
    assert false_discovery_rates(np.array([0.01, 0.04, 0.03, 0.5])) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])


def test_the_null_is_the_same_in_every_process() -> None:
    labels = np.repeat(np.arange(20), 5)
    first, second = (LabelNull(labels, np.arange(100)).smallest(9) for _ in range(2))
    assert np.array_equal(first, second)


def test_the_distribution_is_that_of_scipy() -> None:
    marked, count = np.array([0, 1, 3, 50, 990, 1000])[:, None], np.arange(21)
    expected = hypergeom.pmf(count, 1000, marked, 20)
    assert np.allclose(hypergeometric_pmf(count, 1000, marked, 20), expected, rtol=1e-9, atol=1e-12)
