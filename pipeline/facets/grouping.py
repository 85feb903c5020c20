"""The facets of the units of a layer, from the responses to their examples."""

from collections.abc import Sequence

import numpy as np

from pipeline.examples import topk
from pipeline.facets import clustering
from pipeline.facets.clustering import Reference
from pipeline.facets.responses import ResponsesPart
from pipeline.facets.results import NEAREST, LayerFacets


def group_units(
    responses: ResponsesPart,
    number: int,
    embedding: tuple[int, str],
    channels: Sequence[int],
    reference: Sequence[int],
    images: int,
    level: float,
) -> LayerFacets:
    """Return the facets of the units of a layer.

    Args:
        responses: The merged parts of the whole dataset.
        number: Number of the layer among those with facets.
        embedding: Number and name of the layer whose responses are compared, among those that are read.
        channels: Channels of the units.
        reference: The reference images; unreadable ones do not count.
        images: Number of images of the dataset.
        level: See `clustering.are_different`.
    """
    own = responses.responses[embedding[0]]
    rows = np.flatnonzero(np.isin(responses.index, np.asarray(reference)))
    base = Reference.of(own[rows], images)
    value, image = topk.decode(responses.keys[number])
    facet = np.full(image.shape, -1, np.int16)
    similarity, score = (np.full(len(channels), np.nan, np.float32) for _ in range(2))
    parts: list[tuple[int, int, int, float]] = []
    centers, nearest = [], []
    for unit in range(len(channels)):
        there = np.flatnonzero(image[unit] >= 0)
        directions = base.of_images(own[np.searchsorted(responses.index, image[unit, there])])
        found = clustering.find_facets(directions, base, level)
        facet[unit, there] = found
        similarity[unit], score[unit] = clustering.monosemanticity(directions, base)
        for one, apart in enumerate(clustering.separation(directions, found).tolist()):
            members = np.flatnonzero(found == one)
            center, ranked = _center(directions, members)
            parts.append((unit, one, len(members), apart))
            centers.append(center.astype(np.float32))
            nearest.append(np.pad(image[unit, there][ranked], (0, NEAREST - len(ranked)), constant_values=-1))
    columns = list(zip(*parts, strict=True)) if parts else [(), (), (), ()]
    units = np.array(columns[0], np.int32)
    return LayerFacets(
        embedding=embedding[1],
        channel=np.array(channels, np.int32),
        image=image,
        value=value,
        facet=facet,
        count=np.bincount(units, minlength=len(channels)).astype(np.int32),
        similarity=similarity,
        monosemanticity=score,
        unit=units,
        number=np.array(columns[1], np.int32),
        size=np.array(columns[2], np.int32),
        separation=np.array(columns[3], np.float32),
        center=np.stack(centers) if centers else np.zeros((0, own.shape[1]), np.float32),
        nearest=np.stack(nearest).astype(np.int32) if nearest else np.zeros((0, NEAREST), np.int32),
        mean=base.mean.astype(np.float32),
        deviation=base.deviation.astype(np.float32),
    )


def _center(directions: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the center of some of a unit's examples, (D,), and those nearest to it, at most `NEAREST`."""
    center = clustering.unit_length(directions[members].mean(0))
    return center, members[np.argsort(-(directions[members] @ center), kind="stable")][:NEAREST]
