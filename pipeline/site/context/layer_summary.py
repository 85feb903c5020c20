"""Summaries of layers for the pages, and the dataset images and labels that all layers share."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.judges.judgement import Judgement
from pipeline.judges.ridge import MIN_CORRELATION
from pipeline.names.book import NameBook
from pipeline.names.readable import readable_labels
from pipeline.site.config import SiteConfig
from pipeline.site.media.kernel_images import kernel_views, layer_scale
from pipeline.store import Atlas, LayerView
from pipeline.store.activation_atlas import AtlasExtent
from pipeline.store.facets import FacetsExtent
from pipeline.store.shards import safe_name


@dataclasses.dataclass(frozen=True)
class DisplaySummary:
    """The display images of a layer for one preset.

    Attributes:
        key: Key of the images in the atlas.
        digest: Digest of everything that determines them.
        height: Height in pixels.
        width: Width in pixels.
        channels: Channels that have one.
    """

    key: str
    digest: str
    height: int
    width: int
    channels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PresetSummary:
    """The feature visualizations of a layer by one preset.

    Attributes:
        key: Key of the preset in the atlas, see `LayerView.presets`.
        title: Heading of the preset.
        objective: Name of the objective.
        preset: Name of the preset.
        digest: Digest of everything that determines the visualizations.
        natural: Dataset statistic that activations are compared with.
        variants: Visualizations per unit.
        height: Height of a visualization in pixels.
        width: Width of a visualization in pixels.
        counts: Number of visualizations by status, sorted by status.
        failed: Channels with a failed visualization.
        seconds: Total computing time.
        steps: Least and largest number of optimization steps.
        precisions: Floating-point types of the optimization; empty in old atlases.
        levels: Variants of the network that were optimized on; empty in old atlases.
        fallbacks: Why a faster variant of the network was not used.
        judged: What other networks say about the visualizations, one sentence each.
        masked: Whether the visualizations have transparency masks.
        path_layers: Layers at which their path similarity is measured; empty if it is not known.
        path: Their path similarity, in words; empty if it is not known.
        display: Their display images; None without any.
    """

    key: str
    title: str
    objective: str
    preset: str
    digest: str
    natural: str
    variants: int
    height: int
    width: int
    counts: tuple[tuple[str, int], ...]
    failed: tuple[int, ...]
    seconds: float
    steps: tuple[int, int]
    precisions: tuple[str, ...]
    levels: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    judged: tuple[str, ...] = ()
    masked: bool = False
    path_layers: tuple[str, ...] = ()
    path: str = ""
    display: DisplaySummary | None = None

    @property
    def pictures(self) -> int:
        """Number of visualizations that are not missing."""
        return sum(count for status, count in self.counts if status != "missing")


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """Summary of a layer.

    Attributes:
        name: Name of the layer.
        slug: Its name in file names.
        order: Its number in the atlas.
        kind: Kind of the layer.
        channels: Channels that are in the atlas.
        total: Number of channels in the network.
        map_size: (height, width) of the activation map.
        receptive_field: (height, width) of a unit's receptive field in input pixels, None for the whole image.
        input_size: (height, width) of the network's input in pixels.
        unrendered: Why the layer cannot have visualizations, or "".
        rendered: Its visualizations, by preset.
        classifier: Whether its channels are the classes of the network.
        rotation_number: Share of channels that exceed 95 % of random directions; None if it is not known.
        reference: What its statistics compare activations with; see `LayerView.reference`.
        kernels: Image of the kernel of each channel as a data URI, if the layer is linear in the pixels.
        kernel_size: (height, width) of the kernels in pixels.
        atlas: Extent of its activation atlas; None without one.
        facets: Numbers of the facets of its units; None without any.
        dictionary: What is known of the dictionary that its units are latents of, as names and texts; empty for others.
    """

    name: str
    slug: str
    order: int
    kind: str
    channels: tuple[int, ...]
    total: int
    map_size: tuple[int, int]
    receptive_field: tuple[int, int] | None
    input_size: tuple[int, int]
    unrendered: str
    rendered: tuple[PresetSummary, ...]
    classifier: bool
    reference: str = ""
    rotation_number: float | None = None
    kernels: tuple[str, ...] = ()
    kernel_size: tuple[int, int] = (0, 0)
    atlas: AtlasExtent | None = None
    facets: FacetsExtent | None = None
    dictionary: tuple[tuple[str, str], ...] = ()

    @property
    def href(self) -> str:
        """Path of the layer's page, relative to the root of the site."""
        return f"layers/{self.slug}.html"

    @property
    def atlas_slug(self) -> str:
        """Name of its activation atlas in names of files, relative to the root of the site or of a kind of files."""
        return f"activation-atlas/{self.slug}"

    @property
    def atlas_href(self) -> str:
        """Path of the page of its activation atlas, relative to the root of the site."""
        return f"{self.atlas_slug}.html"

    @property
    def complete(self) -> bool:
        """Whether all channels of the layer are in the atlas."""
        return len(self.channels) == self.total

    @property
    def sees_whole_input(self) -> bool:
        """Whether the receptive field is at least as large as the network's input, so that crops show nothing more."""
        if self.receptive_field is None:
            return True
        return all(field >= size for field, size in zip(self.receptive_field, self.input_size, strict=True))

    @property
    def failed(self) -> tuple[int, ...]:
        """Channels with a failed visualization, in order."""
        return tuple(sorted({channel for r in self.rendered for channel in r.failed}))

    @property
    def pictures(self) -> int:
        """Number of visualizations that are not missing, over all presets."""
        return sum(r.pictures for r in self.rendered)

    @property
    def aperture(self) -> tuple[float, float]:
        """(height, width) of the receptive field as fractions of the input, limited to 0.09 … 1 for drawing."""
        if self.receptive_field is None:
            return 1.0, 1.0
        height, width = (min(1.0, max(0.09, self.receptive_field[i] / self.input_size[i])) for i in (0, 1))
        return height, width


