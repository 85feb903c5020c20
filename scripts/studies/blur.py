"""Study 3: blur the gradient or blur the image, with and without a schedule."""

from pathlib import Path

from page import Report, contest

MEASURES = (
    "peak_ratio", "robust_share", "high_frequency", "checkerboard", "total_variation", "spectral_distance",
    "transfer",
)  # fmt: skip
JUDGED = ("robust_share", "high_frequency", "spectral_distance", "transfer")


def report(run: Path) -> Report:
    """Return the medians of the five presets, and each against the scheduled blur of the gradient."""
    return contest(run, "gradient_schedule", MEASURES, JUDGED)
