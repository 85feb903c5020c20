"""Class visualizations in another classifier: rank and probability of the class."""

import numpy as np


def recognize(logits: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rank and probability of the class of each image.

    The rank is 1 + the number of classes with a higher logit; by chance it is (K + 1) / 2 on average. The probability
    is that of the softmax. Fel et al. 2023 ("Unlocking Feature Visualization for Deeper Networks with MAgnitude
    Constrained Optimization", section 4) call the recognition of visualizations by other networks transferability.

    Args:
        logits: (B, K) logits of the other network.
        classes: (B,) class of each image.

    Returns:
        The ranks (B,), 1 … K, and the probabilities (B,), 0 … 1; float32. NaN for an image with a logit that is not
        finite.
    """
    logits = np.asarray(logits, np.float64)
    own = logits[np.arange(len(logits)), classes][:, None]
    rank = 1.0 + (logits > own).sum(1)
    finite = np.isfinite(logits).all(1)
    with np.errstate(invalid="ignore", over="ignore"):
        probability = 1 / np.exp(logits - own).sum(1)
    rank[~finite] = np.nan
    probability[~finite] = np.nan
    return rank.astype(np.float32), probability.astype(np.float32)
