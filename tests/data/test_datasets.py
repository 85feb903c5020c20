"""Sources of photographs: folders with labels of their own, Parquet and Arrow tables, tar shards."""

import csv
import dataclasses
import functools
import io
import json
import logging
import os
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import compose, write_tar
from PIL import Image

from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.data import datasets, image_formats, image_loading
from pipeline.data.config import MAX_BYTES, MAX_PIXELS, DataConfig
from pipeline.data.readers import huggingface, samples
from pipeline.data.readers.base import DatasetImage
from pipeline.models.config import Preprocessing
from pipeline.planning.planner import make_plan

RECIPE = Preprocessing((16, 16), 16, (0.5,) * 3, (0.25,) * 3)
COLOURS = ((250, 10, 10), (10, 250, 10), (10, 10, 250), (90, 90, 90), (250, 250, 10))


def png(i: int) -> bytes:
    with io.BytesIO() as buffer:
        Image.new("RGB", (20, 24), COLOURS[i]).save(buffer, "PNG")
        return buffer.getvalue()


def check(dataset: datasets.Dataset, labels: list[str], broken: int | None = None) -> None:
    """Every picture comes out with its own colour, after a journey to another process."""
    dataset = pickle.loads(pickle.dumps(dataset))
    assert [p.label for p in dataset.images] == labels and len({p.path for p in dataset.images}) == len(labels)
    for item in image_loading.load_images(dataset, range(len(labels)), RECIPE):
        if item.index == broken:
            assert item.array is None and item.reason
        else:
            assert item.array is not None, item.reason
            assert item.array[:, 8, 8].tolist() == list(COLOURS[item.index])


def hugging_table(with_names: bool) -> pa.Table:
    cells = [{"bytes": png(i), "path": f"{i}.png"} for i in range(5)]
    table = pa.table({"image": cells, "label": pa.array([0, 1, 0, 1, -1], pa.int64())})
    if with_names:
        feature = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog's"], "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    return table


def test_parquet_as_a_hub_holds_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(hugging_table(True), tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    dataset = datasets.list_dataset(DataConfig("huggingface", str(tmp_path)))
    check(dataset, ["cat", "dog's", "cat", "dog's", ""])
    assert dataset.images[3].path == "data/train-00000-of-00001.parquet#3"


def test_arrow_as_save_to_disk_writes_it(tmp_path: Path) -> None:
    table = hugging_table(True)
    parts = (pa.ipc.new_stream, table.slice(0, 3)), (pa.ipc.new_file, table.slice(3))
    for i, (kind, part) in enumerate(parts):
        path = tmp_path / f"data-0000{i}-of-00002.arrow"
        with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    check(datasets.list_dataset(DataConfig("huggingface", str(tmp_path))), ["cat", "dog's", "cat", "dog's", ""])


def test_a_table_with_columns_of_other_names(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2], "png": [png(0), b"no picture"], "breed": ["<b>", "x"]})
    pq.write_table(table, tmp_path / "t.parquet")
    found = DataConfig("huggingface", str(tmp_path / "t.parquet"), label="breed")
    check(datasets.list_dataset(found), ["<b>", "x"], broken=1)
    with pytest.raises(AtlasError, match=r"no column 'bread'\. Nearest: breed"):
        datasets.list_dataset(DataConfig("huggingface", str(tmp_path), label="bread"))
    pq.write_table(pa.table({"id": [1]}), tmp_path / "t.parquet")
    huggingface._parquet.cache_clear()
    with pytest.raises(AtlasError, match="no image column"):
        datasets.list_dataset(DataConfig("huggingface", str(tmp_path)))


def test_tar_shards_are_read_from_their_offsets(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a-000.tar",
        {"001.png": png(0), "001.cls": b"7\n", "001.json": b"{}", "x/002.png": png(1), 'q"\n.png': png(2)},
    )
    write_tar(tmp_path / "a-001.tar", {"001.png": png(3), "001.cls": b"dog"})
    dataset = datasets.list_dataset(DataConfig("webdataset", str(tmp_path)))
    check(dataset, ["7", "x", "", "dog"])
    assert [p.path for p in dataset.images[:2]] == ["a-000.tar#001.png", "a-000.tar#x/002.png"]


