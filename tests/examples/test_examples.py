"""The dataset pass against brute force on a real network, and photographs as people really have them."""

import dataclasses
import io
import logging
import pickle
import resource
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import PHOTOS, tiny_model
from PIL import Image, ImageFile

from pipeline.acceleration.batchnorm_folding import fold
from pipeline.core.errors import AtlasError
from pipeline.data import datasets, image_formats, image_loading, multiband
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset
from pipeline.data.readers.base import DatasetImage
from pipeline.examples import channel_stats, localize, sweep, topk
from pipeline.examples.channel_stats import HistogramRange
from pipeline.examples.label_association import LabeledSources
from pipeline.examples.sweep import ExamplesConfig, ImageSubsets, PassContext, PassResult
from pipeline.kernels import build, spatial_stats
from pipeline.layers.finding import Layer, ReceptiveField, capture, enumerate_layers
from pipeline.models import loading
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, ModelConfig, load_model

RECIPE = Preprocessing((32, 32), 36, (0.5,) * 3, (0.25,) * 3)


def swept(
    model: Model, layers: list[Layer], dataset: Dataset, indices: Iterable[int], config: ExamplesConfig
) -> tuple[PassResult, HistogramRange]:
    subsets = ImageSubsets.of(dataset, config, sum(layer.channels for layer in layers))
    context = PassContext(model, layers, dataset, config)
    ranges = sweep.measure_ranges(context, subsets.sample.tolist())
    return sweep.sweep(context, indices, ranges, subsets), ranges


def seen_by(model: Model, layers: list[Layer], dataset: Dataset, batch: int) -> dict[str, np.ndarray]:
    """Everything every layer says, in memory: what nobody can afford with a real dataset."""
    count = len(dataset.images)
    arrays = [
        item.array
        for item in image_loading.load_images(dataset, range(count), model.preprocessing)
        if item.array is not None
    ]
    seen: dict[str, list[np.ndarray]] = {layer.name: [] for layer in layers}
    with capture(model, layers) as forward, torch.no_grad():
        for start in range(0, count, batch):
            own = arrays[start : start + batch]
            own += [own[-1]] * (batch - len(own))
            for name, maps in forward(torch.from_numpy(np.stack(own)).float() / 255).items():
                seen[name].append(maps.numpy()[: count - start].copy())
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def check(found: PassResult, ranges: HistogramRange, seen: dict[str, np.ndarray], dataset: Dataset, k: int) -> None:
    """Lists equal to the bit, statistics to 1e-6 of the layer's range."""
    numbers = channel_stats.channel_statistics(found.tally, ranges, np.ones(len(ranges.low), bool))
    sources = [p.source for p in dataset.images]
    start = 0
    for maps in seen.values():
        flat = maps.reshape(*maps.shape[:2], -1)
        channels = slice(start, start := start + maps.shape[1])
        close = {"atol": 1e-6 * float(np.abs(flat).max()), "rtol": 1e-6}
        wide = flat.astype(np.float64)
        assert np.array_equal(numbers["max"][channels], flat.max((0, 2)))
        assert np.array_equal(numbers["min"][channels], flat.min((0, 2)))
        assert np.allclose(numbers["mean"][channels], wide.mean((0, 2)), **close)
        assert np.allclose(numbers["sd"][channels], wide.std((0, 2)), **close)
        assert np.allclose(numbers["nonzero"][channels], (wide > 0).mean((0, 2)), atol=1e-6)
        assert np.array_equal(numbers["fired"][channels], ((flat.max(2) > 0).mean(0)).astype(np.float32))
        value, index = topk.decode(found.tops["max"][channels])
        lowest, where = topk.decode(found.tops["min"][channels])
        for c in range(maps.shape[1]):
            for peaks, values, own in ((flat[:, c].max(1), value, index), (-flat[:, c].min(1), lowest, where)):
                best: dict[int, int] = {}
                for image in sorted(range(len(flat)), key=lambda i: (-peaks[i], i)):
                    best.setdefault(sources[image], image)
                order = list(best.values())[:k]
                assert own[c][own[c] >= 0].tolist() == order
                assert values[c][: len(order)].tolist() == peaks[order].tolist()


def test_the_pass_equals_brute_force(photo_folder: Path, tiny: Model) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(photo_folder)))
    layers = [la for la in enumerate_layers(tiny) if la.name in ("stem", "late", "head")]
    found, ranges = swept(tiny, layers, dataset, range(20), ExamplesConfig(k=4, batch=6, sample=5))
    check(found, ranges, seen_by(tiny, layers, dataset, 6), dataset, 4)


