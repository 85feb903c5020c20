"""Facets of units, and the images of these."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

# Examples nearest to the center of a facet: shown beside its image, whose start has their mean spectrum.
NEAREST = 9


@dataclasses.dataclass(frozen=True)
class LayerFacets:
    """Facets of U units of a layer: F in all, by the responses of a layer of D channels to k examples of each unit.

    Attributes:
        embedding: Name of the layer whose responses are compared.
        channel: Channel of each unit, (U,) int32.
        image: Its examples, the highest mean activation first, (U, k) int32; −1 for none.
        value: Mean activation of the unit for each, (U, k) float32; NaN for none.
        facet: Facet of each example, (U, k) int16, numbers from 0 within the unit; −1 for none.
        count: Number of facets of the unit, (U,) int32.
        similarity: Mean cosine of all pairs of its examples, (U,) float32.
        monosemanticity: Score of the unit, (U,) float32; see `clustering.monosemanticity`.
        unit: Row of the unit of each facet, (F,) int32, ascending.
        number: Number of the facet within its unit, (F,) int32.
        size: Number of examples, (F,) int32.
        separation: Mean silhouette of its examples, (F,) float32; NaN for the only facet of a unit.
        center: Mean direction of its examples: their standardized responses, of length 1, (F, D) float32.
        nearest: Its examples nearest to the center, the nearest first, (F, `NEAREST`) int32; −1 for none.
        mean: Mean of each channel that responses are standardized by, (D,) float32.
        deviation: Their standard deviation, (D,) float32; 0 for channels that do not count.
    """

    embedding: str
    channel: np.ndarray
    image: np.ndarray
    value: np.ndarray
    facet: np.ndarray
    count: np.ndarray
    similarity: np.ndarray
    monosemanticity: np.ndarray
    unit: np.ndarray
    number: np.ndarray
    size: np.ndarray
    separation: np.ndarray
    center: np.ndarray
    nearest: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    @property
    def facets(self) -> int:
        """Number of facets of all units, F."""
        return len(self.unit)

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """Centers for the objective `facet`, as long as the unit's largest activation by its examples, (F, D)."""
        scale = np.nanmax(np.abs(self.value), axis=1, initial=1e-6)
        return self.center * scale[self.unit][:, None]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {name: getattr(self, name) for name in LAYER_ARRAYS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], embedding: str) -> "LayerFacets":
        """Create from the result of `arrays` and the name of the layer whose responses are compared."""
        return cls(embedding, *(arrays[name] for name in LAYER_ARRAYS))


LAYER_ARRAYS = tuple(field.name for field in dataclasses.fields(LayerFacets))[1:]


@dataclasses.dataclass(frozen=True)
class FacetsResult:
    """The facets of a layer with their images.

    Attributes:
        facets: The facets.
        images: Image of each facet, (F, H, W, C) uint8.
        examples: Copies of the nearest examples, (F, `NEAREST`, S, S, C) uint8, black where there is none; None if no
            images are stored.
        activation: Mean activation of the unit for the image, (F,) float32.
        cosine: Cosine of the response to the image with the center of its facet, (F,) float32.
        failed: Whether the objective did not rise above its value at the start, (F,) bool.
        device: Kinds of the devices that responses and images were made on, such as "cpu".
    """

    facets: LayerFacets
    images: np.ndarray
    examples: np.ndarray | None
    activation: np.ndarray
    cosine: np.ndarray
    failed: np.ndarray
    device: str
