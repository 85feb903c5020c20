"""Groups of a unit's dataset examples by the responses of another layer, their number, and how alike they are.

Responses are standardized by their mean and deviation over reference images of the dataset and scaled to length 1: the
*direction* of an image. Groups come from repeated division in two. Whether two groups are different facets is decided
by a null hypothesis about images and not about the shape of a distribution: that one of them lies where the images
nearest to a random image lie.
"""

import dataclasses
import functools

import numpy as np

from pipeline.core.metric_specs import MIN_DEVIATION

# Smallest share of the examples, and smallest number of them, that are a facet.
LEAST_SHARE, LEAST_SIZE = 1 / 8, 3

# Smallest number of images of a neighborhood.
LEAST_NEIGHBORS = 4

# A division begins at the median of each of so many principal components; moves of each image, at most.
STARTS, MOVES = 3, 2


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Responses of a layer of D channels to R images that were drawn from a dataset.

    Attributes:
        mean: Mean of each channel, (D,) float64.
        deviation: Standard deviation of each channel, (D,) float64; 0 for constant ones, which do not count.
        directions: Directions of the images, (R, D) float64.
        images: Number of images of the dataset.
    """

    mean: np.ndarray
    deviation: np.ndarray
    directions: np.ndarray
    images: int

    @classmethod
    def of(cls, responses: np.ndarray, images: int) -> "Reference":
        """Create from responses, (R, D), R ≥ 2, and the number of images of the dataset that they were drawn from."""
        x = np.asarray(responses, np.float64)
        mean, deviation = x.mean(0), x.std(0)
        least = np.maximum(1e-6 * np.abs(x).max(0), MIN_DEVIATION * np.median(deviation))
        deviation = np.where(deviation > least, deviation, 0.0)
        return cls(mean, deviation, _standardized(x, mean, deviation), images)

    def of_images(self, responses: np.ndarray) -> np.ndarray:
        """Return the directions of images with these responses, (n, D) float64; 0 for an image like the mean."""
        return _standardized(np.asarray(responses, np.float64), self.mean, self.deviation)

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """The reference images by decreasing cosine with each of them, itself first, (R, R)."""
        cosine = self.directions @ self.directions.T
        np.fill_diagonal(cosine, np.inf)
        return np.argsort(-cosine, axis=1, kind="stable")

    def neighbors(self, size: int) -> int:
        """Return how many reference images are a neighborhood of `size` images of the dataset."""
        share = len(self.directions) / max(self.images, 1)
        return min(len(self.directions), max(LEAST_NEIGHBORS, round(size * share)))

    def _members(self, size: int) -> np.ndarray:
        """Return which reference images are in the neighborhood of each, (R, R) float64 of 0 and 1."""
        members = np.zeros_like(self._order, np.float64)
        np.put_along_axis(members, self._order[:, : self.neighbors(size)], 1.0, axis=1)
        return members

    @functools.lru_cache(maxsize=32)  # noqa: B019 (one reference lives as long as the facets of a layer are found)
    def neighborhoods(self, size: int) -> np.ndarray:
        """Return the mean direction of each neighborhood of `size` images, (R, D) of length 1."""
        return unit_length(self._members(size) @ self.directions)

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def likeness(self, size: int) -> tuple[float, float]:
        """Return the mean cosine of pairs of reference images: of all, and the median over neighborhoods of `size`."""
        everything = mean_cosine(self.directions)
        count = self.neighbors(size)
        sums = self._members(size) @ self.directions
        own = np.square(np.linalg.norm(self.directions, axis=1))
        within = (np.square(np.linalg.norm(sums, axis=1)) - self._members(size) @ own) / (count * max(count - 1, 1))
        return everything, float(np.median(within))


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (…, D) of length 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def _standardized(x: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    return unit_length(np.where(deviation > 0, (x - mean) / np.where(deviation > 0, deviation, 1.0), 0.0))


def mean_cosine(directions: np.ndarray) -> float:
    """Return the mean cosine over all pairs of different images, for directions (n, D); NaN for fewer than two."""
    count = len(directions)
    if count < 2:
        return float("nan")
    total = float(np.square(directions.sum(0)).sum()) - float(np.square(directions).sum())
    return total / (count * (count - 1))


def monosemanticity(directions: np.ndarray, reference: Reference) -> tuple[float, float]:
    """Return how alike the examples of a unit are.

    Pach et al. 2025 ("Sparse Autoencoders Learn Monosemantic Features in Vision-Language Models") score a unit by the
    mean pairwise cosine of the images that activate it. The score here is that cosine s on a scale that does not depend
    on the layer or the dataset: (s − r) / (n − r), where r is that of random images, and n the median over random
    images of that of their nearest ones, as many as the unit has examples.

    Args:
        directions: Directions of the examples, (k, D).
        reference: The reference images.

    Returns:
        The mean cosine, −1 … 1, and the score: 0 for examples like random images, 1 for examples as alike as the
        nearest neighbors of an image. It is not clipped. NaN for fewer than two examples.
    """
    similarity = mean_cosine(directions)
    everything, near = reference.likeness(len(directions))
    return similarity, (similarity - everything) / (near - everything) if near > everything else float("nan")


def bisected(directions: np.ndarray) -> np.ndarray | None:
    """Divide images into two groups by 2-means on their directions: the least sum of squared distances to the means.

    The search begins at the medians of the first principal components, so that nothing is drawn at random, and moves
    one image at a time, the one with the largest gain (Hartigan 1975). Lloyd's iterations would end where they begin: a
    mean of few vectors of many components is nearest to each of its own.

    Args:
        directions: Directions, (n, D).

    Returns:
        Whether each image is in the group of the first image, (n,) bool; None if all directions are equal.
    """
    centered = directions - directions.mean(0)
    left, scale, _ = np.linalg.svd(centered @ centered.T)
    usable = scale > 1e-9 * max(float(scale[0]), 1e-12)
    places = (left * np.sqrt(scale))[:, usable]  # the same distances in at most n − 1 coordinates
    best, found = np.inf, None
    for axis in range(min(STARTS, places.shape[1])):
        groups = _exchanged(places, places[:, axis] > np.median(places[:, axis]))
        within = sum(float(np.square(own - own.mean(0)).sum()) for own in (places[groups], places[~groups]))
        if within < best - 1e-12:
            best, found = within, groups
    return None if found is None else found == found[0]


def _exchanged(places: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return a division into two groups that moving no single vector improves, from one with two nonempty groups."""
    groups = groups.copy()
    for _ in range(MOVES * len(places)):
        sizes = groups.sum(), (~groups).sum()
        distances = [np.square(places - places[own].mean(0)).sum(1) for own in (groups, ~groups)]
        # What the sum of squares loses when a vector leaves its group, minus what it gains in the other.
        leaves = [d * n / max(n - 1, 1) for d, n in zip(distances, sizes, strict=True)]
        joins = [d * n / (n + 1) for d, n in zip(distances, sizes, strict=True)]
        gain = np.where(groups, leaves[0] - joins[1], leaves[1] - joins[0])
        gain[groups if sizes[0] == 1 else np.zeros_like(groups)] = -np.inf
        gain[~groups if sizes[1] == 1 else np.zeros_like(groups)] = -np.inf
        moved = int(gain.argmax())
        if gain[moved] <= 1e-12:
            break
        groups[moved] = ~groups[moved]
    return groups