def test_the_default_networks_examples_are_exactly_those_of_brute_force() -> None:
    """Real weights, real photographs and their crops, all channels: indices and values to the last bit."""
    model = load_model(ModelConfig("package", "efficientnet_lite0")).to("cpu")
    dataset = datasets.list_dataset(DataConfig(limit=48))
    wanted = ("conv_stem", "blocks.2.1.conv_dw", "blocks.4.2", "classifier")
    layers = [la for la in enumerate_layers(model) if la.name in wanted]
    found, ranges = swept(model, layers, dataset, range(48), ExamplesConfig(k=3, sample=16))
    check(found, ranges, seen_by(model, layers, dataset, 16), dataset, 3)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler here")
def test_the_compiled_reduction_says_the_same(photo_folder: Path, tiny: Model) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(photo_folder)))
    layers = [la for la in enumerate_layers(tiny) if la.name in ("stem", "late", "head")]
    config = ExamplesConfig(k=4, batch=6, sample=5, compile=True)
    found, ranges = swept(tiny, layers, dataset, range(20), config)
    check(found, ranges, seen_by(tiny, layers, dataset, 6), dataset, 4)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler here")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 1), (3, 40, 7, 7), (2, 257, 5, 3), (2, 600, 17, 31)])
def test_the_compiled_loop_reduces_maps_of_any_shape(shape: tuple[int, int, int, int]) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)
    centre = torch.linspace(-1, 1, shape[1])
    assert spatial_stats.load_c_loop() is not None
    compiled, lines = (spatial_stats.Reducer(compile)(maps, centre) for compile in (True, False))
    assert torch.equal(
        compiled[: spatial_stats.MEAN_DEVIATION], lines[: spatial_stats.MEAN_DEVIATION]
    )  # extremes are no sums
    assert torch.equal(compiled[spatial_stats.ACTIVE_SHARE], lines[spatial_stats.ACTIVE_SHARE])
    assert torch.allclose(compiled, lines, rtol=1e-6, atol=1e-6)
    assert torch.equal(compiled, spatial_stats.Reducer(True)(maps.contiguous(), centre))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler here")
def test_the_compiled_loop_tells_what_is_no_number() -> None:
    maps = torch.ones(2, 3, 4, 4)
    maps[0, 1, 2, 2] = torch.nan
    found = spatial_stats.Reducer(True)(maps, torch.zeros(3))
    assert found[:4, 0, 1].isnan().all()
    assert found.isnan().sum() == 4
    assert (found[:, 1] == 1).all()


def test_without_a_compiler_it_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object, **__: object) -> object:
        def call(*_: object) -> None:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setenv("CC", "no-such-compiler")
    caches = (spatial_stats.compile_or_fallback, spatial_stats.load_c_loop, build.load_library)
    for kept in caches:
        kept.cache_clear()
    maps, centre = torch.randn(2, 3, 4, 5), torch.zeros(3)
    with caplog.at_level("INFO", logger="pipeline"):
        assert torch.equal(spatial_stats.Reducer(True)(maps, centre), spatial_stats.Reducer(False)(maps, centre))
        assert spatial_stats.compile_or_fallback(channel_stats.bins_of)(centre).tolist() == [1, 1, 1]
    assert "no-such-compiler" in caplog.text
    assert "bins_of runs uncompiled: no C++ compiler" in caplog.text
    for kept in caches:
        kept.cache_clear()


def test_running_out_of_memory_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch must be halved, and the next one still runs compiled."""
    calls: list[int] = []

    def compiled(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
        def call(*tensors: torch.Tensor) -> Any:
            calls.append(len(tensors[0]))
            if len(tensors[0]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(*tensors)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    spatial_stats.compile_or_fallback.cache_clear()
    try:
        call = spatial_stats.compile_or_fallback(torch.neg)
        with pytest.raises(torch.OutOfMemoryError):
            call(torch.ones(8))
        assert call(torch.ones(4)).tolist() == [-1] * 4 and calls == [8, 4]
    finally:
        spatial_stats.compile_or_fallback.cache_clear()


def test_activations_write_in_place_only_while_nothing_is_kept() -> None:
    """The pass lets them, as the network's author did; everyone else finds every map as it was computed."""
    model = tiny_model()
    relus = [module for module in model.module.modules() if isinstance(module, torch.nn.ReLU)]
    assert relus and not any(relu.inplace for relu in relus)
    author = [relu for relu in relus if hasattr(relu, loading._WAS_IN_PLACE)]
    assert author
    with loading.inplace_activations(model):
        assert [relu for relu in relus if relu.inplace] == author
    assert not any(relu.inplace for relu in relus)


def test_bins_of_single_images_are_bounded_in_bytes(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(photo_folder)))
    config = ExamplesConfig(sample=8)
    every = ImageSubsets.of(dataset, config, 1000)
    monkeypatch.setattr(sweep, "LABELLED_BYTES", 5000)
    few = ImageSubsets.of(dataset, config, 1000)
    assert len(every.labelled) == 20 and len(few.labelled) == 5
    assert set(few.labelled.tolist()) <= set(every.labelled.tolist())
    assert np.array_equal(few.sample, every.sample) and np.array_equal(few.subset, every.subset)


