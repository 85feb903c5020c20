"""Setup and tasks of workers as plain data, and the digests of the results."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pipeline.activation_atlas.request import ActivationAtlasRequest
from pipeline.config.schema import Config
from pipeline.core import hashing
from pipeline.core.atomic_io import write_atomic, write_once
from pipeline.core.registry import canonical
from pipeline.data.datasets import Dataset
from pipeline.effects.request import EffectsRequest
from pipeline.facets.request import FacetsRequest
from pipeline.layers.finding import Layer
from pipeline.models.config import LOCATION_FIELDS
from pipeline.visualization.initial_images import InitialImage
from pipeline.visualization.network_penalties import NaturalDeviations
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.preset import Preset

# Versions of the kinds of results. A new version makes finished results stale: it is raised when the code gives
# other results from the same settings (docs/store.md, "Identity").
RENDER_VERSION = 3
EXAMPLES_VERSION = 3
LOCALIZE_VERSION = 5
RESTART_VERSION = 1
EFFECTS_VERSION = 2
CONNECTIONS_VERSION = 1
RELEVANCE_VERSION = 2
SAMPLES_VERSION = 1
LAYOUT_VERSION = 1
CELLS_VERSION = 1
RESPONSES_VERSION = 1
GROUPS_VERSION = 1
FACETS_VERSION = 1

# Version of visualizations by presets with regularizers in the space of a layer, beside `RENDER_VERSION`. Version 1,
# whose weight was relative to the value of the objective, was not part of digests.
LAYER_PENALTIES_VERSION = 2
# Version of visualizations on CUDA devices, beside `RENDER_VERSION`. Version 1, where float32 was TF32 in convolutions
# and bfloat16 included the statistics of batch normalizations, was not part of digests.
CUDA_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that a worker needs besides its tasks, as plain data.

    Attributes:
        config: Configuration of the run.
        weights: Digest of the weights that the run was planned with.
        layers: Layers of the plan.
        dataset: Listing of the dataset.
        threads: CPU threads of one worker.
        device: Device of one worker, for example "cpu" or "cuda".
        others: Layers that presets read besides the layer of the unit.
        begins: Digest of the dataset pass whose best examples or means visualizations need; empty if none does.
        precision: Precision of the optimization steps, one of `acceleration.precision.PRECISIONS`.
        natural: Statistics of natural images in the network; None if no preset compares with them.
        depths: Fixed depths of the network at which the paths of images are measured (`layers.path_depths`).
        mark: A file in the run folder, of another name in each run: workers that see it write their shards there,
            others send them back. Empty if all see the folder.
        effects: The effects that are measured; None without.
        activation_atlas: The activation atlases that are made; None without.
        facets: The units that get facets; None without.
    """

    config: Config
    weights: str
    layers: tuple[Layer, ...]
    dataset: Dataset
    threads: int
    device: str
    others: tuple[Layer, ...] = ()
    begins: str = ""
    precision: str = "float32"
    natural: NaturalDeviations | None = None
    depths: tuple[Layer, ...] = ()
    mark: str = ""
    effects: EffectsRequest | None = None
    activation_atlas: ActivationAtlasRequest | None = None
    facets: FacetsRequest | None = None

    def others_of(self, preset: Preset) -> dict[str, Layer]:
        """Return those of `others` that `preset` reads, by name."""
        return {layer.name: layer for layer in self.others if layer.name in preset.others}


@dataclasses.dataclass(frozen=True)
class _Task:
    """Part of a plan that one worker finishes within minutes.

    Attributes:
        path: Shard that holds the result.
        digest: Identity of the result; a shard with another digest is stale.
        cost: Estimated seconds of one worker.
        replaces: Whether there was a file at `path` when the work began, which lacks something and is replaced.
    """

    stage: ClassVar[str]

    path: str
    digest: str
    cost: float
    replaces: bool = dataclasses.field(default=False, kw_only=True)


@dataclasses.dataclass(frozen=True)
class RenderTask(_Task):
    """Visualize some channels of one layer with one preset.

    Attributes:
        layer: Name of the layer.
        channels: Channels of the layer.
        canvas: (height, width) of the finished images in pixels.
        preset: Name of the preset.
        starts: Initial image of each channel; empty unless the parameterization starts from dataset examples, or the
            units were silent from noise.
        layer_mean: Mean of each channel of the layer over the dataset; empty unless the objective compares with it.
        restart: For units that were silent from noise, the digest of their start from dataset examples.
        silent: Their visualizations from noise, as bytes of a shard: those that were not silent are kept.
    """

    stage = "render"

    layer: str
    channels: tuple[int, ...]
    canvas: tuple[int, int]
    preset: str
    starts: tuple[InitialImage, ...] = ()
    layer_mean: tuple[float, ...] = ()
    restart: str = ""
    silent: bytes = b""

    @property
    def name(self) -> str:
        """Description for messages."""
        return f"{self.layer}:{self.channels[0]}…{self.channels[-1]}"

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.channels)


