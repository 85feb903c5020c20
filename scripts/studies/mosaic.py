"""Study 2: pixels or the Fourier canvas, with and without transforms: which removes high-frequency patterns?"""

from pathlib import Path

from page import Report, contest

MEASURES = ("peak_ratio", "robust_share", "high_frequency", "checkerboard", "spectral_distance", "transfer")
JUDGED = ("high_frequency", "checkerboard", "robust_share", "transfer")


def report(run: Path) -> Report:
    """Return all four combinations, and each against pixels without transforms."""
    return contest(run, "naive", MEASURES, JUDGED)