def summarize(layer: LayerView, order: int, classes: Sequence[str]) -> LayerSummary:
    """Return the summary of a layer; no image is read.

    Args:
        layer: The layer.
        order: Its number in the atlas.
        classes: Class names of the network.
    """
    kernels = layer.kernels()
    return LayerSummary(
        name=layer.name,
        slug=safe_name(layer.name),
        order=order,
        kind=layer.kind,
        channels=tuple(int(c) for c in layer.channels),
        total=layer.total_channels,
        map_size=layer.map_size,
        receptive_field=layer.receptive_field,
        input_size=layer.input_size,
        unrendered=layer.unrendered,
        rendered=tuple(_rendered(layer, key) for key in layer.presets),
        classifier=layer.kind == "linear" and len(classes) == layer.total_channels,
        rotation_number=None if math.isnan(layer.rotation_number) else layer.rotation_number,
        reference=layer.reference,
        kernels=() if kernels is None else _kernel_images(kernels),
        kernel_size=(0, 0) if kernels is None else (kernels.shape[2], kernels.shape[3]),
        atlas=layer.activation_atlas_extent,
        facets=layer.facets_extent,
        dictionary=_dictionary(layer),
    )


def _dictionary(layer: LayerView) -> tuple[tuple[str, str], ...]:
    """Return what is known of the dictionary of a layer of latents, as names and texts; empty for other layers."""
    found = layer.dictionary
    if found is None:
        return ()
    gates = {"none": "dot product", "relu": "ReLU", "topk": f"top {found.get('k', '?')}", "jumprelu": "JumpReLU"}
    pairs = [("reads", str(found.get("reads", ""))), ("after the encoder", gates.get(str(found.get("gate")), ""))]
    facts = found.get("facts")
    shown = ("layer", "gate", "k", "latents")
    for name, value in facts.items() if isinstance(facts, dict) else ():
        if name not in shown:
            pairs.append((str(name), f"{value:,.4g}" if isinstance(value, int | float) else str(value)))
    if "never_active" in found:
        pairs.append(("0 on all dataset images", f"{found['never_active']:,} of {layer.total_channels:,} latents"))
    return tuple(pair for pair in pairs if pair[1])


