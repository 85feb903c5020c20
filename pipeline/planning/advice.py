"""Advice of the plan on the choice of layers: those whose channels are no more than arbitrary directions."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.config.schema import Config
from pipeline.core.errors import AtlasError
from pipeline.layers.finding import Layer
from pipeline.store.reader import open_atlas

# Layers that a message names; the rest is counted.
MAX_NAMED = 3


def linear_output_advice(
    config: Config, layers: Sequence[Layer], class_layers: Collection[str], rotation_numbers: Mapping[str, float]
) -> str:
    """Return advice on layers with a linear output, for which zero is arbitrary; "" if there are none.

    Layers of logits and layers that are linear in the pixels are linear too, but their channels have a meaning:
    classes, and kernels.

    Args:
        config: The configuration of the run.
        layers: The layers of the plan.
        class_layers: Names of those that hold logits.
        rotation_numbers: Known rotation numbers, by layer; see `known_rotation_numbers`.
    """
    linear = [
        layer
        for layer in layers
        if layer.of_channels and not (layer.rectified or layer.linear_in_pixels or layer.name in class_layers)
        if layer.channels > 1
    ]
    if not linear:
        return ""
    names = ", ".join(layer.name for layer in linear[:MAX_NAMED])
    more = f" and {len(linear) - MAX_NAMED} more" if linear[MAX_NAMED:] else ""
    share = (
        "All layers of this plan are" if len(linear) == len(layers) else f"{len(linear)} of {len(layers)} layers are"
    )
    known = [rotation_numbers[layer.name] for layer in linear if layer.name in rotation_numbers]
    measured = f" Their median rotation number is {100 * float(np.median(known)):.0f} % (chance 5 %)." if known else ""
    fixes = ["layers=tour selects the layers inside of blocks whose channels are units"]
    if not any(preset.negative for preset in config.presets):
        fixes.insert(0, "also=[negative] adds the other end of each direction")
    return (
        f"{share} linear outputs ({names}{more}): no rectifier follows, so that their channels need be no more special "
        f"than other directions, and zero is arbitrary.{measured} {'; '.join(fixes)}."
    )


def known_rotation_numbers(folders: Sequence[Path], weights: str) -> dict[str, float]:
    """Return the rotation numbers that atlases of a network have stored, by layer.

    Args:
        folders: Folders of runs; the first that knows a layer counts.
        weights: Digest of the network's weights; atlases of other networks are ignored.
    """
    known: dict[str, float] = {}
    for folder in folders:
        try:
            with open_atlas(folder) as atlas:
                if atlas.attributes.get("weights_sha256") == weights:
                    found = {layer.name: layer.rotation_number for layer in atlas}
                    known = {name: number for name, number in found.items() if not np.isnan(number)} | known
        except (AtlasError, OSError):
            continue  # no atlas yet: advice is given without numbers
    return known
