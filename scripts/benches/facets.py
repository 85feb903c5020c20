"""Check facets on units whose parts are known, and draw a contact sheet of units with several.

scripts/bench facets [--model NAME] [--root ../shared/photos] [--images 1000] [--cases 20] [--cache FILE.npz]
scripts/bench facets --run runs/NAME --layer NAME --out FOLDER

The first: spatial means of the last layer before the logits, the logits and a late layer for all photographs (kept in
--cache). Made units are sums of two standardized logits, or of two channels of the late layer, of different classes:
their correlation over the photographs is below −0.2 for logits and below 0 for channels, which are of the tenth with
the highest scores. Both parts count as found if in one facet the one is larger in at least 70 % of the images, and in
another facet in at most 30 %. Sums are also taken behind a rectifier, as a later layer gets them. Beside them, single
classes and single channels: how many have one facet, and the scores.

The second: the six units of a layer with the most facets, a row for each facet, its image and its nearest examples.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from effects import ROOT, load
from PIL import Image

from pipeline.acceleration.batchnorm_folding import foldable_pairs
from pipeline.acceleration.variants import verified_fold
from pipeline.data import image_loading
from pipeline.data.config import DataConfig
from pipeline.data.datasets import list_dataset
from pipeline.effects.measurement import full_batch, grouped
from pipeline.facets import clustering
from pipeline.facets.clustering import Reference
from pipeline.facets.config import FacetsConfig
from pipeline.facets.request import embedding_of
from pipeline.facets.responses import pooled
from pipeline.layers.finding import capture
from pipeline.layers.selection import LayersConfig, list_layers, logit_layers
from pipeline.store.reader import open_atlas

LATE = "blocks.5.3.conv_dw"
BATCH = 16
# A facet is of a part if it has so large a share of images in which that part is larger than the other.
CLEAR = 0.7


def measured(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return the spatial means of the embedding, the logits and the late layer for all photographs, (n, channels)."""
    if options.cache and Path(options.cache).is_file():
        with np.load(options.cache) as kept:
            return dict(kept)
    model = load(options.model)
    candidates = list_layers(model, LayersConfig(), None)
    logits = logit_layers(model, candidates)
    late = next(layer for layer in candidates if layer.name == options.layer)
    layers = {"embedding": embedding_of(FacetsConfig(), late, candidates, logits), "logits": logits[-1], "late": late}
    network = verified_fold(model, foldable_pairs(model), list(layers.values()))
    dataset = list_dataset(DataConfig("folder", options.root, options.images))
    found: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    loaded = image_loading.load_images(dataset, range(len(dataset.images)), model.preprocessing)
    with torch.no_grad(), capture(network, list(layers.values())) as run:
        for items in grouped(loaded, BATCH):
            arrays = [item.array for item in items if item.array is not None]
            maps = run(full_batch(arrays, BATCH, network.device))
            for name, layer in layers.items():
                rectified = layer.rectified if name == "embedding" else False
                found[name].append(pooled(maps[layer.name][: len(arrays)], rectified).numpy())
    result = {name: np.concatenate(parts) for name, parts in found.items()}
    if options.cache:
        np.savez(options.cache, **result)  # type: ignore[arg-type]
    return result


def standardized(values: np.ndarray) -> np.ndarray:
    """Return standard scores of each channel, without the channels that hardly vary."""
    deviation = values.std(0)
    return ((values - values.mean(0)) / np.maximum(deviation, 1e-9))[:, deviation > 1e-3 * deviation.max()]


