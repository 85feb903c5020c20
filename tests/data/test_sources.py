"""Datasets by name and by URL: torchvision, the Hugging Face Hub, shards over HTTP, folders of any file system."""

import http.server
import io
import pickle
import re
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_tar
from PIL import Image

from pipeline.core.errors import AtlasError
from pipeline.data import datasets, image_loading, remote
from pipeline.data.config import DataConfig
from pipeline.data.readers import webdataset
from pipeline.data.storage_errors import StorageError
from pipeline.models.config import Preprocessing

RECIPE = Preprocessing((16, 16), 16, (0.5,) * 3, (0.25,) * 3)


def png(level: int) -> bytes:
    with io.BytesIO() as buffer:
        Image.new("RGB", (20, 24), (level, level, level)).save(buffer, "PNG")
        return buffer.getvalue()


def levels(dataset: datasets.Dataset) -> list[int]:
    """The level of each image, as a worker reads it."""
    dataset = pickle.loads(pickle.dumps(dataset))
    loaded = list(image_loading.load_images(dataset, range(len(dataset.images)), RECIPE))
    assert all(item.array is not None for item in loaded), [item.reason for item in loaded]
    return [int(item.array[0, 8, 8]) for item in loaded]  # type: ignore[index]


def test_the_files_of_a_torchvision_dataset_are_read_in_place(tmp_path: Path) -> None:
    for i, number in enumerate(("n01440764", "n03888257")):
        folder = tmp_path / "imagenette2-160" / "val" / number
        folder.mkdir(parents=True)
        (folder / "0.JPEG").write_bytes(png(50 * i))
    for split in ("train",):
        (tmp_path / "imagenette2-160" / split / "n01440764").mkdir(parents=True)
    dataset = datasets.list_dataset(DataConfig("torchvision", str(tmp_path), name="imagenette", split="val"))
    assert [(p.path, p.label) for p in dataset.images] == [
        ("imagenette2-160/val/n01440764/0.JPEG", "tench"),
        ("imagenette2-160/val/n03888257/0.JPEG", "parachute"),
    ]
    assert levels(dataset) == [0, 50] and dataset.images[0].size == len(png(0))


def test_imagenet_is_a_folder_with_names_of_classes(tmp_path: Path) -> None:
    for i, number in enumerate(("n02012849", "n03126707")):
        (tmp_path / "train" / number).mkdir(parents=True)
        (tmp_path / "train" / number / "0.JPEG").write_bytes(png(50 * i))
    config = DataConfig("torchvision", str(tmp_path), name="ImageNet")
    assert [p.label for p in datasets.list_dataset(config).images] == ["n02012849", "n03126707"]
    torch.save(({"n02012849": ("crane", "bird"), "n03126707": ("crane",)}, []), tmp_path / "meta.bin")
    dataset = datasets.list_dataset(config)
    assert [(p.path, p.label) for p in dataset.images] == [
        ("n02012849/0.JPEG", "crane, bird"),
        ("n03126707/0.JPEG", "crane"),
    ]
    with pytest.raises(AtlasError, match=r"no folder .*val.*data\.download=true torchvision verifies and unpacks"):
        datasets.list_dataset(DataConfig("torchvision", str(tmp_path), name="imagenet", split="val"))


def test_a_dataset_without_files_becomes_an_archive(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, numbers = np.full((3, 28, 28), [[[0]], [[100]], [[200]]], np.uint8), np.array([7, 1, 7], np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *images.shape) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 3) + numbers.tobytes())
    config = DataConfig("torchvision", str(tmp_path), name="mnist", split="test")
    dataset = datasets.list_dataset(config)
    assert [p.path for p in dataset.images] == [f"neuron-atlas-mnist-test.tar#00000{i}.png" for i in range(3)]
    assert [p.label for p in dataset.images] == ["7 - seven", "1 - one", "7 - seven"]
    assert levels(dataset) == [0, 100, 200]
    written = (tmp_path / "neuron-atlas-mnist-test.tar").stat().st_mtime_ns
    datasets.list_dataset(config)
    assert (tmp_path / "neuron-atlas-mnist-test.tar").stat().st_mtime_ns == written


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


def test_pickles_that_torchvision_does_not_know_are_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(Harm()))
    (folder / "batches.meta").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(AtlasError, match=r"not found or corrupted.*data\.download=true"):
        datasets.list_dataset(DataConfig("torchvision", str(tmp_path), name="cifar10"))


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"data\.name='flowers' is unknown.*flowers102"):
        datasets.list_dataset(DataConfig("torchvision", str(tmp_path), name="flowers"))
    with pytest.raises(AtlasError, match=r"data\.name=None is unknown"):
        datasets.list_dataset(DataConfig("torchvision", str(tmp_path)))
    with pytest.raises(AtlasError, match=r"needs data\.root"):
        datasets.list_dataset(DataConfig("torchvision", name="flowers102"))
    with pytest.raises(AtlasError, match=r"With data\.download=true it is downloaded to data\.root"):
        datasets.list_dataset(DataConfig("torchvision", str(tmp_path), name="flowers102"))
    with pytest.raises(AtlasError, match=r"split='valid' is unknown: CIFAR10 has train and test"):
        datasets.list_dataset(DataConfig("torchvision", str(tmp_path), name="cifar10", split="valid"))
    assert not list(tmp_path.iterdir())


