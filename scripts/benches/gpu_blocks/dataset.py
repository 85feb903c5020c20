"""Block `dataset`: images a second of the dataset pass over generated JPEG files, and of its parts."""

import dataclasses
import inspect
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpu_blocks import networks
from gpu_blocks.bench import Bench
from gpu_blocks.networks import RESNET
from pipeline.core.machine import available_cores
from pipeline.data import image_loading
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset, list_dataset
from pipeline.data.image_loading import Loaded
from pipeline.examples import sweep
from pipeline.kernels.spatial_stats import Reducer

# Different images; files repeat them.
DIFFERENT = 64


def run(bench: Bench) -> None:
    net = networks.network(RESNET, bench.device, bench.carried)
    worker = networks.worker(net, bench.device)
    layers = list(net.layers.values())[: 6 if bench.small else None]
    config = dataclasses.replace(net.config.examples, compile=False)
    threads = max(2, int(available_cores()))
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 24 if bench.small else 2048, bench.small)
        dataset = list_dataset(DataConfig(source="folder", root=folder), net.model.preprocessing.channels)
        context = sweep.PassContext(worker.measured, layers, dataset, config, threads=threads)
        loaded = decoded(bench, context)
        ranges = sweep.measure_ranges(context, range(min(16, len(dataset.images))))
        network_only(bench, context, loaded, ranges)
        for compiled in (False,) if bench.small else (False, True):
            if bench.has(12 + 15 * compiled, f"the whole pass, compiled={compiled}"):
                whole(bench, dataclasses.replace(context, config=dataclasses.replace(config, compile=compiled)), ranges)


def write_images(folder: Path, count: int, small: bool) -> None:
    """Write JPEG files of the size and content of photographs: smooth noise at 500 × 375 pixels."""
    generator = np.random.default_rng(0)
    contents = []
    for _ in range(min(DIFFERENT, count)):
        coarse = Image.fromarray(generator.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((200, 150) if small else (500, 375), Image.Resampling.BICUBIC)).astype(float)
        noisy = (smooth + generator.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        contents.append(buffer.getvalue())
    for i in range(count):
        label = folder / f"class{i % 8}"
        label.mkdir(exist_ok=True)
        (label / f"{i:05}.jpg").write_bytes(contents[i % len(contents)])


def decoded(bench: Bench, context: sweep.PassContext) -> list[Loaded]:
    """Decode all images and print the rate; return the first ones."""
    dataset: Dataset = context.dataset
    count, first, began = 0, [], time.perf_counter()
    for item in image_loading.load_images(
        dataset, range(len(dataset.images)), context.model.preprocessing, context.threads
    ):
        count += 1
        if len(first) < 512:
            first.append(item)
    rate = count / (time.perf_counter() - began)
    bench.row("decoding alone", threads=context.threads, images=count, **{"images/s": rate})
    return first


def network_only(bench: Bench, context: sweep.PassContext, loaded: list[Loaded], ranges: sweep.HistogramRange) -> None:
    """Print the rates of network and reduction, and of the accumulation, on images that are in memory."""
    reducer = Reducer(False)
    parts: list[tuple[np.ndarray, Any]] = []
    for _ in sweep.reduce_batches(context, loaded[: context.config.batch], ranges.centre, reducer, []):
        pass
    bench.synchronize()
    began = time.perf_counter()
    for indices, values in sweep.reduce_batches(context, loaded, ranges.centre, reducer, []):
        parts.append((indices, values.copy() if isinstance(values, np.ndarray) else values.clone()))
    bench.synchronize()
    bench.row("network and reduction alone", **{"images/s": len(loaded) / (time.perf_counter() - began)})
    channels = [layer.channels for layer in context.layers]
    subsets = sweep.ImageSubsets.of(context.dataset, context.config, sum(channels))
    accumulates_there = "device" in inspect.signature(sweep.PassAccumulator).parameters
    place = {"device": torch.device(bench.device)} if accumulates_there else {}
    accumulator = sweep.PassAccumulator(
        channels, context.config, ranges, subsets, context.dataset.sources, False, **place
    )
    began = time.perf_counter()
    sweep.collect(accumulator, parts)
    bench.synchronize()
    bench.row("accumulation alone", **{"images/s": len(loaded) / (time.perf_counter() - began)})


def whole(bench: Bench, context: sweep.PassContext, ranges: sweep.HistogramRange) -> None:
    """Print the rate of the whole first pass; compiled, the first time includes the compilation."""
    channels = sum(layer.channels for layer in context.layers)
    subsets = sweep.ImageSubsets.of(context.dataset, context.config, channels)
    count = len(context.dataset.images)
    compiled = context.config.compile
    if compiled:
        started = bench.wall(lambda: sweep.sweep(context, range(context.config.batch * 8), ranges, subsets))
        bench.row("compilation and 256 images", seconds=started)
    bench.clean()
    seconds = bench.wall(lambda: sweep.sweep(context, range(count), ranges, subsets))
    bench.row(
        "whole first pass", compiled=bool(compiled), channels=channels,
        images=count, **{"images/s": count / seconds}, **bench.memory(),
    )  # fmt: skip
