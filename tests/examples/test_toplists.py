"""Top lists: any split, any order, the same as sorting everything at once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.examples import topk


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


def listed(keys: np.ndarray) -> list[list[tuple[float, int]]]:
    rows = zip(*topk.decode(keys), strict=True)
    return [[(float(v), int(i)) for v, i in zip(*row, strict=True) if i >= 0] for row in rows]


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, list[int], int]:
    images, channels = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    # Few different values, zeros of both signs among them: ties everywhere.
    few, count = st.sampled_from([-2.5, -1, -0.0, 0.0, 1, 3]), images * channels
    flat = draw(st.lists(few, min_size=count, max_size=count))
    values = np.array(flat, np.float32).reshape(images, channels)
    sources = np.array(draw(st.lists(st.integers(0, 8), min_size=images, max_size=images)))
    k = draw(st.integers(1, 6))
    order = draw(st.permutations(range(images)))
    return values, sources, k, list(order), draw(st.integers(1, 7))


@settings(max_examples=200, deadline=None)
@given(cases(), st.booleans())
def test_any_split_in_any_order_is_the_sorted_list(
    case: tuple[np.ndarray, np.ndarray, int, list[int], int], crops: bool
) -> None:
    values, sources, k, order, step = case
    own = sources if crops else None
    parts = []
    for start in range(0, len(order), step):
        rows = np.array(order[start : start + step])
        parts.append(topk.update(topk.empty(values.shape[1], k), values[rows], rows, own))
    merged = topk.merge(parts, k, own)
    assert listed(merged) == brute(values, sources if crops else np.arange(len(values)), k)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_stream_is_the_sorted_list(case: tuple[np.ndarray, np.ndarray, int, list[int], int]) -> None:
    values, sources, k, order, step = case
    top = topk.empty(values.shape[1], k)
    for start in range(0, len(order), step):
        rows = np.array(order[start : start + step])
        top = topk.update(top, values[rows], rows, sources)
    assert listed(top) == brute(values, sources, k)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.integers(0, 2**31 - 1))
def test_keys_order_as_values_and_come_back(values: list[float], index: int) -> None:
    own = np.array(values, np.float32)
    keys = topk.encode(own, np.full(len(own), index))
    value, indices = topk.decode(keys)
    assert np.array_equal(value, own) and (indices == index).all()
    assert np.array_equal(own[np.argsort(keys, kind="stable")], np.sort(own, kind="stable"))


def test_empty_places_are_marked() -> None:
    top = topk.update(topk.empty(1, 3), np.ones((2, 1), np.float32), np.array([0, 1]), np.array([4, 4]))
    value, index = topk.decode(top)
    assert index.tolist() == [[0, -1, -1]] and np.isnan(value[0, 1:]).all()
