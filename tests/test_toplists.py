"""Top lists and tallies: any split, any order, the same as sorting everything at once."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import toplists
from pipeline.statistics import Tally, tally
from pipeline.toplists import TopList


def brute(values: np.ndarray, sources: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
    """By plain sorting: per channel the best image of each source, best first, ties by index."""
    found = []
    for channel in values.T:
        best: dict[int, tuple[float, int]] = {}
        for image, value in enumerate(channel):
            key = (-float(value), image)
            source = int(sources[image])
            best[source] = min(best.get(source, key), key)
        found.append([(-v, i) for v, i in sorted(best.values())[:k]])
    return found


def listed(top: TopList) -> list[list[tuple[float, int]]]:
    rows = zip(top.value, top.index, strict=True)
    return [[(float(v), int(i)) for v, i in zip(*row, strict=True) if i >= 0] for row in rows]


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, list[int], int]:
    images, channels = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    # Few different values: ties everywhere.
    flat = draw(st.lists(st.integers(-3, 3), min_size=images * channels, max_size=images * channels))
    values = np.array(flat, np.float32).reshape(images, channels)
    sources = np.array(draw(st.lists(st.integers(0, 8), min_size=images, max_size=images)))
    k = draw(st.integers(1, 6))
    order = draw(st.permutations(range(images)))
    return values, sources, k, list(order), draw(st.integers(1, 7))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_any_split_in_any_order_is_the_sorted_list(case: tuple[np.ndarray, np.ndarray, int, list[int], int]) -> None:
    values, sources, k, order, step = case
    parts = []
    for start in range(0, len(order), step):
        rows = np.array(order[start : start + step])
        maps = torch.from_numpy(values[rows])[:, :, None, None]
        new = toplists.candidates(maps, rows, sources[rows])
        parts.append(toplists.keep_top(TopList.empty(values.shape[1], k), new, k))
    assert listed(toplists.merge(parts, k)) == brute(values, sources, k)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_stream_is_the_sorted_list(case: tuple[np.ndarray, np.ndarray, int, list[int], int]) -> None:
    values, sources, k, _, step = case
    top = TopList.empty(values.shape[1], k)
    for start in range(0, len(values), step):
        rows = np.arange(start, min(start + step, len(values)))
        maps = torch.from_numpy(values[rows])[:, :, None, None]
        top = toplists.keep_top(top, toplists.candidates(maps, rows, sources[rows]), k)
    assert listed(top) == brute(values, sources, k)


def test_the_place_is_that_of_the_first_maximum() -> None:
    maps = torch.zeros(1, 1, 3, 4)
    maps[0, 0, 1, 2] = maps[0, 0, 2, 0] = 5
    found = toplists.candidates(maps, np.array([9]), np.array([9]))
    assert (found.value[0, 0], found.index[0, 0], found.y[0, 0], found.x[0, 0]) == (5, 9, 1, 2)


def test_empty_places_are_marked() -> None:
    new = toplists.candidates(torch.ones(2, 1, 1, 1), np.array([0, 1]), np.array([4, 4]))
    top = toplists.keep_top(TopList.empty(1, 3), new, 3)
    assert top.index.tolist() == [[0, -1, -1]] and np.isneginf(top.value[0, 1:]).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_tallies_add_up(images: int, step: int, seed: int) -> None:
    maps = torch.randn(images, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    total = Tally.empty(3)
    for start in range(0, images, step):
        total = total + tally(maps[start : start + step])
    statistics = total.statistics()
    assert total.images == images
    assert np.allclose(statistics["mean"], maps.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(statistics["nonzero"], (maps > 0).float().mean((0, 2, 3)), atol=1e-6)
    assert np.array_equal(statistics["max"], maps.amax((0, 2, 3)).numpy())
    assert np.allclose(statistics["best_mean"], maps.mean((2, 3)).amax(0), atol=1e-6)


def test_a_tally_survives_its_arrays() -> None:
    total = tally(torch.randn(2, 3, 4, 4))
    again = Tally.from_arrays(total.arrays())
    assert again.images == 2 and np.array_equal(again.total, total.total)