@pytest.mark.parametrize("cuts", [(8, 12), (1, 2), (7, 19)])
def test_ranges_merge_to_the_same_bytes(photo_folder: Path, tiny: Model, cuts: tuple[int, int]) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(photo_folder)))
    layers = [la for la in enumerate_layers(tiny) if la.name in ("stem", "head")]
    config = ExamplesConfig(k=5, batch=4, sample=8)
    whole, ranges = swept(tiny, layers, dataset, range(20), config)
    context = PassContext(tiny, layers, dataset, config)
    parts = []
    for start, end in ((cuts[1], 20), (0, cuts[0]), cuts):
        part = sweep.sweep(context, range(start, end), ranges, ImageSubsets.of(dataset, config, 12))
        parts.append(PassResult.from_arrays(part.arrays()))
    merged = sweep.merge(parts, 5, dataset.sources).arrays()
    assert all(np.array_equal(array, merged[name]) for name, array in whole.arrays().items())


def test_a_source_picture_stands_once_in_a_list() -> None:
    dataset = datasets.list_dataset(DataConfig(limit=60))
    model = tiny_model()
    layers = [la for la in enumerate_layers(model) if la.name == "late"]
    found, _ = swept(model, layers, dataset, range(60), ExamplesConfig(k=8, batch=20))
    chosen = localize.select_examples(found, [(layers[0], range(8))], dataset, ExamplesConfig(k=8, per_bin=2))[0]
    for name, (_, index) in chosen.lists.items():
        for row in index:
            kept = [dataset.images[i].source for i in row if i >= 0]
            assert len(kept) == len(set(kept)), name
        assert (index >= 0).any(), name


def test_labels_count_sources() -> None:
    """The sample images have a label each, and 412 crops: too few sources for any statistics of labels."""
    dataset = datasets.list_dataset(DataConfig())
    index = np.arange(3, len(dataset.images))
    sources = LabeledSources.of(dataset, index)
    assert len(sources.labels) == len({photo.source for photo in dataset.images[3:]}) and not sources.sufficient
    for number, start in enumerate(sources.starts):
        photo = dataset.images[index[sources.images[start]]]
        assert dataset.labels[0][sources.labels[number]] == photo.label
    assert abs(sources.half.mean() - 0.5) < 0.03


def test_a_linear_channel_below_zero_keeps_its_examples(photo_folder: Path) -> None:
    """Zero is arbitrary there: the highest activations are examples, though none is positive."""
    model = tiny_model()
    with torch.no_grad():
        model.module.head.bias[1] = -1000.0  # type: ignore[union-attr,index,operator]
    dataset = datasets.list_dataset(DataConfig("folder", str(photo_folder)))
    layers = [la for la in enumerate_layers(model) if la.name == "head"]
    config = ExamplesConfig(k=3, batch=5)
    found, _ = swept(model, layers, dataset, range(20), config)
    (chosen,) = localize.select_examples(found, [(layers[0], (0, 1))], dataset, config)
    assert not layers[0].rectified and (found.tally.max[1] < 0) and (chosen.lists["max"][1] >= 0).all()
    rectified = dataclasses.replace(layers[0], rectified=True)
    (chosen,) = localize.select_examples(found, [(rectified, (0, 1))], dataset, config)
    assert (chosen.lists["max"][1][1] == -1).all()


