"""Compare the dataset pass with the bare forward pass, on the same decoded images and cores.

scripts/bench examples [--root ../shared/photos] [--count 1000] [--threads 2] [--compile yes|no]

The two alternate block by block, in an order that changes, so that other load on the machine affects both.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.acceleration.batchnorm_folding import fold, foldable_pairs
from pipeline.data import datasets, image_loading
from pipeline.data.config import DataConfig
from pipeline.data.image_loading import Loaded
from pipeline.examples import sweep
from pipeline.examples.sweep import ExamplesConfig, ImageSubsets, PassAccumulator, PassContext
from pipeline.kernels.allocator import retain_freed_memory
from pipeline.kernels.spatial_stats import Reducer
from pipeline.layers.selection import LayersConfig, list_layers, select_layers
from pipeline.models.config import ModelConfig
from pipeline.models.loading import Model, load_model
from pipeline.store import shards

BLOCK = 192


def bare(model: Model, block: Sequence[Loaded], batch: int) -> None:
    """Run only the network: uint8 → [0, 1] → normalized → all layers."""
    with torch.no_grad():
        for part in pieces(block, batch):
            images = torch.from_numpy(np.stack([item.array for item in part if item.array is not None]))
            images = (images.float() / 255).contiguous(memory_format=torch.channels_last)
            model.module(model.normalize(images))


def pieces(block: Sequence[Loaded], size: int) -> list[Sequence[Loaded]]:
    return [block[i : i + size] for i in range(0, len(block), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=str(Path(__file__).resolve().parents[3] / "shared" / "photos"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--compile", choices=("yes", "no"), default="yes")
    options = parser.parse_args()
    retain_freed_memory()
    torch.set_num_threads(options.threads)
    model = load_model(ModelConfig("package", "efficientnet_lite0")).to("cpu")
    layers = [la for la in select_layers(model, list_layers(model, LayersConfig("convs"), {}), LayersConfig("convs"))]
    layers = [la for la in layers if la.kind == "conv"]
    folded = fold(model, foldable_pairs(model))
    config = ExamplesConfig(compile=options.compile == "yes")
    dataset = datasets.list_dataset(DataConfig("folder", options.root, options.count))
    channels = [layer.channels for layer in layers]
    drawn = ImageSubsets.of(dataset, config, sum(channels))
    print(f"{len(layers)} convolutions, {sum(channels):,} channels, {len(dataset.images)} photographs, "
          f"{options.threads} threads, batch {config.batch}, compiled: {options.compile}")  # fmt: skip

    began = time.perf_counter()
    loaded = [
        item
        for item in image_loading.load_images(dataset, range(len(dataset.images)), model.preprocessing)
        if item.array is not None
    ]
    decoding = (time.perf_counter() - began) / len(loaded)
    # The pass pads the last batch of a task; here every block would have such a batch.
    loaded = loaded[: len(loaded) // config.batch * config.batch]
    began = time.perf_counter()
    context = PassContext(folded, layers, dataset, config)
    ranges = sweep.measure_ranges(context, drawn.sample.tolist())
    sampling = time.perf_counter() - began
    reducer = Reducer(config.compile is True)

    def gathering() -> PassAccumulator:
        return PassAccumulator(channels, config, ranges, drawn, dataset.sources, config.compile is True)

    def passing(into: PassAccumulator, block: Sequence[Loaded]) -> None:
        sweep.collect(into, sweep.reduce_batches(context, block, ranges.centre, reducer, [], into.observe))

    began = time.perf_counter()
    passing(gathering(), loaded[: 2 * BLOCK])
    first = time.perf_counter() - began
    bare(model, loaded[:BLOCK], config.batch)
    bare(folded, loaded[:BLOCK], config.batch)

    into = gathering()
    runs: dict[str, Callable[[Sequence[Loaded]], None]] = {
        "bare forward": lambda block: bare(model, block, config.batch),
        "dataset pass": lambda block: passing(into, block),
        "bare, folded": lambda block: bare(folded, block, config.batch),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn, block in enumerate(pieces(loaded, BLOCK)):
        names = list(runs)
        for name in names[turn % 3 :] + names[: turn % 3]:
            began = time.perf_counter()
            runs[name](block)
            times[name].append((time.perf_counter() - began) / len(block) * 1e3)
    began = time.perf_counter()
    shard = shards.to_bytes({}, into.result().arrays(), "lzf")
    writing = (time.perf_counter() - began) / len(loaded) * 1e3

    print(f"\n{'':14} ms/image   images/s   (median of {len(times['bare forward'])} blocks of {BLOCK})")
    for name, each in times.items():
        print(f"{name:14} {statistics.median(each):8.1f} {1e3 / statistics.median(each):10.1f}")
    for name in ("bare forward", "bare, folded"):
        ratios = [a / b for a, b in zip(times[name], times["dataset pass"], strict=True)]
        total = sum(times[name]) / sum(times["dataset pass"])
        print(f"pass ÷ {name}: {statistics.median(ratios):.1%} of its images/s by block, {total:.1%} in all")
    print(f"beside it: decoding {decoding * 1e3:.1f} ms/image (threads), shard {writing:.2f} ms/image and "
          f"{len(shard) / 1e6:.0f} MB, first block (compiling) {first:.1f} s, sample {sampling:.1f} s")  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    held = sum(item.array.nbytes for item in loaded if item.array is not None) / 2**30
    print(f"peak memory {peak:.2f} GiB, {held:.2f} GiB of them the decoded photographs")


if __name__ == "__main__":
    main()
