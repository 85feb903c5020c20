"""Linear heads: layers that predict the logits of a network from the pooled output of one of its blocks.

A network with auxiliary classifiers has such layers. For any other they are fitted by ridge regression to the logits of
the network itself, on images without labels.
"""

import dataclasses
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.core.ridge import PENALTIES, KernelBasis, feature_scale
from pipeline.layers.finding import ArrayLayer, Layer

# Names of fitted heads: the prefix and the name of the layer that they read.
PREFIX = "head@"


@dataclasses.dataclass(frozen=True)
class HeadScores:
    """How well a head predicts the logits of images that it was not fitted to, by cross-validation.

    Attributes:
        images: Number of images.
        ridge: The penalty of least squared error on held-out images, one of `PENALTIES`.
        r2: Share of the variance of the centered logits that is predicted, over all classes; 0 for predicting the mean
            of the other images, which is chance.
        top1: Share of images whose largest predicted logit is that of the network's own largest logit.
        top5: Share of images with the network's own largest logit among the five largest predicted ones.
    """

    images: int
    ridge: float
    r2: float
    top1: float
    top5: float


@dataclasses.dataclass(frozen=True)
class HeadLayer(ArrayLayer):
    """A fitted head: a layer of K logits, a linear function of the spatial means of another layer's C channels.

    The fields of `Layer` state where the other layer is read; `channels` is K.

    Attributes:
        identity: Digest of what the head was fitted to; empty before that.
        weight: (C, K) float32.
        bias: (K,) float32.
        scores: Scores on held-out images; None before the head is fitted.
    """

    identity: str = ""
    weight: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32), compare=False)
    bias: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32), compare=False)
    scores: HeadScores | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def on(cls, layer: Layer, classes: int) -> "HeadLayer":
        """Return the head of a layer, before it is fitted to `classes` logits."""
        fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(Layer)}
        return cls(**{**fields, "name": PREFIX + layer.name, "channels": classes, "height": 1, "width": 1})

    @property
    def tap(self) -> list[Any]:
        """All attributes that determine the values of this layer, for digests."""
        return [*super().tap, self.identity]

    def maps(self, output: Tensor, batch: int, size: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """Return the predicted logits, (B, K, 1, 1) float32; see `Layer.maps`."""
        features = super().maps(output, batch, size).float().mean(dim=(2, 3))
        held = self._on(features.device)
        return (features @ held["weight"] + held["bias"])[:, :, None, None]

    @property
    def arrays(self) -> dict[str, np.ndarray | None]:
        """The arrays by name."""
        return {"weight": self.weight, "bias": self.bias}

    @property
    def source(self) -> Layer:
        """The layer that the head reads, under the name of the head."""
        return Layer(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Layer)})


def fit_head(features: np.ndarray, logits: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray, HeadScores]:
    """Fit a linear head by ridge regression in closed form, its penalty chosen by cross-validation.

    The logits of each image are centered on 0 (a common offset does not change a softmax), and those of each class and
    the features are centered and the latter standardized over the training images.

    Args:
        features: (n, C) inputs of the head.
        logits: (n, K) logits of the network.
        folds: (n,) number of the part of the images that each image belongs to; at least two different ones.

    Returns:
        Weight (C, K) and bias (K,) of the fit to all images, float32, and the scores of the fits without one part each.
    """
    features = np.asarray(features, np.float64)
    targets = np.asarray(logits, np.float64)
    targets = targets - targets.mean(axis=1, keepdims=True)
    errors, variance = np.zeros(len(PENALTIES)), 0.0
    predictions = np.zeros((len(PENALTIES), *targets.shape), np.float32)
    for fold in np.unique(folds):
        test = folds == fold
        fit = _Ridge(features[~test], targets[~test])
        variance += float(np.square(targets[test] - targets[~test].mean(axis=0)).sum())
        similarities = fit.similarities(features[test])
        for i, penalty in enumerate(PENALTIES):
            predicted = fit.predict(similarities, penalty)
            predictions[i, test] = predicted
            errors[i] += float(np.square(targets[test] - predicted).sum())
    best = int(np.argmin(errors))
    ranked, own = np.argsort(-predictions[best], axis=1), targets.argmax(axis=1)
    scores = HeadScores(
        images=len(features),
        ridge=float(PENALTIES[best]),
        r2=float(1 - errors[best] / max(variance, 1e-12)),
        top1=float((ranked[:, 0] == own).mean()),
        top5=float((ranked[:, :5] == own[:, None]).any(axis=1).mean()),
    )
    weight, bias = _Ridge(features, targets).line(float(PENALTIES[best]))
    return weight.astype(np.float32), bias.astype(np.float32), scores


class _Ridge:
    """Ridge regression of (n, K) targets on (n, C) standardized features, for any penalty."""

    def __init__(self, features: np.ndarray, targets: np.ndarray) -> None:
        self._center, self._scale = feature_scale(features)
        self._train = (features - self._center) * self._scale
        self._basis = KernelBasis(self._train)
        self._mean = targets.mean(axis=0)
        self._rotated = self._basis.vectors.T @ (targets - self._mean)

    def line(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Return weight (C, K) and bias (K,) in units of the given features."""
        weight = self._scale[:, None] * (self._train.T @ (self._basis.vectors @ self._shrunk(penalty)))
        return weight, self._mean - self._center @ weight

    def similarities(self, features: np.ndarray) -> np.ndarray:
        """Return products of (m, C) features with the eigenvectors of the kernel, (m, n)."""
        return (features - self._center) * self._scale @ self._train.T @ self._basis.vectors

    def predict(self, similarities: np.ndarray, penalty: float) -> np.ndarray:
        """Return predictions from `similarities`, (m, K): those of `line`, without computing the line."""
        return similarities @ self._shrunk(penalty) + self._mean

    def _shrunk(self, penalty: float) -> np.ndarray:
        return self._rotated / (self._basis.values + penalty * self._basis.unit)[:, None]