class _OfImages:
    """Name and size of a task over the dataset images `images`."""

    noun: ClassVar[str]

    images: tuple[int, ...]

    @property
    def name(self) -> str:
        """Description for messages."""
        return f"{self.noun}, {len(self.images)} images"

    @property
    def size(self) -> int:
        """Number of dataset images."""
        return len(self.images)


@dataclasses.dataclass(frozen=True)
class PartTask(_OfImages, _Task):
    """Part of a list of dataset images.

    Attributes:
        start: Position of the first image in the list.
        end: One past the position of the last image.
        images: Indices of the dataset images.
    """

    start: int
    end: int
    images: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RangesTask(_OfImages, _Task):
    """Measure the ranges of the activation histograms of all layers on a sample of the dataset.

    Attributes:
        images: Indices of the dataset images.
    """

    stage, noun = "ranges", "ranges"

    images: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SweepTask(_Task):
    """First pass over the dataset images `start` … `end` - 1, for all layers.

    Attributes:
        start: First image.
        end: One past the last image.
        ranges: Ranges of the histograms, as bytes of a shard.
    """

    stage = "examples"

    start: int
    end: int
    ranges: bytes

    @property
    def name(self) -> str:
        """Description for messages."""
        return f"images {self.start}…{self.end - 1}"

    @property
    def size(self) -> int:
        """Number of dataset images."""
        return self.end - self.start

    @property
    def images(self) -> Sequence[int]:
        """Indices of the dataset images."""
        return range(self.start, self.end)


@dataclasses.dataclass(frozen=True)
class LocalizeTask(PartTask):
    """Second pass over dataset examples: their positions, activation maps and crops.

    Attributes:
        start: Position of the first image in the list of all dataset examples.
        end: One past the position of the last image.
        images: Indices of the dataset images.
        index: The part of the `SecondPassIndex` about these images, as bytes of a shard.
    """

    stage, noun = "localize", "second pass"

    index: bytes


@dataclasses.dataclass(frozen=True)
class EffectsTask(PartTask):
    """Effects of units on the outputs of the network for some dataset images.

    Attributes:
        start: Position of the first image in `EffectsRequest.images`, a multiple of `EffectsRequest.batch`.
        end: One past the position of the last image.
        images: Indices of the dataset images.
        means: Mean of each channel of each layer over the dataset, as bytes of a shard with one array for each layer.
    """

    stage, noun = "effects", "effects"

    means: bytes


@dataclasses.dataclass(frozen=True)
class RelevanceTask(PartTask):
    """Positions and masks of units in the dataset images that use them.

    Attributes:
        start: Position of the first image in the list of all such images.
        end: One past the position of the last image.
        images: Indices of the dataset images.
        index: The part of the `RelevanceIndex` about these images, as bytes of a shard.
    """

    stage, noun = "relevance", "relevance"

    index: bytes


@dataclasses.dataclass(frozen=True)
class ConnectionsTask(PartTask):
    """Attributions of connections between units for some dataset images.

    Attributes:
        start: Position of the first image in `EffectsRequest.connected`, a multiple of `EffectsRequest.batch`.
        end: One past the position of the last image.
        images: Indices of the dataset images.
        means: Mean of each channel of each layer over the dataset, as bytes of a shard with one array for each layer.
    """

    stage, noun = "connections", "connections"

    means: bytes


@dataclasses.dataclass(frozen=True)
class SamplesTask(PartTask):
    """Activations at random positions of some dataset images.

    Attributes:
        start: Position of the first image in `ActivationAtlasRequest.images`, a multiple of its `batch`.
        end: One past the position of the last image.
        images: Indices of the dataset images.
    """

    stage, noun = "samples", "activation samples"


@dataclasses.dataclass(frozen=True)
class CellsTask(_Task):
    """Visualize some cells of the activation atlas of a layer.

    Attributes:
        layer: Name of the layer.
        start: The first cell, a multiple of the number of images that are optimized together.
        end: One past the last cell.
        directions: Direction of each cell, as bytes of a shard.
    """

    stage = "cells"

    layer: str
    start: int
    end: int
    directions: bytes

    @property
    def name(self) -> str:
        """Description for messages."""
        return f"{self.layer}, cells {self.start}…{self.end - 1}"

    @property
    def size(self) -> int:
        """Number of cells."""
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class ResponsesTask(PartTask):
    """The examples of units with facets among some dataset images, and the responses of other layers to them.

    Attributes:
        start: The first image, a multiple of `FacetsRequest.batch`.
        end: One past the last image.
        images: Indices of the dataset images.
    """

    stage, noun = "responses", "responses"


