"""An atlas.h5 that somebody else made: refused with the place and the reason, before anything of it is read."""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from test_store import LAYER, content, measured, write_shard

import pipeline
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.planning.folder import RunFolder
from pipeline.runs import maintenance
from pipeline.store import shards, structure, writer
from pipeline.store.reader import check_structure, published

PLACE = "layers/a~2fb..c"
RENDER = f"{PLACE}/render/test"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with two visualizations, and a file beside it that nobody may read."""
    folder = tmp_path / "run"
    write_shard(tmp_path / "s", [0, 4], 1, **measured(1, 2))
    found = shards.find(tmp_path / "s", "d")
    folder.mkdir()
    writer.consolidate(folder / "atlas.h5", content((0, 4)), {(LAYER.name, "test"): found})
    (folder / "config.yaml").write_text("model: {name: net}\n")
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["secret"] = np.arange(8)
    return folder


def replace(file: h5py.File, name: str, **created: object) -> None:
    del file[name]
    file.create_dataset(name, **created)  # type: ignore[arg-type]


def soft_loop(file: h5py.File) -> None:
    file[f"{PLACE}/loop"] = h5py.SoftLink(f"/{PLACE}/loop")


def external_link(file: h5py.File) -> None:
    file[f"{PLACE}/more"] = h5py.ExternalLink("../secret.h5", "/secret")


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((8,), int)
    layout[:] = h5py.VirtualSource("../secret.h5", "secret", (8,))
    file.create_virtual_dataset(f"{PLACE}/more", layout)


def external_data(file: h5py.File) -> None:
    file.create_dataset(f"{PLACE}/more", (4,), np.uint8, external=[("../secret.h5", 0, 4)])


HOSTILE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "no layers": (lambda f: f.__delitem__("layers"), "layers"),
    "no order": (lambda f: f[PLACE].attrs.__delitem__("order"), "order"),
    "order is text": (lambda f: f[PLACE].attrs.__setitem__("order", "first"), "not a complete atlas"),
    "layer is an array": (lambda f: replace(f, PLACE, data=[1]), "is not a group"),
    "activation is text": (lambda f: replace(f, f"{RENDER}/activation", data=["x", "y"]), "activation"),
    "no images": (lambda f: f.__delitem__(f"{RENDER}/images"), "images"),
    "images are huge": (
        lambda f: replace(f, f"{RENDER}/images", shape=(2, 1, 200000, 200000, 3), dtype=np.uint8, chunks=True),
        "images",
    ),
    "one image is huge": (
        lambda f: replace(f, f"{RENDER}/images", shape=(2, 1, 20000, 20000, 3), dtype=np.uint8,
                          chunks=(1, 1, 20000, 20000, 3)),
        "too large",
    ),
    "statistics are huge": (
        lambda f: f.create_dataset(f"{PLACE}/stats/mean", (10**12,), np.float32, chunks=(1000,)),
        "more than the file can hold",
    ),
    "rows are missing": (lambda f: replace(f, f"{RENDER}/robust", data=np.zeros((1, 1), np.float32)), "robust"),
    "an object reference": (
        lambda f: f.create_dataset(f"{PLACE}/ref", (1,), h5py.ref_dtype), "which no array of an atlas has",
    ),
    "soft link loop": (soft_loop, "is a link"),
    "external link": (external_link, "is a link"),
    "virtual dataset": (virtual, "another file"),
    "external data": (external_data, "another file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_atlas_is_refused_in_words(run: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, told = HOSTILE[kind]
    assert writer.verify(run / "atlas.h5", {}) == []
    with h5py.File(run / "atlas.h5", "r+") as file:
        change(file)
    assert main(["verify", str(run), "run.check=0"]) == 1
    assert told in " ".join(capsys.readouterr().out.split())
    for command in (["site", str(run)], ["export", str(run), "--csv"], ["compare", str(run), str(run / "atlas.h5")]):
        assert main(command) == 2, command
        assert told in capsys.readouterr().err, command
    if "link" in kind:
        with pytest.raises(AtlasError, match="is a link"):
            pipeline.open_atlas(run)
    maintenance.repair(RunFolder(run))  # nothing is lost: the file stays, or is set aside
    assert list(run.glob("atlas.h5*"))


def test_an_atlas_with_missing_visualizations_is_whole(tmp_path: Path) -> None:
    """Their images are declared, and never written: large files with little in them are honest, too."""
    write_shard(tmp_path / "s", [0], 1, mask=np.zeros((1, 1, 16, 16), np.uint8))
    found = shards.find(tmp_path / "s", "d")
    many = content(tuple(range(5000)))
    writer.consolidate(tmp_path / "atlas.h5", many, {(LAYER.name, "test"): found})
    with h5py.File(tmp_path / "atlas.h5") as file:
        assert structure.faults(file) == []
    check_structure(tmp_path)


def test_nothing_published_names_a_place_of_this_machine(tmp_path: Path) -> None:
    """The configuration in atlas.h5 goes with it; config.yaml stays in the folder of the run."""
    settings = {
        "run": {"root": "s3://somebody/runs", "scratch": "/home/somebody/copies", "name": "a/b"},
        "model": {"target": "/home/somebody/net.py:build", "checkpoint": "~/weights.pth", "name": "net"},
        "data": {"root": "/mnt/share/photographs/", "labels": "../../somebody/labels.csv"},
        "render": {"objective": {"name": "C:\\Users\\somebody\\own.py:Own"}, "steps": 4, "note": "1/2 of all"},
        "site": {"url": "https://atlas.example.org/x"},
        "also": [{"files": ["/home/somebody/a.npz", "plain/b.npz"]}],
    }
    text = published(yaml.safe_dump(settings))
    for word in ("somebody", "/mnt", "/home", "~"):
        assert word not in text, word
    kept = yaml.safe_load(text)
    assert kept["model"] == {"target": "net.py:build", "checkpoint": "weights.pth", "name": "net"}
    assert kept["data"] == {"root": "photographs", "labels": "labels.csv"}
    assert kept["render"] == {"objective": {"name": "own.py:Own"}, "steps": 4, "note": "1/2 of all"}
    assert kept["also"] == [{"files": ["a.npz", "plain/b.npz"]}] and kept["run"]["name"] == "a/b"
    assert kept["run"]["root"] == "runs" and kept["site"]["url"] == "https://atlas.example.org/x"
    assert published("no: [yaml") == ""


def test_files_of_atlases_have_the_permissions_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        writer.consolidate(tmp_path / "atlas.h5", content((0,)), {})
    finally:
        os.umask(before)
    assert (tmp_path / "atlas.h5").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("change", [external_link, soft_loop, virtual])
def test_a_hostile_shard_is_set_aside_and_nothing_of_it_is_read(run: Path, change: Callable[[h5py.File], None]) -> None:
    folder = run / "shards" / "render" / "x"
    write_shard(folder, [2], 3)
    (path,) = folder.glob("*.h5")
    with h5py.File(path, "r+") as file:
        del file["robust"]
        file.create_group(PLACE)
        change(file)
    (shard,) = shards.find(folder, "d")
    assert shard.structural_fault() and shard.damage()
    ((where, _),) = maintenance.repair(RunFolder(run))
    assert where.endswith(path.name) and not list(run.rglob("*copied*")) and list(folder.glob("*.damaged"))
