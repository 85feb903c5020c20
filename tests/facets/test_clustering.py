"""Facets of made examples, whose groups are known."""

import numpy as np
import pytest

from pipeline.facets import clustering
from pipeline.facets.clustering import Reference

CHANNELS, CLASSES, EACH = 40, 60, 10


def made_dataset(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Responses (600, 40) of images of 60 classes, and the class of each."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((CLASSES, CHANNELS))
    classes = np.repeat(np.arange(CLASSES), EACH)
    return 3 + centers[classes] + 0.4 * rng.standard_normal((len(classes), CHANNELS)), classes


def examples_of(*parts: int) -> tuple[np.ndarray, np.ndarray, Reference]:
    """Directions of the images of some classes, the class of each, and the reference."""
    responses, classes = made_dataset()
    reference = Reference.of(responses, len(responses))
    chosen = np.flatnonzero(np.isin(classes, parts))
    chosen = np.random.default_rng(1).permutation(chosen)
    return reference.of_images(responses[chosen]), classes[chosen], reference


@pytest.mark.parametrize("parts", [(4,), (4, 30), (4, 30, 51)])
def test_a_unit_of_some_classes_has_one_facet_for_each(parts: tuple[int, ...]) -> None:
    directions, classes, reference = examples_of(*parts)
    facets = clustering.find_facets(directions, reference, 0.1)
    assert len(np.unique(facets)) == len(parts)
    assert all(len(np.unique(classes[facets == number])) == 1 for number in range(len(parts)))


def test_facets_are_ordered_by_size_and_do_not_depend_on_a_draw() -> None:
    directions, classes, reference = examples_of(4, 30)
    keep = np.flatnonzero((classes != 4) | (np.cumsum(classes == 4) <= 6))
    facets = clustering.find_facets(directions[keep], reference, 0.1)
    assert np.bincount(facets).tolist() == [10, 6] and (classes[keep][facets == 0] == 30).all()
    assert (clustering.find_facets(directions[keep].copy(), reference, 0.1) == facets).all()


def test_a_level_of_almost_one_finds_no_second_facet() -> None:
    directions, _, reference = examples_of(4, 30)
    assert not clustering.find_facets(directions, reference, 0.999).any()


def test_equal_examples_and_few_examples_are_one_facet() -> None:
    directions, _, reference = examples_of(4, 30)
    assert not clustering.find_facets(np.repeat(directions[:1], 12, 0), reference, 0.1).any()
    assert not clustering.find_facets(directions[:5], reference, 0.1).any()
    assert clustering.find_facets(directions[:0], reference, 0.1).shape == (0,)


def test_monosemanticity_is_0_for_random_images_1_for_neighbors_and_less_for_two_classes() -> None:
    responses, _ = made_dataset()
    reference = Reference.of(responses, len(responses))
    scores = {}
    for name, parts in {"one": (4,), "two": (4, 30), "many": tuple(range(CLASSES))}.items():
        directions, _, _ = examples_of(*parts)
        similarity, scores[name] = clustering.monosemanticity(directions, reference)
        assert similarity == pytest.approx(clustering.mean_cosine(directions))
    assert scores["many"] == pytest.approx(0, abs=1e-9)
    assert 0.9 < scores["one"] < 1.2
    assert 0.2 < scores["two"] < 0.8


def test_mean_cosine_is_the_mean_over_pairs() -> None:
    directions = clustering.unit_length(np.random.default_rng(2).standard_normal((5, 7)))
    pairs = [float(directions[i] @ directions[j]) for i in range(5) for j in range(i)]
    assert clustering.mean_cosine(directions) == pytest.approx(np.mean(pairs))
    assert np.isnan(clustering.mean_cosine(directions[:1]))


def test_neighborhoods_shrink_with_the_share_of_the_dataset_that_is_the_reference() -> None:
    responses, _ = made_dataset()
    assert Reference.of(responses, 600).neighbors(30) == 30
    assert Reference.of(responses, 6000).neighbors(300) == 30
    assert Reference.of(responses, 600_000).neighbors(300) == clustering.LEAST_NEIGHBORS


def test_separation_is_the_silhouette() -> None:
    directions, classes, _ = examples_of(4, 30)
    facets = (classes == 30).astype(int)
    distance = 1 - directions @ directions.T
    expected = []
    for number in (0, 1):
        own, other = np.flatnonzero(facets == number), np.flatnonzero(facets != number)
        values = []
        for i in own:
            a, b = distance[i, own[own != i]].mean(), distance[i, other].mean()
            values.append((b - a) / max(a, b))
        expected.append(np.mean(values))
    assert clustering.separation(directions, facets) == pytest.approx(expected, abs=1e-9)
    assert np.isnan(clustering.separation(directions, np.zeros(len(directions), int))).all()


def test_constant_channels_do_not_count() -> None:
    responses, _ = made_dataset()
    constant = np.concatenate([responses, np.full((len(responses), 3), 1e6)], 1)
    one, two = Reference.of(responses, 600), Reference.of(constant, 600)
    assert two.directions[:, :CHANNELS] == pytest.approx(one.directions) and not two.directions[:, CHANNELS:].any()
