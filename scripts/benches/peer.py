"""Compare Lucent 0.1.8 with this project: time, activation, robust activation, and what other networks see.

scripts/bench peer [--units 2] [--classes 10] [--render distill,fast] [--steps 512] [--judges NAMES] [--out runs/peer]

The same units of five layers of the default network, and some of its classes, on the same cores, alternating: for each
layer first this project, then Lucent's channels one by one, then this project again. Lucent renders one channel at a
time at the network's input size with its own transforms and optimizer, in one process with all cores. This project
renders as in a run: a batch of 8 channels in each of the processes of `engine.workers=auto`, the first channels being
Lucent's. The time of a channel is the wall time of the slowest process divided by the number of channels rendered.
Loading and folding the network, which a run does once per layer, is not counted for either.

Both images are saved in 8 bits and measured in the same way, on the network as loaded: the channel's mean over the map,
on the image and as the mean over 16 randomly transformed copies. Judges are networks that took no part: the rank of the
class for classes, and for other units the place of the image among dataset images along the matching direction
(docs/judges.md); the dataset images, whose statistics images of classes have, are the sample images or those of
--photographs. Lucent is installed separately, into --home; it needs two functions that kornia has moved, which are
restored.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from gpu_blocks.lucent import restore_moved_functions
from peer_judges import Made, dataset_values, seen
from PIL import Image, ImageDraw
from render import config_of, say

from pipeline.acceleration.batchnorm_folding import fold
from pipeline.config.schema import Config
from pipeline.core.seeds import seed_of
from pipeline.data.config import DataConfig
from pipeline.data.datasets import list_dataset
from pipeline.engine.resources import local_resources, size_pool
from pipeline.engine.worker import Worker
from pipeline.images.transforms import ROBUSTNESS_TRANSFORMS, apply_transforms, draw_random
from pipeline.judges.judge import load_judge
from pipeline.kernels.allocator import retain_freed_memory
from pipeline.layers.finding import Layer, capture
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.layers.selection import LayersConfig, list_layers, logit_layers
from pipeline.models.loading import Model, load_model
from pipeline.runs.layer_worker import layer_worker
from pipeline.visualization.evaluation import Visualization
from pipeline.visualization.preset import Preset, Size

# Convolutions whose activation function is in the normalization behind them: both render the same tensor.
LAYERS = ("blocks.1.0.conv_pw", "blocks.3.0.conv_pw", "blocks.4.2.conv_pw", "blocks.5.3.conv_pw", "conv_head")
COPIES = 16
MODEL = "efficientnet_lite0"
JUDGES = ("efficientnet_lite1", "efficientnet_lite2")
PACKAGES = (
    ("--no-deps", "torch-lucent==0.1.8", "kornia==0.9.0", "kornia_rs"),
    ("decorator", "ipython", "scikit-learn", "tqdm"),
)


# ------------------------------------------------------------------------------------------------------------ Lucent


def install(home: Path) -> None:
    """Install Lucent and its dependencies other than PyTorch into a separate folder, once."""
    if (home / "lucent").is_dir():
        return
    for packages in PACKAGES:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(home), *packages]
        subprocess.run(command, check=True)


class Lucent:
    """Lucent's `render_vis`, called as in its README, on the same network."""

    def __init__(self, home: Path, model: Model, threads: int) -> None:
        torch.set_num_threads(threads)
        sys.path.append(str(home))
        restore_moved_functions()
        self.optvis: Any = importlib.import_module("lucent.optvis.render")
        self.param: Any = importlib.import_module("lucent.optvis.param")
        self.transform: Any = importlib.import_module("lucent.optvis.transform")
        self.model = model
        recipe = model.preprocessing
        mean, sd = (torch.tensor(v).view(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
        self.transforms = [*self.transform.standard_transforms, lambda image: (image - mean) / sd]
        self.side = recipe.size[0]

    def picture(self, layer: str, channel: int, steps: int) -> tuple[np.ndarray, float]:
        """Return the image (H, W, 3) uint8, and the seconds that it took."""
        torch.manual_seed(0)
        np.random.seed(0)  # its transforms use this generator
        hooks = [(m, dict(m._forward_hooks)) for m in self.model.module.modules()]
        began = time.perf_counter()
        images = self.optvis.render_vis(
            self.model.module, f"{layer.replace('.', '_')}:{channel}", lambda: self.param.image(self.side),
            transforms=self.transforms, preprocess=False, thresholds=(steps,), progress=False, show_image=False,
        )  # fmt: skip
        took = time.perf_counter() - began
        for module, before in hooks:  # Lucent does not remove its hooks
            module._forward_hooks.clear()
            module._forward_hooks.update(before)
        return (images[-1][0] * 255).round().clip(0, 255).astype(np.uint8), took


# -------------------------------------------------------------------------------------------------------------- ours


@functools.cache
def prepared(preset: str, name: str, threads: int, data: DataConfig) -> tuple[Worker, Preset, Size]:
    """Return a worker as it is when a task begins, the preset for the layer, and the canvas size."""
    retain_freed_memory()
    config = dataclasses.replace(config_of(preset, MODEL), data=data)
    model = load_model(config.model)
    candidates = list_layers(model, LayersConfig(), config.model.aliases)
    (layer,) = [found for found in candidates if found.name == name]
    (field,) = receptive_fields(fold(model), [layer]).values()
    layer = dataclasses.replace(layer, field=field)
    size, worker = layer_worker(model, config, candidates, layer, model.to)
    torch.set_num_threads(threads)
    return worker, worker.setup.config.preset_for(preset, layer), size


def prepare(preset: str, name: str, threads: int, data: DataConfig) -> None:
    worker, own, size = prepared(preset, name, threads, data)
    worker.pictures(name, [0], size, dataclasses.replace(own, steps=2))


def ours(
    preset: str, name: str, threads: int, data: DataConfig, channels: Sequence[int]
) -> tuple[list[Visualization], float, float]:
    """Render `channels` in one batch; return the visualizations and the start and end times."""
    worker, own, size = prepared(preset, name, threads, data)
    began = time.monotonic()
    pictures = worker.pictures(name, channels, size, own)
    return pictures, began, time.monotonic()


# ---------------------------------------------------------------------------------------------------------- measures


def measured(model: Model, layer: Layer, channel: int, image: np.ndarray) -> tuple[float, float]:
    """Return the channel's mean over the map, on the saved image and over 16 randomly transformed copies."""
    picture = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    size = (image.shape[0], image.shape[1])
    random = draw_random(
        ROBUSTNESS_TRANSFORMS, torch.Generator().manual_seed(seed_of("peer", layer.name, channel)), COPIES
    )
    with torch.no_grad(), capture(model, [layer]) as run:
        clean = run(picture)[layer.name][0, channel].mean().item()
        copies = apply_transforms(picture.expand(COPIES, -1, -1, -1), ROBUSTNESS_TRANSFORMS, random, size)
        robust = run(copies)[layer.name][:, channel].mean()
    return clean, robust.item()


def sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], titles: Sequence[str], side: int = 224) -> Image.Image:
    """Return the images side by side at the size of the largest, one unit per row."""
    page = Image.new("RGB", (len(titles) * (side + 8) + 130, len(rows) * (side + 8) + 24), "white")
    pen = ImageDraw.Draw(page)
    for j, title in enumerate(titles):
        pen.text((132 + j * (side + 8), 6), title, fill="black")
    for i, (name, images) in enumerate(rows):
        pen.text((4, 28 + i * (side + 8)), name, fill="black")
        for j, image in enumerate(images):
            # At pixel scale: an image from a smaller canvas is shown smaller, not enlarged.
            found = Image.fromarray(image)
            page.paste(found, (130 + j * (side + 8), 24 + i * (side + 8)))
    return page


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a comparison needs: the network, both contenders and the processes of this project."""

    options: argparse.Namespace
    config: Config
    model: Model
    lucent: Lucent
    pools: list[Any]
    threads: int

    @property
    def presets(self) -> list[str]:
        return self.options.render.split(",")

    @property
    def data(self) -> DataConfig:
        """The dataset, of which judges see the images, and images of classes have the statistics."""
        folder = self.options.photographs
        return DataConfig(source="folder", root=str(folder)) if folder else self.config.data

    def ours(self, preset: str, name: str, channels: list[int]) -> tuple[list[Visualization], float]:
        """Return the visualizations of the layer's channels, and seconds per channel."""
        batch = self.config.engine.images_per_batch(len(channels), "cpu")
        parts = [channels[i * batch : (i + 1) * batch] for i in range(len(self.pools))]
        parts = [part for part in parts if part]
        what = (preset, name, self.threads, self.data)
        for result in [p.apply_async(prepare, what) for p in self.pools]:
            result.get()
        jobs = [p.apply_async(ours, (*what, part)) for p, part in zip(self.pools, parts, strict=False)]
        done = [job.get() for job in jobs]
        seconds = max(end for _, _, end in done) - min(start for _, start, _ in done)
        return [picture for pictures, _, _ in done for picture in pictures], seconds / len(channels)

    def units(self, layer: Layer, count: int) -> tuple[list[int], list[int]]:
        """Return the compared channels, and these with others that fill the batches of a run."""
        step = layer.channels // (count + 1)
        units = [step * (i + 1) for i in range(count)]
        others = [c for c in range(layer.channels) if c not in units]
        batch = self.config.engine.images_per_batch(layer.channels, "cpu")
        room = max(batch * len(self.pools) - len(units), 0)
        rest = others[:: max(1, len(others) // (room + len(units)))][:room]
        return units, units + rest

    def layer(self, layer: Layer, count: int) -> tuple[list[dict[str, Any]], list[Made]]:
        """Render the units of a layer by both; return rows of numbers, and the images."""
        units, channels = self.units(layer, count)
        first = {preset: self.ours(preset, layer.name, channels) for preset in self.presets}
        theirs = [self.lucent.picture(layer.name, channel, self.options.steps) for channel in units]
        again = {preset: self.ours(preset, layer.name, channels)[1] for preset in self.presets}
        rows, made = [], []
        for channel, (image, took) in zip(units, theirs, strict=True):
            row = {"layer": layer.name, "channel": channel, "lucent_seconds": took}
            row |= self.numbers("lucent", layer, channel, image)
            images = {"lucent": image}
            for preset in self.presets:
                pictures, each = first[preset]
                (own,) = [p for p in pictures if p.channel == channel]
                row |= {f"{preset}_seconds": (each + again[preset]) / 2, f"{preset}_px": own.image.shape[0]}
                row |= self.numbers(preset, layer, channel, own.image)
                images[preset] = own.image
            say(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))
            rows.append(row)
            made.append(Made(layer, channel, images))
            Image.fromarray(image).save(self.options.out / f"lucent-{layer.name}-{channel}.png")
        return rows, made

    def numbers(self, maker: str, layer: Layer, channel: int, image: np.ndarray) -> dict[str, float]:
        clean, robust = measured(self.model, layer, channel, image)
        return {f"{maker}_clean": clean, f"{maker}_robust": robust}


def summary(table: pd.DataFrame, preset: str) -> dict[str, Any]:
    """Return the ratios of a preset to Lucent."""
    speed = table["lucent_seconds"].sum() / table[f"{preset}_seconds"].sum()
    clean = (table[f"{preset}_clean"] / table["lucent_clean"]).mean()
    robust = (table[f"{preset}_robust"] / table["lucent_robust"]).mean()
    return {
        "preset": preset,
        "times faster": round(speed, 1),
        "clean ÷ Lucent's, mean of ratios": round(clean, 3),
        "robust ÷ Lucent's, mean of ratios": round(robust, 3),
        "clean, ratio of means": round(table[f"{preset}_clean"].sum() / table["lucent_clean"].sum(), 3),
        "robust, ratio of means": round(table[f"{preset}_robust"].sum() / table["lucent_robust"].sum(), 3),
        "seconds a channel": round(table[f"{preset}_seconds"].mean(), 2),
        "Lucent's": round(table["lucent_seconds"].mean(), 1),
    }


def judge(bench: Bench, made: Sequence[Made], classes: str) -> pd.DataFrame:
    """Return what the judges see in all images, one row each."""
    options = bench.options
    judges = [load_judge(name, config_of("distill", name).model) for name in options.judges.split(",")]
    layers = list({unit.layer.name: unit.layer for unit in made}.values())
    known = dataset_values(bench.model, layers, judges, list_dataset(bench.data), options.count)
    return pd.DataFrame(list(seen(made, classes, judges, known, bench.model.preprocessing.size)))


def report(bench: Bench, rows: list[dict[str, Any]], made: Sequence[Made], classes: str) -> None:
    """Write and print the tables and the contact sheet."""
    out, presets = bench.options.out, bench.presets
    table = pd.DataFrame(rows)
    table.to_csv(out / "peer.csv", index=False)
    pages = [(f"{unit.layer.name}:{unit.channel}", list(unit.images.values())) for unit in made]
    sheet(pages, [f"Lucent, {bench.options.steps} steps", *presets]).save(out / "peer.png")
    lines = [summary(table, preset) for preset in presets]
    say(table.drop(columns="channel").groupby("layer", sort=False).mean().round(3).to_string())
    for line in lines:
        say(" · ".join(f"{k} {v}" for k, v in line.items()))
    result = {"units": rows, "summary": lines}
    if bench.options.judges:
        judged = judge(bench, made, classes)
        judged.to_csv(out / "judges.csv", index=False)
        kind = np.where(judged["layer"] == classes, "classes", "hidden units")
        medians = judged.drop(columns=["layer", "channel"]).groupby([kind, "maker"], sort=False).median()
        say(medians.dropna(axis=1, how="all").round(3).T.to_string())
        ranks = [column for column in judged if str(column).endswith("_rank")]
        for maker, own in judged[judged["layer"] == classes].groupby("maker", sort=False):
            say(
                f"{maker}: rank 1 in "
                + ", ".join(f"{name}: {int((own[name] == 1).sum())} of {len(own)}" for name in ranks)
            )
        result["judges"] = json.loads(judged.to_json(orient="records"))
    (out / "peer.json").write_text(json.dumps(result, indent=1))
    say(f"{out}/peer.csv, judges.csv, peer.json, peer.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=2, help="channels of each layer")
    parser.add_argument("--classes", type=int, default=10, help="classes of the network")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--render", default="distill", help="presets of ours, separated by commas")
    parser.add_argument("--steps", type=int, default=512, help="Lucent's")
    parser.add_argument("--judges", default=",".join(JUDGES), help="networks that judge the images; empty for none")
    parser.add_argument("--photographs", type=Path, help="folder of dataset images")
    parser.add_argument("--count", type=int, default=400, help="number of dataset images for the judges")
    parser.add_argument("--out", type=Path, default=Path("runs/peer"))
    parser.add_argument("--home", type=Path, default=Path(".venv/peer"), help="where Lucent is installed")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    install(options.home)
    config = config_of(options.render.split(",")[0], MODEL)
    model = load_model(config.model)
    cores = local_resources()[0]
    listed = list_layers(model, LayersConfig(), config.model.aliases)
    found = {layer.name: layer for layer in listed}
    classes = logit_layers(model, listed)[-1].name
    counts = {name: options.units for name in options.layers.split(",")}
    if options.classes:
        counts[classes] = options.classes
    team = size_pool(config.engine, [(cores, 0)], 10_000)
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    made: list[Made] = []
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(context.Pool(1)) for _ in range(team.workers)]
        bench = Bench(options, config, model, Lucent(options.home, model, cores), pools, team.threads)
        for name, count in counts.items():
            numbers, images = bench.layer(found[name], count)
            rows += numbers
            made += images
    report(bench, rows, made, classes)


if __name__ == "__main__":
    main()
