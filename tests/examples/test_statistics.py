"""Statistics, spectra and labels against what NumPy says of everything at once; splits and orders to the last byte."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.hashing import hash64
from pipeline.data.datasets import Dataset
from pipeline.data.readers.base import DatasetImage
from pipeline.examples import channel_stats, label_association, quantile_examples, topk
from pipeline.examples.association import Association
from pipeline.examples.channel_stats import HistogramRange, sparsity
from pipeline.examples.label_association import LabeledSources
from pipeline.examples.sweep import LISTS, ExamplesConfig, ImageSubsets, PassAccumulator, PassResult, merge

LAYERS = (3, 1, 4)


def maps_of(seed: int, images: int, kind: str) -> np.ndarray:
    """(n, C, 5, 7) responses: plain, rectified with a dead channel, or far from zero."""
    maps = np.random.default_rng(seed).normal(size=(images, sum(LAYERS), 5, 7)).astype(np.float32)
    if kind == "rectified":
        maps = np.maximum(maps - 2.3, 0)
        maps[:, 0] = 0
    return maps + np.float32(100) if kind == "offset" else maps


def reduced(maps: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """What a network pass hands on, by NumPy."""
    flat = maps.reshape(*maps.shape[:2], -1)
    distance = (flat - centre[:, None]).astype(np.float32)
    means = [x.mean(-1, dtype=np.float64) for x in (distance, distance.astype(np.float64) ** 2, flat > 0)]
    return np.stack([flat.max(-1), flat.min(-1), *means]).astype(np.float32)


def setting(maps: np.ndarray, sources: np.ndarray | None) -> tuple[HistogramRange, ImageSubsets, ExamplesConfig]:
    flat = maps.reshape(*maps.shape[:2], -1)
    first = flat[: len(flat) // 2 + 1]
    ranges = HistogramRange.from_sample(first.max(-1), first.min(-1), first.mean(-1), LAYERS)
    half = np.arange(0, len(maps), 2, dtype=np.int32)
    return ranges, ImageSubsets(half, half, np.arange(len(maps), dtype=np.int32)), ExamplesConfig(k=3)


def gathered(maps: np.ndarray, rows: np.ndarray, sources: np.ndarray | None, given: tuple) -> PassResult:
    ranges, drawn, config = given
    gathering = PassAccumulator(LAYERS, config, ranges, drawn, sources)
    gathering.add(rows, torch.from_numpy(reduced(maps[rows], ranges.centre)))
    return gathering.result([(int(i) + 1000, "cut off: x") for i in rows if i % 5 == 0])


def same(a: PassResult, b: PassResult) -> None:
    left, right = a.arrays(), b.arrays()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        if left[name].dtype == object:
            assert left[name].tolist() == right[name].tolist()
        else:
            assert left[name].tobytes() == right[name].tobytes(), name


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 90),
    st.sampled_from(["plain", "rectified", "offset"]),
    st.booleans(),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_any_split_and_order_gives_the_same_bytes(seed, images, kind, crops, workers, random) -> None:
    maps = maps_of(seed, images, kind)
    sources = np.arange(images, dtype=np.int32) // 3 if crops else None
    given_ = setting(maps, sources)
    whole = gathered(maps, np.arange(images), sources, given_)
    order = list(range(images))
    random.shuffle(order)
    cuts = sorted(random.choices(range(images + 1), k=workers - 1))
    pieces = [order[a:b] for a, b in zip([0, *cuts], [*cuts, images], strict=True) if b > a]
    parts = [PassResult.from_arrays(gathered(maps, np.array(p), sources, given_).arrays()) for p in pieces]
    random.shuffle(parts)
    same(merge(parts, 3, sources), whole)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 90), st.sampled_from(["plain", "rectified", "offset"]))
def test_statistics_are_numpys(seed: int, images: int, kind: str) -> None:
    maps = maps_of(seed, images, kind)
    given_ = setting(maps, None)
    found = gathered(maps, np.arange(images), None, given_)
    got = channel_stats.channel_statistics(found.tally, given_[0], np.ones(sum(LAYERS), bool))
    flat = maps.astype(np.float64).reshape(images, sum(LAYERS), -1)
    peaks = flat.max(-1)
    scale = np.abs(flat).max()
    close = {"atol": 1e-6 * scale, "rtol": 1e-6}
    assert np.allclose(got["mean"], flat.mean((0, 2)), **close)
    assert np.allclose(got["sd"], flat.std((0, 2)), **close)
    assert np.array_equal(got["max"], flat.max((0, 2))) and np.array_equal(got["min"], flat.min((0, 2)))
    assert np.allclose(got["nonzero"], (flat > 0).mean((0, 2)), **close)
    assert np.allclose(got["fired"], (peaks > 0).mean(0), **close)
    assert np.allclose(got["best_mean"], flat.mean(-1).max(0), **close)
    rates = np.maximum(peaks, 0)
    with np.errstate(all="ignore"):
        lifetime = (1 - rates.mean(0) ** 2 / (rates**2).mean(0)) / (1 - 1 / images)
        centred = peaks - peaks.mean(0)
        kurtosis = (centred**4).mean(0) / (centred**2).mean(0) ** 2 - 3
    assert np.allclose(got["sparsity"], lifetime, atol=1e-5, equal_nan=True)
    far = np.abs(given_[0].normalize(peaks) * 10 - 4).max(0) > 100
    resolved = np.isfinite(got["kurtosis"])
    assert np.allclose(got["kurtosis"][resolved & ~far], kurtosis[resolved & ~far], atol=1.1e-2, rtol=1e-5)
    # Maxima that spread over a fortieth of the histogram's range are resolved.
    assert resolved[(given_[0].normalize(peaks).std(0) > 0.025) & ~far].all()
    assert np.array_equal(got["inactive"], flat.max((0, 2)) <= 0)
    assert found.tally.histogram.sum(1).tolist() == [images] * sum(LAYERS)
    edges = np.linspace(0, 1, 255)
    low = given_[0].low
    for c in range(sum(LAYERS)):
        heap = found.tally.histogram[c]
        assert heap[0] == (peaks[:, c] < low[c]).sum() and heap[-1] == (given_[0].normalize(peaks)[:, c] >= 1).sum()
        inside = np.histogram(given_[0].normalize(peaks)[:, c], edges)[0]
        assert np.abs(np.cumsum(heap[1:-1]) - np.cumsum(inside)).max() <= 1


def test_statistics_against_zero_are_left_out_where_zero_is_arbitrary() -> None:
    """A linear channel far below zero is not inactive; its other statistics do not change."""
    maps = maps_of(0, 40, "plain")
    maps[:, 0] -= 100
    given_ = setting(maps, None)
    tally = gathered(maps, np.arange(40), None, given_).tally
    everywhere = channel_stats.channel_statistics(tally, given_[0], np.ones(sum(LAYERS), bool))
    rectified = np.arange(sum(LAYERS)) >= LAYERS[0]
    got = channel_stats.channel_statistics(tally, given_[0], rectified)
    assert everywhere["inactive"].tolist() == [True] + [False] * 7 and not got["inactive"].any()
    for name in ("nonzero", "fired", "sparsity"):
        assert np.isnan(got[name][~rectified]).all()
        assert np.array_equal(got[name][rectified], everywhere[name][rectified])
    for name in ("mean", "sd", "max", "min", "best_mean", "least_mean", "kurtosis"):
        assert np.array_equal(got[name], everywhere[name])


def test_population_sparsity_is_that_of_each_photograph() -> None:
    maps = maps_of(3, 40, "rectified")
    given_ = setting(maps, None)
    tally = gathered(maps, np.arange(40), None, given_).tally
    rates = maps.reshape(40, sum(LAYERS), -1).max(-1).astype(np.float64)
    for i, part in enumerate(np.split(rates, np.cumsum(LAYERS)[:-1], axis=1)):
        with np.errstate(all="ignore"):
            each = sparsity(part.sum(1), (part**2).sum(1), part.shape[1])
        assert tally.crowded[i] == np.isfinite(each).sum()
        if tally.crowded[i]:
            assert tally.crowd[i] / 2**32 / tally.crowded[i] == pytest.approx(np.nanmean(each), abs=1e-6)


def test_sparsity_at_its_ends() -> None:
    assert sparsity(np.array(4.0), np.array(4.0), 4) == 0 and sparsity(np.array(3.0), np.array(9.0), 4) == 1
    assert np.isnan(sparsity(np.array(0.0), np.array(0.0), 4))


def test_lists_are_sorted_by_what_they_say() -> None:
    maps = maps_of(5, 50, "plain")
    found = gathered(maps, np.arange(50), None, setting(maps, None))
    flat = maps.reshape(50, sum(LAYERS), -1)
    order = {"max": -flat.max(-1), "mean": -flat.mean(-1, dtype=np.float64), "min": flat.min(-1)}
    for name in LISTS:
        _, index = topk.decode(found.tops[name])
        assert np.array_equal(index, np.argsort(order[name], axis=0, kind="stable")[:3].T)


def brute_spectrum(peaks, indices, sources, channel, edges, each):
    """Bin by bin, turn by turn, in plain Python."""
    ranked = sorted(range(len(indices)), key=lambda i: (peaks[i], indices[i]))
    chance = {i: int(quantile_examples.pseudo_random(np.array([channel]), indices[[i]])[0, 0]) for i in ranked}
    bins = [[i for r, i in enumerate(ranked) if lo <= (r + 0.5) / len(ranked) * 100 < hi]
            for lo, hi in itertools.pairwise(edges)]  # fmt: skip
    bins = [sorted(b, key=chance.__getitem__) for b in bins]
    used, taken = set(), [[] for _ in bins]
    for _ in range(each):
        for b in sorted(range(len(bins)), key=lambda b: (min(b, len(bins) - 1 - b), b)):
            found = next((i for i in bins[b] if sources[i] not in used and i not in taken[b]), None)
            if found is not None:
                used.add(sources[found])
                taken[b].append(found)
    return [[int(indices[i]) for i in sorted(t, key=ranked.index)] for t in taken]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.booleans(), st.randoms(use_true_random=False))
def test_spectra_are_those_of_plain_python_in_any_order(seed: int, images: int, crops: bool, random) -> None:
    rng = np.random.default_rng(seed)
    peaks = rng.integers(-3, 4, (images, 2)).astype(np.float32)
    indices = np.sort(rng.choice(1000, images, replace=False)).astype(np.int32)
    sources = indices // 100 if crops else indices
    edges = (0, 1, 25, 50, 75, 99, 100)
    shuffled = np.array(random.sample(range(images), images))
    channels = np.array([7, 300])
    value, index = quantile_examples.select_quantile_examples(
        peaks[shuffled], indices[shuffled], sources[shuffled], channels, edges, 3
    )
    for row, channel in enumerate(channels):
        expected = brute_spectrum(peaks[:, row], indices, sources, channel, edges, 3)
        assert [[int(i) for i in b if i >= 0] for b in index[row]] == expected
        for b, own in enumerate(expected):
            at = np.searchsorted(indices, own)
            assert value[row, b, : len(own)].tolist() == peaks[at, row].tolist()


def test_the_subset_does_not_depend_on_the_order_of_the_list() -> None:
    images = [DatasetImage(f"a/{i}.jpg", "", i) for i in range(500)]
    draws = []
    for order in (images, images[::-1]):
        dataset = Dataset(order, {})
        draws.append([dataset.images[i].path for i in dataset.draw(40)])
    assert draws[0] == draws[1] == sorted((p.path for p in images), key=lambda p: hash64(p, "subset"))[:40]


def grouped(labels: np.ndarray, sources: np.ndarray | None = None) -> LabeledSources:
    sources = np.arange(len(labels)) if sources is None else sources
    return LabeledSources.group(labels, sources, np.random.default_rng(7).permutation(sources.max() + 1)[sources])


def associated(peaks: np.ndarray, sources: LabeledSources, rectified: bool = True) -> Association:
    low, high = peaks.min(0).astype(np.float64) - 0.1, peaks.max(0).astype(np.float64) + 0.1
    codes = channel_stats.bins_of(torch.from_numpy(HistogramRange(low, high, low, high).normalize(peaks))).numpy()
    return label_association.associate_by_activations(codes, sources, low, high, rectified)


def test_labels_are_found_with_lift_selectivity_and_auroc() -> None:
    rng = np.random.default_rng(0)
    of = rng.integers(0, 5, 2000).astype(np.int32)
    peaks = rng.normal(size=(2000, 3)).astype(np.float32)
    peaks[of == 2, 0] += 3
    sources = grouped(of)
    found = associated(peaks, sources)
    top = np.argsort(-peaks[:, 0])[:20]
    assert found.method == "responses" and found.best[0] == found.over[0, 0] == 2
    share = (of[top] == 2).mean()
    assert found.count[0, 0] == share * 20 and found.lift[0, 0] == pytest.approx(share / (of == 2).mean())
    assert found.p[0, 0] == pytest.approx(1e-4)
    half = np.empty(len(of), int)
    half[sources.images] = sources.half
    areas, selectivities = [], []
    for h in (0, 1):
        mine, rest = peaks[(half == h) & (of == 2), 0], peaks[(half == h) & (of != 2), 0]
        areas.append((mine[:, None] > rest).mean() + (mine[:, None] == rest).mean() / 2)
        m, r = np.maximum(mine, 0).mean(), np.maximum(rest, 0).mean()
        selectivities.append((m - r) / (m + r))
    assert found.auroc[0] == pytest.approx(np.mean(areas), abs=2e-3)
    assert found.selectivity[0] == pytest.approx(np.mean(selectivities), abs=5e-3)
    assert abs(found.auroc[1] - 0.5) < 0.06


def test_a_channel_of_noise_is_not_associated_with_any_of_200_labels() -> None:
    """Measured on the images that chose the label, its AUROC is far above 0.5 although there is nothing to find."""
    rng = np.random.default_rng(1)
    of = np.repeat(np.arange(200), 20)
    peaks = rng.normal(size=(4000, 64)).astype(np.float32)
    sources = grouped(of)
    found = associated(peaks, sources)
    in_sample = []
    for values in peaks.T:
        best = np.bincount(of, np.maximum(values, 0)).argmax()
        in_sample.append(label_association.auroc(values[of == best], np.sort(values)))
    assert np.mean(in_sample) > 0.62
    # (The mean of a ratio of means is a little below 0.)
    assert abs(found.auroc.mean() - 0.5) < 0.03 and abs(found.selectivity.mean()) < 0.1
    # Of the 40 top images of a channel some share a label: the former condition on lift found one in every channel.
    assert (found.over[:, 0] >= 0).mean() <= 0.125
    assert (found.best >= 0).sum() <= 3 and (found.chosen >= 0).all()


def test_crops_of_one_source_count_once() -> None:
    """30 crops of one image with an accident in it are no evidence about its label."""
    rng = np.random.default_rng(2)
    of = np.r_[np.repeat(0, 11 + 29), np.repeat(np.arange(1, 20), 12)]
    source = np.r_[np.repeat(0, 30), np.arange(1, len(of) - 29)]
    peaks = rng.uniform(0, 1, (len(of), 1)).astype(np.float32)
    peaks[:30] += 5
    as_images, by_source = associated(peaks, grouped(of)), associated(peaks, grouped(of, source))
    assert as_images.best[0] == as_images.over[0, 0] == 0 and as_images.auroc[0] > 0.8
    assert by_source.best[0] == by_source.over[0, 0] == -1 and abs(by_source.auroc[0] - 0.5) < 0.25
    # The label has 11 sources; if it had 9, its 39 images would not be enough.
    assert 0 in grouped(of, source).large
    fewer = (source > 2) | (source == 0)
    assert 0 not in grouped(of[fewer], source[fewer]).large and 0 in grouped(of[fewer]).large


def test_the_value_of_a_source_does_not_grow_with_its_crops() -> None:
    rng = np.random.default_rng(3)
    crops = np.where(np.arange(600) < 300, 20, 2)  # label 0 is cropped ten times as often
    source = np.repeat(np.arange(600), crops)
    of = (source >= 300).astype(int)
    sources = grouped(of, source)
    found = associated(rng.normal(3, 1, (len(source), 32)).astype(np.float32), sources)
    assert abs(found.auroc.mean() - 0.5) < 0.02
    assert sources.sizes.tolist() == [[150, 150], [150, 150]]


def test_halves_and_ties_depend_on_paths_only() -> None:
    """Crops of a source are in one half, and no order of the list matters, even where all values are ties."""
    rng = np.random.default_rng(4)
    source = rng.integers(0, 300, 900)
    of = np.where(rng.uniform(size=900) < 0.1, 9, source % 6)  # some sources have crops with two labels
    order = rng.permutation(300)[source]
    peaks = np.zeros((900, 4), np.float32)
    peaks[:, 1:] = rng.integers(0, 3, (900, 3))
    other = rng.permutation(900)
    a = LabeledSources.group(of, source, order)
    b = LabeledSources.group(of[other], source[other], order[other])
    halves = {tuple(pair) for pair in zip(source[a.images], np.repeat(a.half, np.diff([*a.starts, 900])), strict=True)}
    assert len(halves) == len(np.unique(source)) and abs(a.sizes[0].sum() - a.sizes[1].sum()) < 30
    first, second = associated(peaks, a), associated(peaks[other], b)
    for name, array in first.arrays().items():
        assert np.array_equal(array, second.arrays()[name], equal_nan=array.dtype == np.float32), name


def test_p_values_are_those_of_the_smallest_tail_over_all_labels() -> None:
    """With two labels of equal size, the smallest tail is exactly known: the larger of the two counts decides."""
    sources = grouped(np.repeat([0, 1], 300))
    assert sources.top == 6
    ways = np.array([math.comb(300, k) * math.comb(300, 6 - k) for k in range(7)]) / math.comb(600, 6)
    assert sources.tails[0] == pytest.approx(np.cumsum(ways[::-1])[::-1])
    for count in (4, 5, 6):
        exact = sum(ways[k] for k in range(7) if max(k, 6 - k) >= count)
        assert sources.p_values(sources.tails[0, count]) == pytest.approx(exact, abs=0.02)


def test_labels_of_a_layer_without_zero() -> None:
    """All activations are negative; the label is the one with the highest, and no ratio of them means anything."""
    rng = np.random.default_rng(5)
    of = np.repeat(np.arange(5), 100)
    peaks = rng.normal(-50, 1, (500, 2)).astype(np.float32)
    peaks[of == 3, 0] += 3
    found = associated(peaks, grouped(of), rectified=False)
    assert found.best[0] == 3 and found.auroc[0] > 0.95 and np.isnan(found.selectivity).all()
    assert associated(peaks, grouped(of)).chosen.tolist() == [[-1, -1]] * 2


def test_few_sources_a_label_give_counts_and_say_so() -> None:
    of = np.array([0, 0, 1, 2, -1, 1], np.int32)
    assert not grouped(of).sufficient and grouped(np.repeat([0, 1], 10)).sufficient
    # Forty images of two sources.
    assert not grouped(np.repeat([0, 1], 20), np.repeat([0, 1], 20)).sufficient
    best = np.array([[0, 1, 2, 4], [-1, -1, -1, -1]])
    found = label_association.associate_by_counts(best, of, np.arange(6))
    assert found.method == "counts" and found.over[0].tolist() == [0, 1, -1] and found.count[0].tolist() == [2, 1, 0]
    assert found.over[1].tolist() == [-1, -1, -1] and np.isnan(found.auroc).all() and np.isnan(found.p).all()


def test_counts_are_of_sources_and_not_of_crops() -> None:
    """Unit 0 has a label once; unit 1 twice, but by crops of one source; unit 2 by two sources."""
    labels = np.array([3, 4, 4, 5, 5, 6], np.int32)
    sources = np.array([0, 1, 1, 2, 3, 4])
    best = np.array([[0, 5, -1], [1, 2, 0], [0, 3, 4]])
    found = label_association.associate_by_counts(best, labels, sources)
    assert found.over[:, 0].tolist() == [3, 3, 5] and found.count[:, :2].tolist() == [[1, 1], [1, 1], [2, 1]]
