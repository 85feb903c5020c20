"""Shards and the store: whole or not at all, chunk by chunk the same, and honest about what is wrong."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline
from pipeline.core import atomic_io, hashing
from pipeline.core.errors import AtlasError
from pipeline.core.metric_specs import IMAGE_METRICS, RATIO_METRICS, RELATION_METRICS
from pipeline.effects.results import ConnectionAttribution, EffectsResult
from pipeline.layers.connections import Connectivity
from pipeline.layers.dataflow import Dataflow
from pipeline.layers.finding import Layer, ReceptiveField
from pipeline.store import hdf5, shards, writer
from pipeline.store.writer import Content

LAYER = Layer("a/b..c", "conv", "a", 1, "out", "maps", 9, 7, 7, 1.0, ReceptiveField((11, 11), (4, 4), (-5, -5)))


def pictures(seed: int, count: int, variants: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (count, variants)
    return {
        "images": rng.integers(0, 256, (*shape, 16, 16, 3), np.uint8),
        "trace": rng.random((*shape, 4), np.float32),
        "status": np.full(shape, "converged", object),
        "reason": np.full(shape, "", object),
        "seed": rng.integers(0, 2**62, shape),
        "steps": np.full(shape, 4, np.int32),
        **{k: rng.random(shape, np.float32) for k in ("activation", "robust", "start", "seconds")},
    }


@pytest.mark.skipif(not hdf5.compresses_alike(), reason="HDF5 and Python have different versions of zlib")
@pytest.mark.parametrize("shape", [(40, 1, 64, 63, 3), (3, 2, 9, 9, 1), (2, 1, 600, 600, 3)])
def test_images_compressed_beforehand_give_the_same_file(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    # Noise, which takes more space compressed than before; smooth images; a constant one.
    images = rng.integers(0, 256, shape, np.uint8)
    images[1::2] = images[1::2].astype(np.uint32).cumsum(3) >> 8
    images[0, 0] = 0
    arrays = {"images": images, "mask": images[..., 0].copy(), "trace": rng.random((shape[0], 5))}
    chunks = {
        name: [hdf5.compressed_chunk(pixels) for variants in arrays[name] for pixels in variants]
        for name in ("images", "mask")
    }
    assert hdf5.to_bytes({"a": 1}, arrays, chunks=chunks) == hdf5.to_bytes({"a": 1}, arrays)
    assert np.array_equal(hdf5.from_bytes(hdf5.to_bytes({}, arrays, chunks=chunks))["images"], images)


def measured(seed: int, count: int, variants: int = 1) -> dict[str, np.ndarray]:
    """What a shard holds besides since pictures are measured."""
    rng = np.random.default_rng(seed)
    found = {m.name: rng.random((count, variants), np.float32) for m in IMAGE_METRICS}
    return found | {"response": rng.normal(size=(count, variants, LAYER.channels)).astype(np.float16)}


def write_shard(
    folder: Path, channels: list[int], seed: int, digest: str = "d", variants: int = 1, **more: np.ndarray
) -> dict[str, np.ndarray]:
    arrays = {"channels": np.array(channels, np.int32), **pictures(seed, len(channels), variants), **more}
    attributes = {"digest": digest, "objective": "channel", "natural": "mean", "preset": "test", "layer": LAYER.name}
    shards.write(folder / f"{channels[0]}-{digest}.h5", attributes, arrays)
    return arrays


def content(channels: tuple[int, ...]) -> Content:
    return Content("run", "net", "w" * 64, "a: 1\n", (), (32, 32), [(LAYER, channels)])


def test_budgets_and_the_values_reached_come_back(tmp_path: Path) -> None:
    values = np.array([[[0.04, 0.2]], [[0.06, 0.3]]], np.float32)
    arrays = {"channels": np.array([4, 0], np.int32), **pictures(1, 2), "budget_value": values}
    attributes = {"digest": "d", "objective": "channel", "natural": "mean", "preset": "test", "layer": LAYER.name}
    more = {"budget_names": ["tv", "my.py:Own"], "budget_target": np.array([0.04, 0.25], np.float32)}
    shards.write(tmp_path / "s" / "x.h5", attributes | more, arrays)
    write_shard(tmp_path / "s", [1], 2, "other")
    found, plain = shards.find(tmp_path / "s", "d"), shards.find(tmp_path / "s", "other")
    kinds = {(LAYER.name, "tv"): found, (LAYER.name, "plain"): plain}
    writer.consolidate(tmp_path / "atlas.h5", content((0, 1, 4)), kinds)
    assert writer.verify(tmp_path / "atlas.h5", {LAYER.name: (0, 1, 4)})  # channel 1 is missing by "tv", and so on
    with pipeline.open_atlas(tmp_path) as atlas:
        first, second = atlas["a/b..c"].budgets("tv")
        assert (first.name, second.name) == ("tv", "my.py:Own") and first.target == pytest.approx(0.04)
        assert first.value.ravel().tolist() == pytest.approx([0.06, np.nan, 0.04], nan_ok=True)
        assert second.value.ravel().tolist() == pytest.approx([0.3, np.nan, 0.2], nan_ok=True)
        assert atlas["a/b..c"].budgets("plain") == [] and "budget_value" not in atlas["a/b..c"].measurements("tv")


def test_all_layers_of_the_network_come_back(tmp_path: Path) -> None:
    other = Layer("é<b>", "linear", "x", 1, "out", "vector", 10, 1, 1, 1.0)
    flow = Dataflow((-1, 2), ((0, -1), (1, 2, 0)))
    whole = dataclasses.replace(content((0,)), network_layers=(LAYER, other), dataflow=flow)
    writer.consolidate(tmp_path / "atlas.h5", whole, {})
    with pipeline.open_atlas(tmp_path) as atlas:
        first, second = atlas.network_layers
        assert atlas.network_joins == flow.joins
    assert (first.source, second.source) == flow.sources
    writer.consolidate(tmp_path / "atlas.h5", dataclasses.replace(whole, dataflow=None), {})
    with pipeline.open_atlas(tmp_path) as atlas:  # as older files
        assert [layer.source for layer in atlas.network_layers] == [None, None] and atlas.network_joins == ()
    assert (first.name, first.kind, first.channels, first.map_size) == (LAYER.name, "conv", 9, (7, 7))
    assert (second.name, second.kind, second.channels, second.map_size) == ("é<b>", "linear", 10, (1, 1))
    writer.consolidate(tmp_path / "atlas.h5", content((0,)), {})
    with pipeline.open_atlas(tmp_path) as atlas:
        assert atlas.network_layers == ()


def test_masks_come_back_and_pictures_without_one_are_opaque(tmp_path: Path) -> None:
    masks = np.random.default_rng(3).integers(0, 256, (2, 2, 16, 16), np.uint8)
    arrays = write_shard(tmp_path / "s", [4, 0], 1, variants=2, mask=masks)
    write_shard(tmp_path / "s", [2], 2, variants=2)  # of a former version
    found = shards.find(tmp_path / "s", "d")
    writer.consolidate(tmp_path / "atlas.h5", content((0, 2, 4, 8)), {(LAYER.name, "test"): found})
    (part,) = writer.render_groups(tmp_path / "atlas.h5").values()
    again = tmp_path / "again"
    again.mkdir()
    # Once more from the atlas itself, as after `atlas compact`.
    writer.consolidate(again / "atlas.h5", content((0, 2, 4, 8)), {(LAYER.name, "test"): [part]})
    for folder in (tmp_path, again):
        with pipeline.open_atlas(folder) as atlas:
            layer = atlas["a/b..c"]
            assert np.array_equal(layer.mask(4, variant=1), masks[0, 1])
            assert np.array_equal(layer.mask(0), masks[1, 0]) and "mask" not in layer.measurements()
            assert (layer.mask(2) == 255).all() and (layer.mask(8) == 255).all()
            rgba = layer.transparent(4, variant=1)
            assert np.array_equal(rgba[..., :3], arrays["images"][0, 1]) and rgba.shape == (16, 16, 4)
            assert "mask" not in atlas.units()
    writer.consolidate(tmp_path / "old.h5", content((2,)), {(LAYER.name, "test"): found[:1]})
    with pipeline.open_atlas(tmp_path / "old.h5") as atlas:
        layer = atlas["a/b..c"]
        assert layer.masks() is None and (layer.mask(2) == 255).all() and (layer.transparent(2)[..., 3] == 255).all()


def test_a_damaged_mask_is_found_before_it_is_copied(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", [0, 1], 1, mask=np.zeros((2, 1, 16, 16), np.uint8))
    (path,) = (tmp_path / "s").glob("*.h5")
    with h5py.File(path) as file:
        info = hdf5.dataset(file, "mask").id.get_chunk_info(1)
    data = bytearray(path.read_bytes())
    data[info.byte_offset + info.size // 2] ^= 1
    path.write_bytes(data)
    (shard,) = shards.find(tmp_path / "s", "d")
    with pytest.raises(shards.DamagedShardError):
        writer.consolidate(tmp_path / "atlas.h5", content((0, 1)), {(LAYER.name, "test"): [shard]})
    assert shard.damage()


def test_pictures_come_back_bit_by_bit_from_several_shards(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "s", [0, 4], 1)
    second = write_shard(tmp_path / "s", [2, 8], 2)
    found = shards.find(tmp_path / "s", "d")
    writer.consolidate(tmp_path / "atlas.h5", content((0, 2, 4, 8)), {(LAYER.name, "test"): found})
    with pipeline.open_atlas(tmp_path) as atlas:
        layer = atlas["a/b..c"]
        assert layer.channels.tolist() == [0, 2, 4, 8] and layer.receptive_field == (11, 11)
        for channel, arrays, i in ((0, first, 0), (4, first, 1), (2, second, 0), (8, second, 1)):
            assert np.array_equal(layer.image(channel), arrays["images"][i, 0])
            row = layer.row(channel)
            for key in ("activation", "seed", "status"):
                assert layer.measurements()[key][row, 0] == arrays[key][i, 0]
        table = atlas.units()
        assert list(table["channel"]) == [0, 2, 4, 8] and (table["status"] == "converged").all()
        with pytest.raises(AtlasError, match="Valid: 0, 2, 4, 8"):
            layer.image(3)
        with pytest.raises(AtlasError, match=r"Nearest: a/b\.\.c"):
            atlas["a/b"]
    assert writer.verify(tmp_path / "atlas.h5", {LAYER.name: [0, 2, 4, 8]}) == []


@pytest.mark.parametrize(("compared", "depth"), [("", "second"), ("second", "first")])
def test_variants_agree_in_another_layer_than_their_diversity_term_compares(
    tmp_path: Path, compared: str, depth: str
) -> None:
    """The own layer's answers say that variants differ, the last depth that no term compares that they are equal."""
    rng = np.random.default_rng(0)
    first, second = (np.repeat(rng.normal(size=(2, 1, width)), 2, 1) for width in (3, 5))
    own = rng.normal(size=(2, 2, LAYER.channels))
    if compared:
        second = rng.normal(size=(2, 2, 5))
    arrays = {"channels": np.array([0, 4], np.int32), **pictures(1, 2, 2), **measured(1, 2, 2)}
    arrays["path_means"] = np.concatenate([first, second, own], 2).astype(np.float16)
    attributes = {"digest": "d", "objective": "channel", "natural": "mean", "preset": "test", "layer": LAYER.name}
    attributes["path_layers"] = ["first", "second", LAYER.name]
    shards.write(tmp_path / "s" / "x.h5", attributes, arrays)
    depths = [dataclasses.replace(LAYER, name=name, channels=n) for name, n in (("first", 3), ("second", 5))]
    term = f"layer: {compared or 'null'}"
    config = f"render: {{name: test, couplings: {{diversity: {{weight: 1.0, {term}}}}}}}\n"
    found = dataclasses.replace(content((0, 4)), config_yaml=config, network_layers=(*depths, LAYER))
    writer.consolidate(tmp_path / "atlas.h5", found, {(LAYER.name, "test"): shards.find(tmp_path / "s", "d")})
    with pipeline.open_atlas(tmp_path) as atlas:
        numbers = atlas[LAYER.name].measurements()
        name, means = atlas[LAYER.name].depth_activations()
    assert name == depth and means == pytest.approx(first if compared else second, abs=1e-2)
    assert numbers["depth_agreement"] == pytest.approx(1, abs=1e-3) and (numbers["agreement"] < 0.9).all()