def test_a_channel_that_never_fires_gets_no_arbitrary_examples(photo_folder: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.module.late.bias[2] = -1000.0  # type: ignore[union-attr,index,operator]
    dataset = datasets.list_dataset(DataConfig("folder", str(photo_folder)))
    layers = [la for la in enumerate_layers(model) if la.name in ("late", "relu#2")]
    config = ExamplesConfig(k=3, batch=5)
    found, ranges = swept(model, layers, dataset, range(20), config)
    assert all(layer.rectified for layer in layers)
    inactive = channel_stats.channel_statistics(found.tally, ranges, np.ones(16, bool))["inactive"]
    chosen = localize.select_examples(found, [(la, range(la.channels)) for la in layers], dataset, config)
    assert inactive[2] and inactive[8 + 2] and not inactive.all()
    for own in chosen:
        for name in ("max", "mean", "spectrum"):
            assert (own.lists[name][1][2] == -1).all() and np.isnan(own.lists[name][0][2]).all()
    # What suppresses it most is no accident before the rectifier, and all accident behind it.
    assert (chosen[0].lists["min"][1][2] >= 0).all() and (chosen[1].lists["min"][1][2] == -1).all()


def test_the_second_look_finds_places_maps_and_pictures(photo_folder: Path, tiny: Model) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(photo_folder)))
    layers = [dataclasses.replace(la, field=ReceptiveField((7, 7), (4, 4), (-3, -3))) for la in enumerate_layers(tiny)
              if la.name in ("stem", "late")]  # fmt: skip
    for store in ("images", "crops", "ids"):
        config = ExamplesConfig(k=3, batch=4, maps=4, store=store, side=48, crop_side=24)
        found, _ = swept(tiny, layers, dataset, range(20), config)
        chosen = localize.select_examples(found, [(la, (0, 3, 5)) for la in layers], dataset, config)
        sample = np.array([1, 4, 8, 15], np.int32)
        table = localize.SecondPassIndex.of(chosen, sample)
        depths = tuple(la for la in enumerate_layers(tiny) if la.name in ("relu", "block"))
        context = PassContext(tiny, layers, dataset, config, depths=depths)
        looks = localize.localize(context, table, table.images.tolist())
        seen = seen_by(tiny, [*layers, *depths], dataset, 4)
        for i, layer in enumerate(layers):
            for (image, row, _), place, ends, small in zip(
                *(looks[f"{i}/{name}"] for name in ("pairs", "place", "range", "map")), strict=True
            ):
                maps = seen[layer.name][image, chosen[i].channels[row]]
                assert (place[0], place[1]) == np.unravel_index(maps.argmax(), maps.shape)
                assert (place[2], place[3]) == np.unravel_index(maps.argmin(), maps.shape)
                pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(maps)[None], (4, 4))[0].numpy()
                back = ends[0] + (ends[1] - ends[0]) * (small / 255)
                assert np.abs(back - pooled).max() <= (ends[1] - ends[0]) / 500 + 1e-6
            wanted = set(chosen[i].top().ravel()) | set(chosen[i].top(True).ravel())
            assert sorted(looks[f"{i}/top"]) == sorted(wanted - {-1}) and len(wanted) > 1
            # Of all channels of the layer, not only of those whose examples are kept.
            for image, answer in zip(looks[f"{i}/top"], looks[f"{i}/answer"], strict=True):
                assert answer == pytest.approx(seen[layer.name][image].max((1, 2)), rel=1e-3, abs=1e-3)
            lists = [chosen[i].lists[name][1].ravel() for name in ("mean", "max", "min")]
            assert sorted(looks[f"{i}/paths"]) == sorted({*np.concatenate([sample, *lists]).tolist()} - {-1})
            for image, mean in zip(looks[f"{i}/paths"], looks[f"{i}/mean"], strict=True):
                assert mean == pytest.approx(seen[layer.name][image].mean((1, 2)), rel=1e-3, abs=1e-3)
        # Of the depths before the last layer, for the same images; random ones are not shown.
        assert set(looks["path/index"]) == set(looks["0/paths"]) | set(looks["1/paths"])
        assert set(looks["shown/index"]) == set(table.shown.tolist())
        for d, depth in enumerate(depths):
            for image, mean in zip(looks["path/index"], looks[f"path/{d}"], strict=True):
                assert mean == pytest.approx(seen[depth.name][image].mean((1, 2)), rel=1e-3, abs=1e-3)
        halves = [
            localize.localize(context, table.for_images(a, b - 1), [n for n in table.images.tolist() if a <= n < b])
            for a, b in ((0, 9), (9, 20))
        ]
        names = ("0/pairs", "0/place", "0/top", "0/answer", "1/top", "1/answer", "1/paths", "1/mean", "path/1")
        for name in names:
            assert np.array_equal(np.concatenate([half[name] for half in halves]), looks[name])
        assert ("shown/jpeg" in looks) == (store == "images") and ("0/jpeg" in looks) == (store == "crops")
        if store == "images":
            start, end = looks["shown/offset"][:2]
            with Image.open(io.BytesIO(looks["shown/jpeg"][start:end].tobytes())) as picture:
                assert max(picture.size) == 48 and not picture.getexif()
        if store == "crops":
            assert len(looks["0/offset"]) == len(looks["0/pairs"]) + 1


def test_the_random_images_depend_on_their_paths_alone() -> None:
    images = tuple(DatasetImage(f"{i}.png", "", i) for i in range(400))
    drawn = localize.path_sample(Dataset(images, {}))
    assert len(set(drawn.tolist())) == localize.PATH_SAMPLE and np.array_equal(drawn, np.sort(drawn))
    backwards = localize.path_sample(Dataset(images[::-1], {}))
    assert {images[i].path for i in drawn} == {images[::-1][i].path for i in backwards}
    assert len(localize.path_sample(Dataset(images[:3], {}))) == 3


def test_default_photographs_are_some_hundreds() -> None:
    dataset = datasets.list_dataset(DataConfig())
    assert 300 <= len(dataset.images) <= 600
    assert len({p.path for p in dataset.images}) == len(dataset.images)
    assert all(dataset.locate(p).is_file() for p in dataset.images)


