"""The first pass over the dataset: statistics and top-k images of all channels of all layers at once.

Every layer's output is reduced inside its forward hook, so that no feature map of a batch is kept. From then on, the
channels of all layers lie side by side on one axis. The result for a range of images is small and can be merged with
others: any split of the dataset, merged in any order, gives the same bytes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.acceleration.precision import ieee
from pipeline.core.validation import Use
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.data.image_loading import Loaded
from pipeline.examples import topk
from pipeline.examples.channel_stats import ChannelAccumulator, HistogramRange, RunningSums
from pipeline.images import metrics
from pipeline.kernels import spatial_stats
from pipeline.kernels.spatial_stats import Reducer
from pipeline.kernels.transfers import CPU, upload
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model, inplace_activations

# Lists of images: by the largest activation, the largest spatial mean, and the smallest activation.
LISTS = ("max", "mean", "min")

# So many images are accumulated together.
BUFFER_IMAGES = 192


# Histogram bins of single images, a byte for each channel, take at most so much memory: dictionaries have many latents.
LABELLED_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """What is stored of a dataset, and in what portions it is read. `conf/examples/default.yaml` explains each key."""

    k: Annotated[int, Field(ge=1)] = 8
    spectrum: tuple[float, ...] = (0, 1, 25, 50, 75, 99, 100)
    per_bin: Annotated[int, Field(ge=0)] = 3
    sample: Annotated[int, Field(ge=1)] = 64
    subset: Annotated[int, Field(ge=0)] = 1024
    labelled: Annotated[int, Field(ge=0)] = 32_768
    batch: Annotated[int, Field(ge=1)] = 32
    per_task: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], Use("auto or a number from 1")] = "auto"
    compile: Annotated[bool | Literal["auto"], Use("auto or true, false")] = "auto"
    store: Literal["images", "crops", "ids"] = "images"
    side: Annotated[int, Field(ge=32)] = 320
    crop_side: Annotated[int, Field(ge=8)] = 96
    jpeg_quality: Annotated[int, Field(ge=1)] = 85
    maps: Annotated[int, Field(ge=1)] = 14

    def images_per_task(self, images: int) -> int:
        """Return the number of images per task: by default about 64 tasks of 256 to 4,096 images each."""
        if isinstance(self.per_task, int):
            return self.per_task
        return min(max(256, -(-images // 64)), 4096)

    def should_compile(self, images: int, layers: int) -> bool:
        """Return whether to compile the reduction. By default from 30,000 images times layers on, where that pays."""
        return self.compile if isinstance(self.compile, bool) else images * layers >= 30_000


def labelled_images(config: ExamplesConfig, channels: int) -> int:
    """Return the largest number of images with stored histogram bins, for so many channels in all."""
    return min(config.labelled, LABELLED_BYTES // max(1, channels))


@dataclasses.dataclass(frozen=True)
class ImageSubsets:
    """Images drawn by hash before the pass, as indices.

    Attributes:
        sample: Images that determine the ranges of the histograms, in the order of the draw.
        subset: Images for which the maximum activation of every channel is stored, ascending.
        labelled: Images for which the histogram bin of every channel is stored, ascending.
    """

    sample: np.ndarray
    subset: np.ndarray
    labelled: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, config: ExamplesConfig, channels: int) -> "ImageSubsets":
        """Draw from a dataset. Only paths matter, so that the result is the same on every machine.

        `labelled` is empty if the dataset has fewer than two labels.

        Args:
            dataset: The dataset.
            config: The settings.
            channels: Number of channels of all layers of the pass.
        """
        count = labelled_images(config, channels)
        order = dataset.draw(max(config.sample, config.subset, count))
        labelled = order[:count] if len(dataset.labels[0]) > 1 else order[:0]
        return cls(order[: config.sample], np.sort(order[: config.subset]), np.sort(labelled))


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What both passes over the dataset need.

    Attributes:
        model: The network.
        layers: Layers to measure.
        dataset: The dataset.
        config: Settings.
        stop: Called before every batch; raises an exception to interrupt the pass.
        threads: Number of threads that decode images.
        depths: Fixed depths of the network, which the second pass measures.
    """

    model: Model
    layers: Sequence[Layer]
    dataset: Dataset
    config: ExamplesConfig
    stop: Callable[[], None] = lambda: None
    threads: int = 2
    depths: Sequence[Layer] = ()


