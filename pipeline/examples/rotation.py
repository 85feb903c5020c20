"""The rotation number: whether the channels of a layer are more than arbitrary directions of its activation space."""

import numpy as np

from pipeline.core.metric_specs import MIN_DEVIATION

# Random rotations of a layer, and the percentile of their directions that a channel has to exceed.
ROTATIONS = 3
PERCENTILE = 95.0
# With fewer images, the best image of a random direction says nothing.
MIN_IMAGES = 100


def rotation_number(activations: np.ndarray, seed: int, directions: np.ndarray | None = None) -> float:
    """Return the share of channels that single out an image more than random directions of the layer do.

    For each channel, s is the largest standard score of its mean activation over the images. The channels are then
    rotated: s is computed for the rows of `ROTATIONS` random orthogonal matrices, applied to the standardized
    channels. The result is the share of channels whose s exceeds the 95th percentile of that of the rotations. Where
    the channels are no more special than any directions, as in the residual stream of a network, it is 0.05. Means of
    activation maps are used because they commute with rotations; maxima do not.

    After the comparisons of units with random directions of Szegedy et al. 2014, "Intriguing properties of neural
    networks" (section 3), and Bau et al. 2017, "Network Dissection" (section 3.2).

    Latents of a dictionary are compared with random directions of the layer that they are computed from, without what
    follows their encoder: behind a gate that sets most values to 0, any direction singles out images.

    Args:
        activations: (n, C) means of the activation maps for n dataset images.
        seed: Seed of the rotations.
        directions: For latents, their encoder (N, C): the share is that of its rows. None for the channels themselves.

    Returns:
        0 … 1; NaN for fewer than `MIN_IMAGES` images or fewer than two channels that vary.
    """
    values = np.asarray(activations, np.float64)
    deviation = values.std(0)
    varies = deviation > MIN_DEVIATION * max(float(np.median(deviation)), np.finfo(float).tiny)
    units = None if directions is None else values @ np.asarray(directions, np.float64).T
    values = values[:, varies]
    if len(values) < MIN_IMAGES or values.shape[1] < 2:
        return float("nan")
    standardized = ((values - values.mean(0)) / values.std(0)).astype(np.float32)
    generator = np.random.default_rng(seed)
    rotated = [_scores(standardized @ _rotation(generator, values.shape[1])) for _ in range(ROTATIONS)]
    scores = _scores(standardized) if units is None else _scores(units[:, units.std(0) > 0])
    return float((scores > np.percentile(np.concatenate(rotated), PERCENTILE)).mean())


def _rotation(generator: np.random.Generator, size: int) -> np.ndarray:
    """Return a random orthogonal matrix, uniformly distributed (Mezzadri 2007), float32."""
    q, r = np.linalg.qr(generator.standard_normal((size, size)).astype(np.float32))
    return q * np.sign(np.diag(r))


def _scores(values: np.ndarray) -> np.ndarray:
    """Return the largest standard score of each column."""
    return (values.max(0) - values.mean(0)) / values.std(0)