def png_bomb(path: Path) -> None:
    """A small file that claims to be 60,000 × 60,000."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """One of everything that stands in real folders; names say what must happen."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    (tmp_path / "a" / "deep").mkdir(parents=True)
    rgb.save(tmp_path / "good.jpg")
    rgb.save(tmp_path / "a" / "good.jpg")
    rgb.save(tmp_path / "a" / "deep" / 'quote\'s "two" <script>.png')
    rgb.save(tmp_path / "good new\nline.png")
    rgb.convert("P").save(tmp_path / "good palette.png")
    rgb.convert("RGBA").save(tmp_path / "good alpha.png")
    rgb.convert("CMYK").save(tmp_path / "good cmyk.jpg")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(tmp_path / "good deep.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "good tiny.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / "good turned.jpg", exif=exif)
    (tmp_path / "bad empty.jpg").write_bytes(b"")
    (tmp_path / "bad text.jpg").write_text("not a picture")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "bad short.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    Image.new("RGB", (20_000, 10)).save(tmp_path / "bad long.png")
    png_bomb(tmp_path / "bad bomb.png")
    (tmp_path / "notes.txt").write_text("not listed")
    return tmp_path


def test_odd_files_are_read_rightly_or_skipped_with_a_reason(odd_folder: Path) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(odd_folder)))
    assert len(dataset.images) == 16
    kinds = {
        "bad empty.jpg": "empty file", "bad text.jpg": "not a picture", "bad short.jpg": "cut off",
        "bad link.jpg": "missing, or a broken link", "bad long.png": "too long and thin", "bad bomb.png": "too large",
    }  # fmt: skip
    for item in image_loading.load_images(dataset, range(16), RECIPE):
        name = Path(dataset.images[item.index].path).name
        if name.startswith("bad"):
            assert item.array is None and item.reason.partition(":")[0] == kinds.pop(name)
        else:
            assert item.array is not None and item.array.shape == (3, 32, 32), (name, item.reason)
    assert not kinds


def test_odd_files_end_no_pass(odd_folder: Path, tiny: Model) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(odd_folder)))
    layers = [la for la in enumerate_layers(tiny) if la.name == "stem"]
    found, _ = swept(tiny, layers, dataset, range(16), ExamplesConfig(batch=4))
    assert found.tally.images == 11 and len(found.failed) == 5  # the long one just fits a small network
    assert sorted(i for i, _ in found.failed) == [i for i, _ in found.failed]


def test_a_decompression_bomb_costs_no_memory(odd_folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Exception, match=r"large|exceeds"):
        image_loading.read_image(odd_folder / "bad bomb.png", 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_link_back_up_is_walked_once(odd_folder: Path) -> None:
    before = len(datasets.list_dataset(DataConfig("folder", str(odd_folder))).images)
    (odd_folder / "a" / "up").symlink_to(odd_folder)
    assert len(datasets.list_dataset(DataConfig("folder", str(odd_folder))).images) == before


def test_two_files_of_one_name_are_two_photographs(odd_folder: Path) -> None:
    found = [(p.path, p.label) for p in datasets.list_dataset(DataConfig("folder", str(odd_folder))).images]
    assert ("good.jpg", "") in found and ("a/good.jpg", "a") in found
    assert [p for p, _ in found] == sorted(p for p, _ in found)


def test_sixteen_bits_are_scaled_not_clipped(odd_folder: Path) -> None:
    image = np.asarray(image_loading.read_image(odd_folder / "good deep.png", 3))
    assert image[0, 0].max() == 0 and 225 < image[-1, -1].max() < 240


RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)


def of_type(kind: str) -> np.ndarray:
    """The ramp from 0 to the top of a type."""
    top = 1 if kind[0] == "f" else np.iinfo(kind).max
    return (RAMP * top).astype(kind)


def written(path: Path, kind: str) -> Path:
    """The ramp as a file: Pillow's own where the suffix is not .tif or .npy."""
    if path.suffix == ".npy":
        np.save(path, of_type(kind))
    elif path.suffix == ".tif":
        tifffile.imwrite(path, of_type(kind), photometric="minisblack", byteorder=">" if "big" in path.name else "<")
    else:
        Image.fromarray(of_type(kind)).save(path, irreversible=False)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("a.tif", "big.tif") for kind in
          ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")),
        *(("a" + suffix, kind) for suffix in (".png", ".pgm", ".jp2") for kind in ("uint8", "uint16")),
    ],
)  # fmt: skip
def test_the_type_of_a_file_scales_its_values(tmp_path: Path, name: str, kind: str) -> None:
    if name.endswith(".jp2") and not image_formats.can_decode(image_formats.identify(b"\xff\x4f\xff\x51")):
        pytest.skip("no JPEG 2000 here")
    path = written(tmp_path / name, kind)
    grey, rgb = (np.asarray(image_loading.read_image(path, channels), np.float32) for channels in (1, 3))
    assert rgb.shape == (48, 64, 3) and grey.squeeze().shape == (48, 64)
    # As many levels as there are, rounded to no fewer than the file's own.
    close = {
        "rtol": 0,
        "atol": 0.5 if kind == "uint8" else 2.1 if kind == "int8" else 0.13 if kind == "float16" else 0.01,
    }
    assert np.allclose(grey.squeeze(), RAMP * 255, **close) or kind == "uint8"
    assert np.allclose(rgb, grey.reshape(48, 64, 1), rtol=0, atol=1e-4)
    if kind == "uint8":
        assert np.array_equal(grey.squeeze(), of_type(kind))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_dark_and_bright_planes_keep_their_ratio(tmp_path: Path, suffix: str) -> None:
    """No image is scaled by its own maximum: 200 of 65,535 is dark, beside 300 and beside 60,000."""
    expected = []
    for value in (200, 300, 60_000):
        Image.fromarray(np.full((20, 20), value, np.uint16)).save(tmp_path / f"{value:05d}{suffix}")
        expected.append(value / 65535 * 255)
    dataset = datasets.list_dataset(DataConfig("folder", str(tmp_path)))
    for channels in (1, 3):
        recipe = Preprocessing((16, 16), 18, (0.5,) * channels, (0.25,) * channels)
        found = [item.array for item in image_loading.load_images(dataset, range(3), recipe)]
        assert [a.shape for a in found if a is not None] == [(channels, 16, 16)] * 3
        assert np.allclose([a.mean() for a in found if a is not None], expected, rtol=1e-5)