def test_a_tar_that_was_cut_off_gives_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    with io.BytesIO() as buffer:
        Image.fromarray(noise).save(buffer, "PNG")
        large = buffer.getvalue()
    write_tar(tmp_path / "a.tar", {"0.png": png(0), "1.png": large, "2.png": png(2)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:4000])
    dataset = datasets.list_dataset(DataConfig("webdataset", str(tmp_path)))
    items = list(image_loading.load_images(dataset, range(len(dataset.images)), RECIPE))
    assert items[0].array is not None and all(item.array is None and item.reason for item in items[1:])


@pytest.mark.parametrize("ending", ["csv", "tsv", "json"])
def test_labels_from_a_file(tmp_path: Path, ending: str) -> None:
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    names = ["a/0, 'one'.png", "a/1.png", "2.png"]
    for i, name in enumerate(names):
        (tmp_path / "pictures" / name).write_bytes(png(i))
    file = tmp_path / f"labels.{ending}"
    if ending == "json":
        file.write_text(json.dumps({names[0]: "tench", "2.png": "owl, barn"}))
    elif ending == "csv":
        file.write_text('path,label\n"a/0, \'one\'.png",tench\n2.png,"owl, barn"\n')
    else:
        file.write_text("a/0, 'one'.png\ttench\n2.png\towl, barn\n")
    dataset = datasets.list_dataset(DataConfig("folder", str(tmp_path / "pictures"), labels=str(file)))
    assert {p.path: p.label for p in dataset.images} == {names[0]: "tench", names[1]: "", names[2]: "owl, barn"}
    assert dataset.labels[0] == ("owl, barn", "tench") and sorted(dataset.labels[1].tolist()) == [-1, 0, 1]


def test_labels_that_do_not_fit_are_told(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    root = str(tmp_path)
    (tmp_path / "l.csv").write_text("other.png,tench\n")
    with pytest.raises(AtlasError, match=r"contains no path of a dataset image.*0\.png"):
        datasets.list_dataset(DataConfig("folder", root, labels=str(tmp_path / "l.csv")))
    (tmp_path / "l.json").write_text("[1]")
    with pytest.raises(AtlasError, match="can't be read"):
        datasets.list_dataset(DataConfig("folder", root, labels=str(tmp_path / "l.json")))
    with pytest.raises(AtlasError, match="no such file"):
        datasets.list_dataset(DataConfig("folder", root, labels=str(tmp_path / "nowhere.csv")))


def test_empty_and_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"no \.tar there"):
        datasets.list_dataset(DataConfig("webdataset", str(tmp_path)))
    with pytest.raises(AtlasError, match=r"no \.parquet or \.arrow"):
        datasets.list_dataset(DataConfig("huggingface", str(tmp_path)))
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(AtlasError, match="can't be read as a table"):
        datasets.list_dataset(DataConfig("huggingface", str(tmp_path)))