def _kernel_images(kernels: np.ndarray) -> tuple[str, ...]:
    """Return the image of each of the kernels (C', I, k, k') of a layer, as a data URI."""
    return tuple(kernel_views(kernel, layer_scale(kernels))[0][1] for kernel in kernels)


def _rendered(layer: LayerView, key: str) -> PresetSummary:
    numbers, curves = layer.measurements(key, ("status", "steps", "seconds")), layer.path_curves(key)
    attributes = layer.render_attributes(key)
    _, variants, height, width, _ = layer.images(key).shape
    status = numbers["status"]
    steps = numbers["steps"][numbers["steps"] > 0] if "steps" in numbers else np.zeros(0, np.int32)
    preset, objective = str(attributes.get("preset", "")), str(attributes.get("objective", ""))
    return PresetSummary(
        key=key,
        # In old atlases the key is an objective; the preset is a better title if the key does not distinguish presets.
        title=preset if preset and len(layer.presets) == 1 else key,
        objective=objective or key,
        preset=preset,
        digest=str(attributes.get("digest", "")),
        natural=str(attributes.get("natural", "")),
        variants=variants,
        height=height,
        width=width,
        counts=tuple(sorted(Counter(status.ravel().tolist()).items())),
        failed=tuple(int(c) for c, row in zip(layer.channels, status, strict=True) if (row == "failed").any()),
        seconds=float(np.nansum(numbers["seconds"])) if "seconds" in numbers else 0.0,
        steps=(int(steps.min()), int(steps.max())) if steps.size else (0, 0),
        precisions=tuple(str(attributes.get("precision", "")).split()),
        levels=tuple(str(attributes.get("level", "")).splitlines()),
        fallbacks=tuple(str(attributes.get("level_reason", "")).splitlines()),
        judged=tuple(filter(None, map(_judged, layer.judgements(key)))),
        masked=layer.masks(key) is not None,
        path_layers=curves.layers if curves else (),
        path=_path(layer.measurements(key, ("path_similarity", "path_natural", "path_random"))),
        display=_display(layer, key),
    )


def _display(layer: LayerView, key: str) -> DisplaySummary | None:
    name = layer.displays.get(key)
    if name is None:
        return None
    status = layer.measurements(name, ("status",))["status"][:, 0]
    channels = tuple(int(c) for c, one in zip(layer.channels, status, strict=True) if one not in ("missing", "failed"))
    height, width = layer.images(name).shape[2:4]
    digest = str(layer.render_attributes(name).get("digest", ""))
    return DisplaySummary(name, digest, height, width, channels) if channels else None


def _path(numbers: Mapping[str, np.ndarray]) -> str:
    """Return the path similarity of a layer's visualizations in words; "" if it is not known.

    The means over units have a much smaller error than the numbers of a single unit.
    """
    names = ("path_similarity", "path_natural", "path_random")
    if not all(name in numbers for name in names):
        return ""
    known = np.logical_and.reduce([np.isfinite(numbers[name]) for name in names])
    if not known.any():
        return ""
    own, natural, random = (float(numbers[name][known].mean()) for name in names)
    ratio = f", the first ÷ the second {own / natural:.2f}" if natural > max(random, 0.0) else ""
    text = (
        f"mean path similarity: with dataset examples {own:.2f}, of dataset examples with each other {natural:.2f}, "
        f"with random images {random:.2f}{ratio}"
    )
    return text.replace("-", "−")


