"""verify, repair, compact, export: what is wrong is said, what is whole is kept, what is kept twice may go."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import compose
from test_run import pictures, shard_times

import pipeline
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.engine.tasks import render_digest
from pipeline.engine.worker import Worker
from pipeline.planning.planner import make_plan
from pipeline.runs.maintenance import _recompute_activation, is_reproducible
from pipeline.store import hdf5, shards


def flip(path: Path, inside: str, chunk: int = 0) -> None:
    """Change one bit of a chunk of a file."""
    with h5py.File(path) as file:
        info = hdf5.dataset(file, inside).id.get_chunk_info(chunk)
    data = bytearray(path.read_bytes())
    data[info.byte_offset + info.size // 2] ^= 1
    path.write_bytes(data)


def a_chunked_dataset(path: Path) -> str:
    """Name of the largest dataset of a file that lies in chunks."""
    found: dict[str, int] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and item.chunks:
            found[name] = item.size

    with h5py.File(path) as file:
        file.visititems(visit)
    return max(found, key=lambda name: found[name])


def another_picture(path: Path, inside: str) -> None:
    """Put a picture in the place of another with all checksums right: what only a digest tells."""
    with h5py.File(path, "r+") as file:
        images = hdf5.dataset(file, inside)
        images[0, 0] = 255 - images[0, 0]


def images_of(layer: str) -> str:
    return f"layers/{layer}/render/distill/images"


def test_verify_reads_compares_and_renders_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(finished), "run.check=2", "run.trust=true"]) == 0
    printed = capsys.readouterr()
    assert "intact" in printed.out and printed.err.count("rendered again: ") == 2
    # Every kind of damage is told, in one table.
    flip(finished / "atlas.h5", images_of("conv_stem"))
    shard = sorted((finished / "shards" / "render" / "classifier").glob("*.h5"))[0]
    flip(shard, "images")
    another = sorted((finished / "shards" / "render" / "conv_head").glob("*.h5"))[0]
    another_picture(another, "images")
    sweep = sorted((finished / "shards" / "examples").glob("*.h5"))[0]
    sweep.write_bytes(sweep.read_bytes()[:3000])
    assert main(["verify", str(finished), "run.trust=true"]) == 1
    printed = capsys.readouterr().out
    for name in ("conv_stem", shard.name, another.name, sweep.name):
        assert name in printed.replace("\n", ""), name


def test_a_picture_that_is_another_is_found_by_its_digest(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    another_picture(finished / "atlas.h5", images_of("conv_stem"))
    assert main(["verify", str(finished), "run.check=0"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 3 visualizations do not have their digests" in printed


def test_a_picture_that_cannot_be_rendered_again_is_told(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.engine import worker

    whole = worker.render

    def otherwise(job: Any, units: Any, _: Any) -> Any:
        return whole(dataclasses.replace(job, seed=99), units)

    monkeypatch.setattr(worker, "render", otherwise)
    assert main(["verify", str(finished), "run.check=1", "run.trust=true"]) == 1
    assert "levels of 255 from the stored visualization" in " ".join(capsys.readouterr().out.split())


def made_on_a_gpu(folder: Path, overrides: list[str], precision: str, change: Callable[[np.ndarray], None]) -> None:
    """Let the visualizations of an atlas be those of a GPU, changed by `change`, with digests and activations right."""
    plan = make_plan(compose(overrides).config, timed=False)
    setup = dataclasses.replace(plan.setup, device="cuda", precision=precision)
    worker = Worker(plan.setup)
    with h5py.File(folder / "atlas.h5", "r+") as file:
        for row in plan.rows:
            part = hdf5.group(file, f"layers/{row.layer.name}/render/{row.preset}")
            digest = render_digest(setup, row.layer, row.canvas, row.preset)
            names = {"device": "cuda", "precision": precision, "requested_precision": precision}
            part.attrs.update({**names, "digest": digest})
            images = hdf5.dataset(part, "images")[...]
            change(images)
            hdf5.dataset(part, "images")[...] = images
            hdf5.dataset(part, "images_sha256")[...] = hdf5.image_digests(images)
            activation = hdf5.dataset(part, "activation")
            for place in np.ndindex(*images.shape[:2]):
                unit = row.channels[place[0]], place[1]
                activation[place] = _recompute_activation(worker, row, unit, (), images[place])


def drift(images: np.ndarray) -> None:
    """Change a few values by several levels, as a GPU does that adds in another order."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-4, 5, images.shape) * (rng.random(images.shape) < 0.05)
    images[...] = (images + steps).clip(0, 255)


