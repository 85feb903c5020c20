"""Facets of the units of a layer in `atlas.h5`: what the writer stores, and what the reader returns."""

import dataclasses
from collections.abc import Iterator

import h5py
import numpy as np
import pandas as pd

from pipeline.facets.results import LAYER_ARRAYS, FacetsResult
from pipeline.store import hdf5
from pipeline.store.hdf5 import write_array

GROUP = "facets"

# Arrays of the group by the field of `LayerFacets`: of units, of their examples, of facets, and of the embedding.
PLACES = {
    **{name: f"units/{name}" for name in ("channel", "count", "similarity", "monosemanticity")},
    **{name: f"examples/{name}" for name in ("image", "value", "facet")},
    **{name: f"embedding/{name}" for name in ("mean", "deviation")},
}
OF_IMAGES = ("activation", "cosine", "failed")


def write_facets(group: h5py.Group, result: FacetsResult) -> None:
    """Write the facets of a layer into its group."""
    target = group.create_group(GROUP)
    target.attrs["embedding"], target.attrs["device"] = result.facets.embedding, result.device
    for name, array in result.facets.arrays().items():
        write_array(target, PLACES.get(name, name), array)
    for name in OF_IMAGES:
        write_array(target, name, getattr(result, name))
    images = result.images[:, None]  # a stack of images is chunked by image, and has their digests
    write_array(target, "images", images)
    write_array(target, "images_sha256", hdf5.image_digests(images))
    if result.examples is not None:
        write_array(target, "thumbnails", result.examples)


@dataclasses.dataclass(frozen=True)
class UnitFacets:
    """Facets of U units of a layer: F in all, by the responses of another layer to k dataset images of each unit.

    Attributes:
        layer: Name of the layer.
        embedding: Name of the layer whose responses are compared.
        channel: Channel of each unit, (U,).
        image: Its examples: dataset images with the highest mean activation, the highest first, (U, k); −1 for none.
        value: Mean activation of the unit for each, (U, k); NaN for none.
        facet: Facet of each example, (U, k): numbers from 0 within the unit; −1 for none.
        count: Number of facets of each unit, (U,).
        similarity: Mean cosine of all pairs of its examples, (U,).
        monosemanticity: Score of each unit, (U,): 0 for examples as alike as random images, 1 for examples as alike as
            the images nearest to a random image, as many; see `pipeline.facets.clustering`.
        unit: Row of the unit of each facet, (F,), ascending.
        number: Number of the facet within its unit, (F,).
        size: Number of its examples, (F,).
        separation: Mean silhouette of its examples, −1 … 1, (F,); NaN for the only facet of a unit.
        center: Mean of the standardized responses to its examples, of length 1, (F, D) for D channels.
        nearest: Its examples nearest to the center, the nearest first, (F, n); −1 for none.
        mean: What responses are standardized by: mean over the reference images, (D,).
        deviation: Their standard deviation, (D,).
        images: The image of each facet, (F, H, W, C) uint8.
        activation: Mean activation of the unit for it, (F,).
        cosine: Cosine of the response to it with the center, (F,).
        failed: Whether the objective did not rise above its value at the start, (F,) bool.
        thumbnails: Small copies of the images `nearest`, (F, n, S, S, C) uint8; None if the atlas stores no images.
    """

    layer: str
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
    images: np.ndarray
    activation: np.ndarray
    cosine: np.ndarray
    failed: np.ndarray
    thumbnails: np.ndarray | None

    @property
    def score(self) -> float:
        """Monosemanticity of the layer: the median over its units; NaN without any."""
        return _median(self.monosemanticity)

    def of_unit(self, channel: int) -> np.ndarray:
        """Return the rows of the facets of a channel, the largest facet first; empty if it has none."""
        return np.flatnonzero(self.channel[self.unit] == channel)

    def examples(self, channel: int) -> pd.DataFrame:
        """Return the examples of a channel: dataset image, mean activation of the unit, and number of the facet."""
        rows = np.flatnonzero(self.channel == channel)
        there = self.image[rows].reshape(-1) >= 0
        columns = ("image", "value", "facet")
        return pd.DataFrame({name: getattr(self, name)[rows].reshape(-1)[there] for name in columns})


def facet_numbers(group: h5py.Group, channels: np.ndarray) -> dict[str, np.ndarray]:
    """Return `facets`, the number of facets, and `monosemanticity` of each channel of a layer; empty without facets.

    Args:
        group: The group of the layer.
        channels: Its channels in the atlas, (C',).

    Returns:
        (C',) each; NaN for channels without facets.
    """
    if GROUP not in group:
        return {}
    stored = hdf5.group(group, GROUP)
    rows = pd.Index(hdf5.read_array(stored, PLACES["channel"])).get_indexer(pd.Index(channels))
    named = {"facets": PLACES["count"], "monosemanticity": PLACES["monosemanticity"]}
    return {name: np.where(rows >= 0, hdf5.read_array(stored, place)[rows], np.nan) for name, place in named.items()}


@dataclasses.dataclass(frozen=True)
class FacetsExtent:
    """Numbers of the facets of a layer, read without their images.

    Attributes:
        units: Number of units.
        facets: Number of their facets.
        several: Number of units with more than one.
        score: Median monosemanticity of the units; NaN if none is known.
        embedding: Name of the layer whose responses are compared.
        examples: Number of examples of a unit.
    """

    units: int
    facets: int
    several: int
    score: float
    embedding: str
    examples: int


def read_facets_extent(group: h5py.Group) -> FacetsExtent | None:
    """Return the numbers of the facets in the group of a layer; None if there are none."""
    if GROUP not in group:
        return None
    stored = hdf5.group(group, GROUP)
    count, scores = (hdf5.read_array(stored, PLACES[name]) for name in ("count", "monosemanticity"))
    return FacetsExtent(
        units=len(count),
        facets=int(count.sum()),
        several=int((count > 1).sum()),
        score=_median(scores),
        embedding=hdf5.text_attribute(stored, "embedding"),
        examples=hdf5.dataset(stored, PLACES["image"]).shape[1],
    )


def _median(scores: np.ndarray) -> float:
    known = scores[np.isfinite(scores)]
    return float(np.median(known)) if len(known) else float("nan")


def read_facets(group: h5py.Group) -> UnitFacets | None:
    """Return the facets in the group of a layer; None if there are none."""
    if GROUP not in group:
        return None
    stored = hdf5.group(group, GROUP)
    arrays = {name: hdf5.read_array(stored, PLACES.get(name, name)) for name in (*LAYER_ARRAYS, *OF_IMAGES)}
    return UnitFacets(
        layer=hdf5.text_attribute(group, "name"),
        embedding=hdf5.text_attribute(stored, "embedding"),
        images=hdf5.read_array(stored, "images")[:, 0],
        thumbnails=hdf5.read_array(stored, "thumbnails") if "thumbnails" in stored else None,
        **arrays,
    )


def facets_faults(group: h5py.Group, dataset_images: int) -> Iterator[str]:
    """Yield what is wrong with the facets in the group of a layer; nothing if there are none.

    Args:
        group: The group of the layer.
        dataset_images: Number of images of the dataset.
    """
    found = read_facets(group)
    if found is None:
        return
    limits = (
        ("dataset image", found.image, dataset_images),
        ("nearest example", found.nearest, dataset_images),
        ("unit", found.unit, len(found.channel)),
    )
    yield from hdf5.faults_of_images(hdf5.group(group, GROUP), "the facets", found.images, limits)
