"""What ridge regressions in closed form share: standardized features and the eigenbasis of their kernel."""

import numpy as np

# Ridge penalties, in units of the mean eigenvalue of the kernel: half a decade apart.
PENALTIES = 10.0 ** np.arange(-4, 3.01, 0.5)


def feature_scale(features: np.ndarray, weights: np.ndarray | float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of each column of (n, p) features, and weight ÷ standard deviation; 0 for constant columns."""
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    constant = deviation <= 1e-6 * np.maximum(1e-12, np.abs(mean))
    return mean, np.where(constant, 0.0, weights / np.where(constant, 1.0, deviation))


class KernelBasis:
    """Eigenvectors of the linear kernel of (n, p) standardized features.

    Attributes:
        values: (n,) eigenvalues, at least 0.
        vectors: (n, n) eigenvectors, as columns.
        unit: Mean eigenvalue, in which `PENALTIES` are measured.
    """

    def __init__(self, standardized: np.ndarray) -> None:
        values, self.vectors = np.linalg.eigh(standardized @ standardized.T)
        self.values = np.maximum(values, 0.0)
        self.unit = max(float(self.values.mean()), 1e-12)