def test_a_dataset_of_the_hub_is_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, bool]] = []

    def download(name: str, *, revision: str | None, local_files_only: bool, **_: object) -> str:
        asked.append((str(revision), local_files_only))
        if revision is not None:
            raise FileNotFoundError("no such revision")
        return str(tmp_path)

    (tmp_path / "data").mkdir()
    (tmp_path / "default" / "train").mkdir(parents=True)
    for i, name in enumerate(("data/train-00000-of-00001.parquet", "data/test.parquet", "default/train/0000.parquet")):
        pq.write_table(pa.table({"image": [png(50 * i)]}), tmp_path / name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    dataset = datasets.list_dataset(DataConfig("huggingface", name="organization/name", split="train"))
    assert levels(dataset) == [0, 100] and asked == [("refs/convert/parquet", True), ("None", True)]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(AtlasError, match=r"not on this machine\. With data\.download=true"):
        datasets.list_dataset(DataConfig("huggingface", name="organization/name"))
    with pytest.raises(AtlasError, match=r"can't be downloaded from the Hugging Face Hub: division by zero"):
        datasets.list_dataset(DataConfig("huggingface", name="organization/name", download=True))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AtlasError, match="pip install huggingface_hub"):
        datasets.list_dataset(DataConfig("huggingface", name="organization/name"))


def test_braces_name_shards(tmp_path: Path) -> None:
    assert webdataset.expand("a-{09..11}.tar") == ["a-09.tar", "a-10.tar", "a-11.tar"]
    assert webdataset.expand("{x,y}/{1..0}.tar") == ["x/1.tar", "x/0.tar", "y/1.tar", "y/0.tar"]
    assert webdataset.expand("a{b}.tar") == ["a{b}.tar"]
    with pytest.raises(AtlasError, match="more than 1,000,000 files"):
        webdataset.expand("{0..999}{0..9999}")
    for i in range(3):
        (tmp_path / f"part{i}").mkdir()
        write_tar(tmp_path / f"part{i}" / "a.tar", {"0.png": png(10 * i), "0.cls": str(i).encode()})
    dataset = datasets.list_dataset(DataConfig("webdataset", f"{tmp_path}/part{{2..1}}/a.tar"))
    assert [(p.path, p.label) for p in dataset.images] == [("part2/a.tar#0.png", "2"), ("part1/a.tar#0.png", "1")]
    assert levels(dataset) == [20, 10]
    with pytest.raises(AtlasError, match=r"there is no file .*part3/a\.tar"):
        datasets.list_dataset(DataConfig("webdataset", f"{tmp_path}/part{{2..3}}/a.tar"))


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A server of files that answers requests of ranges."""

    served: int = 0

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)) if asked else (0, len(data) - 1)
        part = data[start : end + 1]
        type(self).served += len(part)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path`."""
    handler = lambda *arguments: Ranges(*arguments, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_shards_at_a_url_are_read_by_ranges(tmp_path: Path, server: str) -> None:
    pytest.importorskip("aiohttp")
    for i in range(2):
        members = {"0.png": png(50 * i), "0.cls": b"x", "filler.bin": bytes(8_000_000), "1.png": png(50 * i + 10)}
        write_tar(tmp_path / f"s{i:02d}.tar", members)
    dataset = datasets.list_dataset(DataConfig("webdataset", f"{server}/s{{00..01}}.tar"))
    assert [p.path for p in dataset.images] == [f"s{i:02d}.tar#{name}.png" for i in range(2) for name in range(2)]
    local = datasets.list_dataset(DataConfig("webdataset", f"{tmp_path}/s{{00..01}}.tar"))
    assert datasets.fingerprint(dataset, RECIPE) == datasets.fingerprint(local, RECIPE)
    Ranges.served = 0
    assert levels(dataset) == [0, 10, 50, 60]
    assert Ranges.served == sum(len(png(level)) for level in (0, 10, 50, 60))
    assert image_loading.encoded_images(dataset, [1]) == {"s00.tar#1.png": png(10)}
    (tmp_path / "s01.tar").unlink()
    with pytest.raises(StorageError):
        dataset.open(dataset.images[3])
    with pytest.raises(AtlasError, match=r"s02\.tar can't be opened"):
        datasets.list_dataset(DataConfig("webdataset", f"{server}/s02.tar"))


def test_a_folder_of_any_file_system() -> None:
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for name, level in (("cat/0.png", 20), ("dog/1.png", 40), ("2.png", 60)):
        files.pipe(f"/atlas-test/{name}", png(level))
    files.pipe("/atlas-test/readme.txt", b"text")
    try:
        config = DataConfig("folder", "memory://atlas-test")
        dataset = datasets.list_dataset(config)
        found = [(p.path, p.label, p.size) for p in dataset.images]
        assert found == [
            ("2.png", "", len(png(60))),
            ("cat/0.png", "cat", len(png(20))),
            ("dog/1.png", "dog", len(png(40))),
        ]
        assert levels(dataset) == [60, 20, 40]
        small = datasets.list_dataset(DataConfig("folder", "memory://atlas-test", max_bytes=10))
        assert next(image_loading.load_images(small, [0], RECIPE)).reason.startswith("too large")
    finally:
        files.rm("/atlas-test", recursive=True)
    with pytest.raises(AtlasError, match=r"no image at all|can't be listed"):
        datasets.list_dataset(config)


def test_what_a_url_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    remote._filesystem.cache_clear()
    with pytest.raises(AtlasError, match=r"data\.root=nowhere://"):
        datasets.list_dataset(DataConfig("folder", "nowhere://bucket/x"))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    remote._filesystem.cache_clear()
    with pytest.raises(AtlasError, match=r"pip install 'neuron-atlas\[remote\]'"):
        datasets.list_dataset(DataConfig("folder", "s3://bucket/x"))