def test_the_fingerprint_knows_labels_sizes_and_recipe(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    one = datasets.fingerprint(datasets.list_dataset(DataConfig("folder", str(tmp_path))), RECIPE)
    assert one == datasets.fingerprint(datasets.list_dataset(DataConfig("folder", str(tmp_path))), RECIPE)
    (tmp_path / "l.csv").write_text("0.png,tench\n")
    labelled = datasets.list_dataset(DataConfig("folder", str(tmp_path), labels=str(tmp_path / "l.csv")))
    other = Preprocessing((16, 16), 18, (0.5,) * 3, (0.25,) * 3)
    (tmp_path / "0.png").write_bytes(png(0) + b" ")
    resized = datasets.list_dataset(DataConfig("folder", str(tmp_path)))
    different = [datasets.fingerprint(labelled, RECIPE), datasets.fingerprint(resized, other)]
    assert all(d != one for d in [*different, datasets.fingerprint(resized, RECIPE)])


@pytest.mark.parametrize("suffix", sorted(suffix for known in image_formats.FORMATS for suffix in known.suffixes))
def test_every_format_is_listed_and_read(tmp_path: Path, suffix: str) -> None:
    """By its suffix, and by its first bytes without one."""
    known = next(known for known in image_formats.FORMATS if suffix in known.suffixes)
    name = {"JPEG 2000": "JPEG2000", "PNM": "PPM"}.get(known.name, known.name)
    Image.init()
    if not image_formats.can_decode(known) or name not in Image.SAVE:
        pytest.skip(f"Pillow can't write {known.name} here")
    with io.BytesIO() as buffer:
        Image.new("RGB", (20, 24), COLOURS[3]).save(buffer, name)
        data = buffer.getvalue()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"1{suffix.upper()}").write_bytes(data)
    (tmp_path / "a" / "2").write_bytes(data)
    dataset = datasets.list_dataset(DataConfig("folder", str(tmp_path)))
    # TGA files have no first bytes of their own.
    expected = [f"a/1{suffix.upper()}"] + ["a/2"] * (known.name != "TGA")
    assert [p.path for p in dataset.images] == expected
    write_tar(tmp_path / "t.tar", {f"1{suffix}": data, "2": data})
    tar = datasets.list_dataset(DataConfig("webdataset", str(tmp_path / "t.tar")))
    assert len(tar.images) == len(expected)
    for source in (dataset, tar):
        for item in image_loading.load_images(source, range(len(expected)), RECIPE):
            assert item.array is not None, item.reason
            assert np.abs(item.array.astype(int) - 90).max() <= 2


def test_the_beginning_of_a_file_tells_its_format() -> None:
    box = b"\0\0\0\x1cftyp%s\0\0\0\0%s"
    cases = {
        b"BM" + bytes(12) + b"\x28\0\0\0": "BMP",
        b"II\x2b\0": "TIFF",
        b"P5\n3 4": "PNM",
        b"\xff\x4f\xff\x51": "JPEG 2000",
        box % (b"avif", b"mif1"): "AVIF",
        box % (b"mif1", b"miafavif"): "AVIF",
        box % (b"heic", b"mif1"): "HEIF",
        box % (b"mif1", b"heic"): "HEIF",
        b"BMW, a car maker of Munich": "",
        b"P1 is a priority": "",
        b"{}": "",
        b"": "",
    }
    for head, name in cases.items():
        found = image_formats.identify(head)
        assert (found.name if found else "") == name, head