def _judged(judgement: Judgement) -> str:
    """Return what a judge says about the visualizations of a layer; "" if it says nothing."""
    numbers = {name: values[np.isfinite(values)] for name, values in judgement.numbers.items()}
    if judgement.kind == "class":
        rank, probability = numbers["rank"], numbers["probability"]
        if not rank.size:
            return ""
        return (
            f"recognized by {judgement.judge}: rank 1 for {int((rank == 1).sum())} of {rank.size}, median rank "
            f"{np.median(rank):g}, median probability {np.median(probability):.2f}"
        )
    correlation, quantile = numbers["correlation"], numbers["quantile"]
    if not correlation.size:
        return ""
    matching = int((correlation >= MIN_CORRELATION).sum())
    place = f"; those at the median quantile {np.median(quantile):.2f}" if quantile.size else ""
    return (
        f"in {judgement.judge}: median held-out correlation {np.median(correlation):.2f}, {matching} of "
        f"{correlation.size} visualizations with a matching direction{place}"
    )


@dataclasses.dataclass(frozen=True)
class ShownExamples:
    """A list of dataset examples, cut to the examples that the site shows.

    Attributes:
        name: Name of the list: "max", "mean", "min", "relevant" or "spectrum".
        value: Activations, or relevances, (C', k).
        index: Rows of the images in the dataset, (C', k).
        y: Row of the activation in the layer's map, (C', k).
        x: Column of the activation in the layer's map, (C', k).
        pair: Numbers of the heat maps, (C', k).
        crop: Numbers of the stored crops, (C', k).
    """

    name: str
    value: np.ndarray
    index: np.ndarray
    y: np.ndarray
    x: np.ndarray
    pair: np.ndarray
    crop: np.ndarray

    @property
    def count(self) -> int:
        """Number of examples per unit, k."""
        return self.index.shape[1]


def list_limits(layer: LayerView, config: SiteConfig) -> dict[str, int]:
    """Return how many examples of each list the site shows of a unit; of `spectrum`, in each bin.

    Means are left out where they are equal to the maxima, because a map has one position.
    """
    means = config.means if math.prod(layer.map_size) > 1 else 0
    limits = {
        "max": config.examples,
        "mean": means,
        "min": config.least,
        "relevant": config.relevant,
        "spectrum": config.per_bin,
    }
    return {name: limit for name, limit in limits.items() if limit}


def shown_lists(layer: LayerView, config: SiteConfig) -> list[ShownExamples]:
    """Return the example lists that the site shows of each unit, if the atlas has them; see `list_limits`."""
    lists = []
    for name, limit in list_limits(layer, config).items():
        examples = layer.examples(name)
        if examples is None:
            continue
        columns = np.arange(min(limit, examples.index.shape[1]))
        if name == "spectrum":
            bins = max(1, len(layer.spectrum_edges) - 1)
            per_bin = examples.index.shape[1] // bins
            columns = np.concatenate([np.arange(min(limit, per_bin)) + per_bin * i for i in range(bins)])
        arrays = (examples.value, examples.index, examples.y, examples.x, examples.map, examples.crop)
        lists.append(ShownExamples(name, *(array[:, columns] for array in arrays)))
    return lists


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The dataset images, the labels, and the classes of the network.

    Attributes:
        paths: Path of each dataset image.
        labels: Label of each dataset image, as pages show it.
        names: All labels of the dataset, as pages show them; records refer to them by index.
        classes: Class names of the network, as pages show them.
        sources: Number of images that the dataset images were cropped from.
        book: The names of the units; it reads the atlas, which must remain open.
    """

    paths: tuple[str, ...]
    labels: tuple[str, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    sources: int
    book: NameBook

    @staticmethod
    def of(atlas: Atlas) -> "Catalogue":
        """Read the catalogue of an atlas."""
        table = {key: column.to_numpy().tolist() for key, column in atlas.dataset().items()}
        sources = len(set(table["source"]))
        names = readable_labels(atlas.dataset_labels)
        shown = dict(zip(atlas.dataset_labels, names, strict=True)) | {"": ""}
        labels = tuple(shown[label] for label in table["label"])
        return Catalogue(tuple(table["path"]), labels, names, readable_labels(atlas.labels), sources, NameBook(atlas))
