"""Sources of photographs: folders with labels of their own, Parquet and Arrow tables, tar shards."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import compose
from PIL import Image

from pipeline import cli, datasets, photos
from pipeline.datasets import DataConfig
from pipeline.errors import AtlasError
from pipeline.plan import make_plan
from pipeline.recipes import Recipe

RECIPE = Recipe((16, 16), 16, (0.5,) * 3, (0.25,) * 3)
COLOURS = ((250, 10, 10), (10, 250, 10), (10, 10, 250), (90, 90, 90), (250, 250, 10))


def png(i: int) -> bytes:
    with io.BytesIO() as buffer:
        Image.new("RGB", (20, 24), COLOURS[i]).save(buffer, "PNG")
        return buffer.getvalue()


def check(dataset: datasets.Dataset, labels: list[str], broken: int | None = None) -> None:
    """Every picture comes out with its own colour, after a journey to another process."""
    dataset = pickle.loads(pickle.dumps(dataset))
    assert [p.label for p in dataset.photos] == labels and len({p.path for p in dataset.photos}) == len(labels)
    for item in photos.load(dataset, range(len(labels)), RECIPE):
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
    dataset = datasets.listing(DataConfig("huggingface", str(tmp_path)))
    check(dataset, ["cat", "dog's", "cat", "dog's", ""])
    assert dataset.photos[3].path == "data/train-00000-of-00001.parquet#3"


def test_arrow_as_save_to_disk_writes_it(tmp_path: Path) -> None:
    table = hugging_table(True)
    parts = (pa.ipc.new_stream, table.slice(0, 3)), (pa.ipc.new_file, table.slice(3))
    for i, (kind, part) in enumerate(parts):
        path = tmp_path / f"data-0000{i}-of-00002.arrow"
        with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    check(datasets.listing(DataConfig("huggingface", str(tmp_path))), ["cat", "dog's", "cat", "dog's", ""])


def test_a_table_with_columns_of_other_names(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2], "png": [png(0), b"no picture"], "breed": ["<b>", "x"]})
    pq.write_table(table, tmp_path / "t.parquet")
    found = DataConfig("huggingface", str(tmp_path / "t.parquet"), label="breed")
    check(datasets.listing(found), ["<b>", "x"], broken=1)
    with pytest.raises(AtlasError, match=r"no column 'bread'\. Nearest: breed"):
        datasets.listing(DataConfig("huggingface", str(tmp_path), label="bread"))
    pq.write_table(pa.table({"id": [1]}), tmp_path / "t.parquet")
    datasets._parquet.cache_clear()
    with pytest.raises(AtlasError, match="no column of pictures"):
        datasets.listing(DataConfig("huggingface", str(tmp_path)))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_tar_shards_are_read_from_their_offsets(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a-000.tar",
        {"001.png": png(0), "001.cls": b"7\n", "001.json": b"{}", "x/002.png": png(1), 'q"\n.png': png(2)},
    )
    write_tar(tmp_path / "a-001.tar", {"001.png": png(3), "001.cls": b"dog"})
    dataset = datasets.listing(DataConfig("webdataset", str(tmp_path)))
    check(dataset, ["7", "x", "", "dog"])
    assert [p.path for p in dataset.photos[:2]] == ["a-000.tar#001.png", "a-000.tar#x/002.png"]


def test_a_tar_that_was_cut_off_gives_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    with io.BytesIO() as buffer:
        Image.fromarray(noise).save(buffer, "PNG")
        large = buffer.getvalue()
    write_tar(tmp_path / "a.tar", {"0.png": png(0), "1.png": large, "2.png": png(2)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:4000])
    dataset = datasets.listing(DataConfig("webdataset", str(tmp_path)))
    items = list(photos.load(dataset, range(len(dataset.photos)), RECIPE))
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
    dataset = datasets.listing(DataConfig("folder", str(tmp_path / "pictures"), labels=str(file)))
    assert {p.path: p.label for p in dataset.photos} == {names[0]: "tench", names[1]: "", names[2]: "owl, barn"}
    assert dataset.labels[0] == ("owl, barn", "tench") and sorted(dataset.labels[1].tolist()) == [-1, 0, 1]


def test_labels_that_do_not_fit_are_told(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    root = str(tmp_path)
    (tmp_path / "l.csv").write_text("other.png,tench\n")
    with pytest.raises(AtlasError, match=r"names none of the photographs.*0\.png"):
        datasets.listing(DataConfig("folder", root, labels=str(tmp_path / "l.csv")))
    (tmp_path / "l.json").write_text("[1]")
    with pytest.raises(AtlasError, match="can't be read"):
        datasets.listing(DataConfig("folder", root, labels=str(tmp_path / "l.json")))
    with pytest.raises(AtlasError, match="no such file"):
        datasets.listing(DataConfig("folder", root, labels=str(tmp_path / "nowhere.csv")))


def test_empty_and_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match=r"no \.tar there"):
        datasets.listing(DataConfig("webdataset", str(tmp_path)))
    with pytest.raises(AtlasError, match=r"no \.parquet or \.arrow"):
        datasets.listing(DataConfig("huggingface", str(tmp_path)))
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(AtlasError, match="can't be read as a table"):
        datasets.listing(DataConfig("huggingface", str(tmp_path)))


def test_the_fingerprint_knows_labels_sizes_and_recipe(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    one = datasets.fingerprint(datasets.listing(DataConfig("folder", str(tmp_path))), RECIPE)
    assert one == datasets.fingerprint(datasets.listing(DataConfig("folder", str(tmp_path))), RECIPE)
    (tmp_path / "l.csv").write_text("0.png,tench\n")
    labelled = datasets.listing(DataConfig("folder", str(tmp_path), labels=str(tmp_path / "l.csv")))
    other = Recipe((16, 16), 18, (0.5,) * 3, (0.25,) * 3)
    (tmp_path / "0.png").write_bytes(png(0) + b" ")
    resized = datasets.listing(DataConfig("folder", str(tmp_path)))
    different = [datasets.fingerprint(labelled, RECIPE), datasets.fingerprint(resized, other)]
    assert all(d != one for d in [*different, datasets.fingerprint(resized, RECIPE)])


def test_a_second_run_borrows_the_pass_of_the_first(tiny_run: list[str], tmp_path: Path) -> None:
    import pipeline

    assert cli.main(["examples", *tiny_run]) == 0
    first = {p.name: p.stat().st_ino for p in (tmp_path / "tiny" / "shards").rglob("*.h5")}
    assert cli.main(["examples", *tiny_run, "run.name=second", "render.steps=9"]) == 0
    second = {p.name: p.stat().st_ino for p in (tmp_path / "second" / "shards").rglob("*.h5")}
    assert second == first  # the very files, linked: nothing was measured again
    with pipeline.open_atlas(tmp_path / "second") as atlas:
        layer = atlas["conv_stem"]
        best = layer.examples("max")
        assert best is not None and (best.map >= 0).all()
        heat = layer.heat_map(int(best.map[0, 0]))
        assert heat is not None and heat.shape == (14, 14)
        assert atlas.picture(int(best.index[0, 0])) is not None and atlas.examples_store == "images"
        shown = atlas.shown(int(best.index[0, 0]))
        assert shown is not None and max(shown.size) > 60
        box = layer.source_box(shown, int(best.y[0, 0]), int(best.x[0, 0]), least=3)
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
    # Another input recipe is another pass.
    plans = [make_plan(compose([*tiny_run, *more]).config, timed=False) for more in ([], ["model.resize=70"])]
    assert plans[0].examples_digest != plans[1].examples_digest
