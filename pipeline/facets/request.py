"""Which units of a run get facets, and by the responses of which layers."""

import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np

from pipeline.activation_atlas.cells import sized
from pipeline.activation_atlas.request import STEP_PASSES
from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.data.datasets import Dataset
from pipeline.effects.request import choose_images
from pipeline.facets.config import FacetsConfig
from pipeline.images.parameterizations import FromImage
from pipeline.layers.finding import Layer
from pipeline.layers.selection import matches
from pipeline.visualization.objectives import Facet
from pipeline.visualization.preset import Preset, Size
from pipeline.visualization.render_job import ROBUST_COPIES

# Images that responses are standardized by and neighborhoods are drawn from, at most; at least so many are needed.
REFERENCE, FEWEST = 1024, 16

# Facets of a unit, assumed before they are found.
EXPECTED = 1.5


@dataclasses.dataclass(frozen=True)
class FacetsRequest:
    """The units that get facets.

    Attributes:
        layers: Their layers.
        channels: Their channels, by layer.
        embeddings: Layers whose responses are kept.
        chosen: For each layer, the number of the one in `embeddings` that its examples are compared by.
        reference: Images that responses are standardized by, ascending.
        images: Number of dataset images.
        config: The settings.
        batch: Images in one forward pass.
        cost: Multiply-adds of the forward pass whose time is the unit of estimates.
        input_size: (height, width) of the network's input.
        canvases: (height, width) of the images of each layer in pixels.
    """

    layers: tuple[Layer, ...]
    channels: tuple[tuple[int, ...], ...]
    embeddings: tuple[Layer, ...]
    chosen: tuple[int, ...]
    reference: tuple[int, ...]
    images: int
    config: FacetsConfig
    batch: int
    cost: float
    input_size: Size = (0, 0)
    canvases: tuple[Size, ...] = ()

    @property
    def count(self) -> int:
        """Number of examples of a unit."""
        return self.config.count(self.images)

    @property
    def expected(self) -> dict[str, int]:
        """About how many facets the units of each layer have, by its name."""
        return {layer.name: self.expected_facets(layer) for layer in self.layers}

    def expected_facets(self, layer: Layer) -> int:
        """Return about how many facets the units of a layer have, before they are found."""
        return round(EXPECTED * len(self.channels_of(layer)))

    def channels_of(self, layer: Layer) -> tuple[int, ...]:
        """Return the channels of the units of a layer."""
        return self.channels[self.layers.index(layer)]

    def embedding(self, layer: Layer) -> Layer:
        """Return the layer whose responses the examples of a layer are compared by."""
        return self.embeddings[self.chosen[self.layers.index(layer)]]

    def canvas(self, layer: Layer) -> Size:
        """Return the (height, width) of the images of a layer."""
        return self.canvases[self.layers.index(layer)]

    def sized(self, preset: Preset) -> Preset:
        """Return the main preset with the size and steps of the images of facets."""
        return sized(preset, self.config.size, self.config.steps)

    def preset(self, preset: Preset, layer: Layer, targets: dict[str, np.ndarray]) -> Preset:
        """Return the preset of the images of some facets of a layer, as its variants.

        Args:
            preset: The main preset of the run.
            layer: The layer.
            targets: `center`, `mean` and `deviation` of the objective `facet`.
        """
        buffer = io.BytesIO()
        np.savez(buffer, **targets)  # type: ignore[arg-type]
        embedding = self.embedding(layer)
        objective = Facet(
            ConfigFile(f"the facets of {layer.name}", buffer.getvalue()),
            embedding.name,
            self.config.power,
            embedding.rectified,
        )
        own = dataclasses.replace(
            self.sized(preset), objective=objective, variants=len(targets["center"]), couplings=(), attempts=1
        )
        return own.for_layer(layer)

    def passes(self, preset: Preset, layer: Layer) -> float:
        """Return the estimated work for the image of one facet, in forward passes over an image of the input size."""
        height, width = self.canvas(layer)
        margin = self.sized(preset).margin
        area = (height + 2 * margin) * (width + 2 * margin) / math.prod(self.input_size)
        cost = max(layer.cost, self.embedding(layer).cost) / max(self.cost, 1.0)
        return (STEP_PASSES * self.config.steps + ROBUST_COPIES) * area * cost


