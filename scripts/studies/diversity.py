"""Study 4: a diversity term against random starts only: how many facets, at what cost?"""

from pathlib import Path

import numpy as np
import pandas as pd
from page import Report, compared, medians, pairs, sheet, told

from pipeline.compare.statistics import median, paired_test
from pipeline.store.reader import open_atlas

MEASURES = ("peak_ratio", "robust_share", "depth_agreement", "high_frequency", "seconds")


def facets(responses: np.ndarray) -> np.ndarray:
    """Return the effective number of different visualizations of each unit, (G,), from 1 to V.

    exp(−Σ λ log λ) over the eigenvalues λ of K / V, where K are the cosines between the layer's activations for the V
    visualizations of a unit after subtracting the mean over all visualizations: 1 if all are equal, V if all are
    orthogonal. Negative cosines are not clipped. Source: Friedman & Dieng 2023, "The Vendi Score".

    Args:
        responses: Activations of a layer for V visualizations of each unit, (G, V, C).
    """
    centred = responses - responses.reshape(-1, responses.shape[-1]).mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)
    shares = np.linalg.eigvalsh(unit @ unit.transpose(0, 2, 1) / responses.shape[1]).clip(0)
    logs = np.log(np.where(shares > 0, shares, 1))
    return np.exp(-(shares * logs).sum(-1))


def report(run: Path) -> Report:
    """Return facets by preset and layer, their cost, and four visualizations of a unit under each preset.

    Facets are counted by the activations at a depth before the layer of the unit: the term lowers the cosines in the
    layer itself, whatever the images show. Layers without such a depth are left out.
    """
    found = compared(run)
    presets = [contender.preset for contender in found.contenders]
    counted: dict[str, list[np.ndarray]] = {preset: [] for preset in presets}
    rows = []
    with open_atlas(run) as atlas:
        names = []
        for layer in atlas:
            if not layer.depth_activations(presets[0])[0]:
                continue
            names.append(layer.name)
            for preset in presets:
                counted[preset].append(facets(layer.depth_activations(preset)[1].astype(np.float64)))
            pictures = [layer.images(preset)[0] for preset in presets]
            rows += [(f"{layer.name}:{layer.channels[0]}", list(pictures[0])), ("", list(pictures[-1]))]
    lines = []
    first = np.concatenate(counted[presets[0]])
    for preset in presets:
        own = np.concatenate(counted[preset])
        line = {"preset": f"`{preset}`", "facets": told(median(own))}
        if preset != presets[0]:
            against = paired_test(own, first)
            line["more facets than starts"] = f"{against.wins} of {len(own)} units, p = {against.p:.2g}"
        else:
            line["more facets than starts"] = ""
        lines.append(line | {name: f"{np.median(part):.2f}" for name, part in zip(names, counted[preset], strict=True)})
    pictures = len(rows[0][1])
    figure = sheet(
        [f"start {i + 1}" for i in range(pictures)], [(name or f"  {presets[-1]}", images) for name, images in rows]
    )
    measures = ("peak_ratio", "robust_share", "depth_agreement")
    return Report(
        {
            f"Effective number of different pictures among {pictures}, medians over {len(first)} units, with 95 % "
            "intervals, and by layer, by activations before that layer:": pd.DataFrame(lines),
            "What it costs, medians over units of a unit's median picture:": medians(found, MEASURES),
            f"Difference to `{presets[0]}` over the same units, and on how many each was better:": pairs(
                found, presets[0], measures
            ),
        },
        figure,
    )
