"""The second pass over the dataset: where and how strongly each unit responds to its dataset examples.

The first pass stores numbers only. When it is complete, the dataset examples of all units are known, and a second
forward pass over these images alone gives positions, activation maps and the images to show.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.acceleration.precision import ieee
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.examples import topk
from pipeline.examples.quantile_examples import select_quantile_examples
from pipeline.examples.shown_images import (
    ShownImages,
    SourceImage,
    concatenate_bytes,
    receptive_field_jpeg,
    source_copier,
)
from pipeline.examples.sweep import LISTS, ExamplesConfig, PassContext, PassResult
from pipeline.images import metrics
from pipeline.kernels.transfers import upload
from pipeline.layers.finding import Layer, capture
from pipeline.layers.path_depths import depths_before, spatial_means
from pipeline.models.config import Preprocessing

# For so many of a unit's highest and lowest dataset examples, the activations of the whole layer are stored: feature
# visualizations are compared with their mean. For all k examples they would take more space than all other results of
# the pass.
TOP = 4

# Paths through the network are compared with those of so many of a unit's dataset examples. Four would give the
# similarity of the examples to each other with twice the error.
PATH_EXAMPLES = 8

# So many random images are read beside the dataset examples: paths are measured in standard deviations over them.
PATH_SAMPLE = 128

# The lists of examples that the paths of visualizations are compared with.
PATH_LISTS = ("mean", "max", "min")


@dataclasses.dataclass(frozen=True)
class TopExamples:
    """Dataset examples of C' channels of one layer.

    Attributes:
        channels: The channels, (C',) int32.
        lists: (values float32, image indices int32), (C', k) each, by list; NaN and −1 for no image. The list
            `spectrum` contains its quantile bins one after the other, with the same number of entries each.
    """

    channels: np.ndarray
    lists: Mapping[str, tuple[np.ndarray, np.ndarray]]

    def pairs(self) -> np.ndarray:
        """Return all pairs of image and channel that are in any list, each once.

        Returns:
            (P, 3) int32, sorted: image, row of the channel in `channels`, and 1 if the pair is only in the list `min`.
        """
        entries = []
        for name, (_, index) in self.lists.items():
            is_image = index >= 0
            row = np.broadcast_to(np.arange(len(index))[:, None], index.shape)[is_image]
            entries.append(np.stack([index[is_image], row, np.full(len(row), int(name == "min"))], 1))
        unique = np.unique(np.concatenate(entries), axis=0).astype(np.int32)
        if not len(unique):
            return unique
        # Of (image, row, 0) and (image, row, 1) keep the first.
        is_first = np.r_[True, (unique[1:, :2] != unique[:-1, :2]).any(1)]
        return unique[is_first]

    def top(self, negative: bool = False) -> np.ndarray:
        """Return the `TOP` images with the highest (or lowest) activations, (C', at most TOP); −1 for none."""
        return self.lists["min" if negative else "max"][1][:, :TOP]

    def path_examples(self, name: str) -> np.ndarray:
        """Return the images that paths of visualizations are compared with, (C', at most PATH_EXAMPLES); −1 for none.

        Args:
            name: One of `PATH_LISTS`.
        """
        return self.lists[name][1][:, :PATH_EXAMPLES]


def path_sample(dataset: Dataset) -> np.ndarray:
    """Return the random images that paths are compared with: those with the lowest hashes of their paths, ascending."""
    return np.sort(dataset.draw(PATH_SAMPLE))


def select_examples(
    swept: PassResult, layers: Sequence[tuple[Layer, Sequence[int]]], dataset: Dataset, config: ExamplesConfig
) -> list[TopExamples]:
    """Select the dataset examples of each layer's channels from the result of a complete first pass.

    Arbitrary entries are left out where `Layer.rectified`: a channel whose activation was never positive gets only
    examples of its lowest activations, and images with an activation of exactly 0, the output of a rectifier for any
    negative input, are never in a list of extremes.

    Args:
        swept: Result of the first pass, for all channels of the layers.
        layers: Layers, and of each the channels to select examples for.
        dataset: The dataset.
        config: Settings.
    """
    sources = dataset.source_numbers
    examples: list[TopExamples] = []
    start = 0
    for layer, layer_channels in layers:
        channels = np.asarray(layer_channels)
        columns = start + channels
        is_inactive = layer.rectified & ~(swept.tally.max[columns] > 0)[:, None]
        lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in LISTS:
            value, index = topk.decode(swept.tops[name][columns])
            value = -value if name == "min" else value
            is_arbitrary = (layer.rectified & (value == 0)) | (is_inactive & (name != "min"))
            lists[name] = _without(is_arbitrary, value, index)
        value, index = select_quantile_examples(
            swept.responses[:, columns],
            swept.responses_index,
            sources[swept.responses_index],
            channels,
            config.spectrum,
            config.per_bin,
        )
        lists["spectrum"] = _without(is_inactive, value.reshape(len(channels), -1), index.reshape(len(channels), -1))
        examples.append(TopExamples(channels.astype(np.int32), lists))
        start += layer.channels
    return examples


def _without(removed: np.ndarray, value: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Empty the entries of a list for which `removed` is true."""
    return np.where(removed, np.float32(np.nan), value), np.where(removed, -1, index)


@dataclasses.dataclass(frozen=True)
class SecondPassIndex:
    """What the second pass has to measure, for each layer.

    Attributes:
        channels: Channels with dataset examples, (C',).
        pairs: Pairs of image and channel, (P, 3), sorted by image; see `TopExamples.pairs`.
        top: Images for which the maximum activations of the whole layer are stored, (m,) int32, ascending.
        paths: Images for which spatial means are stored, of the whole layer and of the depths before it, (q,) int32,
            ascending: the `path_examples` of all units, and `sample`.
        sample: Random images, (r,) int32, ascending; see `path_sample`.
    """

    channels: tuple[np.ndarray, ...]
    pairs: tuple[np.ndarray, ...]
    top: tuple[np.ndarray, ...]
    paths: tuple[np.ndarray, ...]
    sample: np.ndarray

    @classmethod
    def of(cls, chosen: Sequence[TopExamples], sample: np.ndarray) -> "SecondPassIndex":
        """Create from the dataset examples of each layer and the random images."""
        tops = [np.unique(np.concatenate([c.top().ravel(), c.top(True).ravel()])) for c in chosen]
        paths = [
            np.unique(np.concatenate([*(c.path_examples(name).ravel() for name in PATH_LISTS), sample])) for c in chosen
        ]
        return cls(
            tuple(c.channels for c in chosen),
            tuple(c.pairs() for c in chosen),
            tuple(top[top >= 0].astype(np.int32) for top in tops),
            tuple(images[images >= 0].astype(np.int32) for images in paths),
            sample,
        )

    def for_images(self, first: int, last: int) -> "SecondPassIndex":
        """Return the part for the images from `first` to `last`, both included."""

        def rows(images: np.ndarray) -> slice:
            return slice(*np.searchsorted(images, [first, last + 1]))

        return SecondPassIndex(
            self.channels,
            tuple(pairs[rows(pairs[:, 0])] for pairs in self.pairs),
            tuple(top[rows(top)] for top in self.top),
            tuple(images[rows(images)] for images in self.paths),
            self.sample[rows(self.sample)],
        )

    @property
    def shown(self) -> np.ndarray:
        """All images of all pairs, ascending."""
        return np.unique(np.concatenate([np.zeros(0, np.int32), *(pairs[:, 0] for pairs in self.pairs)]))

    @property
    def images(self) -> np.ndarray:
        """All images to read, ascending: those of all pairs, and the random ones."""
        return np.union1d(self.shown, self.sample).astype(np.int32)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as a shard stores them."""
        parts = {"channels": self.channels, "pairs": self.pairs, "top": self.top, "paths": self.paths}
        arrays_of_layers = {f"{i}/{name}": array for name, arrays in parts.items() for i, array in enumerate(arrays)}
        return {**arrays_of_layers, "sample": self.sample}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "SecondPassIndex":
        """Create from the result of `arrays`."""
        count = sum(name.endswith("/pairs") for name in arrays)

        def of_layers(name: str) -> tuple[np.ndarray, ...]:
            return tuple(arrays[f"{i}/{name}"] for i in range(count))

        return cls(of_layers("channels"), of_layers("pairs"), of_layers("top"), of_layers("paths"), arrays["sample"])


@ieee(deterministic=True)
def localize(context: PassContext, index: SecondPassIndex, images: Sequence[int]) -> dict[str, np.ndarray]:
    """Run the second pass over the given images.

    Args:
        context: Network, layers, dataset and settings.
        index: Pairs to measure, at least those of `images`.
        images: Images to read.

    Returns:
        Arrays by name, as a shard stores them. For layer i:

        - `i/pairs` (p, 3) int32: as in `TopExamples.pairs`;
        - `i/place` (p, 4) int16: row and column of the maximum, row and column of the minimum;
        - `i/range` (p, 2) float32 and `i/map` (p, h, w) uint8: the averaged activation map, with 0 and 255 for the
          ends of its range;
        - `i/top` (m,) int32 and `i/answer` (m, C) float16: the images of `index.top` that were read, and the maximum
          activations of all channels of the layer on them;
        - `i/paths` (q,) int32 and `i/mean` (q, C) float16: the same for `index.paths` and spatial means;
        - `i/jpeg`, `i/offset`: with `store="crops"`, a crop for each pair, in the form of `concatenate_bytes`.

        For the depths: `path/index` (n,) int32, the images of any layer's `index.paths` that were read, and for depth
        number d of `context.depths`, if it lies before a layer, `path/d` (n, C) float16, the spatial means of all its
        channels; NaN where the network did not compute it.

        For the images of pairs: `shown/index`, `shown/size` (width, height), `shown/box` (the region that became the
        input), `shown/lost` (images that could not be read), and with `store="images"` `shown/jpeg` and
        `shown/offset`.
    """
    paths = _PathMeasurements(context, index)
    measurements = {layer.name: _LayerMeasurements(layer, index, i, images) for i, layer in enumerate(context.layers)}
    shown, lost = _measure_images(context, set(index.shown.tolist()), images, paths, measurements)
    arrays = shown.arrays(lost, context.config.store) | paths.arrays()
    for i, layer in enumerate(context.layers):
        own = measurements[layer.name].arrays(context.config)
        arrays |= {f"{i}/{name}": array for name, array in own.items()}
    return arrays


def _measure_images(
    context: PassContext,
    shown_images: set[int],
    images: Sequence[int],
    paths: "_PathMeasurements",
    measurements: "Mapping[str, _LayerMeasurements]",
) -> tuple[ShownImages, list[tuple[int, str]]]:
    """Run the network on images, and collect what is measured of them.

    Args:
        context: Network, layers, dataset and settings.
        shown_images: The images of pairs.
        images: Images to read.
        paths: Receives the spatial means.
        measurements: Receive the maps of each layer, by its name.

    Returns:
        The images of pairs, and those of them that could not be read, with the reasons.
    """
    model, config = context.model, context.config
    device = model.device
    shown = ShownImages()
    failed: list[tuple[int, str]] = []
    batch_images: list[int] = []

    def measure(layer: Layer, maps: Tensor) -> None:
        if layer.name in measurements:
            measurements[layer.name].add(batch_images, maps, config.maps)
        paths.observe(layer, maps)

    copier = source_copier(context.dataset, model.preprocessing, config)
    loaded = image_loading.load_images(context.dataset, images, model.preprocessing, context.threads, copier)
    with capture(model, context.layers, each=measure, optional=paths.depths) as forward, torch.no_grad():
        for items, batch in image_loading.batches(loaded, config.batch, failed):
            context.stop()
            batch_images[:] = [item.index for item in items]
            paths.start(batch_images)
            full = np.concatenate([batch, np.repeat(batch[-1:], config.batch - len(batch), 0)])
            forward(upload(full, device).float() / 255)
            paths.finish()
            items = [item for item in items if item.index in shown_images]
            shown.add(items, config)
            if config.store == "crops":
                source_images = {item.index: item.extra for item in items}
                for layer_measurements in measurements.values():
                    layer_measurements.add_crops(source_images, model.preprocessing, config)
    return shown, [one for one in failed if one[0] in shown_images]


class _PathMeasurements:
    """Spatial means of images at the depths before any of the layers, batch by batch."""

    def __init__(self, context: PassContext, index: SecondPassIndex) -> None:
        deepest = max(context.layers, key=lambda layer: layer.cost)
        self.depths = depths_before(deepest, context.depths)
        self._wanted = set(np.concatenate([np.zeros(0, np.int32), *index.paths]).tolist())
        self._indices: list[int] = []
        self._means: dict[str, list[Tensor]] = {depth.name: [] for depth in self.depths}
        self._rows: list[int] = []
        self._batch: dict[str, Tensor] = {}

    def start(self, images: Sequence[int]) -> None:
        """Begin a batch of images."""
        self._rows = [row for row, image in enumerate(images) if image in self._wanted]
        self._indices += [images[row] for row in self._rows]
        self._batch = {}

    def observe(self, layer: Layer, maps: Tensor) -> None:
        """Measure the maps (B, C, H, W) of a layer, if it is a depth."""
        if layer.name in self._means and self._rows:
            rows = upload(np.array(self._rows), maps.device)
            self._batch[layer.name] = metrics.clamped_half(spatial_means(maps[rows]))

    def finish(self) -> None:
        """End a batch."""
        for depth in self.depths:
            unknown = torch.full((len(self._rows), depth.channels), torch.nan, dtype=torch.float16)
            self._means[depth.name].append(self._batch.get(depth.name, unknown))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays `path/…` of `localize`."""
        arrays: dict[str, np.ndarray] = {"path/index": np.array(self._indices, np.int32)}
        for i, depth in enumerate(self.depths):
            none = np.zeros((0, depth.channels), np.float16)
            arrays[f"path/{i}"] = np.concatenate([none, *(means.cpu().numpy() for means in self._means[depth.name])])
        return arrays


class _LayerMeasurements:
    """Positions, activation maps and crops of one layer's pairs, batch by batch.

    Except for crops, results stay on the device until `arrays`: a GPU does not wait for the CPU.
    """

    def __init__(self, layer: Layer, index: SecondPassIndex, i: int, images: Sequence[int]) -> None:
        self._layer = layer
        self._channels = index.channels[i]
        self._top, self._paths = set(index.top[i].tolist()), set(index.paths[i].tolist())
        self._rows_of = rows_by_image(index.pairs[i], images)
        self._pairs: list[np.ndarray] = []
        self._parts: list[dict[str, Tensor]] = []
        self._peaks: list[tuple[list[int], Tensor]] = []
        self._means: list[tuple[list[int], Tensor]] = []
        self._crops: dict[tuple[int, int], bytes] = {}

    def add(self, images: Sequence[int], maps: Tensor, side: int) -> None:
        """Measure the pairs of a batch.

        Args:
            images: Images of the batch.
            maps: Feature maps (B, C, H, W), with B at least the number of images.
            side: Largest side of the stored activation maps.
        """
        for wanted, values, found in ((self._top, _peaks, self._peaks), (self._paths, spatial_means, self._means)):
            rows = [b for b, image in enumerate(images) if image in wanted]
            if rows:
                own = maps[upload(np.array(rows), maps.device)]
                found.append(([images[b] for b in rows], metrics.clamped_half(values(own))))
        positions = [(b, image) for b, image in enumerate(images) if image in self._rows_of]
        if not positions:
            return
        counts = [len(self._rows_of[image]) for _, image in positions]
        rows, only_min = np.concatenate([self._rows_of[image] for _, image in positions]).T
        places = np.stack([np.repeat([b for b, _ in positions], counts), self._channels[rows].astype(np.int64)])
        batch, channel = upload(places, maps.device)
        pair_maps = maps[batch, channel].float()  # (p, H, W)
        pairs = np.stack([np.repeat([image for _, image in positions], counts), rows, only_min], 1)
        self._pairs.append(pairs.astype(np.int32))
        self._parts.append(_measure_maps(pair_maps, side))

    def add_crops(
        self, source_images: Mapping[int, SourceImage], recipe: Preprocessing, config: ExamplesConfig
    ) -> None:
        """Cut the crops of the last batch's pairs; `source_images` are those of this batch, by image."""
        if not self._parts:
            return
        # Of an earlier batch, if the last one has no pair of this layer.
        pairs, places = self._pairs[-1].tolist(), self._parts[-1]["place"].tolist()
        for (image, row, only_min), place in zip(pairs, places, strict=True):
            if image in source_images:
                unit = place[2:] if only_min else place[:2]
                self._crops[image, row] = receptive_field_jpeg(self._layer, unit, source_images[image], recipe, config)

    def arrays(self, config: ExamplesConfig) -> dict[str, np.ndarray]:
        """Return the arrays `i/…` of `localize`, without the prefix."""
        layer = self._layer
        map_size = (min(layer.height, config.maps), min(layer.width, config.maps))
        no_pairs = {
            "place": np.zeros((0, 4), np.int16),
            "range": np.zeros((0, 2), np.float32),
            "map": np.zeros((0, *map_size), np.uint8),
        }
        arrays: dict[str, np.ndarray] = {"pairs": np.concatenate([np.zeros((0, 3), np.int32), *self._pairs])}
        for name, none in no_pairs.items():
            arrays[name] = np.concatenate([none, *(part[name].cpu().numpy() for part in self._parts)])
        for index_name, name, found in (("top", "answer", self._peaks), ("paths", "mean", self._means)):
            none = np.zeros((0, layer.channels), np.float16)
            arrays[index_name] = np.array([image for images, _ in found for image in images], np.int32)
            arrays[name] = np.concatenate([none, *(values.cpu().numpy() for _, values in found)])
        if config.store == "crops":
            arrays |= concatenate_bytes("", [self._crops[image, row] for image, row, _ in arrays["pairs"].tolist()])
        return arrays


def _peaks(maps: Tensor) -> Tensor:
    """Return the maximum of each map, (B, C, H, W) → (B, C) float32."""
    return maps.float().flatten(2).amax(2)


def rows_by_image(pairs: np.ndarray, images: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the columns behind the first, the image, of the pairs (P, …) of every image in `images` that has any.

    `pairs` are sorted by image.
    """
    starts = np.searchsorted(pairs[:, 0], images, "left").tolist()
    ends = np.searchsorted(pairs[:, 0], images, "right").tolist()
    return {
        int(image): pairs[start:end, 1:] for image, start, end in zip(images, starts, ends, strict=True) if end > start
    }


def _measure_maps(maps: Tensor, side: int) -> dict[str, Tensor]:
    """Return positions of the extremes, ranges and averaged copies of maps (p, H, W); see `localize`."""
    height, width = maps.shape[1:]
    flat = maps.flatten(1)
    largest, smallest = flat.argmax(1), flat.argmin(1)
    places = torch.stack([largest // width, largest % width, smallest // width, smallest % width], 1)
    small = functional.adaptive_avg_pool2d(maps[:, None], (min(height, side), min(width, side)))[:, 0]
    ends = torch.stack([small.amin((1, 2)), small.amax((1, 2))], 1)
    span = (ends[:, 1] - ends[:, 0]).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = ((small - ends[:, :1, None]) / span[:, None, None] * 255).round().clamp(0, 255)
    return {
        "place": places.to(torch.int16),
        "range": ends,
        "map": scaled.to(torch.uint8),
    }
