"""Listing of folders: in columns, kept in a cache, and only as far as something has changed; the fingerprint stays."""

import dataclasses
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import AtlasError
from pipeline.data import datasets, image_loading, listing_cache
from pipeline.data.config import DataConfig
from pipeline.data.image_table import ImageTable
from pipeline.data.readers import folder as folder_reader
from pipeline.data.readers import folder_scan
from pipeline.data.readers.base import DatasetImage
from pipeline.models.config import Preprocessing

RECIPE = Preprocessing((16, 16), 16, (0.5,) * 3, (0.25,) * 3)
NAMES = (
    b"a/1.jpg", b"a/b/2.JPEG", b"a.jpg", b'b/"q".jpg', "b/ü.png".encode(), b"b/bad\xff.jpg", 
    "c/\U0001f600.jpg".encode(), b"c/back\\slash.jpg", b"c/line\n.jpg", b"c/del\x7f.gif",
)  # fmt: skip

# Fingerprints that the version before the listing in columns computed.
FORMER = {
    DataConfig("folder"): "c46f4ec65ba3f2df0633ae53235ac41da92dca134e606089298e5c0bdf8d5da3",
    DataConfig("folder", limit=3): "e70821bae431626371f9fc593e86668e669fe04845b60b9736acb7f2aa48442d",
    DataConfig("folder", max_bytes=77): "5203e04061d05dd26e79086f51a66b77a07ce26c11b7a9a456b53631f18b7bca",
    DataConfig("webdataset"): "07cfe46cfc1acd901b24658f7e6501005aad11e41eeb13da6d413af4e7b1f989",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files of odd names in three folders, a broken link, and an archive."""
    root = tmp_path / "images"
    for i, name in enumerate(NAMES):
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (i + 1))
    (root / "c" / "link.jpg").symlink_to("nowhere")
    with tarfile.open(root / "t.tar", "w") as archive:
        for name in ("k/1.jpg", "k/2.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 5
            archive.addfile(info, io.BytesIO(b"12345"))
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Listings of any size are kept, in a cache of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing_cache, "MIN_IMAGES", 0)
    monkeypatch.setattr(folder_scan, "SETTLED", -1.0)
    return tmp_path / "cache" / "neuron-atlas" / "listings"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders that are listed."""
    names: list[str] = []
    whole = os.scandir

    def scandir(path: str) -> Any:
        if "images" in Path(path).parts:  # not the cache
            names.append(Path(path).name)
        return whole(path)

    monkeypatch.setattr(folder_scan.os, "scandir", scandir)
    return names


def content(dataset: datasets.Dataset) -> tuple[list[DatasetImage], str, dict[str, str]]:
    return list(dataset.images), datasets.fingerprint(dataset, RECIPE), dict(dataset.unreadable)


@pytest.mark.parametrize("config", FORMER, ids=lambda config: f"{config.source} {config.limit} {config.max_bytes}")
def test_fingerprints_of_earlier_versions_hold(root: Path, config: DataConfig) -> None:
    dataset = datasets.list_dataset(dataclasses.replace(config, root=str(root)))
    assert datasets.fingerprint(dataset, RECIPE) == FORMER[config]
    copied = pickle.loads(pickle.dumps(dataset, protocol=5))
    assert datasets.fingerprint(copied, RECIPE) == FORMER[config] and content(copied) == content(dataset)


def test_the_fingerprint_of_crops_holds() -> None:
    expected = "9602d96804840740c98d894e1d2b08726cd0801e3ae09ccba4d801001d9dc52f"
    assert datasets.fingerprint(datasets.list_dataset(DataConfig()), RECIPE) == expected


def test_only_folders_that_changed_are_listed_again(root: Path, cache: Path, scanned: list[str]) -> None:
    config = DataConfig("folder", str(root))
    first = content(datasets.list_dataset(config))
    assert sorted(scanned) == ["a", "b", "b", "c", "images"] and len(list(cache.glob("*.arrow"))) == 1
    scanned.clear()
    assert content(datasets.list_dataset(config)) == first and scanned == []
    (root / "a" / "new.jpg").write_bytes(b"new")
    (root / "b" / "ü.png").unlink()
    changed = content(datasets.list_dataset(config))
    assert sorted(scanned) == ["a", "b"]
    assert changed == content(datasets.list_dataset(dataclasses.replace(config, relist=True)))
    assert {p.path for p in changed[0]} == {p.path for p in first[0]} - {"b/ü.png"} | {"a/new.jpg"}
    scanned.clear()
    (root / "d").mkdir()
    (root / "d" / "0.jpg").write_bytes(b"d")
    assert datasets.list_dataset(config).images[-1] == DatasetImage("d/0.jpg", "d", 12 - 1, size=1)
    assert sorted(scanned) == ["d", "images"]


def test_a_folder_that_has_just_changed_is_not_trusted(
    root: Path, cache: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_scan, "SETTLED", 3600.0)
    config = DataConfig("folder", str(root))
    for _ in range(2):
        scanned.clear()
        datasets.list_dataset(config)
        assert "a" in scanned


def test_fingerprints_of_large_datasets_are_kept(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig("folder", str(root))
    assert datasets.fingerprint(datasets.list_dataset(config), RECIPE) == FORMER[DataConfig("folder")]
    (kept,) = (cache.parent / "fingerprints").iterdir()
    assert kept.read_text() == FORMER[DataConfig("folder")]
    monkeypatch.setattr(datasets, "_fingerprint", lambda *_: "0" * 64)
    assert datasets.fingerprint(datasets.list_dataset(config), RECIPE) == FORMER[DataConfig("folder")]
    for other in (dataclasses.replace(config, max_bytes=77), dataclasses.replace(config, limit=3)):
        assert datasets.fingerprint(datasets.list_dataset(other), RECIPE) == "0" * 64
    kept.write_text("damaged")
    assert datasets.fingerprint(datasets.list_dataset(config), RECIPE) == "0" * 64


@pytest.mark.parametrize("damage", ["cut off", "text", "of others"])
def test_a_damaged_cache_is_listed_anew(root: Path, cache: Path, scanned: list[str], damage: str) -> None:
    config = DataConfig("folder", str(root))
    first = content(datasets.list_dataset(config))
    (file,) = cache.glob("*.arrow")
    if damage == "of others":
        file.chmod(0o666)
    else:
        file.write_bytes(file.read_bytes()[:200] if damage == "cut off" else b"text")
    scanned.clear()
    assert content(datasets.list_dataset(config)) == first and scanned


def test_small_datasets_leave_nothing_in_the_cache(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    datasets.list_dataset(DataConfig("folder", str(root)))
    assert not list(tmp_path.glob("cache/*/listings/*.arrow"))


def test_each_file_is_looked_up_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    whole = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: (looked_up.append(str(path)), whole(path, *a, **k))[1])
    datasets.fingerprint(datasets.list_dataset(DataConfig("folder", str(root))), RECIPE)
    assert not [path for path in looked_up if path.endswith(".jpg")]  # sizes come with the entries of the folder


def test_a_file_that_changed_after_the_listing_ends_the_run(root: Path) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(root)))
    (root / "a.jpg").write_bytes(b"other")
    with pytest.raises(AtlasError, match=r"a\.jpg has 5 bytes, and had 3 when .* data\.relist=true"):
        list(image_loading.load_images(dataset, [0], RECIPE))


