"""Errors of the storage say nothing about an image: retried, then the task fails, and the next run reads it."""

import csv
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.data import datasets, image_loading
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset
from pipeline.data.readers import folder_scan
from pipeline.data.readers.base import MISSING, DatasetImage
from pipeline.data.storage_errors import StorageError, names_storage_error
from pipeline.models.config import Preprocessing
from pipeline.store import shards

RECIPE = Preprocessing((16, 16), 16, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(root / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_loading, "RETRY_PAUSES", (0.01, 0.02))


def failing(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool], number: int = errno.EIO
) -> Callable[[], None]:
    """Let the calls of `read_image` fail for whose number `fails` is true; return what ends that."""
    whole, calls = image_loading.read_image, 0

    def read(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if fails(calls):
            raise OSError(number, os.strerror(number))
        return whole(*arguments)

    monkeypatch.setattr(image_loading, "read_image", read)
    return lambda: monkeypatch.setattr(image_loading, "read_image", whole)


def test_an_image_is_tried_again_after_an_error_of_the_storage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(folder)))
    failing(monkeypatch, lambda call: call in (2, 3))
    loaded = list(image_loading.load_images(dataset, range(4), RECIPE, threads=1))
    assert [item.reason for item in loaded] == [""] * 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_storage_that_goes_on_failing_raises(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    dataset = datasets.list_dataset(DataConfig("folder", str(folder)))
    failing(monkeypatch, lambda call: call >= 3, number)
    with pytest.raises(StorageError, match=r"'2.png' could not be read because of its storage: \[Errno"):
        list(image_loading.load_images(dataset, range(4), RECIPE, threads=1))


def test_what_is_the_fault_of_a_file_is_told_and_not_raised(folder: Path) -> None:
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:50])
    (folder / "4.png").write_bytes(b"no image")
    (folder / "5.png").symlink_to(folder / "nowhere.png")
    (folder / "6.png").symlink_to("6.png")
    dataset = datasets.list_dataset(DataConfig("folder", str(folder)))
    reasons = [item.reason for item in image_loading.load_images(dataset, range(7), RECIPE)]
    assert reasons[0].startswith("cut off") and reasons[1:4] == [""] * 3
    assert reasons[4:] == ["not a picture", MISSING, MISSING]


def test_a_file_that_was_listed_and_vanished_is_an_error_of_the_storage(folder: Path) -> None:
    """Also behind a link: where a mount is lost, all links into it lead to nothing."""
    (folder / "4.png").symlink_to(shutil.copy(folder / "3.png", folder.parent))
    dataset = datasets.list_dataset(DataConfig("folder", str(folder)))
    (folder.parent / "3.png").unlink()
    with pytest.raises(StorageError, match=r"'4\.png'"):
        list(image_loading.load_images(dataset, range(5), RECIPE))


def test_a_folder_that_cannot_be_listed_does_not_shrink_the_dataset(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "more").mkdir()
    whole = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("more"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(path)

    monkeypatch.setattr(folder_scan.os, "scandir", scandir)
    with pytest.raises(AtlasError, match=r"more can't be listed, so that images would be missing"):
        datasets.list_dataset(DataConfig("folder", str(folder)))


def test_images_are_sent_with_what_is_known_of_them(folder: Path, tmp_path: Path) -> None:
    """Without a shared file system: the worker fails for what the driver could not read, and reports what is broken."""
    (folder / "4.png").symlink_to(folder / "nowhere.png")
    dataset = datasets.list_dataset(DataConfig("folder", str(folder)))
    (folder / "1.png").unlink()
    sent = image_loading.encoded_images(dataset, range(5))
    assert sorted(sent) == ["0.png", "2.png", "3.png"]
    there = tmp_path / "worker"
    there.mkdir()
    for name, data in sent.items():
        (there / name).write_bytes(data)  # type: ignore[arg-type]
    copied = Dataset(dataset.images, {"": str(there)}, copied=True, unreadable=dataset.unreadable)
    assert [item.reason for item in image_loading.load_images(copied, [0, 2, 4], RECIPE)] == ["", "", MISSING]
    with pytest.raises(StorageError):
        list(image_loading.load_images(copied, [1], RECIPE))


def test_recorded_reasons_of_earlier_versions_are_told_apart() -> None:
    assert names_storage_error("unreadable: OSError: [Errno 5] Input/output error")
    assert names_storage_error("unreadable: OSError: [Errno 116] Stale file handle: 'a.png'")
    assert not names_storage_error("unreadable: OSError: [Errno 22] Invalid argument")
    assert not names_storage_error("unreadable: OSError: cannot identify [Errno 5]")
    unknown = Dataset((DatasetImage("a.png", "", 0),), {"": "/nowhere"})
    assert not image_loading.may_be_readable(unknown, 0, "no permission: Permission denied")


def failures(run: Path) -> list[list[str]]:
    with (run / "failures.csv").open(encoding="utf-8") as handle:
        return [row[:3] for row in list(csv.reader(handle))[1:]]


@pytest.mark.long
def test_a_run_reads_what_the_storage_failed_to_give_once_it_is_back(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["examples", *tiny_run, "engine.attempts=1"]
    parts = tmp_path / "tiny" / "shards" / "examples"
    restore = failing(monkeypatch, lambda _: any(parts.glob("*.h5")))
    assert main(command) == 1  # something was set aside: not complete
    assert "Input/output error" in failures(tmp_path / "tiny")[0][2]
    stored = [shards.read(path) for path in parts.glob("*.h5")]
    assert all(shard is not None and not len(shard.get("failed/index")["failed/index"]) for shard in stored)
    restore()
    assert main(command) == 0
    assert failures(tmp_path / "tiny") == []
    # A pass of an earlier version, which recorded such errors as if the images were broken.
    shard = shards.read(min(parts.glob("*.h5")))
    assert shard is not None
    reasons = {
        "failed/index": np.array([shard.attributes["start"]], np.int32),
        "failed/reason": np.array(["unreadable: OSError: [Errno 5] Input/output error"], object),
    }
    shards.write(shard.path, shard.attributes, shard.arrays() | reasons)
    os.utime(shard.path, (1, 1))
    capsys.readouterr()
    assert main(command) == 0
    assert "1 parts of the dataset pass lack images that are read again now" in capsys.readouterr().err
    assert failures(tmp_path / "tiny") == []
    again = shards.read(shard.path)
    assert again is not None and not len(again.get("failed/index")["failed/index"])
    # No other run takes over a pass with such gaps, and `verify` names images that are really broken.
    reasons["failed/reason"][0] = "cut off: image file is truncated"
    shards.write(shard.path, shard.attributes, shard.arrays() | reasons)
    main(["verify", str(tmp_path / "tiny"), "run.check=0"])
    assert f"{shard.path.name}: 1 images could not be read: cut off 1" in capsys.readouterr().err
