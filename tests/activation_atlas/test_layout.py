"""Layout of sampled activations: whitening, the plane, cells, classes and nearest samples, on made cases."""

import importlib.util

import numpy as np
import pytest

from pipeline.activation_atlas import projection
from pipeline.activation_atlas.layout import LEAST_SHRINKAGE, lay_out, place, shrunk_moment, whitening
from pipeline.activation_atlas.projection import planar, principal_components
from pipeline.activation_atlas.results import CLASSES, NEAREST, AtlasLayout, SamplesPart


def clusters(count: int = 60, channels: int = 12, kinds: int = 3) -> np.ndarray:
    """Vectors around a few directions that share a large component, (count, channels)."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(0, 0.1, (count, channels))
    vectors[:, 0] += 5
    vectors[np.arange(count), 1 + np.arange(count) % kinds] += 2
    return vectors.astype(np.float32)


def part_of(vectors: np.ndarray, positions: int = 1, top: np.ndarray | None = None) -> SamplesPart:
    """Samples of one layer; `vectors` (n · positions, C) are those of n images one after the other."""
    images = len(vectors) // positions
    shaped = vectors.reshape(images, positions, -1).astype(np.float32)
    places = np.stack(np.meshgrid(np.arange(images), np.arange(positions), indexing="ij"), axis=2).astype(np.int16)
    top = np.full(images, -1, np.int32) if top is None else top.astype(np.int32)
    return SamplesPart(np.arange(images, dtype=np.int32), top, (shaped,), (places,))


def check(layout: AtlasLayout, vectors: np.ndarray) -> None:
    """What holds for every layout."""
    inside = layout.cell >= 0
    assert layout.count.sum() == inside.sum() and (layout.count > 0).all()
    assert np.array_equal(np.bincount(layout.cell[inside], minlength=layout.cells), layout.count)
    rows, columns = layout.grid
    assert (layout.row < rows).all() and (layout.column < columns).all() and (layout.row >= 0).all()
    keys = layout.row.astype(int) * columns + layout.column
    assert (np.diff(keys) > 0).all()
    floor = np.floor(layout.coordinates[inside]).astype(int)
    assert np.array_equal(floor[:, 0], layout.column[layout.cell[inside]])
    assert np.array_equal(floor[:, 1], layout.row[layout.cell[inside]])
    for cell in range(layout.cells):
        own = vectors[layout.cell == cell]
        np.testing.assert_allclose(layout.mean[cell], own.mean(0), rtol=1e-4, atol=1e-5)
        numbers = layout.nearest[cell][layout.nearest[cell] >= 0]
        assert len(numbers) and (layout.cell[numbers] == cell).all()
        assert len(set(layout.image[numbers].tolist())) == len(numbers) <= NEAREST
    lengths = np.linalg.norm(layout.direction, axis=1)
    np.testing.assert_allclose(lengths, np.ones(layout.cells), rtol=1e-5)


def test_whitening_makes_the_second_moment_the_identity() -> None:
    vectors = clusters(400)
    moment, _ = shrunk_moment(vectors, shrinkage=0.0)
    np.testing.assert_allclose(moment, vectors.astype(np.float64).T @ vectors / len(vectors), rtol=1e-6)
    white = vectors @ whitening(moment)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(12), atol=1e-6)


def test_whitening_of_channels_that_are_never_active() -> None:
    vectors = clusters()
    vectors[:, 4:] = 0
    matrix = whitening(shrunk_moment(vectors, shrinkage=0.0)[0])
    assert np.isfinite(matrix).all() and np.allclose(matrix[4:], 0)
    shrunk, shrinkage = shrunk_moment(vectors)
    assert np.isfinite(whitening(shrunk)).all() and shrinkage >= LEAST_SHRINKAGE
    assert np.linalg.eigvalsh(shrunk).min() > 0


def test_shrinkage_falls_with_the_number_of_samples_and_keeps_the_trace() -> None:
    values = []
    for count in (5, 50, 5000):
        vectors = np.random.default_rng(1).normal(size=(count, 20)) * np.linspace(0.1, 3, 20)
        moment, shrinkage = shrunk_moment(vectors)
        assert np.trace(moment) == pytest.approx(np.square(vectors).sum() / count)
        values.append(shrinkage)
    assert values[0] > values[1] > values[2] == LEAST_SHRINKAGE
    assert shrunk_moment(np.ones((1, 4)))[1] == pytest.approx(LEAST_SHRINKAGE)
    assert shrunk_moment(np.zeros((3, 4)))[1] == 1.0


def test_a_direction_is_what_is_special_about_a_cell() -> None:
    """All samples share channel 0; whitened, it has less weight than the channel that only this kind has."""
    vectors = clusters(600)
    matrix = whitening(shrunk_moment(vectors)[0])
    for kind in range(3):
        mean = vectors[kind::3].mean(0)
        assert mean.argmax() == 0 and (mean @ matrix @ matrix).argmax() == 1 + kind
    layout = lay_out(part_of(vectors), 0, grid=4, min_count=1)
    check(layout, vectors)
    moment, _ = shrunk_moment(vectors)
    solved = np.linalg.solve(moment, layout.mean.T.astype(np.float64)).T
    solved /= np.linalg.norm(solved, axis=1, keepdims=True)
    np.testing.assert_allclose(layout.direction, solved, atol=1e-4)


def test_similar_samples_are_close_and_counts_add_up() -> None:
    vectors = clusters()
    layout = lay_out(part_of(vectors), 0, grid=5, min_count=1)
    check(layout, vectors)
    assert max(layout.grid) == 5 and layout.count.sum() == len(vectors)
    kinds = np.arange(len(vectors)) % 3
    centers = np.stack([layout.coordinates[kinds == kind].mean(0) for kind in range(3)])
    nearest = np.linalg.norm(layout.coordinates[:, None] - centers, axis=2).argmin(1)
    assert (nearest == kinds).mean() > 0.95


def test_cells_with_few_samples_stay_empty() -> None:
    vectors = clusters()
    everything, large = (lay_out(part_of(vectors), 0, 9, least) for least in (1, 4))
    check(large, vectors)
    assert large.cells < everything.cells and (large.count >= 4).all()
    assert np.array_equal(large.coordinates, everything.coordinates)
    assert (large.cell == -1).sum() == everything.count[everything.count < 4].sum()


def test_samples_without_any_activation_are_in_no_cell() -> None:
    vectors = clusters()
    vectors[::4] = 0
    layout = lay_out(part_of(vectors), 0, 4, 1)
    check(layout, vectors)
    assert (layout.cell[::4] == -1).all() and np.isnan(layout.coordinates[::4]).all()
    assert layout.count.sum() == 45
    none = lay_out(part_of(np.zeros((20, 6))), 0, 4, 1)
    assert none.cells == 0 and (none.cell == -1).all() and none.direction.shape == (0, 6)
    unread = lay_out(SamplesPart.joined([], [(0, "unreadable")]), 0, 4, 1)
    assert unread.cells == 0 and len(unread.image) == 0


@pytest.mark.parametrize("count", [1, 2, 7])
def test_fewer_samples_than_cells(count: int) -> None:
    vectors = clusters(count)
    layout = lay_out(part_of(vectors), 0, 10, 1)
    check(layout, vectors)
    assert layout.method == "PCA" and layout.count.sum() == count


def test_equal_samples_share_a_cell() -> None:
    layout = lay_out(part_of(np.ones((40, 5))), 0, 8, 1)
    assert layout.cells == 1 and layout.count.tolist() == [40] and layout.grid == (1, 1)


def test_classes_of_cells_and_a_layer_without_a_classifier() -> None:
    vectors = np.repeat(np.eye(2), 10, axis=0)
    top = np.array([7] * 5 + [3] * 4 + [9] + [3] * 10)
    layout = lay_out(part_of(vectors, top=top), 0, 2, 1)
    assert layout.cells == 2
    first = int(layout.cell[0])
    assert layout.classes[first].tolist() == [7, 3, 9, -1, -1][:CLASSES]
    assert layout.class_count[first].tolist() == [5, 4, 1, 0, 0]
    assert layout.classes[1 - first, 0] == 3 and layout.class_count[1 - first].tolist() == [10, 0, 0, 0, 0]
    without = lay_out(part_of(vectors), 0, 2, 1)
    assert (without.classes == -1).all() and (without.class_count == 0).all() and (without.top == -1).all()


def test_several_positions_of_an_image() -> None:
    vectors = clusters(40)
    layout = lay_out(part_of(vectors, positions=2, top=np.arange(20)), 0, 2, 1)
    check(layout, vectors)
    assert layout.image.tolist() == np.repeat(np.arange(20), 2).tolist() == layout.y.tolist() == layout.top.tolist()
    assert layout.x.tolist() == [0, 1] * 20


def test_a_layout_is_read_as_it_was_written() -> None:
    layout = lay_out(part_of(clusters()), 0, 3, 1)
    again = AtlasLayout.from_arrays(layout.arrays(), layout.attributes())
    assert (again.method, again.shrinkage, again.grid) == (layout.method, layout.shrinkage, layout.grid)
    for name, array in layout.arrays().items():
        assert np.array_equal(array, again.arrays()[name], equal_nan=array.dtype.kind == "f"), name


def test_the_plane_is_the_same_every_time_and_keeps_its_aspect() -> None:
    vectors = clusters(50)
    first, second = (place(vectors.copy(), 9) for _ in range(2))
    assert first[0] == second[0] and np.array_equal(first[1], second[1])
    flat = np.zeros((10, 3), np.float32)
    flat[:, 0], flat[:, 1] = np.linspace(-3, 3, 10), 0.5  # after centering, a line
    method, places, shape = place(flat, 6)
    assert method == "PCA" and min(shape) == 1 and places.max() < 6


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_more_samples_than_t_sne_lays_out_are_placed_at_their_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "MOST_TSNE", 30)
    components = principal_components(clusters(90), 5)
    method, places = planar(components, ["t-SNE"])
    assert method == "t-SNE" and places.shape == (90, 2)
    chosen = np.unique(np.linspace(0, 89, 30).round().astype(int))
    assert len(np.unique(places, axis=0)) <= 30
    for row in range(90):
        distances = np.linalg.norm(components[chosen] - components[row], axis=1)
        assert np.array_equal(places[row], places[chosen[distances.argmin()]])


def test_without_other_methods_the_plane_is_that_of_the_principal_components() -> None:
    components = principal_components(clusters(), 4)
    method, places = planar(components, [])
    assert method == "PCA" and np.array_equal(places, components[:, :2])