def test_paths_of_former_versions_and_of_other_depths_are_not_known(tmp_path: Path) -> None:
    folder, path = tmp_path / "s", tmp_path / "atlas.h5"
    write_shard(folder, [0], 1)  # of a former version
    means = {}
    for channel, names in ((2, ["first", LAYER.name]), (4, ["other", LAYER.name])):
        means[channel] = np.random.default_rng(channel).normal(size=(1, 1, 12)).astype(np.float16)
        arrays = {"channels": np.array([channel], np.int32), **pictures(channel, 1), "path_means": means[channel]}
        attributes = {"digest": "d", "objective": "channel", "natural": "mean", "preset": "test", "layer": LAYER.name}
        shards.write(folder / f"{channel}-d.h5", attributes | {"path_layers": names}, arrays)
    found = shards.find(folder, "d")
    for parts in (found, None):  # from the shards, and then from the atlas, as after `atlas compact`
        parts = parts or list(writer.render_groups(path).values())
        writer.consolidate(path, content((0, 2, 4)), {(LAYER.name, "test"): parts})
        with h5py.File(path) as file:
            group = hdf5.group(file, f"layers/{shards.safe_name(LAYER.name)}/render/test")
            stored = hdf5.read_array(group, "path_means")
            assert list(group.attrs["path_layers"]) == ["first", LAYER.name]
        assert np.array_equal(stored[1], means[2][0]) and np.isnan(stored[[0, 2]]).all()
        with pipeline.open_atlas(tmp_path) as atlas:
            assert atlas[LAYER.name].path_curves() is None  # there is no dataset pass
            assert "path_means" not in atlas[LAYER.name].measurements()
    assert writer.verify(path, {LAYER.name: (0, 2, 4)}) == []


