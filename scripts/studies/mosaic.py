"""Study 2: pixels or the Fourier canvas, with and without transforms: which removes high-frequency patterns?"""

from pathlib import Path

from page import Report, contest

MEASURES = {"gain": 2, "robust_gain": 2, "high_frequency": 3, "checkerboard": 1, "spectral_distance": 3, "transfer": 2}
JUDGED = {"high_frequency": 3, "checkerboard": 1, "robust_gain": 2, "transfer": 2}


def report(run: Path) -> Report:
    """Return all four combinations, and each against pixels without transforms."""
    return contest(run, "naive", MEASURES, JUDGED)
