"""Shares of the variance of images and of the layer's activations that unit and initial photograph have."""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.store.reader import open_atlas
from study_measures.vendi import coarse

KINDS = ("free", "pulled")


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


def values(run: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each layer and kind of start, with the shares of variance; the row counts as one unit."""
    rows = []
    with open_atlas(run) as atlas:
        for layer in atlas:
            for kind in KINDS:
                names = [name for name in layer.presets if name.startswith(kind)]
                looks = np.stack([coarse(layer.images(name)[:]).mean(1) for name in names], 1)
                answers = []
                for name in names:
                    activations = layer.image_activations(name)
                    assert activations is not None
                    answers.append(activations.astype(np.float64).mean(1))
                responses = np.stack(answers, 1)
                spread = responses.std((0, 1))
                row: dict[str, object] = {"layer": layer.name, "channel": 0, "preset": kind, "variant": 0}
                for what, some in (("colors", looks), ("activations", responses[..., spread > 0] / spread[spread > 0])):
                    unit, start, rest = components(some)
                    row |= {f"{what}_unit": unit, f"{what}_start": start, f"{what}_rest": rest}
                    row[f"{what}_start_minus_unit"] = start - unit
                own = frame[(frame["layer"] == layer.name) & frame["preset"].isin(names)]
                row |= {name: own[name].median() for name in ("mean_ratio", "robust_share", "high_frequency")}
                rows.append(row)
    return pd.DataFrame(rows)