def request_facets(
    config: FacetsConfig,
    dataset: Dataset,
    layers: Sequence[tuple[Layer, Sequence[int]]],
    preset: Preset,
    candidates: Sequence[Layer],
    logits: Sequence[Layer],
    batch: int,
) -> FacetsRequest | None:
    """Return which units get facets, without the sizes of images; None without layers.

    Args:
        config: The settings.
        dataset: The dataset; reference images are those with the lowest hashes of their paths, one of each source.
        layers: Layers of the run that get visualizations, with their channels.
        preset: The main preset.
        candidates: All layers of the network, in its order.
        logits: Layers of logits.
        batch: Images in one forward pass.

    Raises:
        AtlasError: If a glob matches no layer of the run, there are too few images, or the preset has no facets.
    """
    if not config.layers:
        return None
    names = [name for layer, _ in layers for name in (layer.name, layer.alias) if name]
    for pattern in config.layers:
        if not any(matches(layer, pattern) for layer, _ in layers):
            raise AtlasError(
                f"facets.layers: no layer of this run that gets visualizations matches {pattern!r}. "
                f"{nearest_names(pattern, names)} layers.include adds layers to the run."
            )
    reference = choose_images(dataset, REFERENCE) if len(dataset.images) else ()
    if len(reference) < FEWEST:
        raise AtlasError(
            f"facets.layers needs at least {FEWEST} dataset images of different sources, and there are "
            f"{len(reference)}: choose some with data=folder data.root=DIR."
        )
    _check_preset(preset)
    chosen = [(layer, own) for layer, own in layers if any(matches(layer, pattern) for pattern in config.layers)]
    compared = [embedding_of(config, layer, candidates, logits) for layer, _ in chosen]
    embeddings = tuple({layer.name: layer for layer in compared}.values())
    return FacetsRequest(
        layers=tuple(layer for layer, _ in chosen),
        channels=tuple(tuple(own) for _, own in chosen),
        embeddings=embeddings,
        chosen=tuple(embeddings.index(layer) for layer in compared),
        reference=reference,
        images=len(dataset.images),
        config=config,
        batch=batch,
        cost=max(layer.cost for layer, _ in layers),
    )


def _check_preset(preset: Preset) -> None:
    """Raise `AtlasError` if the main preset cannot make the images of facets."""
    if isinstance(preset.canvas, FromImage):
        raise AtlasError(
            "facets.layers: the images of facets start from spectra. Choose another render/canvas than image."
        )
    if any(stage.layer for stage in preset.stages):
        raise AtlasError(
            "facets.layers: render.schedule optimizes other layers, whose units have other facets. Choose another "
            "render/schedule."
        )


def embedding_of(config: FacetsConfig, layer: Layer, candidates: Sequence[Layer], logits: Sequence[Layer]) -> Layer:
    """Return the layer whose responses the examples of a layer are compared by: never its own, nor a copy of it.

    Raises:
        AtlasError: If there is no such layer, or the one that was chosen is the layer itself.
    """
    if config.embedding is not None:
        found = next((one for one in candidates if config.embedding in (one.name, one.alias)), None)
        if found is None:
            nearest = nearest_names(config.embedding, [one.name for one in candidates])
            raise AtlasError(f"facets.embedding: there is no layer {config.embedding!r}. {nearest}")
        if found.name == layer.name:
            raise AtlasError(
                f"facets.embedding: {layer.name} has facets itself. Responses of the layer of the units contain what "
                "the examples were chosen by; choose another layer."
            )
        return found
    order = [one.name for one in candidates]
    ends = {one.name for one in logits}
    first = min((order.index(name) for name in ends if name in order), default=len(order))
    before = [one for one in candidates[:first] if one.name not in ends]
    # The last layer before the logits, and what differs from it by pooling and rectification only.
    last = [one for one in before if one.channels == before[-1].channels] if before else []
    copies = {one.name for one in last if one.cost >= 0.999 * last[-1].cost} if last else set()
    if before and layer.name not in copies:
        return before[-1]
    if logits and layer.name not in ends:
        return logits[-1]
    raise AtlasError(f"facets.layers: the network has no other late layer to compare examples of {layer.name} by.")