def test_bits_alpha_and_white_that_is_zero(tmp_path: Path) -> None:
    step = np.repeat([[0, 1]], 8, 0).repeat(4, 1).astype(np.uint8)
    Image.fromarray(step * 255).convert("1").save(tmp_path / "1.png")
    Image.fromarray(step * 255).convert("1").save(tmp_path / "1.tif")
    Image.fromarray(step * 255).save(tmp_path / "4.png", bits=4)
    Image.merge("LA", [Image.fromarray(step * 255), Image.fromarray(255 - step * 155)]).save(tmp_path / "la.png")
    for name, values in (("8", step * 255), ("16", step * np.uint16(65535)), ("f", step.astype(np.float32))):
        tifffile.imwrite(tmp_path / f"white {name}.tif", values, photometric="miniswhite")
    for path in sorted(tmp_path.iterdir()):
        grey = np.asarray(image_loading.read_image(path, 1)).squeeze()
        assert np.array_equal(grey, (1 - step if "white" in path.name else step) * 255), path.name
    # Transparent pixels are seen on white.
    Image.merge("LA", [Image.fromarray(step * 0), Image.fromarray(step * 255)]).save(tmp_path / "la.png")
    assert np.array_equal(np.asarray(image_loading.read_image(tmp_path / "la.png", 1)), 255 - step * 255)


def test_twelve_bits_are_twelve_bits() -> None:
    assert multiband.to_levels(np.array([0, 4095], np.uint16), 4095).tolist() == [0, 255]


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("kind", ["uint16", "float32", "float64"])
def test_colours_of_more_than_eight_bits(tmp_path: Path, kind: str, planar: bool) -> None:
    """Pillow reads no floats in colour, and takes the bytes of 16-bit planes for values of their own."""
    colours = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 0.25)], -1)
    values = (colours * (65535 if kind == "uint16" else 1)).astype(kind)
    planes = {"planarconfig": "separate", "photometric": "rgb"} if planar else {"photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", values.transpose(2, 0, 1).copy() if planar else values, **planes)
    assert np.abs(np.asarray(image_loading.read_image(tmp_path / "a.tif", 3), np.float32) - colours * 255).max() <= 1
    grey = np.asarray(image_loading.read_image(tmp_path / "a.tif", 1), np.float32).squeeze()
    assert np.abs(grey - colours @ [0.299, 0.587, 0.114] * 255).max() <= 1.5


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (RAMP * 255, "floats from 0 to 255, and floats must lie in [0, 1]"),
        (RAMP - 0.5, "floats from -0.5 to 0.5, and floats must lie in [0, 1]"),
        (np.where(RAMP > 0.5, np.nan, RAMP), "NaN or infinity"),
        (np.where(RAMP > 0.5, np.inf, RAMP), "NaN or infinity"),
        ((RAMP * 100 - 50).astype(np.int16), "negative integers, down to -50"),
        ((RAMP * 100 - 50).astype(np.int32), "negative integers, down to -50"),
        ((RAMP * 100 - 50).astype(np.int8), "negative integers, down to -50"),
        (RAMP.astype(np.complex64), "of type complex64"),
    ],
)
@pytest.mark.parametrize("channels", [1, 5])
def test_values_outside_their_range_are_refused(tmp_path: Path, values: np.ndarray, reason: str, channels: int) -> None:
    if channels == 5:
        values = np.stack([values] * 5)
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
    dataset = Dataset((DatasetImage("a.tif", "", 0),), {"": str(tmp_path)})
    recipe = Preprocessing((32, 32), 36, (0.5,) * channels, (0.25,) * channels)
    assert next(image_loading.load_images(dataset, [0], recipe)).reason == f"unsupported values: {reason}"
    # What rounding does to floats is no reason.
    just = np.stack([RAMP * 1.00001] * channels).squeeze().astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", just, photometric="minisblack")
    item = next(image_loading.load_images(dataset, [0], recipe))
    assert item.array is not None and item.array.max() <= 255