def are_different(first: np.ndarray, second: np.ndarray, reference: Reference, level: float) -> bool:
    """Return whether two groups of images are different facets.

    Null hypothesis: the second group lies where the neighborhood of a random image lies, seen from the first. For each
    reference image the mean direction of its nearest images, as many as the group has, is compared with the mean
    direction of the other group. The groups are one facet if they are closer to each other than all but `level` of
    these neighborhoods, in either direction.

    Args:
        first: Directions of the one group, (n, D).
        second: Directions of the other, (m, D).
        reference: The reference images.
        level: Share of the neighborhoods.
    """
    one, other = unit_length(first.mean(0)), unit_length(second.mean(0))
    cosine = float(one @ other)
    closer = [
        float((reference.neighborhoods(len(group)) @ center >= cosine).mean())
        for group, center in ((second, one), (first, other))
    ]
    return min(closer) > level


def find_facets(directions: np.ndarray, reference: Reference, level: float) -> np.ndarray:
    """Return the facet of each example of a unit.

    All examples are divided in two, and each group again, as long as the two groups are different facets
    (`are_different`) and both have an eighth of the examples, at least three.

    Args:
        directions: Directions of the examples, the highest activation first, (k, D).
        reference: The reference images.
        level: See `are_different`.

    Returns:
        (k,) int64 numbers from 0, the largest facet first, then the one with the higher activation.
    """
    least = max(LEAST_SIZE, round(LEAST_SHARE * len(directions)))
    found: list[np.ndarray] = []
    pending = [np.arange(len(directions))]
    while pending:
        own = pending.pop()
        groups = bisected(directions[own]) if len(own) >= 2 * least else None
        if groups is not None and least <= groups.sum() <= len(own) - least:
            first, second = own[groups], own[~groups]
            if are_different(directions[first], directions[second], reference, level):
                pending += [first, second]
                continue
        found.append(own)
    facets = np.zeros(len(directions), np.int64)
    for number, own in enumerate(sorted(found, key=lambda own: (-len(own), int(own[0]) if len(own) else 0))):
        facets[own] = number
    return facets


def separation(directions: np.ndarray, facets: np.ndarray) -> np.ndarray:
    """Return the mean silhouette of the examples of each facet (Rousseeuw 1987), with distances 1 − cosine.

    The silhouette of an example is (b − a) / max(a, b), where a is its mean distance to the others of its facet and b
    the smallest mean distance to the examples of another one.

    Args:
        directions: Directions of the examples, (k, D).
        facets: Facet of each, (k,), numbers from 0.

    Returns:
        (F,) float64, −1 … 1; NaN for a single facet.
    """
    count = int(facets.max()) + 1 if len(facets) else 0
    if count < 2:
        return np.full(count, np.nan)
    distance = 1 - directions @ directions.T
    np.fill_diagonal(distance, 0.0)
    belongs = facets[:, None] == np.arange(count)
    sizes = belongs.sum(0)
    mean = distance @ belongs / np.maximum(sizes - belongs, 1)
    own = mean[belongs]
    nearest = np.where(belongs, np.inf, mean).min(1)
    silhouette = (nearest - own) / np.maximum(np.maximum(nearest, own), 1e-12)
    return np.array([silhouette[facets == number].mean() for number in range(count)])