def exchange(images: np.ndarray) -> None:
    """Give each unit the visualization of another."""
    images[...] = np.roll(images, 1, axis=0)


LONG = [pytest.param(precision, marks=pytest.mark.long) for precision in ("tf32", "bfloat16")]


@pytest.mark.parametrize("precision", ["float32", *LONG])
@pytest.mark.long
def test_visualizations_of_a_gpu_are_verified_on_a_cpu(
    precision: str, finished: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A small drift is right, another unit's image is not; nothing is left out because of its device."""
    made_on_a_gpu(finished, tiny_run, precision, drift)
    assert main(["verify", str(finished), "run.check=15", "run.trust=true"]) == 0
    err = capsys.readouterr().err
    assert err.count("rendered again: largest difference ") == 15
    assert "largest difference 0 levels" not in err and "largest difference 1 levels" not in err
    made_on_a_gpu(finished, tiny_run, precision, exchange)
    assert main(["verify", str(finished), "run.check=15", "run.trust=true"]) == 1
    assert " ".join(capsys.readouterr().out.split()).count("levels of 255 from the stored visualization") >= 12


def test_the_same_drift_is_found_in_visualizations_of_a_cpu(
    finished: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    digests = {}
    tiny_run = [*tiny_run, "engine.precision=float32"]  # only that is compared exactly
    assert main(["run", *tiny_run, "run.update=true"]) == 0
    with h5py.File(finished / "atlas.h5") as file:
        for name, layer in hdf5.group(file, "layers").items():
            digests[name] = layer["render/distill"].attrs["digest"]
    made_on_a_gpu(finished, tiny_run, "float32", drift)
    with h5py.File(finished / "atlas.h5", "r+") as file:
        for name, digest in digests.items():
            hdf5.group(file, f"layers/{name}/render/distill").attrs.update({"device": "cpu", "digest": digest})
    assert main(["verify", str(finished), "run.check=15", "run.trust=true"]) == 1
    assert " ".join(capsys.readouterr().out.split()).count("levels of 255 from the stored visualization") == 15


@pytest.mark.parametrize(
    ("made", "precision", "here", "equal"),
    [
        ("cpu", "float32", "cpu", True),
        (None, "float32", "cpu", True),  # of former versions
        ("cpu", "bfloat16", "cpu", False),
        ("cpu", "float32", "cuda:0", False),
        ("cuda", "float32", "cpu", False),
        ("cuda", "float32", "cuda", False),
        ("cpu cuda", "float32", "cpu", False),
        ("cuda", "tf32", "cuda", False),
    ],
)
def test_only_float32_on_cpus_is_the_same_again(made: str | None, precision: str, here: str, equal: bool) -> None:
    part = shards.Shard(Path("atlas.h5"), {} if made is None else {"device": made})
    assert is_reproducible(part, precision, SimpleNamespace(device=here)) == equal  # type: ignore[arg-type]


@pytest.mark.long
def test_compact_leaves_what_atlas_h5_holds_and_nothing_is_made_again(
    finished: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = pictures(finished)
    with pipeline.open_atlas(finished) as atlas:
        best = [layer.examples("max") for layer in atlas]
    assert main(["compact", str(finished)]) == 0
    (left,) = (finished / "shards" / "examples").glob("*.h5")
    assert left.name.startswith("0-20-") and not list((finished / "shards").glob("render/*/*.h5"))
    assert "shards deleted" in capsys.readouterr().out
    assert main(["verify", str(finished), "run.check=0"]) == 0
    assert main(["run", *tiny_run]) == 0
    assert "Nothing is missing" in capsys.readouterr().err
    # Another configuration is refused as before, and more channels join what is there.
    assert main(["run", *tiny_run, "render.steps=5"]) == 2
    assert main(["run", *tiny_run, "layers.channels=0:4", "run.update=true"]) == 0
    after = pictures(finished)
    assert len(after) == 20 and all(np.array_equal(before[k], after[k]) for k in before)
    made = [path for path in (finished / "shards" / "render").rglob("*.h5")]
    assert len(made) == 5 and all(shards.read(p).get("channels")["channels"].tolist() == [3] for p in made)  # type: ignore[union-attr]
    with pipeline.open_atlas(finished) as atlas:
        for old, layer in zip(best, atlas, strict=True):
            new = layer.examples("max")
            assert old is not None and new is not None and np.array_equal(old.index, new.index[:3])
    # Compacted again, with pictures from both.
    assert main(["compact", str(finished)]) == 0
    assert not list((finished / "shards").glob("render/*/*.h5"))
    assert all(np.array_equal(after[k], v) for k, v in pictures(finished).items())


def test_compact_merges_the_dataset_pass_unchanged(finished: Path) -> None:
    from pipeline.examples import sweep

    paths = (finished / "shards" / "examples").glob("*.h5")
    pieces = [piece for piece in map(shards.read, paths) if piece is not None]
    assert len(pieces) > 1
    results = (sweep.PassResult.from_arrays(piece.arrays()) for piece in pieces)
    expected = sweep.merge(results, len(pieces[0].get("tops/max")["tops/max"][0]), None).arrays()
    attributes = pieces[0].attributes.keys()
    assert main(["compact", str(finished)]) == 0
    (path,) = (finished / "shards" / "examples").glob("*.h5")
    merged = shards.read(path)
    assert merged is not None and merged.attributes.keys() == attributes and not merged.damage()
    assert merged.attributes["device"] == "cpu"
    stored = merged.arrays()
    assert stored.keys() == expected.keys() and stored["codes/bin"].shape[0] == 20
    for name, array in expected.items():
        assert stored[name].dtype == array.dtype, name
        assert np.array_equal(stored[name], array, equal_nan=array.dtype.kind == "f"), name


def test_a_pass_that_was_continued_on_a_gpu_says_so(finished: Path, tiny_run: list[str]) -> None:
    """Its parts are merged: in IEEE float32 they differ by rounding alone."""
    first = sorted((finished / "shards" / "examples").glob("*.h5"))[0]
    with h5py.File(first, "r+") as file:
        assert file.attrs["device"] == "cpu"
        file.attrs["device"] = "cuda"
    (finished / "atlas.h5").unlink()
    assert main(["run", *tiny_run]) == 0
    with h5py.File(finished / "atlas.h5") as file:
        assert file["dataset"].attrs["device"] == "cpu cuda"
    assert main(["compact", str(finished)]) == 0
    (path,) = (finished / "shards" / "examples").glob("*.h5")
    merged = shards.read(path)
    assert merged is not None and merged.attributes["device"] == "cpu cuda"


def test_compact_deletes_nothing_unless_the_atlas_is_whole(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = shard_times(finished)
    another_picture(finished / "atlas.h5", images_of("conv_stem"))
    assert main(["compact", str(finished)]) == 2
    assert "Not compacted: layers/conv_stem/render/distill" in capsys.readouterr().err
    (finished / "atlas.h5").unlink()
    assert main(["compact", str(finished)]) == 2
    assert shard_times(finished) == times


@pytest.mark.long
def test_compact_keeps_shards_of_other_settings(finished: Path, tiny_run: list[str]) -> None:
    old = {p.name for p in (finished / "shards").glob("render/*/*.h5")}
    assert main(["render", *tiny_run, "render.steps=5", "run.update=true"]) == 0
    assert main(["compact", str(finished)]) == 0
    left = {p.name for p in (finished / "shards" / "render").rglob("*.h5")}
    assert left and left <= old


def masks(run: Path) -> dict[tuple[str, int], np.ndarray]:
    with pipeline.open_atlas(run) as atlas:
        return {(layer.name, int(c)): layer.mask(int(c)) for layer in atlas for c in layer.channels}


@pytest.mark.long
def test_a_damaged_mask_costs_its_own_picture_alone(finished: Path, tiny_run: list[str]) -> None:
    before = masks(finished)
    assert len(before) == 15 and all(mask.any() for mask in before.values())
    assert main(["compact", str(finished)]) == 0
    flip(finished / "atlas.h5", images_of("conv_stem").replace("images", "mask"), 1)
    assert main(["verify", str(finished), "run.check=0"]) == 1
    assert main(["repair", str(finished)]) == 0
    kept = shard_times(finished)
    assert main(["run", *tiny_run]) == 0
    fresh = set(shard_times(finished)) - set(kept)
    assert sum(int(name.split("-")[2]) for name in fresh) == 1
    after = masks(finished)
    assert all(np.array_equal(after[unit], mask) for unit, mask in before.items())


@pytest.mark.long
def test_repair_saves_what_is_whole_of_a_compacted_atlas(
    finished: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = pictures(finished)
    assert main(["compact", str(finished)]) == 0
    flip(finished / "atlas.h5", images_of("conv_stem"), 1)
    another_picture(finished / "atlas.h5", images_of("classifier"))
    assert main(["verify", str(finished), "run.trust=true"]) == 1
    capsys.readouterr()
    assert main(["repair", str(finished)]) == 0
    assert "13 visualizations that no shard holds were kept" in " ".join(capsys.readouterr().out.split())
    assert (finished / "atlas.h5.damaged").exists() and not (finished / "atlas.h5").exists()
    kept = shard_times(finished)
    assert main(["run", *tiny_run]) == 0
    fresh = set(shard_times(finished)) - set(kept)
    assert sum(int(name.split("-")[2]) for name in fresh) == 2  # only the two that were lost
    assert all(np.array_equal(before[k], v) for k, v in pictures(finished).items())
    assert main(["verify", str(finished), "run.trust=true"]) == 0
    assert main(["repair", str(finished)]) == 0 and "nothing is damaged" in capsys.readouterr().out


def test_pictures_keep_their_attributes_through_compact_repair_and_run(finished: Path, tiny_run: list[str]) -> None:
    """Above all the precision, by which `verify` renders again; and any attribute of a later version."""
    assert main(["compact", str(finished)]) == 0
    with h5py.File(finished / "atlas.h5", "r+") as file:
        here = {str(layer["render/distill"].attrs["precision"]) for layer in hdf5.group(file, "layers").values()}
        for layer in hdf5.group(file, "layers").values():
            layer["render/distill"].attrs.update({"precision": "bfloat16", "later": "kept"})
    flip(finished / "atlas.h5", images_of("conv_stem"), 1)
    assert main(["repair", str(finished)]) == 0
    copied = [shards.read(path) for path in (finished / "shards" / "render").rglob("*.h5")]
    assert len(copied) == 5
    for shard in copied:
        assert shard is not None
        assert {k: shard.attributes.get(k) for k in ("precision", "later")} == {
            "precision": "bfloat16",
            "later": "kept",
        }
        assert "order" not in shard.attributes
    assert main(["run", *tiny_run]) == 0
    with h5py.File(finished / "atlas.h5") as file:
        found = {str(layer.attrs["name"]): dict(layer["render/distill"].attrs) for layer in file["layers"].values()}  # type: ignore[union-attr]
    assert {name: attributes["precision"] for name, attributes in found.items()} == {
        name: " ".join(sorted({"bfloat16"} | here)) if name == "conv_stem" else "bfloat16" for name in found
    }
    assert found["classifier"]["later"] == "kept" and not {"complete", "shard_version"} & found["classifier"].keys()


def test_an_activation_that_is_not_the_images_is_told(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(finished / "atlas.h5", "r+") as file:
        numbers = hdf5.dataset(file, "layers/conv_stem/render/distill/activation")
        numbers[...] = numbers[...] * 1.5
    assert main(["verify", str(finished), "run.check=15", "run.trust=true"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("the network's activation on the stored image is") == 3 and "levels of 255" not in printed
    assert all(f"conv_stem:{channel}" in printed for channel in range(3))


def test_repair_of_shards_keeps_their_whole_pictures(
    finished: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shard = max((finished / "shards" / "render" / "conv_head").glob("*.h5"), key=lambda p: p.stat().st_size)
    flip(shard, "images")
    with h5py.File(shard) as file:
        count = len(hdf5.read_array(file, "channels"))
    torn = sorted((finished / "shards" / "examples").glob("*.h5"))[0]
    torn.write_bytes(b"no")
    (finished / "atlas.h5").unlink()
    assert main(["repair", str(finished)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    # How many pictures share a shard follows from timing.
    assert count == 1 or f"{count - 1} intact visualizations kept" in printed
    assert "can't be read; set aside" in printed
    assert not shard.exists() and shard.with_name(f"{shard.name}.damaged").exists()
    assert main(["run", *tiny_run]) == 0
    assert main(["verify", str(finished), "run.check=0"]) == 0


def test_a_run_never_overwrites_an_atlas_that_it_cannot_read(finished: Path, tiny_run: list[str]) -> None:
    torn = (finished / "atlas.h5").read_bytes()[:5000]
    (finished / "atlas.h5").write_bytes(torn)
    assert main(["run", *tiny_run]) == 0
    assert (finished / "atlas.h5.damaged").read_bytes() == torn
    assert main(["verify", str(finished), "run.check=0"]) == 0


def test_damage_in_a_shard_never_reaches_the_atlas(finished: Path, tiny_run: list[str]) -> None:
    """A raw copy takes a bad chunk along with its bad checksum, unless somebody looks."""
    before = pictures(finished)
    (finished / "atlas.h5").unlink()
    for layer in ("conv_stem", "classifier"):
        flip(sorted((finished / "shards" / "render" / layer).glob("*.h5"))[0], "images")
    sweep = max((finished / "shards" / "examples").glob("*.h5"), key=lambda p: p.stat().st_size)
    flip(sweep, a_chunked_dataset(sweep))
    assert main(["run", *tiny_run]) == 0
    assert main(["verify", str(finished), "run.check=0"]) == 0
    assert all(np.array_equal(before[k], v) for k, v in pictures(finished).items())


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_units_as_a_table(finished: Path, kind: str) -> None:
    assert main(["export", str(finished), f"--{kind}"]) == 0
    path = finished / f"units.{kind}"
    table = pd.read_parquet(path) if kind == "parquet" else pd.read_csv(path)
    with pipeline.open_atlas(finished) as atlas:
        units = atlas.units()
    assert list(table.columns) == list(units.columns) and len(table) == 15
    assert np.allclose(table["activation"], units["activation"]) and (table["seed"] == units["seed"]).all()


def test_no_pickle_in_any_file(finished: Path) -> None:
    assert main(["export", str(finished)]) == 0
    for path in (p for p in finished.rglob("*") if p.is_file()):
        start = path.read_bytes()[:4]
        assert start[:1] != b"\x80" and start[:2] != b"PK", path  # pickle's and torch.save's first bytes
    source = "".join(p.read_text() for p in Path(pipeline.__file__).parent.rglob("*.py"))
    assert (
        "import pickle" not in source
        and "pickle.load" not in source
        and "allow_pickle=True" not in source
        and "torch.save" not in source
    )
    # A checkpoint is read as weights only, unless its owner says that it may run code.
    assert source.count("torch.load(") == source.count("weights_only=True)") + source.count("weights_only=not trust)")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", where], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


@pytest.mark.long
def test_a_full_disk_while_shards_are_written(
    small_disk: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*(o for o in tiny_run if not o.startswith("run.root")), f"run.root={small_disk}"]
    assert main(["examples", *settings]) == 0
    kept = shard_times(small_disk / "tiny")
    ballast = small_disk / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as handle:
        while True:
            handle.write(bytes(1024))
    capsys.readouterr()
    assert main(["run", *settings]) == 2
    assert "The disk is full" in capsys.readouterr().err
    assert not list(small_disk.rglob("*.tmp-*")) and shard_times(small_disk / "tiny") == kept
    ballast.unlink()
    assert main(["render", *settings]) == 0
    times = shard_times(small_disk / "tiny")
    assert all(times[name] == when for name, when in kept.items()) and len(times) > len(kept)


def test_a_full_disk_while_the_atlas_is_written(
    finished: Path, small_disk: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the atlas that was there before is still there, whole, and the next run goes on."""
    settings = [*(o for o in tiny_run if not o.startswith("run.root")), f"run.root={small_disk}"]
    shutil.copytree(finished, small_disk / "tiny", ignore=shutil.ignore_patterns("site"))
    old = (small_disk / "tiny" / "atlas.h5").read_bytes()
    room = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(os.urandom(room - 40_000))
    assert main(["render", *settings, "layers.channels=[0,1]", "run.update=true"]) == 2
    told = capsys.readouterr().err
    assert "The disk is full: " in told and "could not be written" in told
    assert (small_disk / "tiny" / "atlas.h5").read_bytes() == old and not list(small_disk.rglob("*.tmp-*"))
    (small_disk / "ballast").unlink()
    assert main(["render", *settings, "layers.channels=[0,1]", "run.update=true"]) == 0
    with pipeline.open_atlas(small_disk / "tiny") as atlas:
        assert len(atlas.units()) == 10


@pytest.mark.parametrize("room", [0, 700, 5_000, 60_000, 300_000])
def test_hdf5_outlives_a_disk_that_fills_up_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Also in the middle of its own bookkeeping, which it reads again: a message, and the process goes on."""
    whole, written = os.pwrite, [0]

    def pwrite(handle: int, data: Any, at: int) -> int:
        written[0] += len(data)
        if written[0] > room:
            raise OSError(28, "No space left on device")
        return whole(handle, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(AtlasError, match="The disk is full"), hdf5.create_file(tmp_path / "x.h5") as file:
        for i in range(300):
            group = file.create_group(f"layers/{i}")
            group.attrs["name"] = "x" * 500
            hdf5.write_array(group, "a", np.random.default_rng(i).random(2000))
            assert len(hdf5.read_array(file, f"layers/{i // 2}/a")) == 2000
    assert not list(tmp_path.iterdir())


def test_a_file_over_the_limit_is_a_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a quota; also HDF5's own way of writing must end in a message."""
    code = (
        "import resource, signal, sys, numpy as np; from pathlib import Path\n"
        "from pipeline.store import hdf5, shards\n"
        "from pipeline.core.errors import AtlasError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "data = np.random.default_rng(0).integers(0, 256, (40, 1, 64, 64, 3), np.uint8)\n"
        "def direct(path):\n"
        "    with hdf5.create_file(path) as file: hdf5.write_array(file, 'images', data)\n"
        "for way in (lambda p: shards.write(p, {}, {'images': data}), direct):\n"
        "    try: way(Path(sys.argv[1], 'x.h5'))\n"
        "    except AtlasError as error: print(error)\n"
        "    assert not list(Path(sys.argv[1]).iterdir())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("The disk is full") == 2, done.stdout + done.stderr


def test_a_driver_writes_a_shard_only_where_its_own_task_says(tmp_path: Path) -> None:
    from pipeline.engine.tasks import Done, RangesTask, write_result

    task = RangesTask(str(tmp_path / "mine.h5"), "d", 1.0, (0,))
    write_result(task, Done(str(tmp_path / ".." / "elsewhere.h5"), 1.0, shards.to_bytes({"digest": "d"}, {})))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.h5"] and shards.read(tmp_path / "mine.h5") is not None


def test_of_two_workers_with_one_task_the_first_writes_its_shard(tmp_path: Path) -> None:
    """A worker that was given up may finish; only what lacked something when the work began is replaced."""
    from pipeline.engine.tasks import RangesTask, write_shard

    task = RangesTask(str(tmp_path / "shards" / "one.h5"), "d", 1.0, (0,))
    for digest in ("first", "second"):
        write_shard(task, shards.to_bytes({"digest": digest}, {}))
        written = shards.read(Path(task.path))
        assert written is not None and written.attributes["digest"] == "first"
    write_shard(dataclasses.replace(task, replaces=True), shards.to_bytes({"digest": "third"}, {}))
    written = shards.read(Path(task.path))
    assert written is not None and written.attributes["digest"] == "third"
    assert [path.name for path in Path(task.path).parent.iterdir()] == ["one.h5"]


def test_verify_without_any_work(tmp_path: Path) -> None:
    from pipeline.planning.folder import RunFolder
    from pipeline.runs import maintenance

    with pytest.raises(AtlasError, match="no finished work yet"):
        maintenance.verify(RunFolder(tmp_path))