@dataclasses.dataclass(frozen=True)
class FacetsTask(_Task):
    """Visualize some facets of the units of a layer.

    Attributes:
        layer: Name of the layer.
        start: The first facet.
        end: One past the last facet.
        images: Indices of the dataset images that are read: the nearest examples of all of them.
        facets: Of each facet the channel, center and nearest examples, and what centers are standardized by, as bytes
            of a shard.
    """

    stage = "facets"

    layer: str
    start: int
    end: int
    images: tuple[int, ...]
    facets: bytes

    @property
    def name(self) -> str:
        """Description for messages."""
        return f"{self.layer}, facets {self.start}…{self.end - 1}"

    @property
    def size(self) -> int:
        """Number of facets."""
        return self.end - self.start


DatasetTask = (
    RangesTask | SweepTask | LocalizeTask | EffectsTask | RelevanceTask | ConnectionsTask | SamplesTask | ResponsesTask
)
Task = RenderTask | CellsTask | FacetsTask | DatasetTask


# What the memory of a task depends on: layer and preset of visualizations, which determine their canvas, or layer and
# stage of cells and facets; otherwise the stage.
MemoryKey = tuple[str, ...]


def memory_key(task: Task) -> MemoryKey:
    """Return what batch sizes that fit into memory are kept by."""
    match task:
        case RenderTask():
            return task.layer, task.preset
        case CellsTask() | FacetsTask():
            return task.layer, task.stage
    return (task.stage,)


def device_kind(device: str) -> str:
    """Return the kind of a device: "cuda" for "cuda:1". Pixels depend on it, and not on the number of the device."""
    return device.partition(":")[0]


@dataclasses.dataclass(frozen=True)
class Done:
    """Report of a finished task; the result itself is in the shard.

    Attributes:
        path: Path of the shard.
        seconds: Duration of the task.
        data: Bytes of the shard if the worker does not see the run folder of the driver.
        batch: (device, number of images) that fit into memory, after the device ran out of it.
        restart_reason: Why this worker should be replaced; empty if it can go on.
    """

    path: str
    seconds: float
    data: bytes = b""
    batch: tuple[str, int] | None = None
    restart_reason: str = ""


def write_result(task: Task, done: Done) -> None:
    """Write a shard that came back as bytes, to the path of the task, whatever path the worker reports."""
    if done.data:
        write_shard(task, done.data)


def write_shard(task: Task, data: bytes) -> None:
    """Write the shard of a task to its path.

    A shard that another worker has written since the work began stays: a worker that was given up, such as one of a
    driver that was killed, may have finished the same task.
    """
    write = write_atomic if task.replaces else write_once
    write(Path(task.path), data)


def render_digest(setup: Setup, layer: Layer, canvas: tuple[int, int], name: str) -> str:
    """Return the digest of everything that changes the visualizations of `layer` by the preset called `name`.

    Precision and the kind of device are part of it, because they change pixels. The driver resolves
    `engine.precision=auto` once per run folder, so that a run continues elsewhere in the precision that it began with.
    """
    config = setup.config
    own_preset = config.preset_for(name, layer)
    preset = canonical(own_preset)
    preset.pop("name")  # the same settings under another name give the same images
    for stage in preset["schedule"]:
        stage.pop("head", None)  # the plan has named the layer of the head in `layer`
    model = canonical(config.model)
    for key in LOCATION_FIELDS:
        model.pop(key)  # paths of weights and code; their contents are in the digest of the weights
    checkpoint = None
    if any(isinstance(perturbation, Ensemble) for perturbation in own_preset.augmentations):
        # The content of a file does not say which of its state dicts was loaded.
        checkpoint = [config.model.checkpoint_key, config.model.checkpoint_prefix]
    exact = own_preset.requires_original_weights
    return hashing.digest_of(
        {
            "result": "render",
            "version": RENDER_VERSION,
            "weights": setup.weights,
            "model": model,
            "arguments": _arguments(config),
            "layer": layer.tap,
            "canvas": list(canvas),
            "preset": preset,
            "layers read": [other.tap for other in setup.others_of(own_preset).values()],
            "dataset pass": setup.begins if own_preset.needs_dataset_pass else "",
            "checkpoint": checkpoint,
            "seed": config.run.seed,
            "precision": "float32" if exact else setup.precision,
            "device": device_kind(setup.device),
            **({"cuda": CUDA_VERSION} if device_kind(setup.device) == "cuda" else {}),
            **_natural_digest(setup, own_preset),
            **({"layer penalties": LAYER_PENALTIES_VERSION} if own_preset.layer_penalties else {}),
        }
    )


