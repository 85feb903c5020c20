"""The direction of another network that matches a unit best, by ridge regression with held-out images.

Features (n images, p numbers) of the other network predict the activations of a unit. The images are divided into
three folds. For each fold, the regression is fitted to the other two, its penalty chosen there by the closed-form
leave-one-out error, and it predicts the fold. Every number below compares predictions for images that the fit did not
see.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from pipeline.core.ridge import PENALTIES, KernelBasis, feature_scale

FOLDS = 3
# Fewest images for a fit; with fewer the held-out correlation says little.
MIN_IMAGES = 60
# Units with a lower held-out correlation (less than about a fifth of the variance) have no direction in the other
# network: noise can have a high prediction then (docs/judges.md).
MIN_CORRELATION = 0.45


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the prediction for each image is among the predictions for held-out dataset images.

    Attributes:
        quantile: Share of held-out dataset images with a lower prediction (ties count half), (m,), 0 … 1.
        deviations: Difference from their mean, in their standard deviations, (m,).
    """

    quantile: np.ndarray
    deviations: np.ndarray


class _Fold:
    """Kernel ridge regression on the images of the other folds.

    Features are limited to their range over the training images, standardized, and weighted such that all groups of
    columns (layers) contribute the same variance: the kernel is the mean of the linear kernels of the groups. The limit
    keeps predictions from being extrapolated along features that no dataset image has to that degree.
    """

    def __init__(self, features: np.ndarray, held_out: np.ndarray, sizes: Sequence[int]) -> None:
        self.held_out = held_out
        train = features[~held_out]
        self._low, self._high = train.min(0), train.max(0)
        weights = np.repeat([1 / np.sqrt(max(1, size) * len(sizes)) for size in sizes], sizes)
        self._mean, self._scale = feature_scale(train, weights)
        self._train = self._standardized(train)
        self._basis = KernelBasis(self._train)
        self._penalties = PENALTIES * self._basis.unit
        self._test_kernel = self._kernel(features[held_out])

    def _standardized(self, features: np.ndarray) -> np.ndarray:
        return (np.clip(features, self._low, self._high) - self._mean) * self._scale

    def _kernel(self, features: np.ndarray) -> np.ndarray:
        return self._standardized(features) @ self._train.T

    def fit(self, targets: np.ndarray) -> "_Fit":
        """Fit the activations of u units, (n, u), each with the penalty of least leave-one-out error.

        With the eigenvectors V and eigenvalues e of the kernel, the fitted values for penalty λ are H y with
        H = V diag(e / (e + λ)) Vᵀ + 1 / n, and the leave-one-out residual of image i is (y − H y)_i / (1 − H_ii).
        """
        train = targets[~self.held_out]
        mean = train.mean(0)
        values, vectors = self._basis.values, self._basis.vectors
        rotated = vectors.T @ (train - mean)
        best = np.full(train.shape[1], np.inf)
        coefficients = np.zeros_like(train)
        for penalty in self._penalties:
            # Residuals are V diag(λ / (e + λ)) Vᵀ y, without the cancellation of y − H y.
            residual = vectors @ (rotated * (penalty / (values + penalty))[:, None])
            leverage = np.square(vectors) @ (values / (values + penalty)) + 1 / len(train)
            left_out = residual / np.maximum(1 - leverage, 1e-9)[:, None]
            error = np.square(left_out).mean(0)
            better = error < best
            best = np.where(better, error, best)
            coefficients[:, better] = residual[:, better] / penalty
        return _Fit(mean, coefficients, mean + self._test_kernel @ coefficients)

    def predict(self, fit: "_Fit", features: np.ndarray, units: np.ndarray) -> np.ndarray:
        """Return the prediction for each image (m, p) of the activation of its unit (m,); (m,)."""
        return fit.mean[units] + (self._kernel(features) * fit.coefficients[:, units].T).sum(1)


@dataclasses.dataclass(frozen=True)
class _Fit:
    """The regressions of u units in one fold.

    Attributes:
        mean: Mean activation over the training images, (u,).
        coefficients: Weights of the training images, (n, u).
        predictions: Predictions for the held-out images, (t, u).
    """

    mean: np.ndarray
    coefficients: np.ndarray
    predictions: np.ndarray


class FeatureSpace:
    """Features of another network on dataset images, prepared for regressions.

    Args:
        features: (n, p) features.
        folds: Fold of each image, (n,), 0 … 2; crops of one source image must have the same.
        sizes: Number of columns of each group (layer); their sum is p.

    Raises:
        ValueError: If there are fewer than `MIN_IMAGES` images, or a fold is empty.
    """

    def __init__(self, features: np.ndarray, folds: np.ndarray, sizes: Sequence[int]) -> None:
        if len(features) < MIN_IMAGES:
            raise ValueError(f"{len(features)} images are too few: at least {MIN_IMAGES}")
        if set(folds.tolist()) != set(range(FOLDS)):
            raise ValueError("a fold has no images")
        features = np.asarray(features, np.float64)
        self.folds = [_Fold(features, folds == number, sizes) for number in range(FOLDS)]

    def match(self, targets: np.ndarray) -> "Match":
        """Fit the activations of u units on the same images, (n, u)."""
        targets = np.asarray(targets, np.float64)
        return Match(self, targets, [fold.fit(targets) for fold in self.folds])


class Match:
    """The best matching directions of u units; see `FeatureSpace.match`."""

    def __init__(self, space: FeatureSpace, targets: np.ndarray, fits: Sequence[_Fit]) -> None:
        self._space, self._targets, self._fits = space, targets, fits

    @functools.cached_property
    def correlation(self) -> np.ndarray:
        """Pearson's correlation of predictions and activations of held-out images, mean of the folds, (u,), −1 … 1.

        It is 1 if a linear direction of the features has exactly the unit's activations, and 0 on average for features
        that have nothing to do with it. NaN for a unit whose activation is the same on all images of a fold.
        """
        pairs = zip(self._space.folds, self._fits, strict=True)
        return np.mean([_correlations(fit.predictions, self._targets[fold.held_out]) for fold, fit in pairs], axis=0)

    def place(self, features: np.ndarray, units: np.ndarray) -> Placement:
        """Return where images are among held-out dataset images by the prediction of a unit's activation.

        Each fold compares the image with its own held-out images; the result is the mean of the folds.

        Args:
            features: (m, p) features of the images.
            units: Column of `match`'s targets for each image, (m,).

        Returns:
            NaN for units whose held-out correlation is below `MIN_CORRELATION` or NaN.
        """
        features = np.asarray(features, np.float64)
        quantiles, deviations = [], []
        for fold, fit in zip(self._space.folds, self._fits, strict=True):
            predicted = fold.predict(fit, features, units)
            others = fit.predictions[:, units]
            quantiles.append(((others < predicted).mean(0) + (others <= predicted).mean(0)) / 2)
            with np.errstate(divide="ignore", invalid="ignore"):
                deviations.append((predicted - others.mean(0)) / others.std(0))
        matched = self.correlation[units] >= MIN_CORRELATION
        return Placement(
            np.where(matched, np.mean(quantiles, axis=0), np.nan),
            np.where(matched, np.mean(deviations, axis=0), np.nan),
        )


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of the columns of two arrays (t, u); NaN for constant columns of `b`."""
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    constant_prediction = np.linalg.norm(a, axis=0) <= 1e-12
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = (a * b).sum(0) / norm
    varies = np.linalg.norm(b, axis=0) > 0
    return np.where(varies, np.where(constant_prediction, 0.0, correlation), np.nan)
