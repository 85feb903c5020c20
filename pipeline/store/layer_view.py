"""The read API of one layer of an atlas: lazy access as NumPy and pandas; `pipeline.store.reader` opens the file."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from pipeline.core import metric_specs
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.data import crops
from pipeline.examples.association import Association
from pipeline.images.opacity import with_opacity
from pipeline.judges.judgement import NUMBERS, Judgement, Kind
from pipeline.store import hdf5
from pipeline.store.activation_atlas import ActivationAtlas, AtlasExtent, read_activation_atlas, read_extent
from pipeline.store.effects import UnitEffects, read_effects
from pipeline.store.facets import FacetsExtent, UnitFacets, facet_numbers, read_facets, read_facets_extent
from pipeline.store.path_means import depth_means, path_layers
from pipeline.store.wiring import SIDES, Attributed, Wiring, read_attributed, read_wiring

# Attribute of a group `render/<preset>` of display images: the preset whose visualizations they show larger.
DISPLAY_OF = "display_of"
# Members of a group `render/<preset>` that are not measurements of single images.
PATH_CURVES = ("path_curve", "path_curve_natural", "path_curve_random")
NOT_MEASUREMENTS = ("images", "images_sha256", "mask", "response", "judges", "budget_value", "path_means", *PATH_CURVES)
# Dataset in `stats` that holds the best activation over the dataset, by the group's attribute `natural`.
NATURAL_STATISTICS = {"mean": "best_mean", "max": "max", "least": "least_mean", "min": "min"}
# The metric that the objective itself is, by the same attribute.
NUMERATORS = {"mean": "spatial_mean", "max": "peak", "least": "spatial_mean", "min": "peak"}


@dataclasses.dataclass(frozen=True)
class ShownImage:
    """Geometry of a dataset image that is an example of some unit.

    Attributes:
        index: Row of the image in the dataset.
        size: (width, height) of the source image in pixels.
        box: (left, top, right, bottom) of the part that became the network's input, in pixels of the source image;
            it may extend beyond the edges.
    """

    index: int
    size: tuple[int, int]
    box: tuple[float, float, float, float]


def jpeg_image(group: h5py.Group, at: int) -> Image.Image:
    """Open image number `at` of a group with the datasets `jpeg` (bytes) and `offset`."""
    start, end = hdf5.dataset(group, "offset")[at : at + 2]
    return Image.open(io.BytesIO(hdf5.dataset(group, "jpeg")[int(start) : int(end)].tobytes()))


@dataclasses.dataclass(frozen=True)
class Examples:
    """Dataset examples of each unit of a layer.

    Attributes:
        value: Activations, (C', k).
        index: Rows of the images in the dataset, (C', k); −1 where there is no example.
        y: Row of the activation in the layer's map, (C', k).
        x: Column of the activation in the layer's map, (C', k).
        map: Numbers of the heat maps for `LayerView.heat_map`, (C', k); −1 where there is none.
        crop: Numbers of the crops for `LayerView.crop`, (C', k); −1 where the atlas stores none.
    """

    value: np.ndarray
    index: np.ndarray
    y: np.ndarray
    x: np.ndarray
    map: np.ndarray
    crop: np.ndarray


@dataclasses.dataclass(frozen=True)
class BudgetValues:
    """An image regularizer with a budget, and how far the feature visualizations of a layer meet it.

    Attributes:
        name: Registered name of the regularizer, such as "tv".
        target: The budget: mean of the regularizer over its terms.
        value: The mean that each saved image has, (C', V) float32; NaN where one is missing.
    """

    name: str
    target: float
    value: np.ndarray


@dataclasses.dataclass(frozen=True)
class PathCurves:
    """Path similarity at each of D layers, from the first to the units' own; see `images.path_similarity`.

    Attributes:
        layers: Names of the layers, D; the last is the units' own, whose own channel is left out.
        similarity: Of the visualizations with the unit's best dataset examples, (C', V, D).
        natural: Of these examples with each other, (C', D).
        random: Of these examples with random dataset images, (C', D).
    """

    layers: tuple[str, ...]
    similarity: np.ndarray
    natural: np.ndarray
    random: np.ndarray


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Histograms of the per-image maxima of each unit.

    Attributes:
        counts: Images per bin, (C', bins).
        edges: Edges of the bins, (C', bins + 1).
        under: Images below the first edge, (C',).
        over: Images above the last edge, (C',).
        ends: Smallest and largest per-image maximum, (C', 2).
    """

    counts: np.ndarray
    edges: np.ndarray
    under: np.ndarray
    over: np.ndarray
    ends: np.ndarray


class Stack:
    """Fast read access to single images of a stack (N, V, H, W, C): `stack[n, v]` is (H, W, C) uint8, read-only.

    An image is one chunk, whose compressed bytes can be read and decompressed directly. HDF5's own filter pipeline
    takes half as long again. The zlib stream contains a checksum of its own. Datasets that were not created by
    `hdf5.create_images`, and chunks that fail to decompress, are read through HDF5, which raises a precise error.
    """

    def __init__(self, images: h5py.Dataset) -> None:
        self._images = images
        self._shape = images.shape[2:]
        self._size = math.prod(self._shape)
        filters = images.compression == "gzip" and images.fletcher32 and not images.shuffle
        self._direct = filters and images.chunks == (1, 1, *self._shape) and images.dtype == np.uint8

    def __getitem__(self, at: tuple[int, int]) -> np.ndarray:
        if self._direct:
            with contextlib.suppress(OSError, RuntimeError, ValueError, zlib.error):
                filter_mask, chunk = self._images.id.read_direct_chunk((*at, 0, 0, 0))
                pixels = zlib.decompress(memoryview(chunk)[:-4], bufsize=self._size)  # without HDF5's own checksum
                if filter_mask == 0 and len(pixels) == self._size:
                    return np.frombuffer(pixels, np.uint8).reshape(self._shape)
        return np.asarray(self._images[at])


class LayerView:
    """One layer of an atlas. Arrays are read from the file on access.

    C' is the number of the layer's channels in the atlas, and C the number in the network.

    Attributes:
        name: Name of the layer.
        kind: Kind of the layer, such as "conv" or "linear".
        channels: Channel numbers in the atlas, (C',) int32.
        total_channels: Number of channels in the network, C.
        map_size: (height, width) of the layer's activation map.
    """

    def __init__(self, group: h5py.Group) -> None:
        self._group = group
        self._schema_version = hdf5.integer_attribute(group.file, "schema_version")[0]
        self.name = hdf5.text_attribute(group, "name")
        self.kind = hdf5.text_attribute(group, "kind")
        self.total_channels = hdf5.integer_attribute(group, "channels")[0]
        self.map_size = (hdf5.integer_attribute(group, "map_height")[0], hdf5.integer_attribute(group, "map_width")[0])
        self._cache: dict[str, np.ndarray] | None = None
        self.channels = hdf5.read_array(group, "channels")
        self._row = {int(c): i for i, c in enumerate(self.channels)}

    def with_cache(self) -> "LayerView":
        """Cache every array that is read from now on, as a read-only array, and return this view."""
        if self._cache is None:
            self._cache = {}
        return self

    def _get(self, parent: h5py.Group, name: str) -> np.ndarray:
        if self._cache is None:
            return hdf5.read_array(parent, name)
        key = f"{parent.name}/{name}"
        if key not in self._cache:
            self._cache[key] = hdf5.read_array(parent, name)
            self._cache[key].flags.writeable = False
        return self._cache[key]

    def fingerprint(self, part: str = "") -> str:
        """Return the sha256 of this layer's stored bytes, or of one `part` of it; "" if there is no such part.

        Any changed value changes it. Recompression alone may change it too, except for images, which enter by the
        digests of their pixels.
        """
        if part and part not in self._group:
            return ""
        digest = hashlib.sha256()
        stored = self._group[part] if part else self._group
        hdf5.hash_stored(digest, stored, replaced="images", replacement="images_sha256")
        return digest.hexdigest()

    @property
    def receptive_field(self) -> tuple[int, int] | None:
        """(height, width) of a unit's receptive field in input pixels, or None for the whole image."""
        height, width = self._geometry[0]
        return (height, width) if height else None

    @property
    def receptive_field_grid(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Placement of receptive fields in input pixels: ((height, width) of the stride, (row, column) of the first).

        The field of the map's position (y, x) begins at row `first[0] + y * stride[0]` and column
        `first[1] + x * stride[1]`; with padding it may extend beyond the input.
        """
        _, (down, across), (row, column), _ = self._geometry
        return (down, across), (row, column)

    @functools.cached_property
    def _geometry(self) -> tuple[tuple[int, ...], ...]:
        names = ("receptive_field", "receptive_field_stride", "receptive_field_offset", "input_size")
        return tuple(hdf5.integer_attribute(self._group, name) for name in names)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the network's input in pixels."""
        height, width = self._geometry[3]
        return height, width

    @property
    def presets(self) -> tuple[str, ...]:
        """Presets with feature visualizations of this layer, the run's main preset first; without `displays`."""
        return tuple(name for name, group in self._renders.items() if DISPLAY_OF not in group.attrs)

    @property
    def displays(self) -> dict[str, str]:
        """Names under which `images` has display images, by the preset that they show on a larger canvas.

        They exist for chosen units; those of all others have the status "missing".
        """
        found = ((group.attrs.get(DISPLAY_OF), name) for name, group in self._renders.items())
        return {of: name for of, name in found if isinstance(of, str)}

    @functools.cached_property
    def _renders(self) -> dict[str, h5py.Group]:
        """Groups of feature visualizations by preset, in the order of the run."""
        if "render" not in self._group:
            return {}
        parent = hdf5.group(self._group, "render")
        groups = {name: hdf5.group(parent, name) for name in hdf5.member_names(parent)}
        if any("order" not in group.attrs for group in groups.values()):
            return groups  # schema version 2: one preset, groups by objective
        ordered = sorted(groups.values(), key=lambda group: hdf5.integer_attribute(group, "order"))
        return {hdf5.text_attribute(group, "preset"): group for group in ordered}

    def row(self, channel: int) -> int:
        """Return the row of `channel` in all arrays of this layer.

        Raises:
            AtlasError: If the atlas does not have the channel.
        """
        if int(channel) not in self._row:
            raise AtlasError(
                f"{self.name}:{channel} is not in this atlas. {nearest_names(str(channel), map(str, self._row))}"
            )
        return self._row[int(channel)]

    def images(self, preset: str | None = None) -> h5py.Dataset:
        """Return all feature visualizations, (C', V, H, W, 3) uint8, as an h5py dataset that is read by slices.

        Args:
            preset: Name of a preset; the run's main preset by default.

        Raises:
            AtlasError: If the layer has no visualizations, or none by `preset`.
        """
        return hdf5.dataset(self._render(preset), "images")

    def image(self, channel: int, preset: str | None = None, variant: int = 0) -> np.ndarray:
        """Return one feature visualization, (H, W, 3) uint8."""
        return self.images(preset)[self.row(channel), variant]

    def masks(self, preset: str | None = None) -> h5py.Dataset | None:
        """Return all transparency masks, (C', V, H, W) uint8, as an h5py dataset; None in atlases without masks.

        Args:
            preset: Name of a preset; the run's main preset by default.
        """
        group = self._render(preset)
        return hdf5.dataset(group, "mask") if "mask" in group else None

    def mask(self, channel: int, preset: str | None = None, variant: int = 0) -> np.ndarray:
        """Return the transparency mask of one feature visualization, (H, W) uint8.

        It is the absolute gradient of the objective with respect to the image, averaged over the colors, summed over
        the optimization steps (Fel et al. 2023, arXiv 2306.06805); 255 is the 99th percentile of the image.
        `transparent` applies it to the image.

        Args:
            channel: Channel of the unit.
            preset: Name of a preset; the run's main preset by default.
            variant: Number of the variant.

        Returns:
            255 everywhere for a visualization that was made before there were masks.
        """
        row, masks = self.row(channel), self.masks(preset)
        if masks is None:
            return np.full(self.images(preset).shape[2:4], 255, np.uint8)
        return masks[row, variant]

    def transparent(self, channel: int, preset: str | None = None, variant: int = 0) -> np.ndarray:
        """Return one feature visualization with the opacity of its mask, (H, W, 4) uint8: RGBA as in a PNG file."""
        return with_opacity(self.image(channel, preset, variant), self.mask(channel, preset, variant))

    def stack(self, preset: str | None = None) -> "Stack":
        """Return fast access to single feature visualizations: `stack[row, variant]` is (H, W, C) uint8."""
        return Stack(self.images(preset))

    def image_digests(self, preset: str | None = None) -> np.ndarray | None:
        """Return the sha256 of each image's pixels, (C', V, 32) uint8, or None in atlases without digests."""
        group = self._render(preset)
        return self._get(group, "images_sha256") if "images_sha256" in group else None

    def measurements(self, preset: str | None = None, names: Collection[str] = ()) -> dict[str, np.ndarray]:
        """Return the measurements of the feature visualizations by name, (C', V) each.

        These are activation, robust, start, seed, status and so on as stored, without those that an older atlas
        lacks or has in another meaning, and the ratios `peak_ratio`, `mean_ratio` and `robust_share`
        (`pipeline.core.metric_specs.METRICS`). A number of the unit is repeated for each of its visualizations.

        Args:
            preset: Name of a preset; the run's main preset by default.
            names: Stored measurements to read; with any, no ratios are computed. All by default.
        """
        group = self._render(preset)
        stored = [name for name in hdf5.member_names(group) if name not in NOT_MEASUREMENTS and self._is_known(name)]
        shape = hdf5.dataset(group, "activation").shape
        values = {name: self._get(group, name) for name in stored if not names or name in names}
        for name, array in values.items():
            if array.ndim == 1:
                values[name] = np.broadcast_to(array[:, None], shape)
        if names:
            return values
        # Older atlases have only the activation, which is a peak or a mean by the objective's own statistic.
        numerator = NUMERATORS.get(self._natural(preset))
        if numerator and numerator not in values:
            values[numerator] = values["activation"]
        return values | self._ratios(values, preset)

    def _is_known(self, name: str) -> bool:
        """Return whether a stored array has the meaning that this version describes."""
        metric = metric_specs.find_metric(name)
        return metric is None or self._schema_version >= metric.since

    def _ratios(self, values: Mapping[str, np.ndarray], preset: str | None) -> dict[str, np.ndarray]:
        """Return the ratios of which the numerators are among `values`."""
        denominators = {name: best[:, None] for name, best in self.dataset_best(preset).items()}
        return metric_specs.ratios(values, denominators, metric_specs.is_minimized(self._natural(preset)))

    def image_activations(self, preset: str | None = None) -> np.ndarray | None:
        """Return the largest activation of each channel of the layer on each visualization, (C', V, C) float16.

        NaN where a visualization is missing; None in atlases without these activations.
        """
        group = self._render(preset)
        return self._get(group, "response") if "response" in group else None

    def depth_activations(self, preset: str | None = None) -> tuple[str, np.ndarray]:
        """Return a layer before this one, and the spatial means of its channels for each visualization.

        It is the last of the fixed depths before the layer, but for one that the preset's diversity term compares: what
        the visualizations of a unit were made to differ in says little about how much they differ.

        Returns:
            The name and (C', V, D) float32, NaN where a visualization is missing; "" and (C', V, 0) if there is none.
        """
        group = self._render(preset)
        if "depth_agreement" not in group or "model/layers/name" not in self._group.file:
            return depth_means(group, {})
        columns = [self._get(self._group.file, f"model/layers/{key}").tolist() for key in ("name", "channels")]
        widths = dict(zip(*columns, strict=True))
        name = hdf5.text_attribute(hdf5.dataset(group, "depth_agreement"), "layer")
        later = set(path_layers(hdf5.all_attributes(group))) - {name}
        return depth_means(group, widths, later)

    def judgements(self, preset: str | None = None) -> tuple[Judgement, ...]:
        """Return what other networks say about the visualizations; empty without the setting `judges`.

        For class visualizations `numbers` has rank and probability of the class, for hidden units `correlation` (how
        well the judge can express the unit), and `quantile` and `deviations` of the prediction for the visualization
        among those for held-out dataset images; (C', V) float32 each.

        Args:
            preset: Name of a preset; the run's main preset by default.
        """
        parent = self._render(preset)
        if "judges" not in parent:
            return ()
        judges = hdf5.group(parent, "judges")
        found = []
        for name in hdf5.member_names(judges):
            group = hdf5.group(judges, name)
            kind: Kind = "class" if hdf5.text_attribute(group, "kind") == "class" else "unit"
            weights = hdf5.text_attribute(group, "weights_sha256")
            numbers = {key: self._get(group, key) for key in NUMBERS[kind] if key in group}
            found.append(Judgement(hdf5.text_attribute(group, "judge"), weights, kind, numbers))
        return tuple(found)

    def path_curves(self, preset: str | None = None) -> PathCurves | None:
        """Return the path similarity at each layer up to the units; None without a dataset pass and in old atlases.

        NaN for visualizations that were made before path similarity existed.
        """
        group = self._render(preset)
        if "path_curve" not in group:
            return None
        names = np.asarray(self.render_attributes(preset)["path_layers"]).tolist()
        return PathCurves(tuple(map(str, names)), *(self._get(group, name) for name in PATH_CURVES))

    def budgets(self, preset: str | None = None) -> list[BudgetValues]:
        """Return the regularizers of a preset that have a budget, in its order; empty if there is none."""
        group = self._render(preset)
        if "budget_value" not in group:
            return []
        attributes, values = self.render_attributes(preset), self._get(group, "budget_value")
        pairs = zip(attributes["budget_names"], np.asarray(attributes["budget_target"]).tolist(), strict=True)
        return [BudgetValues(str(name), target, values[..., i]) for i, (name, target) in enumerate(pairs)]

    @property
    def dictionary(self) -> dict[str, Any] | None:
        """Of a layer of latents, what is known of its dictionary (`layers.dictionaries.DictionaryLayer.description`).

        With `never_active`, the number of its latents that are 0 on all dataset images, if there was a dataset pass.
        """
        if "dictionary" not in self._group.attrs:
            return None
        try:
            found = json.loads(str(self._group.attrs["dictionary"]))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise AtlasError(f"{self.name}: the attribute dictionary is not JSON. Make the atlas again from its run.")
        stats = self._group.get("stats")
        if isinstance(stats, h5py.Group) and "never_active" in stats.attrs:
            found["never_active"] = int(hdf5.integer_attribute(stats, "never_active")[0])
        return found

    @property
    def visualized(self) -> np.ndarray:
        """Whether each unit is selected for visualization, (C',) bool; the others have dataset examples only."""
        if "visualized" not in self._group:
            return np.ones(len(self.channels), bool)
        return self._get(self._group, "visualized").astype(bool)

    @property
    def unrendered(self) -> str:
        """Why this layer cannot have visualizations, such as a missing gradient; empty where it can."""
        return str(self._group.attrs.get("unrendered", ""))

    def render_attributes(self, preset: str | None = None) -> dict[str, Any]:
        """Return the attributes of a preset's group: preset, objective, digest, the statistic `natural` and so on."""
        return hdf5.all_attributes(self._render(preset))

    def examples(self, which: str = "max") -> Examples | None:
        """Return a list of dataset examples, or None if the atlas does not have it.

        Args:
            which: "max" or "mean" for the largest spatial maxima or means, largest first; "min" for the smallest
                spatial minima, smallest first; "spectrum" for examples drawn from quantile bins of the maxima
                (`spectrum_edges`); with effects, "relevant" for the images that use the unit most, whose values are
                relevances and whose positions are those of the largest relevance (`relevance_masks`).
        """
        path = f"examples/{which}"
        if path not in self._group:
            return None
        group = hdf5.group(self._group, path)
        arrays = {key: self._get(group, key) for key in ("value", "index", "y", "x")}
        nothing = np.full(arrays["index"].shape, -1, np.int32)
        maps = self._get(group, "map") if "map" in group else nothing
        crops = maps if "examples/maps/jpeg" in self._group else nothing
        if which == "relevant":
            crops = self._get(group, "crop") if "crop" in group else nothing
        return Examples(**arrays, map=maps, crop=crops)

    def relevance_masks(self) -> np.ndarray | None:
        """Return which pixels of the images `examples("relevant")` the unit's relevance comes from, or None.

        Returns:
            (C', k, h, w) uint8, in cells of the network's input; 255 for the largest value of each mask. See
            `pipeline.effects.relevance`.
        """
        return self._get(self._group, "examples/relevant/mask") if "examples/relevant/mask" in self._group else None

    @property
    def spectrum_edges(self) -> tuple[float, ...]:
        """Edges of the quantile bins of `examples("spectrum")`, in percent; each bin has the same number of columns."""
        if "examples/spectrum" not in self._group:
            return ()
        return tuple(np.asarray(self._group["examples/spectrum"].attrs["edges"]).tolist())

    def heat_map(self, number: int) -> np.ndarray | None:
        """Return one heat map, (h, w) float32 activations, average-pooled to a small size; None for number −1."""
        if number < 0 or "examples/maps" not in self._group:
            return None
        group = hdf5.group(self._group, "examples/maps")
        low, high = hdf5.dataset(group, "range")[int(number)]
        return (low + (high - low) * (hdf5.dataset(group, "value")[int(number)] / np.float32(255))).astype(np.float32)

    def heat_maps(self) -> h5py.Dataset | None:
        """Return all heat maps as stored, (pairs, h, w) uint8: 0 is the minimum of each map, 255 its maximum."""
        return hdf5.dataset(self._group, "examples/maps/value") if "examples/maps" in self._group else None

    def heat_ranges(self) -> np.ndarray | None:
        """Return the activations that 0 and 255 of each heat map represent, (pairs, 2) float32."""
        return self._get(self._group, "examples/maps/range") if "examples/maps" in self._group else None

    def crop(self, number: int, which: str = "max") -> Image.Image | None:
        """Return the receptive field of an example as an image, where the atlas stores crops of the dataset.

        Args:
            number: Number of the crop, as in `Examples.crop`.
            which: Name of the list that the example is in: crops of "relevant" have numbers of their own.
        """
        group = "examples/relevant" if which == "relevant" else "examples/maps"
        if number < 0 or f"{group}/jpeg" not in self._group:
            return None
        return jpeg_image(hdf5.group(self._group, group), int(number))

    def stats(self) -> dict[str, np.ndarray]:
        """Return statistics over the dataset by name (mean, sd, max, nonzero, inactive, …), (C',) each."""
        if "stats" not in self._group:
            return {}
        group = hdf5.group(self._group, "stats")
        return {name: self._get(group, name) for name in hdf5.member_names(group)}

    def layer_mean(self) -> np.ndarray | None:
        """Return the mean of every channel of the layer over all positions of all dataset images, (C,) float32.

        None without a dataset pass, and in atlases that were made before this was stored.
        """
        return self._get(self._group, "layer_mean") if "layer_mean" in self._group else None

    @property
    def reference(self) -> str:
        """What activations are compared with by `nonzero`, `fired`, `sparsity` and `inactive` of `stats`.

        "zero" where a rectifier reads the layer or made it; "none" where zero is arbitrary, as in the linear output of
        a residual block: these statistics are then NaN, and no unit is inactive. "zero" in atlases before schema 5,
        which compared all layers with zero; "" without a dataset pass.
        """
        stats = self._group.get("stats")
        return str(stats.attrs.get("reference", "zero")) if isinstance(stats, h5py.Group) else ""

    @property
    def population_sparsity(self) -> float:
        """Mean sparsity of the layer's activations on an image, 0 … 1.

        NaN if no unit was active, in layers without a zero (`reference`), and in old atlases.
        """
        stats = self._group.get("stats")
        return float(stats.attrs.get("population_sparsity", np.nan)) if isinstance(stats, h5py.Group) else float("nan")

    @property
    def rotation_number(self) -> float:
        """Share of channels that exceed 95 % of random directions of the layer; NaN in old atlases, or of few images.

        0.05 is chance; see `pipeline.examples.rotation.rotation_number`.
        """
        stats = self._group.get("stats")
        return float(stats.attrs.get("rotation_number", np.nan)) if isinstance(stats, h5py.Group) else float("nan")

    def histogram(self) -> Histogram | None:
        """Return histograms of the per-image maxima, or None without a dataset pass."""
        if "histogram" not in self._group:
            return None
        counts, ends = self._get(self._group, "histogram/counts"), self._get(self._group, "histogram/ends")
        low, high = self._get(self._group, "histogram/range").T[..., None]
        edges = low + (high - low) * np.linspace(0, 1, counts.shape[1] - 1)
        return Histogram(counts[:, 1:-1], edges, counts[:, 0], counts[:, -1], ends)

    def quantiles(self, shares: Sequence[float]) -> np.ndarray:
        """Return quantiles of the per-image maxima, (C', q), interpolated within the bins of the histogram.

        Args:
            shares: The q quantiles, 0 … 1.

        Returns:
            NaN without a dataset pass.
        """
        histogram = self.histogram()
        result = np.full((len(self.channels), len(shares)), np.nan)
        if histogram is None:
            return result
        bins = [histogram.under[:, None], histogram.counts, histogram.over[:, None]]
        for row, cumulative in enumerate(np.concatenate(bins, 1).cumsum(1)):
            if not cumulative[-1]:
                continue
            edges, (low, high) = histogram.edges[row], histogram.ends[row]
            borders = np.clip([min(low, edges[0]), *edges, max(high, edges[-1])], low, high)
            result[row] = np.interp(np.asarray(shares) * cumulative[-1], [0, *cumulative], borders)
        return result

    def kernels(self) -> np.ndarray | None:
        """Return the kernel of each unit in units of pixels, (C', I, k, k') float32.

        It is the change of the activation at one position for a change of a pixel by 1, from black to white; I is 3 for
        color images. None for layers that are not linear in the pixels, and in older atlases.
        """
        return self._get(self._group, "kernel") if "kernel" in self._group else None

    @property
    def has_exact_kernels(self) -> bool:
        """Whether `kernels` includes all normalizations: not one that divides by statistics of each image."""
        return "kernel" in self._group and bool(self._group["kernel"].attrs.get("exact", True))

    def labels(self) -> Association | None:
        """Return the association of each unit with `Atlas.dataset_labels`, or None if the dataset has no labels."""
        if "labels" not in self._group:
            return None
        group = hdf5.group(self._group, "labels")
        stored = {name: self._get(group, name) for name in hdf5.member_names(group)}
        empty = Association.empty(hdf5.text_attribute(group, "method"), *stored["over"].shape)
        return dataclasses.replace(empty, **stored)  # atlases before schema 5 have neither `p` nor `chosen`

    def connectivity(self, side: str) -> Wiring | None:
        """Return the strongest connections of each unit to another layer of the atlas, or None if there are none.

        Args:
            side: "inputs" for the layer before, "outputs" for the layer after.
        """
        return read_wiring(self._group, side)

    def attributed_connections(self, side: str) -> Attributed | None:
        """Return the connections of each unit with the largest attributions over the dataset, or None.

        Args:
            side: "inputs" for the layer before, "outputs" for the layer after.
        """
        return read_attributed(self._group, side)

    @property
    def connected_layers(self) -> tuple[str, ...]:
        """Names of the layers that the units of this one have connections to."""
        groups = [
            hdf5.group(self._group, f"{kind}/{side}")
            for kind in ("wiring", "attributed")
            for side in SIDES
            if f"{kind}/{side}" in self._group
        ]
        return tuple(dict.fromkeys(hdf5.text_attribute(group, "layer") for group in groups))

    def dataset_activations(self) -> np.ndarray | None:
        """Return the maxima of every unit on the images `Atlas.responses_index`, (C', n) float16, or None."""
        return self._get(self._group, "responses") if "responses" in self._group else None

    def effects(self) -> UnitEffects | None:
        """Return the effects of the units on the outputs of the network, over `Atlas.effects_index`, or None."""
        return read_effects(self._group, self.channels)

    def activation_atlas(self) -> ActivationAtlas | None:
        """Return the activation atlas of the layer, or None; see `pipeline.activation_atlas.layout`."""
        return read_activation_atlas(self._group)

    def facets(self) -> UnitFacets | None:
        """Return the facets of the units of the layer, with their images and examples, or None."""
        return read_facets(self._group)

    def facet_numbers(self) -> dict[str, np.ndarray]:
        """Return the number of facets and the monosemanticity of each unit, (C',) each; empty without facets."""
        return facet_numbers(self._group, self.channels)

    @property
    def facets_extent(self) -> FacetsExtent | None:
        """Numbers of the facets of the layer, among them its monosemanticity; None without any."""
        return read_facets_extent(self._group)

    @property
    def activation_atlas_extent(self) -> AtlasExtent | None:
        """Size of the activation atlas of the layer; None without one."""
        return read_extent(self._group)

    def similar(self, channel: int, count: int = 8) -> pd.DataFrame:
        """Return the units of this layer whose activations correlate most with those of `channel`, best first.

        Returns:
            The columns channel and correlation, Pearson's over the images `Atlas.responses_index`.
        """
        responses = self.dataset_activations()
        if responses is None or responses.shape[1] < 2:
            return pd.DataFrame({"channel": np.zeros(0, np.int32), "correlation": np.zeros(0, np.float32)})
        centered = responses.astype(np.float32)
        centered -= centered.mean(1, keepdims=True)
        norm = np.linalg.norm(centered, axis=1)
        row = self.row(channel)
        with np.errstate(divide="ignore", invalid="ignore"):
            correlation = centered @ centered[row] / (norm * norm[row])
        # −2 marks the unit itself and units that never change.
        correlation = np.where(np.isfinite(correlation), correlation, -2)
        correlation[row] = -2
        order = np.argsort(-correlation, kind="stable")[:count]
        order = order[correlation[order] > -2]
        return pd.DataFrame({"channel": self.channels[order], "correlation": correlation[order].astype(np.float32)})

    def dataset_max(self, preset: str | None = None) -> np.ndarray:
        """Return the best activation over the dataset by the objective's own statistic, (C',); NaN if not measured."""
        return self._natural_statistic(self._natural(preset))

    def dataset_best(self, preset: str | None = None) -> dict[str, np.ndarray]:
        """Return the denominators of the activation ratios, (C',) each by name; NaN if not measured."""
        peak, mean = ("min", "least") if metric_specs.is_minimized(self._natural(preset)) else ("max", "mean")
        return {
            metric_specs.DATASET_PEAK: self._natural_statistic(peak),
            metric_specs.DATASET_MEAN: self._natural_statistic(mean),
        }

    def _natural(self, preset: str | None) -> str:
        """Return which statistic over the dataset the activations of a preset are compared with; "" if not stored."""
        return str(self.render_attributes(preset).get("natural", ""))

    def _natural_statistic(self, natural: str) -> np.ndarray:
        """Return the best activation over the dataset by a key of `NATURAL_STATISTICS`, (C',); NaN if not measured."""
        statistic = NATURAL_STATISTICS.get(natural)
        if statistic is None or f"stats/{statistic}" not in self._group:
            return np.full(len(self.channels), np.nan, np.float32)
        return self._get(self._group, f"stats/{statistic}")

    def crop_box(self, y: int, x: int, min_size: int = 48) -> tuple[int, int, int, int] | None:
        """Return (left, top, right, bottom) of the receptive field of unit (y, x), in pixels of the network's input.

        Args:
            y: Row in the activation map.
            x: Column in the activation map.
            min_size: Minimum side of the box in pixels. A smaller box is enlarged, so that people can recognize its
                content, and moved inside the input.

        Returns:
            None if the receptive field is the whole image.
        """
        size, stride, offset, limits = self._geometry
        if not size[0]:
            return None
        return crops.receptive_field_box(int(y), int(x), size, stride, offset, limits, min_size)

    def source_box(self, photo: ShownImage, y: int, x: int, min_size: int = 48) -> tuple[int, int, int, int] | None:
        """Return the `crop_box` of unit (y, x) in pixels of the source image, clipped to it.

        `min_size` is in pixels of the network's input. None if the receptive field is the whole image.
        """
        box = self.crop_box(y, x, min_size)
        return None if box is None else crops.to_source_box(box, self.input_size, photo.box, photo.size)

    def _render(self, preset: str | None) -> h5py.Group:
        if not self._renders:
            raise AtlasError(f"{self.name} has no feature visualizations; `atlas render` makes them.")
        if preset is None:
            preset = next(iter(self.presets or self._renders))
        if preset not in self._renders:
            raise AtlasError(
                f"{self.name} has no feature visualizations by {preset!r}. {nearest_names(preset, self.presets)}"
            )
        return self._renders[preset]
