"""Effects of units in `atlas.h5`: what the writer stores, and what the reader returns."""

import dataclasses
from collections.abc import Mapping

import h5py
import numpy as np
import pandas as pd

from pipeline.core.errors import AtlasError
from pipeline.effects.results import REPLACEMENTS, EffectsResult, LayerEffects, RelevantImages
from pipeline.store import hdf5
from pipeline.store.hdf5 import write_array, write_jpegs
from pipeline.store.shards import safe_name

# Two-sided 95 % quantile of the normal distribution.
INTERVAL = 1.959964


def write_effects(file: h5py.File, effects: EffectsResult) -> None:
    """Write the effects into the groups of their layers, whose channels are written already."""
    file.create_group("effects").attrs["outputs"] = effects.outputs
    if effects.device:
        file["effects"].attrs["device"] = effects.device
    write_array(file, "effects/index", effects.index)
    write_array(file, "effects/top", effects.top)
    for number, (name, layer) in enumerate(effects.layers.items()):
        group = hdf5.group(file, f"layers/{safe_name(name)}")
        own = layer.attribution[hdf5.read_array(group, "channels")]
        write_array(group, "effects/attribution", own)
        write_array(group, "effects/mean", own.mean(1, dtype=np.float64).astype(np.float32))
        write_array(group, "effects/size", np.abs(own).mean(1, dtype=np.float64).astype(np.float32))
        if len(layer.ablated) and len(effects.index):
            _write_ablations(group, layer)
        if name in effects.relevant:
            for field in dataclasses.fields(RelevantImages):
                array = getattr(effects.relevant[name], field.name)
                if array is not None:
                    write_array(group, f"examples/relevant/{field.name}", array)
            if effects.crops is not None:
                pieces = effects.crops.pieces(f"{number}/jpeg")
                write_jpegs(hdf5.group(group, "examples/relevant"), effects.crops[f"{number}/offset"], pieces)


def _write_ablations(group: h5py.Group, layer: LayerEffects) -> None:
    write_array(group, "effects/ablation/channel", layer.ablated)
    for replacement in REPLACEMENTS:
        write_array(group, f"effects/ablation/{replacement}/top", layer.top[replacement])
        write_array(group, f"effects/ablation/{replacement}/mean", layer.mean[replacement])
        write_array(group, f"effects/ablation/{replacement}/sd", layer.deviation[replacement])
    group["effects"].attrs["rank_correlation"] = rank_correlation(layer.attribution[layer.ablated], layer.top["mean"])


def rank_correlation(attribution: np.ndarray, ablation: np.ndarray) -> float:
    """Return Spearman's rank correlation of attributions and exact effects over all pairs of unit and image.

    NaN if one of them is constant, or undefined for an image.
    """
    pair = np.stack([attribution.ravel(), ablation.ravel()]).astype(np.float64)
    if not np.isfinite(pair).all() or (np.ptp(pair, axis=1) == 0).any():
        return float("nan")
    from scipy.stats import rankdata  # takes a second to load, for which the processes that write a site don't wait

    return float(np.corrcoef(rankdata(pair, axis=1))[0, 1])


def half_interval(deviation: np.ndarray, images: int) -> np.ndarray:
    """Return half the length of the 95 % interval of a mean, from the standard deviation over so many images."""
    return INTERVAL * deviation / np.sqrt(max(1, images))


@dataclasses.dataclass(frozen=True)
class UnitEffects:
    """Effects of the units of a layer on the outputs of the network, over n dataset images.

    The effect on an output is the output minus the output without the unit: positive if the unit raises it.

    Attributes:
        channels: Channels of the units, (C',).
        attribution: Attribution to the largest output of each image, (C', n) float32: the sum over positions of
            gradient × (activation − mean over the dataset).
        mean: Mean of `attribution` over the images, (C',) float32.
        size: Mean of its absolute values, (C',) float32.
        ablated: Channels of the U units whose effects are also measured by ablation, (U,).
        ablations: For each replacement of the unit's map, "zero" and "mean" (over the dataset): effects on the largest
            output of each image `top` (U, n), and on all K outputs the mean over images `mean` and standard deviation
            `sd`, (U, K).
        rank_correlation: Spearman's rank correlation of `attribution` with the ablation to the mean, over all pairs of
            an ablated unit and an image; NaN if there is none.
    """

    channels: np.ndarray
    attribution: np.ndarray
    mean: np.ndarray
    size: np.ndarray
    ablated: np.ndarray
    ablations: Mapping[str, Mapping[str, np.ndarray]]
    rank_correlation: float

    def on_outputs(self, channel: int, replacement: str = "mean") -> pd.DataFrame:
        """Return the mean effects of an ablated unit on all outputs, largest first, with 95 % intervals over images.

        Returns:
            The columns output, effect, low and high.

        Raises:
            AtlasError: If the unit was not ablated.
        """
        rows = np.flatnonzero(self.ablated == channel)
        if not len(rows) or replacement not in self.ablations:
            known = ", ".join(map(str, self.ablated.tolist())) or "none"
            raise AtlasError(f"Channel {channel} was not ablated (ablated: {known}); see effects.ablated.")
        arrays = self.ablations[replacement]
        effect, sd = arrays["mean"][rows[0]], arrays["sd"][rows[0]]
        half = half_interval(sd, arrays["top"].shape[1])
        table = pd.DataFrame(
            {"output": np.arange(len(effect)), "effect": effect, "low": effect - half, "high": effect + half}
        )
        return table.sort_values("effect", ascending=False, kind="stable", ignore_index=True)


def read_effects(group: h5py.Group, channels: np.ndarray) -> UnitEffects | None:
    """Return the effects in the group of a layer; None if there are none."""
    if "effects" not in group:
        return None
    arrays = hdf5.group(group, "effects")

    def read(name: str) -> np.ndarray:
        return hdf5.read_array(arrays, name)

    ablations = {}
    if "ablation" in arrays:
        ablations = {
            one: {name: read(f"ablation/{one}/{name}") for name in ("top", "mean", "sd")} for one in REPLACEMENTS
        }
    return UnitEffects(
        channels=channels,
        attribution=read("attribution"),
        mean=read("mean"),
        size=read("size"),
        ablated=read("ablation/channel") if "ablation" in arrays else np.zeros(0, np.int32),
        ablations=ablations,
        rank_correlation=float(arrays.attrs.get("rank_correlation", np.nan)),
    )