@pytest.mark.parametrize("kind", ["bool", "uint8", "uint16", "int16", "uint32", "float16", "float32"])
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
@pytest.mark.parametrize("first", [True, False])
def test_bands_are_scaled_by_the_same_rules(tmp_path: Path, kind: str, suffix: str, first: bool) -> None:
    shares = np.stack([RAMP * share for share in (1, 0.5, 0.1, 0.01, 0)], 0 if first else -1)
    values = shares > 0.25 if kind == "bool" else (shares * (1 if kind[0] == "f" else np.iinfo(kind).max)).astype(kind)
    if suffix == ".npy":
        np.save(tmp_path / "a.npy", values)
    elif kind == "bool":
        pytest.skip("bits are written as one image")
    else:
        tifffile.imwrite(tmp_path / f"a{suffix}", values, photometric="minisblack")
    found = np.asarray(image_loading.read_image(tmp_path / f"a{suffix}", 5), np.float32)
    expected = (shares > 0.25 if kind == "bool" else shares) * np.float32(255)
    close = 1 if kind == "uint8" else 0.13 if kind == "float16" else 0.01
    assert found.shape == (48, 64, 5)
    assert np.abs(found - (expected.transpose(1, 2, 0) if first else expected)).max() <= close


def test_images_of_many_depths_go_through_the_pass_together(tmp_path: Path, tiny: Model) -> None:
    """Bytes stay what they were in a batch with floats, and what is shown is in 8 bits."""
    rng = np.random.default_rng(0)
    grey = rng.random((40, 40)).astype(np.float32)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "0.png")
    Image.fromarray(grey).save(tmp_path / "1.tif")
    Image.fromarray((grey * 65535).astype(np.uint16)).save(tmp_path / "2.png")
    tifffile.imwrite(tmp_path / "3.tif", np.stack([grey, grey / 2, grey / 4], -1), photometric="rgb")
    Image.fromarray((grey * 0.1).astype(np.float32)).save(tmp_path / "4.tif")
    dataset = datasets.list_dataset(DataConfig("folder", str(tmp_path)))
    recipe = tiny.preprocessing
    ((_, batch),) = image_loading.batches(image_loading.load_images(dataset, range(5), recipe), 5, [])
    ((_, alone),) = image_loading.batches(image_loading.load_images(dataset, [0], recipe), 1, [])
    assert batch.dtype == np.float32 and alone.dtype == np.uint8 and np.array_equal(batch[:1], alone)
    assert np.abs(batch[1] - batch[2]).max() < 0.01 and np.abs(batch[1] * 0.1 - batch[4]).max() < 0.01
    layers = [la for la in enumerate_layers(tiny) if la.name in ("stem", "late")]
    config = ExamplesConfig(k=5, batch=5, sample=5)
    found, ranges = swept(tiny, layers, dataset, range(5), config)
    check(found, ranges, seen_by(tiny, layers, dataset, 5), dataset, 5)
    chosen = localize.select_examples(found, [(la, range(3)) for la in layers], dataset, config)
    table = localize.SecondPassIndex.of(chosen, np.zeros(0, np.int32))
    for store in ("images", "crops"):
        context = PassContext(tiny, layers, dataset, dataclasses.replace(config, store=store))
        looks = localize.localize(context, table, range(5))
        if store == "images":
            offset = looks["shown/offset"]
            for i, expected in ((1, 127), (2, 127), (3, 80), (4, 13)):
                with Image.open(io.BytesIO(looks["shown/jpeg"][offset[i] : offset[i + 1]].tobytes())) as picture:
                    assert picture.size == (40, 40) and abs(np.asarray(picture.convert("L")).mean() - expected) < 4