def test_measures_come_back_and_answers_are_compared(tmp_path: Path) -> None:
    folder, path = tmp_path / "s", tmp_path / "atlas.h5"
    whole = write_shard(folder, [0, 4], 1, variants=2, **measured(1, 2, 2))
    # One of a former version, without measures, and a channel that nobody made.
    write_shard(folder, [2], 2, variants=2)
    writer.consolidate(path, content((0, 2, 4, 8)), {(LAYER.name, "test"): shards.find(folder, "d")})
    with pipeline.open_atlas(path) as atlas:
        layer = atlas[LAYER.name]
        numbers, answers = layer.measurements(), layer.image_activations()
        for name in (metric.name for metric in IMAGE_METRICS):
            assert np.array_equal(numbers[name][[0, 2]], whole[name]) and np.isnan(numbers[name][[1, 3]]).all()
        assert answers is not None and np.array_equal(answers[[0, 2]], whole["response"])
        assert "response" not in numbers and "transfer" not in numbers  # there are no photographs
        own = whole["response"].astype(np.float64)
        own -= own.mean((0, 1))
        cosine = [(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in own]
        assert numbers["agreement"][[0, 2]] == pytest.approx(np.repeat(cosine, 2).reshape(2, 2), abs=1e-4)
        assert np.isnan(numbers["agreement"][[1, 3]]).all()
        table = atlas.units()
        expected = {"agreement", *(metric.name for metric in (*IMAGE_METRICS, *RATIO_METRICS))}
        assert expected <= set(table.columns) and len(table) == 8
    assert [what for where, what in writer.verify(path, {}) if "missing" not in what] == []
    with h5py.File(path, "r+") as file:
        file[f"layers/{shards.safe_name(LAYER.name)}/render/test/saturation"][0, 0] = 1.5
    assert (f"{LAYER.name}/test", "saturation is not between 0 and 1") in writer.verify(path, {})


def test_an_atlas_of_before_the_measures_opens(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", [0, 1], 1)
    path = tmp_path / "atlas.h5"
    writer.consolidate(path, content((0, 1)), {(LAYER.name, "test"): shards.find(tmp_path / "s", "d")})
    with pipeline.open_atlas(path) as atlas:
        numbers = atlas[LAYER.name].measurements()
        later = {metric.name for metric in (*IMAGE_METRICS, *RELATION_METRICS)} - {"spatial_mean"}
        assert not numbers.keys() & later and np.isnan(numbers["mean_ratio"]).all()
        assert np.array_equal(numbers["spatial_mean"], numbers["activation"])
        assert atlas[LAYER.name].image_activations() is None and len(atlas.units()) == 2
    assert writer.verify(path, {LAYER.name: [0, 1]}) == []


def test_connections_come_back_and_those_of_former_versions_open(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    norm, total, strength = rng.normal(size=(3, 9, 4)).astype(np.float32)
    channel = np.tile(np.array([3, 1, 0, -1], np.int32), (9, 1))
    wired = Connectivity("before", channel, norm, total, strength, "sd", ("a.norm", "a.conv"))
    path = tmp_path / "atlas.h5"
    writer.consolidate(path, dataclasses.replace(content((2, 5)), inputs={LAYER.name: wired}), {})
    with pipeline.open_atlas(path) as atlas:
        found = atlas[LAYER.name].connectivity("inputs")
        assert found is not None and atlas[LAYER.name].connectivity("outputs") is None
        assert (found.layer, found.scale, found.approximate) == ("before", "sd", ("a.norm", "a.conv"))
        for name in ("channel", "norm", "sum", "strength"):
            assert np.array_equal(getattr(found, name), getattr(wired, name)[[2, 5]])
    with h5py.File(path, "r+") as file:
        group = hdf5.group(file, f"layers/{shards.safe_name(LAYER.name)}/wiring/inputs")
        del group["strength"], group.attrs["scale"], group.attrs["approximate"]
    with pipeline.open_atlas(path) as atlas:
        found = atlas[LAYER.name].connectivity("inputs")
        assert found is not None and (found.scale, found.approximate) == ("", ())
        assert np.array_equal(found.strength, norm[[2, 5]])
        assert found.kernel is None and found.residual is None and found.attribution is None
        assert not found.linearized and found.path == found.bypassed == found.gated == ()


def test_kernels_paths_and_attributions_of_connections_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    norm, total, strength = rng.normal(size=(3, 9, 3)).astype(np.float32)
    channel = np.tile(np.array([3, 1, -1], np.int32), (9, 1))
    kernel, residual = rng.normal(size=(9, 3, 5, 3)).astype(np.float16), norm + 1
    paths = {"path": ("a", "b"), "bypassed": ("b",), "gated": ("c",), "linearized": True}
    wired = Connectivity("before", channel, norm, total, strength, "sd", (), kernel, residual=residual, **paths)
    value = np.array([[1, -3, 0, 2], [0, 0, 0, 4]], np.float32)
    effects = EffectsResult(
        "head", np.zeros(0, np.int32), np.zeros(0, np.int32), {},
        connections={LAYER.name: ConnectionAttribution("before", value, 7)},
    )  # fmt: skip
    before = dataclasses.replace(LAYER, name="before", channels=4)
    both = dataclasses.replace(
        content((2, 5)), layers=[(before, (0, 3)), (LAYER, (2, 5))], inputs={LAYER.name: wired}, effects=effects
    )
    path = tmp_path / "atlas.h5"
    writer.consolidate(path, both, {})
    with pipeline.open_atlas(path) as atlas:
        layer = atlas[LAYER.name]
        found, strongest = layer.connectivity("inputs"), layer.attributed_connections("inputs")
        assert found is not None and found.kernel is not None and found.residual is not None
        assert np.array_equal(found.kernel, kernel[[2, 5]]) and np.array_equal(found.residual, residual[[2, 5]])
        assert (found.path, found.bypassed, found.gated, found.linearized) == (("a", "b"), ("b",), ("c",), True)
        assert found.attribution is not None
        assert np.array_equal(found.attribution, np.array([[2, -3, np.nan], [4, 0, np.nan]]), equal_nan=True)
        assert strongest is not None and (strongest.layer, strongest.images) == ("before", 7)
        assert strongest.channel.tolist() == [[1, 3, 0, -1], [3, -1, -1, -1]]
        assert strongest.value.tolist() == [[-3, 2, 1, 0], [4, 0, 0, 0]]
        back = atlas["before"].attributed_connections("outputs")
        assert (
            back is not None and back.channel.tolist() == [[2, -1], [5, 2]] and back.value.tolist() == [[1, 0], [4, 2]]
        )
        assert layer.connected_layers == ("before",) and atlas["before"].connected_layers == (LAYER.name,)


def test_a_lost_picture_is_marked_and_reported(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", [0], 1)
    writer.consolidate(tmp_path / "atlas.h5", content((0, 1)), {(LAYER.name, "test"): shards.find(tmp_path / "s", "d")})
    with pipeline.open_atlas(tmp_path) as atlas:
        numbers = atlas[LAYER.name].measurements()
        assert numbers["status"][:, 0].tolist() == ["converged", "missing"] and np.isnan(numbers["activation"][1, 0])
    assert "1 feature visualizations are missing" in writer.verify(tmp_path / "atlas.h5", {LAYER.name: [0, 1]})[0][1]
    assert any("2 planned channels" in w for _, w in writer.verify(tmp_path / "atlas.h5", {LAYER.name: [0, 5, 6]}))


def test_one_flipped_byte_is_found(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", [0, 1, 2], 1)
    path = tmp_path / "atlas.h5"
    writer.consolidate(path, content((0, 1, 2)), {(LAYER.name, "test"): shards.find(tmp_path / "s", "d")})
    with h5py.File(path) as file:
        item = hdf5.dataset(file, f"layers/{shards.safe_name(LAYER.name)}/render/test/images")
        at = item.id.get_chunk_info_by_coord((1, 0, 0, 0, 0)).byte_offset
    data = bytearray(path.read_bytes())
    data[at + 40] ^= 1
    path.write_bytes(data)
    wrong = writer.verify(path, {})
    assert len(wrong) == 1 and wrong[0][0].endswith("images") and "can't be read" in wrong[0][1]


def test_images_carry_what_viewers_look_for(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", [0], 1)
    writer.consolidate(tmp_path / "atlas.h5", content((0,)), {(LAYER.name, "test"): shards.find(tmp_path / "s", "d")})
    with h5py.File(tmp_path / "atlas.h5") as file:
        images = hdf5.dataset(file, f"layers/{shards.safe_name(LAYER.name)}/render/test/images")
        assert images.attrs["CLASS"] == b"IMAGE" and images.chunks == (1, 1, 16, 16, 3)
        assert images.compression == "gzip" and images.fletcher32
        assert file.attrs["schema"] == "neuron-atlas" and file.attrs["schema_version"] == 5


def test_only_shards_of_the_right_digest_count(tmp_path: Path) -> None:
    write_shard(tmp_path, [0], 1, "old")
    write_shard(tmp_path, [1], 1, "new")
    (tmp_path / "torn.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 100)
    found = shards.find(tmp_path, "new")
    assert [s.path.name for s in found] == ["1-new.h5"]


def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    shards.write(path, {"digest": "1"}, {"a": np.arange(3)})
    with pytest.raises(RuntimeError), hdf5.create_file(path) as file:
        file["b"] = 1
        raise RuntimeError
    shard = shards.read(path)
    assert shard is not None and shard.arrays()["a"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]


def test_killed_writers_leave_whole_shards_only(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import sys, itertools, numpy as np
        from pathlib import Path
        from pipeline.store import shards
        for i in itertools.count():
            shards.write(Path(sys.argv[1], f"{i}.h5"), {"digest": "d"}, {"a": np.full(30000, i)})
    """)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)])
        while len(list(folder.glob("*.h5"))) < 5:
            time.sleep(0.02)
        time.sleep(0.005 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        files = sorted(folder.glob("*.h5"))
        for path in files:
            shard = shards.read(path)
            assert shard is not None and (shard.arrays()["a"] == int(path.stem)).all()
        atomic_io.remove_temporary_files(folder)
        assert not list(folder.glob("*.tmp-*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AtlasError, match="The disk is full"):
        shards.write(tmp_path / "x.h5", {}, {"a": np.arange(3)})
    assert not list(tmp_path.iterdir())


@given(st.text(min_size=0, max_size=30))
def test_safe_names_stay_in_their_folder(name: str) -> None:
    safe = shards.safe_name(name)
    assert safe and "/" not in safe and safe not in (".", "..") and not safe.startswith(".")
    assert Path("root", safe).parent == Path("root")


@given(st.text(max_size=12), st.text(max_size=12))
def test_safe_names_are_as_different_as_the_names(a: str, b: str) -> None:
    assert (shards.safe_name(a) == shards.safe_name(b)) == (a == b)


def test_module_paths_stay_readable() -> None:
    assert shards.safe_name("blocks.3.1.conv_dw") == "blocks.3.1.conv_dw"
    assert shards.safe_name("../../x") == "~2e.~2f..~2fx"


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert hashing.digest_of({"a": 1, "b": [2]}) == hashing.digest_of({"b": [2], "a": 1})
    assert hashing.digest_of({"a": 1}) != hashing.digest_of({"a": 2})


def test_what_is_no_atlas_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="There is no atlas"):
        pipeline.open_atlas(tmp_path)
    (tmp_path / "atlas.h5").write_text("no")
    with pytest.raises(AtlasError, match="can't be opened"):
        pipeline.open_atlas(tmp_path)
    (tmp_path / "atlas.h5").unlink()
    shards.write(tmp_path / "atlas.h5", {}, {"a": np.arange(2)})
    with pytest.raises(AtlasError, match="not a neuron atlas"):
        pipeline.open_atlas(tmp_path)
    with h5py.File(tmp_path / "atlas.h5", "w") as file:
        file.attrs.update({"schema": "neuron-atlas", "schema_version": 99})
        file.create_group("layers")
    with pytest.raises(AtlasError, match=r"schema version 99; this program reads up to 5\. Update it"):
        pipeline.open_atlas(tmp_path)
    with h5py.File(tmp_path / "atlas.h5", "a") as file:
        file.attrs["schema_version"] = 1
    with pytest.raises(AtlasError, match=r"schema version 1; this program reads 2 to 5\..*make it again"):
        pipeline.open_atlas(tmp_path)


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="h5dump is not installed")
def test_h5dump_reads_it(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", [0], 1)
    writer.consolidate(tmp_path / "atlas.h5", content((0,)), {(LAYER.name, "test"): shards.find(tmp_path / "s", "d")})
    subprocess.run(["h5dump", "-H", tmp_path / "atlas.h5"], check=True, capture_output=True)


def test_crop_boxes_stay_inside_and_around_the_unit(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", [0], 1)
    writer.consolidate(tmp_path / "atlas.h5", content((0,)), {(LAYER.name, "test"): shards.find(tmp_path / "s", "d")})
    with pipeline.open_atlas(tmp_path) as atlas:
        layer = atlas[LAYER.name]
        # Unit 3 sees rows 3·4 - 5 … 3·4 - 5 + 10 = 7 … 17, whose middle is 12.5.
        assert layer.crop_box(3, 3, min_size=11) == (7, 7, 18, 18)
        assert layer.crop_box(0, 6, min_size=11) == (19, 0, 30, 11)
        assert layer.crop_box(3, 3, min_size=48) == (0, 0, 32, 32)