def restart_digest(setup: Setup, render: str, examples: str) -> str:
    """Return the digest of everything that changes visualizations that start from the best dataset examples.

    Args:
        setup: The setup of the workers.
        render: Digest of the visualizations from noise.
        examples: Digest of the first pass.
    """
    config = setup.config.examples
    return hashing.digest_of(
        {
            "result": "restart",
            "version": RESTART_VERSION,
            "render": render,
            "examples": examples,
            "side": config.side,
            "crop_side": config.crop_side,
            "jpeg_quality": config.jpeg_quality,
        }
    )


def _natural_digest(setup: Setup, preset: Preset) -> dict[str, str]:
    """Return the source of the statistics of natural images for a digest; empty for presets that do not use them."""
    if not preset.network_penalties or setup.natural is None:
        return {}
    return {"natural deviations": setup.natural.source}


def _arguments(config: Config) -> Any:
    """Return the arguments of a network from a library: its weights alone do not determine, say, a stride.

    The digest of a network from the user's own code includes its arguments.
    """
    arguments = config.model.arguments if config.model.source != "custom" else None
    return canonical(arguments) if arguments else None


def examples_digest(setup: Setup, fingerprint: str) -> str:
    """Return the digest of everything that changes the first pass: dataset, weights, layers, and what is kept.

    Args:
        setup: The setup of the workers.
        fingerprint: Digest of the dataset and the preprocessing.
    """
    config = setup.config.examples
    return hashing.digest_of(
        {
            "result": "examples",
            "version": EXAMPLES_VERSION,
            "weights": setup.weights,
            "arguments": _arguments(setup.config),
            "dataset": fingerprint,
            "layers": [layer.tap for layer in setup.layers],
            "k": config.k,
            "batch": config.batch,
            "sample": config.sample,
            "subset": config.subset,
            "labelled": config.labelled,
        }
    )


def localize_digest(setup: Setup, examples: str, channels: Sequence[Sequence[int]]) -> str:
    """Return the digest of everything that changes which dataset examples are shown, and how.

    Args:
        setup: The setup of the workers.
        examples: Digest of the first pass.
        channels: Channels of each layer.
    """
    config = setup.config.examples
    return hashing.digest_of(
        {
            "result": "localize",
            "version": LOCALIZE_VERSION,
            "examples": examples,
            "channels": [list(numbers) for numbers in channels],
            "spectrum": list(config.spectrum),
            "per_bin": config.per_bin,
            "store": config.store,
            "side": config.side,
            "crop_side": config.crop_side,
            "jpeg_quality": config.jpeg_quality,
            "maps": config.maps,
            "depths": [depth.tap for depth in setup.depths],
        }
    )


def effects_digest(setup: Setup, examples: str) -> str:
    """Return the digest of everything that changes the effects of units.

    Args:
        setup: The setup of the workers, with effects.
        examples: Digest of the first pass, which has the means of the channels.
    """
    request = setup.effects
    assert request is not None
    return hashing.digest_of(
        {
            "result": "effects",
            "version": EFFECTS_VERSION,
            "examples": examples,
            "outputs": request.outputs.tap,
            "layers": [layer.tap for layer in request.layers],
            "images": len(request.images),
            "ablated": [list(channels) for channels in request.ablated],
            "batch": request.batch,
        }
    )


def connections_digest(setup: Setup, examples: str) -> str:
    """Return the digest of everything that changes the attributions of connections.

    Args:
        setup: The setup of the workers, with effects.
        examples: Digest of the first pass, which has the means of the channels.
    """
    request = setup.effects
    assert request is not None
    return hashing.digest_of(
        {
            "result": "connections",
            "version": CONNECTIONS_VERSION,
            "examples": examples,
            "outputs": request.outputs.tap,
            "layers": [layer.tap for layer in request.layers],
            "channels": [list(numbers) for numbers in request.channels],
            "images": len(request.connected),
            "batch": request.batch,
        }
    )


