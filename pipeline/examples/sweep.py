"""The dataset pass: one sweep over a range of photographs, all channels of all layers at once, nothing dumped.

Every layer's response is reduced inside the hook that sees it, so that no activation of a batch outlives its
layer. From then on the channels of all layers stand side by side on one axis. The result of a range is small and can
be merged with any other: any split, merged in any order, is the same to the last byte.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.data.image_loading import Loaded
from pipeline.examples import topk
from pipeline.examples.channel_stats import ChannelAccumulator, HistogramRange, tally
from pipeline.examples.quantile_examples import subset
from pipeline.kernels import spatial_stats
from pipeline.kernels.spatial_stats import Reducer
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model, in_place

LISTS = ("max", "mean", "min")

# So many photographs are sorted and counted together.
HELD = 192


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """What is kept of a dataset, and in what portions it is read; conf/examples/default.yaml explains each."""

    k: int = 8
    spectrum: tuple[float, ...] = (0, 1, 25, 50, 75, 99, 100)
    per_bin: int = 3
    sample: int = 64
    subset: int = 1024
    labelled: int = 32_768
    batch: int = 32
    per_task: int | str = "auto"
    compile: bool | str = "auto"
    store: str = "images"
    side: int = 320
    crop_side: int = 96
    jpeg_quality: int = 85
    maps: int = 14

    def portion(self, photographs: int) -> int:
        """Photographs a task: about 64 tasks, but of no fewer than 256 photographs, and no more than 4,096."""
        if isinstance(self.per_task, int):
            return self.per_task
        return min(max(256, -(-photographs // 64)), 4096)

    def compiles(self, photographs: int, layers: int) -> bool:
        """Whether a compiled reduction pays: compiling takes as long as some thousands of photographs and layers."""
        return self.compile if isinstance(self.compile, bool) else photographs * layers >= 30_000


@dataclasses.dataclass(frozen=True)
class ImageSubsets:
    """Photographs drawn by hash before the pass, as indices: `sample` in the order of the draw, the others rising.

    `sample` sets the ranges of histograms; of `subset` every channel's response is kept, of `labelled` its bin.
    """

    sample: np.ndarray
    subset: np.ndarray
    labelled: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, config: ExamplesConfig) -> "ImageSubsets":
        """The same on every machine: paths decide. Nothing is drawn as labelled where there are no two labels."""
        most = max(config.sample, config.subset, config.labelled)
        order = subset([p.path for p in dataset.photos], most)
        labelled = order[: config.labelled] if len(dataset.labels[0]) > 1 else order[:0]
        return cls(order[: config.sample], np.sort(order[: config.subset]), np.sort(labelled))


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What photographs gave, for the C channels of all layers side by side.

    `tops` are keys (C, k) by list; `responses` the maxima (n, C) float32 of the photographs `responses_index`, `codes`
    the bins (n, C) uint8 of `codes_index`, both by rising index; `failed` what could not be read, and why.
    """

    tops: Mapping[str, np.ndarray]
    tally: ChannelAccumulator
    responses_index: np.ndarray
    responses: np.ndarray
    codes_index: np.ndarray
    codes: np.ndarray
    failed: tuple[tuple[int, str], ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """As they go into a shard."""
        return {
            **{f"tops/{name}": keys for name, keys in self.tops.items()},
            **{f"tally/{name}": array for name, array in self.tally.arrays().items()},
            "responses/index": self.responses_index,
            "responses/peak": self.responses,
            "codes/index": self.codes_index,
            "codes/bin": self.codes,
            "failed/index": np.array([i for i, _ in self.failed], np.int32),
            "failed/reason": np.array([reason for _, reason in self.failed], object),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "PassResult":
        """The inverse of `arrays`."""

        def under(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

        failed = zip(arrays["failed/index"].tolist(), arrays["failed/reason"].tolist(), strict=True)
        return cls(
            {name: arrays[f"tops/{name}"] for name in LISTS},
            ChannelAccumulator.from_arrays(under("tally/")),
            arrays["responses/index"],
            arrays["responses/peak"],
            arrays["codes/index"],
            arrays["codes/bin"],
            tuple((int(i), str(reason)) for i, reason in failed),
        )


class PassAccumulator:
    """Takes reduced responses image by image, in any order, and has a `PassResult` of them at any time."""

    def __init__(
        self,
        layers: Sequence[int],
        config: ExamplesConfig,
        ranges: HistogramRange,
        drawn: ImageSubsets,
        sources: np.ndarray | None,
        compile: bool = False,
    ) -> None:
        self._layers, self._k, self._ranges, self._drawn, self._sources = layers, config.k, ranges, drawn, sources
        self._tops = {name: topk.empty(sum(layers), config.k) for name in LISTS}
        self._tally = ChannelAccumulator.empty(layers)
        self._compile = compile
        self._centre = ranges.centre.astype(np.float32)
        self._responses: list[tuple[np.ndarray, np.ndarray]] = []
        self._codes: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, indices: np.ndarray, reduced: np.ndarray) -> None:
        """Photographs `indices` (n,) with what `reduction` says of them, (5, n, C) float32."""
        if not torch.from_numpy(reduced).sum().isfinite():
            # A network may overflow on some picture: what is no number must not enter sums of whole numbers.
            reduced = np.nan_to_num(reduced)
        peaks, lows, shifts, squares, positives = reduced
        for name, values in {"max": peaks, "mean": shifts + self._centre, "min": -lows}.items():
            self._tops[name] = topk.extended(self._tops[name], values, indices, self._sources)
        added, codes = tally(peaks, lows, shifts, squares, positives, self._ranges, self._layers, self._compile)
        self._tally = self._tally + added
        for kept, drawn, values in (
            (self._responses, self._drawn.subset, peaks),
            (self._codes, self._drawn.labelled, codes),
        ):
            own = np.isin(indices, drawn)
            if own.any():
                kept.append((indices[own].astype(np.int32), values[own]))

    def swept(self, failed: Iterable[tuple[int, str]] = ()) -> PassResult:
        """The result so far."""
        channels = sum(self._layers)
        responses = _sorted(self._responses, np.zeros((0, channels), np.float32))
        codes = _sorted(self._codes, np.zeros((0, channels), np.uint8))
        return PassResult(dict(self._tops), self._tally, *responses, *codes, tuple(sorted(failed)))


def _sorted(parts: Sequence[tuple[np.ndarray, np.ndarray]], nothing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices, rows) of several parts, by rising index."""
    index = np.concatenate([np.zeros(0, np.int32), *(i for i, _ in parts)])
    order = np.argsort(index, kind="stable")
    return index[order], np.concatenate([nothing, *(rows for _, rows in parts)])[order]


def reduced(
    model: Model,
    layers: Sequence[Layer],
    loaded: Iterable[Loaded],
    batch: int,
    centre: np.ndarray,
    reducer: Reducer,
    failed: list[tuple[int, str]],
    stop: Callable[[], None] = lambda: None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices (n,), (5, n, C) float32 as `reduction` gives them) of photographs, batch by batch.

    The numbers are overwritten by the next batch: who wants to keep them copies them.
    """
    device = next(model.module.parameters()).device
    starts = np.cumsum([0, *(layer.channels for layer in layers)])
    place = {layer.name: i for i, layer in enumerate(layers)}
    centres = [torch.from_numpy(centre[a:b].astype(np.float32)).to(device) for a, b in itertools.pairwise(starts)]
    parts: list[Tensor] = [torch.empty(0)] * len(layers)
    joined = torch.empty(5, batch, int(starts[-1]), device=device)

    def reduce(layer: Layer, maps: Tensor) -> None:
        i = place[layer.name]
        parts[i] = reducer(maps, centres[i])

    # A map is reduced the moment it is there: what comes after may overwrite it.
    with in_place(model), capture(model, layers, each=reduce) as forward, torch.no_grad():
        for items, images in image_loading.batches(loaded, batch, failed):
            stop()
            # Always the same batch size: kernels chosen by size would round differently.
            if len(images) < batch:
                images = np.concatenate([images, np.repeat(images[-1:], batch - len(images), 0)])
            # Turned round while they are bytes.
            full = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
            forward(full.float().div_(255))
            torch.cat(parts, -1, out=joined)
            yield np.array([item.index for item in items]), joined[:, : len(items)].cpu().numpy()


def ranges_of(
    model: Model, layers: Sequence[Layer], dataset: Dataset, config: ExamplesConfig, sample: Sequence[int]
) -> HistogramRange:
    """Ranges of histograms and centres of squares, from the photographs of a first sample."""
    channels = [layer.channels for layer in layers]
    loaded = image_loading.load(dataset, sample, model.recipe)
    found = [
        array.copy()
        for _, array in reduced(model, layers, loaded, config.batch, np.zeros(sum(channels)), Reducer(False), [])
    ]
    joined = np.concatenate([np.zeros((5, 0, sum(channels)), np.float32), *found], 1)
    return HistogramRange.measured(
        joined[spatial_stats.PEAK], joined[spatial_stats.LOW], joined[spatial_stats.SHIFT], channels
    )


def sweep(
    model: Model,
    layers: Sequence[Layer],
    dataset: Dataset,
    indices: Iterable[int],
    config: ExamplesConfig,
    ranges: HistogramRange,
    drawn: ImageSubsets,
    stop: Callable[[], None] = lambda: None,
    threads: int = 2,
) -> PassResult:
    """Examples and statistics of all channels of `layers` over the photographs `indices`."""
    compile = config.compiles(len(dataset.photos), len(layers))
    gathering = PassAccumulator([layer.channels for layer in layers], config, ranges, drawn, dataset.sources, compile)
    reducer = Reducer(compile)
    failed: list[tuple[int, str]] = []
    loaded = image_loading.load(dataset, indices, model.recipe, threads)
    collect(gathering, reduced(model, layers, loaded, config.batch, ranges.centre, reducer, failed, stop))
    return gathering.swept(failed)


def collect(gathering: PassAccumulator, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Add what `reduced` gives, many photographs at a time, in memory that is used again.

    Fresh memory for every batch would scatter the network's own, which then runs slower. All of it beside the
    network would take from it what it wins.
    """
    rows, block, filled = np.empty(HELD, np.int64), np.empty((5, 0, 0), np.float32), 0
    for indices, values in pieces:
        if not block.size:
            block = np.empty((5, HELD, values.shape[2]), np.float32)
        start = 0
        while start < len(indices):
            count = min(HELD - filled, len(indices) - start)
            rows[filled : filled + count] = indices[start : start + count]
            block[:, filled : filled + count] = values[:, start : start + count]
            filled, start = filled + count, start + count
            if filled == HELD:
                gathering.add(rows, block)
                filled = 0
    if filled:
        gathering.add(rows[:filled], block[:, :filled])


def merge(sweeps: Iterable[PassResult], k: int, sources: np.ndarray | None) -> PassResult:
    """One result from several over disjoint photographs, in any order; one is held in memory at a time."""
    total: PassResult | None = None
    for one in sweeps:
        if total is None:
            total = one
            continue
        responses = [(total.responses_index, total.responses), (one.responses_index, one.responses)]
        codes = [(total.codes_index, total.codes), (one.codes_index, one.codes)]
        total = PassResult(
            {name: topk.merge([total.tops[name], one.tops[name]], k, sources) for name in LISTS},
            total.tally + one.tally,
            *_sorted(responses, one.responses[:0]),
            *_sorted(codes, one.codes[:0]),
            tuple(sorted(total.failed + one.failed)),
        )
    assert total is not None
    return total