class Judge:
    """Facets and scores of units that are given by their values for all photographs.

    Args:
        embedding: Responses of the embedding, (n, D).
        config: The settings of facets.
    """

    def __init__(self, embedding: np.ndarray, config: FacetsConfig) -> None:
        self._reference = Reference.of(embedding, len(embedding))
        self._count, self._level = config.count(len(embedding)), config.level

    def facets(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the examples of a unit with values (n,), the facet of each, and the score of the unit."""
        top = np.argsort(-values, kind="stable")[: self._count]
        directions = self._reference.directions[top]
        found = clustering.find_facets(directions, self._reference, self._level)
        return top, found, clustering.monosemanticity(directions, self._reference)[1]


def made_units(
    scores: np.ndarray, judge: Judge, draw: Callable[[], tuple[int, int]], cases: int, rectified: bool
) -> dict[str, float]:
    """Return in how many made units both parts are found, and how their scores compare with those of their parts."""
    found, several, lower = 0, 0, 0
    for _ in range(cases):
        first, second = draw()
        parts = scores[:, [first, second]]
        top, facets, score = judge.facets((parts.clip(0) if rectified else parts).sum(1))
        larger = parts[top, 0] > parts[top, 1]
        shares = [larger[facets == number].mean() for number in range(facets.max() + 1)]
        found += int(max(shares) >= CLEAR and min(shares) <= 1 - CLEAR)
        several += int(len(shares) > 1)
        lower += int(score < np.mean([judge.facets(parts[:, i])[2] for i in range(2)]))
    return {
        "units": cases,
        "both parts found": found,
        "several facets": several,
        "score below that of the parts": lower,
    }


def single_units(scores: np.ndarray, judge: Judge, chosen: np.ndarray) -> dict[str, float]:
    """Return how many single units have one facet, and the median and quartiles of their scores."""
    results = [judge.facets(scores[:, number]) for number in chosen]
    quartiles = np.nanpercentile([score for _, _, score in results], [25, 50, 75])
    return {
        "units": len(chosen),
        "one facet": sum(int(facets.max()) == 0 for _, facets, _ in results),
        **{f"score, {name}": round(float(q), 2) for name, q in zip(("25 %", "median", "75 %"), quartiles, strict=True)},
    }


def _pair(rng: np.random.Generator, pool: np.ndarray, correlation: np.ndarray, limit: float) -> tuple[int, int]:
    """Draw two of the channels `pool` whose correlation is below a limit."""
    while True:
        first, second = map(int, rng.choice(pool, 2, replace=False))
        if correlation[first, second] < limit:
            return first, second


def check(options: argparse.Namespace) -> None:
    values = measured(options)
    judge = Judge(values["embedding"], FacetsConfig())
    rng = np.random.default_rng(options.seed)
    for name, limit in (("logits", -0.2), ("late", 0.0)):
        scores = standardized(values[name])
        correlation = np.corrcoef(scores.T)
        # Of channels, the half with the clearer meaning: parts must be known to be found.
        clear = np.array([judge.facets(scores[:, i])[2] for i in range(scores.shape[1])]) if name == "late" else None
        pool = np.arange(scores.shape[1]) if clear is None else np.argsort(-clear)[: scores.shape[1] // 10]

        def draw(
            pool: np.ndarray = pool, correlation: np.ndarray = correlation, limit: float = limit
        ) -> tuple[int, int]:
            while True:
                first, second = map(int, rng.choice(pool, 2, replace=False))
                if correlation[first, second] < limit:
                    return first, second

        print(name, "single:", single_units(scores, judge, rng.choice(scores.shape[1], 100, replace=False)), flush=True)
        for rectified in (True, False):
            kind = "rectified sums" if rectified else "sums"
            print(name, f"{kind}:", made_units(scores, judge, draw, options.cases, rectified), flush=True)


def contact_sheet(run: Path, layer: str, out: Path, side: int = 128) -> None:
    """Write FOLDER/facets.png: the six units with the most facets, each facet a row."""
    with open_atlas(run) as atlas:
        found = atlas[layer].facets()
    assert found is not None and found.thumbnails is not None, f"{layer} has no facets with examples"
    channels = found.channel[np.argsort(-found.count, kind="stable")[:6]].tolist()
    rows = []
    for channel in channels:
        for row in found.of_unit(channel).tolist():
            cells = [found.images[row], *found.thumbnails[row]]
            rows.append(np.concatenate([np.array(Image.fromarray(cell).resize((side, side))) for cell in cells], 1))
            size, apart, cosine = int(found.size[row]), float(found.separation[row]), float(found.cosine[row])
            print(f"{layer}:{channel} facet of {size}, separation {apart:.2f}, cosine {cosine:.2f}")
        rows.append(np.full((8, rows[-1].shape[1], 3), 255, np.uint8))
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(out / "facets.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--root", default=str(ROOT.parent / "shared" / "photos"))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", default="")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--layer", default=LATE)
    parser.add_argument("--out", type=Path, default=Path("runs/facets"))
    options = parser.parse_args()
    if options.run:
        contact_sheet(options.run, options.layer, options.out)
    else:
        check(options)


if __name__ == "__main__":
    main()