def relevance_digest(setup: Setup, examples: str) -> str:
    """Return the digest of everything that changes which images are listed by relevance, and their masks.

    Args:
        setup: The setup of the workers, with effects.
        examples: Digest of the first pass.
    """
    request, config = setup.effects, setup.config.examples
    assert request is not None
    return hashing.digest_of(
        {
            "result": "relevance",
            "version": RELEVANCE_VERSION,
            "effects": effects_digest(setup, examples),
            "channels": [list(numbers) for numbers in request.channels],
            "examples": request.examples,
            "store": config.store,
            "side": config.side,
            "crop_side": config.crop_side,
            "jpeg_quality": config.jpeg_quality,
        }
    )


def samples_digest(setup: Setup, fingerprint: str) -> str:
    """Return the digest of everything that changes the samples of activation atlases.

    Args:
        setup: The setup of the workers, with activation atlases.
        fingerprint: Digest of the dataset and the preprocessing.
    """
    request = setup.activation_atlas
    assert request is not None
    return hashing.digest_of(
        {
            "result": "samples",
            "version": SAMPLES_VERSION,
            "weights": setup.weights,
            "arguments": _arguments(setup.config),
            "dataset": fingerprint,
            "layers": [[layer.tap, layer.rectified] for layer in request.layers],
            "outputs": request.outputs.tap if request.outputs is not None else None,
            "images": len(request.images),
            "positions": request.config.positions,
            "seed": setup.config.run.seed,
            "batch": request.batch,
        }
    )


def layout_digest(setup: Setup, samples: str, layer: Layer) -> str:
    """Return the digest of everything that changes the layout of the samples of a layer, but the method.

    The method is the best that is installed when the samples are laid out; it is recorded with the layout.

    Args:
        setup: The setup of the workers, with activation atlases.
        samples: Digest of the samples.
        layer: The layer.
    """
    request = setup.activation_atlas
    assert request is not None
    return hashing.digest_of(
        {
            "result": "layout",
            "version": LAYOUT_VERSION,
            "samples": samples,
            "layer": layer.tap,
            "grid": request.config.grid,
            "min_count": request.config.min_count,
        }
    )


def cells_digest(setup: Setup, layer: Layer, content: str) -> str:
    """Return the digest of everything that changes the visualizations of the cells of a layer.

    Args:
        setup: The setup of the workers, with activation atlases.
        layer: The layer.
        content: Digest of the layout, by its values.
    """
    request = setup.activation_atlas
    assert request is not None
    return hashing.digest_of(
        {
            "result": "cells",
            "version": CELLS_VERSION,
            "render": render_digest(setup, layer, request.canvas(layer), setup.config.render.name),
            "steps": request.config.steps,
            "layout": content,
        }
    )


def responses_digest(setup: Setup, fingerprint: str) -> str:
    """Return the digest of everything that changes the examples of units with facets, and the responses to them.

    Args:
        setup: The setup of the workers, with facets.
        fingerprint: Digest of the dataset and the preprocessing.
    """
    request = setup.facets
    assert request is not None
    return hashing.digest_of(
        {
            "result": "responses",
            "version": RESPONSES_VERSION,
            "weights": setup.weights,
            "arguments": _arguments(setup.config),
            "dataset": fingerprint,
            "layers": [layer.tap for layer in request.layers],
            "channels": [list(numbers) for numbers in request.channels],
            "embeddings": [[layer.tap, layer.rectified] for layer in request.embeddings],
            "reference": len(request.reference),
            "count": request.count,
            "batch": request.batch,
        }
    )


def groups_digest(setup: Setup, responses: str, layer: Layer) -> str:
    """Return the digest of everything that changes the facets of the units of a layer.

    Args:
        setup: The setup of the workers, with facets.
        responses: Digest of the responses.
        layer: The layer.
    """
    request = setup.facets
    assert request is not None
    return hashing.digest_of(
        {
            "result": "facet groups",
            "version": GROUPS_VERSION,
            "responses": responses,
            "layer": layer.tap,
            "embedding": request.embedding(layer).tap,
            "level": request.config.level,
        }
    )


def facets_digest(setup: Setup, layer: Layer, content: str) -> str:
    """Return the digest of everything that changes the images of the facets of a layer.

    Args:
        setup: The setup of the workers, with facets.
        layer: The layer.
        content: Digest of the facets, by their values.
    """
    request, config = setup.facets, setup.config
    assert request is not None
    return hashing.digest_of(
        {
            "result": "facets",
            "version": FACETS_VERSION,
            "render": render_digest(setup, layer, request.canvas(layer), config.render.name),
            "steps": request.config.steps,
            "power": request.config.power,
            "facets": content,
            "store": config.examples.store != "ids",
        }
    )
