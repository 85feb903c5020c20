"""The dataset pass on a device other than the CPU: the same bytes, and no step that waits for the CPU."""

import copy
import dataclasses
import random as random_module
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_statistics import LAYERS, same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.data import datasets
from pipeline.data.config import DataConfig
from pipeline.data.image_loading import Loaded
from pipeline.examples import localize, sweep
from pipeline.examples.channel_stats import HistogramRange, PopulationSparsity, RunningSums
from pipeline.examples.sweep import ExamplesConfig, ImageSubsets, PassAccumulator, PassContext, PassResult
from pipeline.kernels.spatial_stats import Reducer
from pipeline.layers.finding import Layer, enumerate_layers
from pipeline.models.loading import Model

META = torch.device("meta")


def reduced_of(seed: int, images: int, kind: str) -> np.ndarray:
    """(5, n, C) reduced activations: normal, with many ties, or of any size and without a number."""
    rng = np.random.default_rng(seed)
    shape = (5, images, sum(LAYERS))
    values = rng.normal(size=shape)
    if kind == "ties":
        values = rng.integers(-2, 3, shape) / 4 * rng.choice([-1.0, 1.0], shape)  # −0 among them
    if kind == "extremes":
        values *= 10.0 ** rng.integers(-44, 39, shape)
        values[rng.random(shape) < 0.05] = np.inf
        values[rng.random(shape) < 0.05] = np.nan
    values[:, :, 1] = 0.5  # a channel that does not vary, and one that is never positive
    values[0, :, 2] = np.minimum(values[0, :, 2], 0)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def part_of(
    reduced: np.ndarray,
    rows: Sequence[int],
    sources: np.ndarray | None,
    dense: bool,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> PassResult:
    sample = np.random.default_rng(1).normal(size=(20, sum(LAYERS)))
    ranges = HistogramRange.from_sample(sample, sample - 1, sample / 2, LAYERS)
    count = reduced.shape[1]
    subsets = ImageSubsets(np.arange(2), np.arange(0, count, 2), np.arange(0, count, 3))
    accumulator = PassAccumulator(LAYERS, ExamplesConfig(k=3), ranges, subsets, sources, device=device)
    accumulator.dense = dense
    indices = np.array(rows)
    accumulator.observe(indices, torch.rand(len(rows), 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(device))
    accumulator.add(indices, torch.from_numpy(reduced[:, indices]).to(device))
    result = accumulator.result()
    return dataclasses.replace(result, appearance=np.zeros_like(result.appearance))


def parts(count: int, workers: int, random: random_module.Random) -> Iterator[list[int]]:
    order = list(range(count))
    random.shuffle(order)
    cuts = sorted(random.choices(range(count + 1), k=workers - 1))
    for start, end in zip([0, *cuts], [*cuts, count], strict=True):
        if end > start:
            yield order[start:end]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 150),
    st.sampled_from(["normal", "ties", "extremes"]),
    st.booleans(),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_the_operations_of_a_device_give_the_same_bytes(seed, images, kind, crops, workers, random) -> None:
    reduced = reduced_of(seed, images, kind)
    sources = np.arange(images, dtype=np.int32) // 3 if crops else None
    whole = part_of(reduced, range(images), sources, dense=False)
    results = [part_of(reduced, rows, sources, dense=True) for rows in parts(images, workers, random)]
    same(sweep.merge(results, 3, sources), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["normal", "ties", "extremes"])
@pytest.mark.parametrize("crops", [False, True])
def test_a_gpu_gives_the_same_bytes(kind: str, crops: bool) -> None:
    reduced = reduced_of(0, 150, kind)
    sources = np.arange(150, dtype=np.int32) // 3 if crops else None
    whole = part_of(reduced, range(150), sources, dense=False)
    same(part_of(reduced, range(150), sources, dense=True, device=torch.device("cuda")), whole)


def test_sums_of_a_layer_do_not_depend_on_the_images_beside_it() -> None:
    layers = (7, 64, 1, 64, 300, 5)
    peaks = torch.randn(100, sum(layers), generator=torch.Generator().manual_seed(0))
    population = PopulationSparsity(layers)
    together, alone = population(peaks), torch.cat([population(row[None]) for row in peaks])
    assert torch.equal(together.nan_to_num(-1), alone.nan_to_num(-1)) and together.shape == (100, 6)


def test_totals_are_snapshots() -> None:
    reduced = torch.from_numpy(reduced_of(0, 10, "normal"))
    ranges = HistogramRange.from_sample(reduced[0].numpy(), reduced[1].numpy(), reduced[2].numpy(), LAYERS)
    sums = RunningSums(ranges, LAYERS)
    sums.add(reduced)
    before = sums.total()
    counts = before.histogram.copy()
    sums.add(reduced)
    assert np.array_equal(before.histogram, counts) and sums.total().images == 20


class Waits(TorchDispatchMode):
    """Records what would make a GPU and the CPU wait for each other; tensors on the device `meta` stand for its own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = any(t.is_meta for t in tensors)
        if name == "_to_copy" and "device" in kwargs:
            target = torch.device(kwargs["device"])
            if on_device and target != META:
                self.found.append("download")
                return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
            if not on_device and target == META and not kwargs.get("non_blocking"):
                self.found.append("upload that waits")
        elif on_device and name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.found.append(name)
        elif on_device and name.startswith("index"):  # a mask needs the number of its ones, other indices a copy
            self.found += [name] * any(t.dtype == torch.bool or not t.is_meta for t in tensors)
        elif on_device and name != "copy_" and any(t.dim() and not t.is_meta for t in tensors):
            self.found.append(f"{name} of tensors on two devices")
        return func(*args, **kwargs)


def test_what_waits_is_found() -> None:
    values = torch.zeros(3, device=META)
    with Waits() as waits:
        values.cpu()
        torch.zeros(3).to(META)
        values[torch.zeros(3, dtype=torch.long)]
        torch.zeros(3).to(META, non_blocking=True)
    assert waits.found == ["download", "upload that waits", "index"]


def on_meta(model: Model) -> Model:
    module = copy.deepcopy(model.module).to(META)
    return dataclasses.replace(model, module=module)


@pytest.mark.parametrize("crops", [False, True])
def test_a_steady_batch_of_the_pass_waits_for_nothing(tiny: Model, photo_folder: Path, crops: bool) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(photo_folder)))
    layers, batch, count = enumerate_layers(tiny), 16, 15 * 16
    channels = [layer.channels for layer in layers]
    config = ExamplesConfig(k=3, batch=batch)
    subsets = ImageSubsets(np.arange(2), np.arange(0, count, 5), np.arange(0, count, 3))
    flat = np.zeros(sum(channels))
    ranges = HistogramRange(flat - 1, flat + 1, flat, flat + 1)
    sources = np.arange(count, dtype=np.int32) // 3 if crops else None
    accumulator = PassAccumulator(channels, config, ranges, subsets, sources, device=META)
    context = PassContext(on_meta(tiny), layers, dataset, config)
    size = (3, *tiny.preprocessing.size)
    loaded = (Loaded(i, np.full(size, i, np.uint8)) for i in range(count))
    batches = sweep.reduce_batches(context, loaded, ranges.centre, Reducer(False), [], accumulator.observe)
    with Waits() as waits:
        sweep.collect(accumulator, batches)
        assert waits.found == []
        assert len(accumulator.result().codes_index) == len(subsets.labelled)
    assert set(waits.found) == {"download"}


def test_a_steady_batch_of_the_second_pass_waits_for_nothing(tiny: Model, photo_folder: Path) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(photo_folder)))
    layers: list[Layer] = [la for la in enumerate_layers(tiny) if la.name in ("stem", "late")]
    depths = tuple(la for la in enumerate_layers(tiny) if la.name in ("relu", "block"))
    images = list(range(20))
    pairs = np.array([(i, row, i % 2) for i in images for row in (0, 2)], np.int32)
    every = np.array(images, np.int32)
    channels = np.array([0, 1, 3], np.int32)
    index = localize.SecondPassIndex((channels,) * 2, (pairs,) * 2, (every,) * 2, (every,) * 2, every[:4])
    waits = Waits()
    found: list[int] = []

    def stop() -> None:
        found.append(len(waits.found))

    context = PassContext(on_meta(tiny), layers, dataset, ExamplesConfig(batch=4, store="ids"), stop, 2, depths)
    with waits:
        arrays = localize.localize(context, index, images)
    assert found == [0] * 5 and set(waits.found) == {"download"}
    assert len(arrays["0/map"]) == len(arrays["1/pairs"]) == 40 and arrays["path/0"].shape[0] == 20