@pytest.fixture
def without_decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose Pillow has no optional decoder, and without pillow-heif."""
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    monkeypatch.setattr(image_formats.features, "check", lambda name: False)
    image_formats.can_decode.cache_clear()
    yield
    monkeypatch.undo()
    image_formats.can_decode.cache_clear()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_what_is_passed_over_is_counted_by_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, without_decoders: None
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("1.heic", "2.HEIC", "deep/3.heic"):
        (tmp_path / name).write_bytes(HEIC)
    for name in ("readme.txt", "deep/notes.TXT", "LICENSE", "deep/none"):
        (tmp_path / name).write_text("text")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(
        AtlasError, match=r"no image at all.* holds 8 files of other kinds: \(no suffix\) 3, \.heic 3, \.txt 2"
    ):
        datasets.list_dataset(DataConfig("folder", str(tmp_path)))
    with pytest.raises(AtlasError, match=r"To read \.heic: pip install \"neuron-atlas\[heic\]\""):
        datasets.list_dataset(DataConfig("folder", str(tmp_path)))
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "9").write_bytes(png(1))
    with caplog.at_level(logging.INFO, "pipeline"):
        assert [p.path for p in datasets.list_dataset(DataConfig("folder", str(tmp_path))).images] == ["0.png", "9"]
    assert [r.message for r in caplog.records if "skipped" in r.message] == [
        "8 files of other kinds skipped: (no suffix) 3, .heic 3, .txt 2; "
        'to read .heic: pip install "neuron-atlas[heic]", or scripts/setup heic in a checkout'
    ]
    caplog.clear()
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "0.png").write_bytes(png(0))
    with caplog.at_level(logging.INFO, "pipeline"):
        datasets.list_dataset(DataConfig("folder", str(tmp_path / "clean")))
    assert "skipped" not in caplog.text


def test_many_kinds_are_not_all_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(15):
        (tmp_path / f"x.{i:02d}").write_text("")
    (tmp_path / "0.png").write_bytes(png(0))
    with caplog.at_level(logging.INFO, "pipeline"):
        datasets.list_dataset(DataConfig("folder", str(tmp_path)))
    assert "15 files of other kinds skipped: .00 1, .01 1" in caplog.text
    assert caplog.text.rstrip().endswith(".11 1, and 3 more kinds")


def test_tar_shards_count_what_they_pass_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"1.png": png(0), "1.cls": b"7", "1.json": b"{}", "2.png": png(1), "2.json": b"{}", "2.txt": b"a dog"}
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "b.tar.gz").write_bytes(b"a compressed shard")
    with caplog.at_level(logging.INFO, "pipeline"):
        assert len(datasets.list_dataset(DataConfig("webdataset", str(tmp_path))).images) == 2
    assert "4 files of other kinds skipped: .json 2, .gz 1, .txt 1" in caplog.text
    write_tar(tmp_path / "a.tar", {"1.cls": b"7", "1.json": b"{}"})
    with pytest.raises(AtlasError, match=r"no image at all.* holds 2 files of other kinds: \.gz 1, \.json 1"):
        datasets.list_dataset(DataConfig("webdataset", str(tmp_path)))


def test_heic_is_read_where_its_package_is_installed(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (20, 24), COLOURS[3])).save(tmp_path / "0.heic")
    dataset = datasets.list_dataset(DataConfig("folder", str(tmp_path)))
    items = list(image_loading.load_images(dataset, range(len(dataset.images)), RECIPE))
    assert len(items) == 1 and items[0].array is not None and np.abs(items[0].array.astype(int) - 90).max() <= 2


def test_a_worker_without_a_decoder_fails_image_by_image(tmp_path: Path, without_decoders: None) -> None:
    """The driver lists; what this machine lacks must not change the list, and must not look like a broken file."""
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "1.heic").write_bytes(HEIC)
    (tmp_path / "2.avif").write_bytes(HEIC.replace(b"heic", b"avif"))
    listed = datasets.Dataset(
        tuple(DatasetImage(name, "", i) for i, name in enumerate(("0.png", "1.heic", "2.avif"))), {"": str(tmp_path)}
    )
    good, heic, avif = image_loading.load_images(listed, range(3), RECIPE)
    assert good.array is not None
    assert heic.reason.startswith('no decoder: HEIF (pip install "neuron-atlas[heic]"')
    assert avif.reason.startswith("no decoder: AVIF (install Pillow")


@pytest.mark.long
def test_a_raised_limit_of_pixels_reads_what_was_refused(tiny_run: list[str], tmp_path: Path) -> None:
    """As the message says: the setting that it names, changed, gives the image."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(4):
        Image.new("RGB", (80, 80), COLOURS[i]).save(root / f"{i}.png")
    Image.new("RGB", (140, 100), COLOURS[4]).save(root / "large.png")
    asked = [*tiny_run, f"data.root={root}"]

    def failures() -> list[list[str]]:
        with (tmp_path / "tiny" / "failures.csv").open(encoding="utf-8") as handle:
            return list(csv.reader(handle))[1:]

    assert main(["examples", *asked, "data.max_pixels=10000"]) == 0
    reason = "too large: 140 × 100 pixels; data.max_pixels allows 10,000"
    assert failures() == [["examples", "large.png", reason, ""]]
    assert main(["examples", *asked, "data.max_pixels=14000", "run.update=true"]) == 0
    assert failures() == []
    with pytest.raises(AtlasError, match=r"data\.max_pixels=0 is too small: at least 1, or null"):
        compose([*asked, "data.max_pixels=0"])
    default = compose(asked).config.data
    assert default.max_pixels == MAX_PIXELS == 64_000_000
    recipes = [datasets.fingerprint(datasets.list_dataset(DataConfig("folder", str(root), max_pixels=n)), RECIPE)
               for n in (64_000_000, 14_000, None)]  # fmt: skip
    assert recipes[0] != recipes[1] != recipes[2] != recipes[0]


