"""Study 3: blur the gradient or blur the image, with and without a schedule."""

from pathlib import Path

from page import Report, contest

MEASURES = {
    "gain": 2, "robust_gain": 2, "high_frequency": 3, "checkerboard": 1, "total_variation": 3, "spectral_distance": 3,
    "transfer": 2,
}  # fmt: skip
JUDGED = {"robust_gain": 2, "high_frequency": 3, "spectral_distance": 3, "transfer": 2}


def report(run: Path) -> Report:
    """Return the medians of the five presets, and each against the scheduled blur of the gradient."""
    return contest(run, "gradient_schedule", MEASURES, JUDGED)
