"""Study 4: a diversity term against plain random starts: how many facets, at what cost?"""

from pathlib import Path

import numpy as np
import pandas as pd
from page import Report, compared, medians, pairs, sheet, told

from pipeline.compare.statistics import duel, median
from pipeline.store.reader import open_atlas

MEASURES = {"gain": 2, "robust_gain": 2, "agreement": 2, "high_frequency": 3, "seconds": 1}


def facets(responses: np.ndarray) -> np.ndarray:
    """(G, V, C) answers of a layer to V pictures of each unit → (G,) effective number of different ones, 1 … V.

    exp(−Σ λ log λ) over the eigenvalues λ of K / V, K the cosines between a unit's answers without the mean answer to
    all pictures: 1 where all are the same, V where none has anything to do with another. Source: Friedman & Dieng 2023,
    "The Vendi Score". Negative cosines count as they are.
    """
    centred = responses - responses.reshape(-1, responses.shape[-1]).mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)
    shares = np.linalg.eigvalsh(unit @ unit.transpose(0, 2, 1) / responses.shape[1]).clip(0)
    logs = np.log(np.where(shares > 0, shares, 1))
    return np.exp(-(shares * logs).sum(-1))


def report(run: Path) -> Report:
    """Facets by preset and layer, what they cost, and four pictures of a unit by each preset."""
    found = compared(run)
    presets = [contender.preset for contender in found.contenders]
    counted: dict[str, list[np.ndarray]] = {preset: [] for preset in presets}
    rows = []
    with open_atlas(run) as atlas:
        for layer in atlas:
            for preset in presets:
                answers = layer.picture_responses(preset)
                assert answers is not None, "this atlas was made before answers to pictures were kept"
                counted[preset].append(facets(answers.astype(np.float64)))
            pictures = [layer.pictures(preset)[0] for preset in presets]
            rows += [(f"{layer.name}:{layer.channels[0]}", list(pictures[0])), ("", list(pictures[-1]))]
        names = list(atlas.layers)
    lines = []
    first = np.concatenate(counted[presets[0]])
    for preset in presets:
        own = np.concatenate(counted[preset])
        line = {"preset": f"`{preset}`", "facets": told(median(own))}
        if preset != presets[0]:
            against = duel(own, first)
            line["more facets than starts"] = f"{against.wins} of {len(own)} units, p = {against.p:.2g}"
        else:
            line["more facets than starts"] = ""
        lines.append(line | {name: f"{np.median(part):.2f}" for name, part in zip(names, counted[preset], strict=True)})
    pictures = len(rows[0][1])
    figure = sheet(
        [f"start {i + 1}" for i in range(pictures)], [(name or f"  {presets[-1]}", images) for name, images in rows]
    )
    measures = {"gain": 2, "robust_gain": 2, "agreement": 2}
    return Report(
        {
            f"Effective number of different pictures among {pictures}, medians over {len(first)} units, with 95 % "
            "intervals, and by layer:": pd.DataFrame(lines),
            "What it costs, medians over units of a unit's median picture:": medians(found, MEASURES),
            f"Difference to `{presets[0]}` over the same units, and on how many each was better:": pairs(
                found, presets[0], measures
            ),
        },
        figure,
    )