def path_rows(root: Path, paths: list[str | None], table: str = "data/t.parquet") -> datasets.Dataset:
    cells = pa.array(
        [{"bytes": None, "path": p} for p in paths], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    (root / table).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": cells}), root / table)
    huggingface._parquet.cache_clear()
    huggingface._cached_column.cache_clear()
    return datasets.list_dataset(DataConfig("huggingface", str(root)))


def test_rows_may_name_files_below_the_root(tmp_path: Path) -> None:
    for i, name in enumerate(("data/near.png", "images/far.png", "images/up.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(i))
    check(path_rows(tmp_path, ["near.png", "images/far.png", "../images/up.png"]), ["", "", ""])
    gone, empty = image_loading.load_images(path_rows(tmp_path, ["gone.png", None]), range(2), RECIPE)
    assert gone.reason == "missing, or a broken link" and empty.reason == "an empty cell"


def test_rows_that_lead_out_of_the_root_are_refused(tmp_path: Path) -> None:
    """A table that somebody else made must not open, or send to workers, any file of this machine."""
    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(0))
    (root / "inside.png").write_bytes(png(1))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "door").symlink_to(tmp_path)
    outside = [
        str(tmp_path / "secret.png"), "../../secret.png", "../secret.png/../../secret.png", "link.png",
        "door/secret.png", str(root / "inside.png"), "/etc/hostname",
    ]  # fmt: skip
    dataset = path_rows(root, [*outside, "inside.png"])
    *refused, good = image_loading.load_images(dataset, range(len(outside) + 1), RECIPE)
    for name, item in zip(outside, refused, strict=True):
        assert item.array is None
        assert item.reason == f"outside the dataset: the path {name!r} must be relative and lie below data.root"
        with pytest.raises(ValueError, match="outside the dataset"):
            dataset.content(dataset.images[item.index])
    assert good.array is not None, good.reason
    # The root may itself be a link.
    (tmp_path / "alias").symlink_to(root)
    assert (
        next(
            image_loading.load_images(
                datasets.list_dataset(DataConfig("huggingface", str(tmp_path / "alias"))), [7], RECIPE
            )
        ).array
        is not None
    )


def test_a_row_group_is_read_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int, str]] = []

    @functools.lru_cache(maxsize=2)
    def slow(path: str, group: int, column: str) -> int:
        read.append((path, group, column))
        time.sleep(0.05)
        return group

    monkeypatch.setattr(huggingface, "_cached_column", slow)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: huggingface.image_cells("t", i // 8, "image"), range(16)))
    assert found == [0] * 8 + [1] * 8 and sorted(read) == [("t", 0, "image"), ("t", 1, "image")]


@pytest.mark.long
def test_a_second_run_borrows_the_pass_of_the_first(tiny_run: list[str], tmp_path: Path) -> None:
    import pipeline

    assert main(["examples", *tiny_run]) == 0
    first = {p.name: p.stat().st_ino for p in (tmp_path / "tiny" / "shards").rglob("*.h5")}
    assert main(["examples", *tiny_run, "run.name=second", "render.steps=9"]) == 0
    second = {p.name: p.stat().st_ino for p in (tmp_path / "second" / "shards").rglob("*.h5")}
    assert second == first  # the very files, linked: nothing was measured again
    with pipeline.open_atlas(tmp_path / "second") as atlas:
        layer = atlas["conv_stem"]
        best = layer.examples("max")
        assert best is not None and (best.map >= 0).all()
        heat = layer.heat_map(int(best.map[0, 0]))
        assert heat is not None and heat.shape == (14, 14)
        assert atlas.source_image(int(best.index[0, 0])) is not None and atlas.examples_store == "images"
        shown = atlas.image_geometry(int(best.index[0, 0]))
        assert shown is not None and max(shown.size) > 60
        box = layer.source_box(shown, int(best.y[0, 0]), int(best.x[0, 0]), min_size=3)
        assert box is not None and 0 <= box[0] < box[2] <= shown.size[0] and 0 <= box[1] < box[3] <= shown.size[1]
        spectrum = layer.examples("spectrum")
        assert spectrum is not None and spectrum.index.shape == (3, 18) and len(layer.spectrum_edges) == 7
        quantiles = layer.quantiles([0, 0.5, 1])
        assert (np.diff(quantiles) >= 0).all() and np.allclose(quantiles[:, 2], layer.stats()["max"])
        assert layer.similar(int(layer.channels[0]), 2)["correlation"].between(-1.001, 1.001).all()
        labels = layer.labels()
        assert labels is not None and labels.method == "counts" and len(atlas.dataset_labels) == 4
        histogram = layer.histogram()
        assert histogram is not None and histogram.counts.shape == (3, 254) and 0 <= layer.population_sparsity <= 1
        for layer in atlas:
            linear = layer.name.endswith(("conv_pwl", "classifier"))  # a block's output, and the logits
            assert layer.reference == ("none" if linear else "zero")
            assert np.isnan(layer.population_sparsity) == linear
            assert all(np.isnan(layer.stats()[name]).all() == linear for name in ("nonzero", "fired", "sparsity"))
    # Another input recipe is another pass.
    plans = [make_plan(compose([*tiny_run, *more]).config, timed=False) for more in ([], ["model.resize=70"])]
    assert plans[0].examples_digest != plans[1].examples_digest


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member of an archive may claim gigabytes, of which each decoding thread would read its own."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.png").write_bytes(png(0))
    (tmp_path / "folder" / "1.png").write_bytes(png(1) + bytes(2000))
    write_tar(tmp_path / "a.tar", {"0.png": png(0), "1.png": png(1) + bytes(2000)})
    cells = pa.table({"image": [png(0), png(1) + bytes(2000)]})
    pq.write_table(cells, tmp_path / "a.parquet")
    reason = f"too large: {len(png(1)) + 2000:,} bytes; data.max_bytes allows 1,000"
    for config in (
        DataConfig("folder", str(tmp_path / "folder"), max_bytes=1000),
        DataConfig("webdataset", str(tmp_path / "a.tar"), max_bytes=1000),
        DataConfig("huggingface", str(tmp_path / "a.parquet"), max_bytes=1000),
    ):
        dataset = datasets.list_dataset(config)
        good, large = image_loading.load_images(dataset, range(2), RECIPE)
        assert good.array is not None and (large.array, large.reason) == (None, reason), config.source
        assert image_loading.encoded_images(dataset, [1]) == {dataset.images[1].source_path: reason}
        unlimited = datasets.list_dataset(dataclasses.replace(config, max_bytes=MAX_BYTES))
        assert datasets.fingerprint(dataset, RECIPE) != datasets.fingerprint(unlimited, RECIPE)
    # A row group is read at once, whatever the sizes of its cells.
    group = DataConfig("huggingface", str(tmp_path / "a.parquet"), max_bytes=100)
    monkeypatch.setattr(huggingface, "image_cells", lambda *_: pytest.fail("the group was read"))
    assert next(image_loading.load_images(datasets.list_dataset(group), [0], RECIPE)).reason.startswith("too large")
    assert compose(["data=samples"]).config.data.max_bytes == 256 * 2**20


def test_a_tar_member_beyond_the_end_of_its_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": png(0), "1.png": png(1) + bytes(5000)})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
    dataset = datasets.list_dataset(DataConfig("webdataset", str(tmp_path)))
    assert [image.path for image in dataset.images] == ["a.tar#0.png"]
    assert "1.png" in caplog.text or "damaged" in caplog.text


def test_authors_of_sample_images_are_named() -> None:
    listed = datasets.list_dataset(DataConfig("samples"))
    named = samples.credits_of(image.path for image in listed.images)
    assert len(named) == 2 and all("CC BY 2.0" in line and "flickr.com" in line for line in named)
    assert samples.credits_of(["skimage/astronaut.png#0,0,9,9", "china.jpg", "sklearn/other.jpg#0,0,1,1"]) == ()