@dataclasses.dataclass(frozen=True)
class PassResult:
    """Result of the first pass for any set of images, for the C channels of all layers side by side.

    Attributes:
        tops: Keys (C, k) of the top-k images (`topk`), by list.
        tally: Sums over the images.
        responses_index: The images of `ImageSubsets.subset`, (n,), ascending.
        responses: Their maximum activations, (n, C) float32.
        means: Their spatial means, (n, C) float16; NaN in results of former versions.
        appearance: Their contrast and chroma (`images.metrics.appearance`), (n, 2) float32; NaN in results of
            former versions.
        codes_index: The images of `ImageSubsets.labelled`, (n,), ascending.
        codes: The histogram bins of their maximum activations, (n, C) uint8.
        failed: Images that could not be read, with the reason.
    """

    tops: Mapping[str, np.ndarray]
    tally: ChannelAccumulator
    responses_index: np.ndarray
    responses: np.ndarray
    means: np.ndarray
    appearance: np.ndarray
    codes_index: np.ndarray
    codes: np.ndarray
    failed: tuple[tuple[int, str], ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as a shard stores them."""
        return {
            **{f"tops/{name}": keys for name, keys in self.tops.items()},
            **{f"tally/{name}": array for name, array in self.tally.arrays().items()},
            "responses/index": self.responses_index,
            "responses/peak": self.responses,
            "responses/mean": self.means,
            "responses/appearance": self.appearance,
            "codes/index": self.codes_index,
            "codes/bin": self.codes,
            "failed/index": np.array([i for i, _ in self.failed], np.int32),
            "failed/reason": np.array([reason for _, reason in self.failed], object),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "PassResult":
        """Create from the result of `arrays`."""
        tally = {k.removeprefix("tally/"): v for k, v in arrays.items() if k.startswith("tally/")}
        index = arrays["responses/index"]
        failed = zip(arrays["failed/index"].tolist(), arrays["failed/reason"].tolist(), strict=True)
        return cls(
            tops={name: arrays[f"tops/{name}"] for name in LISTS},
            tally=ChannelAccumulator.from_arrays(tally),
            responses_index=index,
            responses=arrays["responses/peak"],
            means=arrays.get("responses/mean", np.full(arrays["responses/peak"].shape, np.nan, np.float16)),
            appearance=arrays.get("responses/appearance", np.full((len(index), 2), np.nan, np.float32)),
            codes_index=arrays["codes/index"],
            codes=arrays["codes/bin"],
            failed=tuple((int(i), str(reason)) for i, reason in failed),
        )


class PassAccumulator:
    """Accumulates reduced activations of images, in any order, into a `PassResult`."""

    def __init__(
        self,
        layers: Sequence[int],
        config: ExamplesConfig,
        ranges: HistogramRange,
        subsets: ImageSubsets,
        sources: np.ndarray | None,
        compile: bool = False,
        device: torch.device = CPU,
    ) -> None:
        """Create an accumulator without any image.

        Args:
            layers: Number of channels of each layer.
            config: Settings.
            ranges: Ranges and scales of the channels.
            subsets: Images for which activations or bins are stored.
            sources: Source of every image of the dataset; None if each image is its own source.
            compile: Whether to compile the computation of sums.
            device: Device of the activations. All results stay there until `result`: if it is a GPU, it never waits
                for the CPU.
        """
        self._layers, self._subsets, self._sources = layers, subsets, sources
        self._device, self.dense = device, device.type != "cpu"
        self._tops = {name: upload(topk.empty(sum(layers), config.k), device) for name in LISTS}
        self._device_sources = None if sources is None else upload(sources, device)
        self._sums = RunningSums(ranges, layers, compile, device)
        self._centre = upload(ranges.centre.astype(np.float32), device)
        self._responses: list[_Rows] = []
        self._means: list[_Rows] = []
        self._codes: list[_Rows] = []
        self._appearance: list[_Rows] = []

    def observe(self, indices: np.ndarray, images: Tensor) -> None:
        """Add contrast and chroma of images, (n, C, H, W) in [0, 1]; those outside the subset are ignored."""
        members = self._members(indices, self._subsets.subset)
        if members is not None:
            look = metrics.appearance(images[members.rows])
            self._appearance.append(_Rows(members.indices, torch.stack([look["contrast"], look["chroma"]], 1)))

    def add(self, indices: np.ndarray, reduced: Tensor) -> None:
        """Add images.

        Args:
            indices: Indices of the images, (n,).
            reduced: Their reduced activations, (5, n, C) float32, as `spatial_stats.Reducer` returns them.
        """
        # Networks may overflow on some images, and the sums of integers have no NaN or infinity.
        if self.dense or not reduced.sum().isfinite():
            reduced = reduced.nan_to_num()
        means = reduced[spatial_stats.MEAN_DEVIATION] + self._centre
        self._update_tops("max", reduced[spatial_stats.MAXIMUM], indices)
        self._update_tops("mean", means, indices)
        self._update_tops("min", -reduced[spatial_stats.MINIMUM], indices)
        codes = self._sums.add(reduced, self.dense)
        members = self._members(indices, self._subsets.subset)
        if members is not None:
            self._responses.append(_Rows(members.indices, reduced[spatial_stats.MAXIMUM][members.rows]))
            self._means.append(_Rows(members.indices, metrics.clamped_half(means[members.rows])))
        members = self._members(indices, self._subsets.labelled)
        if members is not None:
            self._codes.append(_Rows(members.indices, codes[members.rows]))

    def _update_tops(self, name: str, values: Tensor, indices: np.ndarray) -> None:
        tops = self._tops[name]
        if self.dense:
            self._tops[name] = topk.update_dense(tops, values, upload(indices, self._device), self._device_sources)
        else:
            self._tops[name] = torch.from_numpy(topk.update(tops.numpy(), values.numpy(), indices, self._sources))

    def _members(self, indices: np.ndarray, subset: np.ndarray) -> "_Rows | None":
        """Return those of `indices` that are in a subset, and their places in `indices`; None if there are none."""
        is_member = np.isin(indices, subset)
        if not is_member.any():
            return None
        return _Rows(indices[is_member].astype(np.int32), upload(np.flatnonzero(is_member), self._device))

    def result(self, failed: Iterable[tuple[int, str]] = ()) -> PassResult:
        """Return the result for all images so far; `failed` are images that could not be read, with the reason."""
        channels = sum(self._layers)
        responses_index, responses = _sort_rows(self._responses, np.zeros((0, channels), np.float32))
        _, means = _sort_rows(self._means, np.zeros((0, channels), np.float16))
        codes_index, codes = _sort_rows(self._codes, np.zeros((0, channels), np.uint8))
        observed, rows = _sort_rows(self._appearance, np.zeros((0, 2), np.float32))
        appearance = np.full((len(responses_index), 2), np.nan, np.float32)
        appearance[np.searchsorted(responses_index, observed)] = rows
        return PassResult(
            tops={name: keys.cpu().numpy() for name, keys in self._tops.items()},
            tally=self._sums.total(),
            responses_index=responses_index,
            responses=responses,
            means=means,
            appearance=appearance,
            codes_index=codes_index,
            codes=codes,
            failed=tuple(sorted(failed)),
        )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Values of some images.

    Attributes:
        indices: Indices of the images, (m,) int32.
        rows: Their values, (m, …).
    """

    indices: np.ndarray
    rows: Tensor


def _sort_rows(parts: Sequence[_Rows], no_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices and values of all parts, sorted by index; see `_sort_by_index`."""
    return _sort_by_index([(part.indices, part.rows.cpu().numpy()) for part in parts], no_rows)


def _sort_by_index(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], no_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate (indices, rows) and sort them by index; `no_rows` (0, C) sets type and shape if there is no part."""
    index = np.concatenate([np.zeros(0, np.int32), *(indices for indices, _ in parts)])
    order = np.argsort(index, kind="stable")
    return index[order], np.concatenate([no_rows, *(rows for _, rows in parts)])[order]


def reduce_batches(
    context: PassContext,
    loaded: Iterable[Loaded],
    centre: np.ndarray,
    reducer: Reducer,
    failed: list[tuple[int, str]],
    observe: Callable[[np.ndarray, Tensor], None] = lambda *_: None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Run the network on images and reduce the feature maps of all layers.

    Args:
        context: Network, layers and settings.
        loaded: Images.
        centre: Center of each channel, (C,), which the reduction subtracts.
        reducer: The reduction.
        failed: The (index, reason) of every image that could not be read is appended to this list.
        observe: Function that is called for each batch with the indices and the images, (n, C, H, W) in [0, 1].

    Yields:
        Indices (n,) and reduced activations (5, n, C) float32 of each batch, on the device of the network. The latter
        are a view of a buffer that the next batch overwrites: copy them to keep them.
    """
    model, layers, batch_size = context.model, context.layers, context.config.batch
    device = model.device
    starts = np.cumsum([0, *(layer.channels for layer in layers)])
    position = {layer.name: i for i, layer in enumerate(layers)}
    centres = [upload(centre[a:b].astype(np.float32), device) for a, b in itertools.pairwise(starts)]
    parts: list[Tensor] = [torch.empty(0)] * len(layers)
    joined = torch.empty(5, batch_size, int(starts[-1]), device=device)

    def reduce(layer: Layer, maps: Tensor) -> None:
        i = position[layer.name]
        parts[i] = reducer(maps, centres[i])

    # Maps are reduced in the hook, before later layers can overwrite them: in-place activations are safe.
    with inplace_activations(model), capture(model, layers, each=reduce) as forward, torch.no_grad():
        for items, images in image_loading.batches(loaded, batch_size, failed):
            context.stop()
            # Pad to the full batch size: kernels that are chosen by batch size round differently.
            if len(images) < batch_size:
                images = np.concatenate([images, np.repeat(images[-1:], batch_size - len(images), 0)])
            # Change the memory format before the conversion to float, while there are fewer bytes to move.
            full = upload(images, device).contiguous(memory_format=torch.channels_last)
            scaled = full.float().div_(255)
            indices = np.array([item.index for item in items])
            observe(indices, scaled[: len(items)])
            forward(scaled)
            torch.cat(parts, -1, out=joined)
            yield indices, joined[:, : len(items)]


@ieee(deterministic=True)
def measure_ranges(context: PassContext, sample: Sequence[int]) -> HistogramRange:
    """Measure the ranges of histograms and the centers of squares on a first sample of images."""
    channels = [layer.channels for layer in context.layers]
    loaded = image_loading.load_images(context.dataset, sample, context.model.preprocessing)
    batches = reduce_batches(context, loaded, np.zeros(sum(channels)), Reducer(False), [])
    reduced = [values.clone() for _, values in batches]
    joined = torch.cat([torch.zeros(5, 0, sum(channels)), *(values.cpu() for values in reduced)], 1).numpy()
    return HistogramRange.from_sample(
        joined[spatial_stats.MAXIMUM], joined[spatial_stats.MINIMUM], joined[spatial_stats.MEAN_DEVIATION], channels
    )


@ieee(deterministic=True)
def sweep(context: PassContext, indices: Iterable[int], ranges: HistogramRange, subsets: ImageSubsets) -> PassResult:
    """Run the first pass over the images `indices`.

    Args:
        context: Network, layers, dataset and settings.
        indices: Images to read.
        ranges: Ranges and scales of the channels; the same for all parts of a pass.
        subsets: Images for which activations or bins are stored.
    """
    dataset, config, layers = context.dataset, context.config, context.layers
    compile = config.should_compile(len(dataset.images), len(layers))
    channels = [layer.channels for layer in layers]
    device = context.model.device
    accumulator = PassAccumulator(channels, config, ranges, subsets, dataset.sources, compile, device)
    failed: list[tuple[int, str]] = []
    loaded = image_loading.load_images(dataset, indices, context.model.preprocessing, context.threads)
    reducer, observe = Reducer(compile), accumulator.observe
    collect(accumulator, reduce_batches(context, loaded, ranges.centre, reducer, failed, observe))
    return accumulator.result(failed)


def collect(accumulator: PassAccumulator, batches: Iterable[tuple[np.ndarray, Tensor]]) -> None:
    """Add the batches of `reduce_batches` to an accumulator, `BUFFER_IMAGES` images at a time.

    The buffer is reused: fresh memory for every batch would fragment that of the network, which then runs slower.
    """
    rows = np.empty(BUFFER_IMAGES, np.int64)
    buffer = torch.empty(5, 0, 0)
    filled = 0
    for indices, values in batches:
        if not buffer.numel():
            buffer = values.new_empty(5, BUFFER_IMAGES, values.shape[2])
        start = 0
        while start < len(indices):
            count = min(BUFFER_IMAGES - filled, len(indices) - start)
            rows[filled : filled + count] = indices[start : start + count]
            buffer[:, filled : filled + count] = values[:, start : start + count]
            filled, start = filled + count, start + count
            if filled == BUFFER_IMAGES:
                accumulator.add(rows, buffer)
                filled = 0
    if filled:
        accumulator.add(rows[:filled], buffer[:, :filled])


def merge(results: Iterable[PassResult], k: int, sources: np.ndarray | None) -> PassResult:
    """Merge results over disjoint sets of images, in any order; at most two are in memory at a time.

    Args:
        results: At least one result.
        k: Length of the lists.
        sources: Source of every image of the dataset; None if each image is its own source.
    """
    total: PassResult | None = None
    for result in results:
        total = result if total is None else _merge_two(total, result, k, sources)
    assert total is not None
    return total


def _merge_two(a: PassResult, b: PassResult, k: int, sources: np.ndarray | None) -> PassResult:
    responses_index, responses = _sort_by_index(
        [(a.responses_index, a.responses), (b.responses_index, b.responses)], b.responses[:0]
    )
    _, means = _sort_by_index([(a.responses_index, a.means), (b.responses_index, b.means)], b.means[:0])
    _, appearance = _sort_by_index(
        [(a.responses_index, a.appearance), (b.responses_index, b.appearance)], b.appearance[:0]
    )
    codes_index, codes = _sort_by_index([(a.codes_index, a.codes), (b.codes_index, b.codes)], b.codes[:0])
    return PassResult(
        tops={name: topk.merge([a.tops[name], b.tops[name]], k, sources) for name in LISTS},
        tally=a.tally + b.tally,
        responses_index=responses_index,
        responses=responses,
        means=means,
        appearance=appearance,
        codes_index=codes_index,
        codes=codes,
        failed=tuple(sorted(a.failed + b.failed)),
    )
