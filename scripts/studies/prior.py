"""Study 6: how much of a visualization comes from the image it starts from, how much from the unit?"""

from pathlib import Path

import numpy as np
import pandas as pd
from page import Report, compared, medians, sheet
from PIL import Image

from pipeline.data import datasets
from pipeline.data.config import DataConfig
from pipeline.data.image_loading import load_images as photographs
from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model
from pipeline.store.reader import open_atlas

STARTS = Path("runs/study-prior-starts")
COUNT = 6
KINDS = ("free", "pulled")
COARSE = 16


def prepare() -> None:
    """Write six whole images, far apart in the dataset list, into the folder that the presets name."""
    dataset = datasets.list_dataset(DataConfig())
    recipe = load_model(ModelConfig("package", "efficientnet_lite0")).preprocessing
    sources = np.asarray(dataset.sources if dataset.sources is not None else np.arange(len(dataset.images)))
    firsts = [int(np.flatnonzero(sources == source)[0]) for source in np.unique(sources)]
    chosen = [firsts[i] for i in np.linspace(0, len(firsts) - 1, COUNT).astype(int)]
    STARTS.mkdir(parents=True, exist_ok=True)
    for i, item in enumerate(sorted(photographs(dataset, chosen, recipe), key=lambda item: item.index)):
        assert item.array is not None
        Image.fromarray(item.array.transpose(1, 2, 0)).save(STARTS / f"{i}.png")


def components(values: np.ndarray) -> tuple[float, float, float]:
    """Return the shares of variance due to unit, start, and their interaction, (3,); they sum to 1.

    Two-way analysis of variance without replication, random effects, summed over the F values: with mean squares M,
    σ²_unit = (M_unit − M_rest) / S, σ²_start = (M_start − M_rest) / U, σ²_rest = M_rest; negative values count as 0.
    Source: Searle, Casella & McCulloch, "Variance Components", 1992, chapter 4.

    Args:
        values: Values for U units and S starts, (U, S, F).
    """
    units, starts, _ = values.shape
    mean = values.mean((0, 1))
    by_unit, by_start = values.mean(1) - mean, values.mean(0) - mean
    rest = values - mean - by_unit[:, None] - by_start[None]
    m_unit = starts * (by_unit**2).sum() / (units - 1)
    m_start = units * (by_start**2).sum() / (starts - 1)
    m_rest = (rest**2).sum() / ((units - 1) * (starts - 1))
    parts = np.array([max(0.0, (m_unit - m_rest) / starts), max(0.0, (m_start - m_rest) / units), m_rest])
    unit, start, both = parts / max(parts.sum(), 1e-30)
    return float(unit), float(start), float(both)


def errors(values: np.ndarray) -> np.ndarray:
    """Return standard errors of `components`, (3,), by the jackknife over units: √((n − 1) / n Σ (θ₋ᵢ − mean θ₋ᵢ)²).

    The bootstrap would draw a unit twice, and two equal rows count as variance of the start. Source: Efron & Stein
    1981, "The jackknife estimate of variance".
    """
    count = len(values)
    without = np.array([components(np.delete(values, i, 0)) for i in range(count)])
    return np.sqrt((count - 1) / count * ((without - without.mean(0)) ** 2).sum(0))


def coarse(image: np.ndarray) -> np.ndarray:
    """Return the coarse layout of an image (H, W, 3) uint8: 16 × 16 colors in [0, 1], flattened."""
    small = Image.fromarray(image).resize((COARSE, COARSE), Image.Resampling.BOX)
    return np.asarray(small, np.float64).ravel() / 255


def report(run: Path) -> Report:
    """Return the shares of variance of the images and of the layer's activations, by layer."""
    tables = []
    rows = []
    with open_atlas(run) as atlas:
        for layer in atlas:
            for kind in KINDS:
                names = [f"{kind}{i}" for i in range(COUNT)]
                pictures = [layer.images(name)[:, 0] for name in names]
                looks = np.stack([[coarse(image) for image in images] for images in pictures], 1)
                answers = np.stack([layer.image_activations(name)[:, 0].astype(np.float64) for name in names], 1)
                spread = answers.std((0, 1))
                answers = answers[..., spread > 0] / spread[spread > 0]
                row = {"layer": layer.name, "start": kind}
                for what, values in (("colours", looks), ("answers", answers)):
                    shares = zip(("unit", "start", "rest"), components(values), errors(values), strict=True)
                    row |= {f"{what}: {part}": f"{share:.2f} ± {error:.2f}" for part, share, error in shares}
                tables.append(row)
                rows.append((f"{layer.name}:{layer.channels[0]}" if kind == "free" else "  pulled", [
                    images[0] for images in pictures
                ]))  # fmt: skip
        units = sum(len(layer.channels) for layer in atlas)
    starts = [np.asarray(Image.open(STARTS / f"{i}.png").convert("RGB")) for i in range(COUNT)]
    figure = sheet([f"start {i + 1}" for i in range(COUNT)], [("photograph", starts), *rows])
    measures = ("peak_ratio", "robust_share", "high_frequency", "transfer")
    title = (
        f"Shares of the variance over {units} units × {COUNT} photographs, ± standard errors (jackknife over units):"
    )
    return Report(
        {title: pd.DataFrame(tables), "Each start, medians over units:": medians(compared(run), measures)}, figure
    )