def test_a_worker_gets_the_images_beside_the_message(root: Path) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(root)))
    buffers: list[pickle.PickleBuffer] = []
    message = pickle.dumps(dataset, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1 and b"slash" not in message
    assert content(pickle.loads(message, buffers=buffers)) == content(dataset)


def test_a_table_is_a_sequence_of_its_images() -> None:
    images = [
        DatasetImage("a.tar#1", "x", 0, None, "a.tar", (512, 3), 9),
        DatasetImage("\udcff", "", 7, (1, 2, 3, 4)),
        DatasetImage("c", "b\ud800", 7, size=-1),
    ]
    table = ImageTable.of(iter(images))
    assert list(table) == images and table[-1] == images[2] and list(table[:2]) == images[:2]
    assert list(table[1:]) == images[1:] and list(table.paths()) == [image.path for image in images]
    assert table.labels[0] == ("b\ud800", "x") and table.labels[1].tolist() == [1, -1, 0]
    assert table[:2].labels[0] == ("x",)
    with pytest.raises(IndexError):
        table[3]
    assert list(ImageTable.of([])) == [] and ImageTable.of([]).draw(3).tolist() == []
    assert np.array_equal(table.draw(2), table.draw(3)[:2])


def test_the_folder_reader_needs_no_object_for_an_image(root: Path) -> None:
    assert isinstance(folder_reader.list_images(DataConfig("folder", str(root))).photos, ImageTable)