def test_pillows_settings_do_not_matter_and_are_left_as_they_were(
    odd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of a user's network may set them: half a file is no photograph, and the limit is that of data.max_pixels."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    names = ("bad short.jpg", "good.jpg", "a/good.jpg")
    dataset = Dataset(tuple(DatasetImage(name, "", i) for i, name in enumerate(names)), {"": str(odd_folder)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short, *good = image_loading.load_images(dataset, range(3), RECIPE, threads=3)
    assert short.array is None and short.reason.startswith("cut off")
    assert all(item.array is not None for item in good)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True and Image.MAX_IMAGE_PIXELS == 5


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_limit_of_pixels_can_be_set(tmp_path: Path, channels: int) -> None:
    if channels == 5:
        np.save(tmp_path / "0.npy", np.zeros((5, 30, 40), np.float32))
        tifffile.imwrite(tmp_path / "1.tif", np.zeros((30, 40, 5), np.uint8), photometric="minisblack")
    else:
        Image.new("L", (40, 30)).save(tmp_path / "0.png")
        tifffile.imwrite(tmp_path / "1.tif", np.zeros((30, 40, 3), np.float64), photometric="rgb")
    recipe = Preprocessing((16, 16), 18, (0.5,) * channels, (0.25,) * channels)

    def reasons(limit: int | None) -> list[str]:
        config = DataConfig("folder", str(tmp_path), max_pixels=limit)
        dataset = pickle.loads(pickle.dumps(datasets.list_dataset(config, channels)))  # as workers get it
        return [item.reason for item in image_loading.load_images(dataset, range(2), recipe)]

    assert reasons(1199) == ["too large: 40 × 30 pixels; data.max_pixels allows 1,199"] * 2
    assert reasons(1200) == reasons(None) == ["", ""]


def test_more_pixels_than_pillow_allows_by_itself(tmp_path: Path) -> None:
    """Its own limit is 179 million, and it warns above 89: neither counts below data.max_pixels."""
    Image.new("1", (15_000, 12_000)).save(tmp_path / "0.png")
    default = DataConfig("folder", str(tmp_path))
    reasons = []
    for config in (default, dataclasses.replace(default, max_pixels=180_000_000)):
        reasons.append(
            next(
                image_loading.load_images(datasets.list_dataset(config), [0], Preprocessing((8, 8), 8, (0.5,), (0.5,)))
            ).reason
        )
    assert reasons == ["too large: 15000 × 12000 pixels; data.max_pixels allows 64,000,000", ""]


def test_exif_turns_the_picture(odd_folder: Path) -> None:
    assert image_loading.read_image(odd_folder / "good turned.jpg", 3).size == (40, 60)


def test_grey_networks_get_grey_pictures(odd_folder: Path) -> None:
    grey = Preprocessing((32, 32), 36, (0.5,), (0.25,))
    assert image_loading.preprocess(image_loading.read_image(odd_folder / "good.jpg", 1), grey).shape == (1, 32, 32)


def test_the_input_is_torchvisions_own(photo_folder: Path) -> None:
    from torchvision.transforms import v2

    image = image_loading.read_image(next(photo_folder.rglob("07.png")), 3)
    recipe = Preprocessing((32, 32), 36, (0.5,) * 3, (0.25,) * 3, "bicubic")
    theirs = v2.Compose([v2.Resize(36, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)])(image)
    assert np.array_equal(image_loading.preprocess(image, recipe), np.asarray(theirs).transpose(2, 0, 1))


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="no image at all"):
        datasets.list_dataset(DataConfig("folder", str(tmp_path)))
    with pytest.raises(AtlasError, match="no such folder"):
        datasets.list_dataset(DataConfig("folder", str(tmp_path / "nowhere")))
    with pytest.raises(AtlasError, match=r"needs data\.root"):
        datasets.list_dataset(DataConfig("folder"))
    with pytest.raises(AtlasError, match="Nearest: folder"):
        datasets.list_dataset(DataConfig("folde"))


def test_all_unreadable_is_no_crash(tmp_path: Path, tiny: Model) -> None:
    (tmp_path / "x.jpg").write_text("no")
    dataset = Dataset((DatasetImage("x.jpg", "", 0),), {"": str(tmp_path)})
    layers = [la for la in enumerate_layers(tiny) if la.name == "stem"]
    found, _ = swept(tiny, layers, dataset, range(1), ExamplesConfig())
    assert found.failed == ((0, "not a picture"),) and (topk.decode(found.tops["max"])[1] == -1).all()
    chosen = localize.select_examples(found, [(layers[0], range(3))], dataset, ExamplesConfig())[0]
    assert not len(chosen.pairs())


@pytest.mark.long
@pytest.mark.photos
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the ImageNet photographs are not beside this checkout")
def test_the_default_network_is_right_on_imagenet_photographs() -> None:
    """85.3 % with the right input recipe; ImageNet's usual mean and std lose about 8 points."""
    model = fold(load_model(ModelConfig("package", "efficientnet_lite0")).to("cpu"))
    dataset = datasets.list_dataset(DataConfig("folder", str(PHOTOS)))
    labels = sorted({p.label for p in dataset.images})
    assert len(labels) == 1000
    right, failed = 0, []
    loaded = image_loading.load_images(dataset, range(len(dataset.images)), model.preprocessing)
    with torch.no_grad():
        for items, batch in image_loading.batches(loaded, 50, failed):
            images = (torch.from_numpy(batch).float() / 255).contiguous(memory_format=torch.channels_last)
            logits = model.module(model.normalize(images))
            truth = [labels.index(dataset.images[item.index].label) for item in items]
            right += int((logits.argmax(1) == torch.tensor(truth)).sum())
    logging.getLogger(__name__).info("right on %d of 1000 photographs", right)  # shown by --log-cli-level=INFO
    assert not failed and right >= 840
