"""Reruns: what another run has already is linked, cut out or copied, and never made again; what is left is said."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import TINY, compose

import pipeline
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.engine import worker
from pipeline.examples import sweep
from pipeline.planning import cost_model, manifest, planner
from pipeline.planning.folder import RunFolder
from pipeline.runs.pass_subset import PassSubset

SMALL = ["layers.include=[blocks.1.0.*,classifier]", "layers.channels=[0,2]"]
TINY_PRESETS = ["render.steps=2", "render.size=32", "render.margin=4"]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A finished run that no test may change, and the overrides it was made with, but for its place."""
    root = tmp_path_factory.mktemp("base")
    settings = [*TINY, "data=folder", f"data.root={photo_folder}"]
    assert main(["run", *settings, f"run.root={root}", "run.name=base"]) == 0
    before = snapshot(root / "base")
    yield root / "base", settings
    assert snapshot(root / "base") == before


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(layer, channel) of every picture that is rendered from here on."""
    made: list[tuple[str, int]] = []
    whole = worker.render

    def counting(job: Any, units: Any, start: Any) -> Any:
        made.extend((job.layer.name, channel) for channel, _ in units)
        return whole(job, units, start)

    monkeypatch.setattr(worker, "render", counting)
    return made


@pytest.fixture
def no_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads any photograph."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("a photograph was read")

    for module in ("pipeline.examples.sweep", "pipeline.examples.localize"):
        monkeypatch.setattr(f"{module}.image_loading.load_images", read)


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody probes a receptive field."""

    def probe(*_: object) -> None:
        raise AssertionError("a receptive field was probed")

    monkeypatch.setattr(planner, "receptive_fields", probe)


def content(folder: Path) -> dict[str, np.ndarray]:
    """Everything in an atlas but what tells when and how long."""
    found: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not name.endswith("/seconds") and not name.startswith("provenance"):
            found[name] = item[()]
        skipped = ("created", "identity", "run")
        found.update({f"{name}@{k}": np.asarray(v) for k, v in item.attrs.items() if k not in skipped})

    with h5py.File(folder / "atlas.h5") as file:
        file.visititems(visit)
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two atlases are equal: to the last bit but for pictures, whose rounding differs with their batch."""

    def equal(name: str) -> bool:
        a, b = one[name], other[name]
        if "/render/" not in name or a.dtype.kind not in "fu":
            return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        if name.endswith("images"):
            return int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1
        return name.endswith("sha256") or np.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)

    return one.keys() == other.keys() and all(map(equal, one))


def test_examples_are_linked_and_only_pictures_that_differ_are_rendered(
    finished: tuple[Path, list[str]],
    tmp_path: Path,
    rendered: list[tuple[str, int]],
    no_photograph: None,
    no_probe: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, settings = finished
    rerun = [*settings, f"run.root={tmp_path}", "run.name=again", f"base={base}"]
    longer = [*rerun, "render.steps=5"]
    assert main(["plan", *longer]) == 0
    printed = capsys.readouterr().out
    assert f"from {base}: first pass over 20 images, 0 of 15 visualizations" in printed
    assert re.search(r"to do: dataset pass over 0 images, 15 visualizations; about \d+ s( \([^)]+\))? with", printed)
    assert not (tmp_path / "again" / "shards").exists()  # a plan links nothing

    assert main(["run", *longer]) == 0
    assert len(rendered) == 15
    for kind in ("ranges", "examples", "localize"):
        linked = sorted((tmp_path / "again" / "shards" / kind).glob("*.h5"))
        assert linked and all(path.samefile(base / "shards" / kind / path.name) for path in linked)
    with pipeline.open_atlas(base) as old, pipeline.open_atlas(tmp_path / "again") as new:
        for before, after in zip(old, new, strict=True):
            a, b = before.examples("max"), after.examples("max")
            assert a is not None and b is not None and np.array_equal(a.index, b.index)
            assert before.receptive_field == after.receptive_field
            assert (before.measurements()["steps"] == 4).all() and (after.measurements()["steps"] == 5).all()

    # With the base's own settings all of its pictures are taken, too: the atlas is the same, and nothing was rendered.
    rendered.clear()
    capsys.readouterr()
    equal = [o.replace("run.name=again", "run.name=equal") for o in rerun]
    assert main(["run", *equal]) == 0
    told = capsys.readouterr()
    assert f"from {base}: first pass over 20 images, 15 of 15 visualizations" in told.out
    assert "to do: nothing is missing" in told.out and "Reusing 15 visualizations of" in told.err
    assert not rendered and same(content(base), content(tmp_path / "equal"))


def test_nothing_is_probed_timed_or_made_where_nothing_is_missing(
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", *tiny_run]) == 0
    before = snapshot(tmp_path / "tiny" / "shards")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this takes time")

    for name in ("receptive_fields", "estimate", "fold"):
        monkeypatch.setattr(planner, name, never)
    capsys.readouterr()
    assert main(["run", *tiny_run]) == 0
    printed = capsys.readouterr().out
    assert "here already: first pass over 20 images, 15 of 15 visualizations\nto do: nothing is missing" in printed
    assert snapshot(tmp_path / "tiny" / "shards") == before


def test_only_what_is_missing_is_timed(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, settings = finished
    timed: list[str] = []
    costs: list[float] = []
    whole = planner.estimate

    def noting(chosen: Any, rows: Any, *rest: Any) -> Any:
        timed.extend(row.layer.name for row in rows)
        found = whole(chosen, rows, *rest)
        costs.extend(row.cost(1) for row in found[0])
        return found

    monkeypatch.setattr(planner, "estimate", noting)
    more = [*settings, f"run.root={tmp_path}", "run.name=more", f"base={base}", "layers.include=[conv_*,blocks.0.0.*]"]
    assert main(["plan", *more]) == 0
    assert timed and "conv_stem" not in timed and all(name.startswith("blocks.0.0") for name in timed)
    written = (tmp_path / "more" / "plan.csv").read_text().splitlines()
    seconds = {line.split(",")[0]: float(line.split(",")[-2]) for line in written[1:-2]}
    assert seconds["conv_stem"] == 0 and timed[0] in seconds  # tenths of a second; so small a layer may have none
    assert costs and all(cost > 0 for cost in costs)


@pytest.mark.parametrize("store", ["images", "crops"])
@pytest.mark.long
def test_fewer_layers_and_channels_are_cut_out_of_the_base(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    base, settings = finished
    settings = [*settings, f"examples.store={store}"]
    if store != "images":
        assert main(["run", *settings, f"run.root={tmp_path / 'base'}", "run.name=base"]) == 0
        base = tmp_path / "base" / "base"
    small = [*settings, *SMALL, "run.name=small"]
    alone, based = tmp_path / "alone", tmp_path / "based"
    assert main(["run", *small, f"run.root={alone}"]) == 0

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this was done already")

    monkeypatch.setattr("pipeline.examples.sweep.image_loading.load_images", never)
    monkeypatch.setattr(worker, "render", never)
    assert main(["run", *small, f"run.root={based}", f"base={base}"]) == 0
    ours, theirs = content(based / "small"), content(alone / "small")
    assert any(name.endswith("heat") or "maps/value" in name for name in ours) and same(ours, theirs)
    assert main(["verify", str(based / "small"), "run.check=0"]) == 0


@pytest.mark.long
def test_channels_that_the_base_does_not_show_are_looked_at_again(
    finished: tuple[Path, list[str]],
    tmp_path: Path,
    rendered: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, settings = finished
    more = [*settings, "layers.channels='1:5'", "run.name=more"]
    assert main(["run", *more, f"run.root={tmp_path / 'alone'}"]) == 0
    assert len(rendered) == 20
    rendered.clear()
    capsys.readouterr()
    assert main(["run", *more, f"run.root={tmp_path / 'based'}", f"base={base}"]) == 0
    assert f"from {base}: first pass over 20 images, 10 of 20 visualizations" in capsys.readouterr().out
    assert len(rendered) == 10 and {channel for _, channel in rendered} == {3, 4}
    assert same(content(tmp_path / "alone" / "more"), content(tmp_path / "based" / "more"))


def test_other_layers_than_the_bases_are_looked_at_in_full(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, settings = finished
    other = [*settings, "layers.include=[conv_stem,blocks.0.0.*]", f"run.root={tmp_path}", "run.name=other"]
    assert main(["plan", *other, f"base={base}"]) == 0
    printed = capsys.readouterr().out
    assert f"from {base}: first pass over 0 images, 3 of" in printed and "dataset pass over 20 images, " in printed
    assert f"the dataset pass cannot be reused: {base} has no blocks.0.0." in printed
    assert main(["plan", *settings, f"run.root={tmp_path}", "run.name=k", f"base={base}", "examples.k=2"]) == 0
    assert "the dataset pass cannot be reused: examples.k: 3 → 2" in capsys.readouterr().out


@pytest.mark.long
def test_a_base_that_is_only_begun_lends_what_it_has(
    finished: tuple[Path, list[str]], tmp_path: Path, rendered: list[tuple[str, int]]
) -> None:
    base, settings = finished
    half = tmp_path / "half" / "base"
    shutil.copytree(base, half)
    for path in [half / "atlas.h5", *sorted((half / "shards" / "examples").glob("*.h5"))[:1]]:
        path.unlink()
    shutil.rmtree(half / "shards" / "localize")
    shutil.rmtree(half / "shards" / "render" / "conv_stem")
    rest = [*settings, f"run.root={tmp_path}", "run.name=rest", f"base={half}"]
    assert main(["run", *rest]) == 0
    assert {layer for layer, _ in rendered} == {"conv_stem"}
    assert same(content(base), content(tmp_path / "rest"))


@pytest.mark.long
def test_a_compacted_base_lends_out_of_its_atlas(
    finished: tuple[Path, list[str]], tmp_path: Path, rendered: list[tuple[str, int]], no_photograph: None
) -> None:
    base, settings = finished
    small = tmp_path / "compacted" / "base"
    shutil.copytree(base, small)
    assert main(["compact", str(small)]) == 0
    assert not list((small / "shards").glob("render/*/*.h5"))
    before = snapshot(small)
    again = [*settings, f"run.root={tmp_path}", "run.name=again", f"base={small}", "layers.channels='1:3'"]
    assert main(["run", *again]) == 0
    assert not rendered and snapshot(small) == before
    copied = list((tmp_path / "again" / "shards").glob("render/*/*.h5"))
    assert len(copied) == 5  # a shard a layer, of the channels that are wanted
    with pipeline.open_atlas(base) as old, pipeline.open_atlas(tmp_path / "again") as new:
        for layer in new:
            assert layer.channels.tolist() == [1, 2]
            assert all(np.array_equal(layer.image(c), old[layer.name].image(c)) for c in (1, 2))


@pytest.mark.long
def test_where_links_cannot_be_made_files_are_copied(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rendered: list[tuple[str, int]]
) -> None:
    base, settings = finished

    def refused(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    assert main(["run", *settings, f"run.root={tmp_path}", "run.name=copy", f"base={base}"]) == 0
    assert not rendered and same(content(base), content(tmp_path / "copy"))
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "copy" / "shards").rglob("*.h5"))


def test_a_picture_that_is_damaged_in_the_base_is_made_again(
    finished: tuple[Path, list[str]], tmp_path: Path, rendered: list[tuple[str, int]]
) -> None:
    base, settings = finished
    bad = tmp_path / "bad" / "base"
    shutil.copytree(base, bad)
    damaged = sorted((bad / "shards" / "render" / "conv_head").glob("*.h5"))[0]
    with h5py.File(damaged) as file:
        images = file["images"]
        assert isinstance(images, h5py.Dataset)
        at = images.id.get_chunk_info(0).byte_offset
    data = bytearray(damaged.read_bytes())
    data[at + 20] ^= 1
    damaged.write_bytes(data)
    before = snapshot(bad)
    assert main(["run", *settings, f"run.root={tmp_path}", "run.name=again", f"base={bad}"]) == 0
    assert len(rendered) == 1 and rendered[0][0] == "conv_head" and snapshot(bad) == before
    assert same(content(base), content(tmp_path / "again"))


@pytest.mark.long
def test_a_base_is_free_and_not_needed_any_more(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, settings = finished
    copy = tmp_path / "copy" / "base"
    shutil.copytree(base, copy)
    mine = [*settings, f"run.root={tmp_path}", "run.name=mine"]
    assert main(["run", *mine, f"base={copy}", "only=below:1e9"]) == 0
    shutil.rmtree(copy)
    assert main(["verify", str(tmp_path / "mine"), "run.check=1", "run.trust=true"]) == 0
    assert main(["compact", str(tmp_path / "mine")]) == 0
    whole = [*settings, f"run.root={tmp_path}", "run.name=whole"]
    assert main(["run", *whole, f"base={base}"]) == 0
    capsys.readouterr()
    assert main(["run", *whole]) == 0
    assert "to do: nothing is missing" in capsys.readouterr().out
    # A run that names itself has nothing to borrow, which is no error.
    assert main(["plan", *whole, f"base={tmp_path / 'whole'}"]) == 0


@pytest.mark.long
def test_a_multirun_over_presets_has_one_base(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_photograph: None
) -> None:
    base, settings = finished
    monkeypatch.chdir(tmp_path)
    settings = [o for o in settings if not o.startswith("render")]
    overrides = [*settings, *TINY_PRESETS, f"base={base}", "run.root=runs"]
    assert main(["run", "--multirun", *overrides, "render=tv,naive"]) == 0
    made = sorted(path.parent.name for path in tmp_path.glob("runs/*/atlas.h5"))
    assert made == ["test_efficientnet-naive", "test_efficientnet-tv"]
    for name in made:
        with pipeline.open_atlas(tmp_path / "runs" / name) as atlas:
            assert atlas["conv_stem"].examples() is not None and atlas["conv_stem"].presets == (name.split("-")[1],)


TABLES: dict[str, Callable[[Path, Path], Path]] = {}


def table(function: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    TABLES[function.__name__] = function
    return function


@table
def columns(base: Path, folder: Path) -> Path:
    (folder / "units.csv").write_text("layer,why,channel\nconv_head,flat,2\nconv_stem,,0\nconv_head,flat,2\n")
    return folder / "units.csv"


@table
def names(base: Path, folder: Path) -> Path:
    (folder / "units.txt").write_text("\ufeffunit\nconv_head:2\n\nconv_stem:0\n", encoding="utf-8")
    return folder / "units.txt"


@table
def no_header(base: Path, folder: Path) -> Path:
    (folder / "units.csv").write_text("conv_stem,0\nconv_head,2.0\n")
    return folder / "units.csv"


@table
def exported_csv(base: Path, folder: Path) -> Path:
    with pipeline.open_atlas(base) as atlas:
        frame = atlas.units()
    frame = frame[[(a, b) in (("conv_head", 2), ("conv_stem", 0)) for a, b in zip(frame.layer, frame.channel)]]  # noqa: B905
    frame.to_csv(folder / "units.csv", index=False)
    frame.to_parquet(folder / "units.parquet", index=False)
    return folder / "units.csv"


@table
def exported_parquet(base: Path, folder: Path) -> Path:
    return exported_csv(base, folder).with_suffix(".parquet")


@pytest.mark.parametrize("kind", TABLES)
def test_units_from_a_table(finished: tuple[Path, list[str]], tmp_path: Path, kind: str) -> None:
    base, settings = finished
    listed = TABLES[kind](base, tmp_path)
    # What the policy and layers.channels would choose does not matter.
    chosen = ["layers=logits", "layers.channels=7", f"units={listed}"]
    settings = [o for o in settings if not o.startswith("layers")]
    made = planner.make_plan(
        compose([*settings, *chosen, f"run.root={tmp_path}", "run.name=units"]).config, timed=False
    )
    assert [(la.name, channels) for la, channels in made.layers] == [("conv_stem", (0,)), ("conv_head", (2,))]
    narrowed = compose([*settings, *chosen, "layers.exclude=[*head]"]).config
    assert [la.name for la, _ in planner.make_plan(narrowed, timed=False).layers] == ["conv_stem"]


@pytest.mark.long
def test_only_units_whose_pictures_were_not_good_enough(
    finished: tuple[Path, list[str]],
    tmp_path: Path,
    rendered: list[tuple[str, int]],
    no_photograph: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, settings = finished
    bad = tmp_path / "bad" / "base"
    shutil.copytree(base, bad)
    with h5py.File(bad / "atlas.h5", "r+") as file:
        status = file["layers/conv_head/render/distill/status"]
        assert isinstance(status, h5py.Dataset)
        status[1, 0] = "failed"
    rerun = [*settings, "render.steps=6", f"run.root={tmp_path}", f"base={bad}"]
    assert main(["run", *rerun, "run.name=failed", "only=failed"]) == 0
    assert rendered == [("conv_head", 1)]
    assert f"from {bad}: first pass over 20 images, 0 of 1 visualizations" in capsys.readouterr().out
    with pipeline.open_atlas(tmp_path / "failed") as atlas:
        assert atlas.layers == ("conv_head",) and atlas["conv_head"].channels.tolist() == [1]
        assert atlas["conv_head"].examples() is not None
    # Again: the base says the same, so nothing is missing.
    assert main(["run", *rerun, "run.name=failed", "only=failed"]) == 0
    assert len(rendered) == 1

    with pipeline.open_atlas(base) as atlas:
        frame = atlas.units()
    frame["ratio"] = (frame["peak"] / frame["max"]).where(frame["max"] > 0)
    limit = float(frame.ratio.median())
    weak = {(row.layer, row.channel) for row in frame[frame.ratio < limit].itertuples()}
    below = compose([*settings, f"base={bad}", "run.name=weak", f"only=below:{limit}"]).config
    made = planner.make_plan(below, timed=False)
    assert {(la.name, c) for la, channels in made.layers for c in channels} == weak and weak

    # Both: those of the table that are so.
    (tmp_path / "some.csv").write_text("conv_head:1\nconv_head:2\nconv_stem:0\n")
    both = compose([*settings, f"base={bad}", "run.name=both", "only=failed", f"units={tmp_path / 'some.csv'}"]).config
    made = planner.make_plan(both, timed=False)
    assert [(la.name, channels) for la, channels in made.layers] == [("conv_head", (1,))]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base=nowhere"], "base=nowhere: There is no run at nowhere"),
        (["model.name=test_resnet"], "model.name: 'test_efficientnet' → 'test_resnet'"),
        (["model.input_size=32"], "input recipe, size: (64, 64) → (32, 32)"),
        (["data.limit=7"], "data.limit: None → 7"),
        (["only=faild"], "only='faild' is unknown. Nearest: failed"),
        (["only=below:much"], "below needs a number"),
        (["only=failed"], "no visualization of"),
        (["only=below:-1e9"], "the smallest activation ratio in"),
        (["only=failed", "base=null"], "only=failed needs base=runs/NAME"),
        (["units=nowhere.csv"], "units=nowhere.csv can't be read: No such file"),
        (["units=empty.csv"], "is empty: rows of layer,channel"),
        (["units=words.csv"], "'first' in row 1 is no channel"),
        (["units=layers.csv"], "the network has no layer 'conv_stme'. Nearest: conv_stem"),
        (["units=channels.csv"], ", and no 999."),
        (["units=one.csv", "layers.exclude=[conv_stem]"], "leave none of the layers that units and only choose"),
        (["units=one.csv", "only=converged"], "None of the units of one.csv satisfies only=converged"),
    ],
)
def test_what_cannot_be_based_or_chosen_is_told(
    finished: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    base, settings = finished
    monkeypatch.chdir(tmp_path)
    files = {
        "empty": "\n", "words": "layer,channel\nconv_stem,first\n", "layers": "conv_stme:0\n",
        "channels": "conv_stem:999\n", "one": "conv_stem:5\n",
    }  # fmt: skip
    for name, text in files.items():
        Path(f"{name}.csv").write_text(text)
    made = [*settings, f"base={base}", "run.name=rerun", *overrides]
    with pytest.raises(AtlasError) as error:
        planner.make_plan(compose(made).config, timed=False)
    assert message in str(error.value)
    assert main(["plan", *made]) == 2
    assert message in capsys.readouterr().err and not Path("runs").exists()


def test_only_about_the_run_itself_is_refused(finished: tuple[Path, list[str]]) -> None:
    base, settings = finished
    own = [*settings, f"run.root={base.parent}", "run.name=base", f"base={base}", "only=failed"]
    with pytest.raises(AtlasError, match="Give the new run another name"):
        planner.make_plan(compose(own).config, timed=False)


def test_files_that_changed_are_another_dataset(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    base, settings = finished
    source = next(o.removeprefix("data.root=") for o in settings if o.startswith("data.root="))
    shutil.copytree(source, tmp_path / "photos")
    first = sorted((tmp_path / "photos").rglob("*.png"))[0]
    moved = [o for o in settings if not o.startswith("data.root=")] + [f"data.root={tmp_path / 'photos'}"]
    config = compose([*moved, f"base={base}", "run.name=moved"]).config
    planner.make_plan(config, timed=False)  # elsewhere, but the same
    first.unlink()
    with pytest.raises(AtlasError, match=r"data\.root"):
        planner.make_plan(config, timed=False)
    # Without what the base's plan wrote down, its atlas still tells.
    old = tmp_path / "old"
    shutil.copytree(base, old)
    (old / manifest.NAME).unlink()
    with pytest.raises(AtlasError, match=r"Nothing of base=.* can be reused"):
        planner.make_plan(compose([*moved, f"base={old}", "run.name=moved"]).config, timed=False)
    made = planner.make_plan(compose([*settings, f"base={old}", "run.name=moved"]).config, timed=False)
    from pipeline.planning.folder import RunFolder

    assert PassSubset.of(made, RunFolder(old)) is None and PassSubset.of(made, RunFolder(base)) is not None
    (old / "atlas.h5").unlink()
    with pytest.raises(AtlasError, match="`atlas plan` with its settings"):
        planner.make_plan(compose([*settings, f"base={old}", "run.name=moved"]).config, timed=False)


def test_what_builds_a_network_beside_its_weights_counts(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    base, settings = finished
    built = [*settings, "+model.arguments={output_stride:16}"]
    with pytest.raises(AtlasError, match=r"model\.arguments: None → "):
        planner.make_plan(compose([*built, f"base={base}", "run.name=built"]).config, timed=False)
    plans = [planner.make_plan(compose(own).config, timed=False) for own in (settings, built)]
    assert plans[0].setup.weights == plans[1].setup.weights
    assert plans[0].examples_digest != plans[1].examples_digest
    tasks = [made.render_tasks(tmp_path, {row: set() for row in made.rows}, 1) for made in plans]
    assert not {task.digest for task in tasks[0]} & {task.digest for task in tasks[1]}


def test_inputs_survive_their_file_and_count_for_the_same_network_only(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    base, settings = finished
    made = planner.make_plan(compose([*settings, f"run.root={base.parent}", "run.name=base"]).config, timed=False)
    kept = manifest.read(base)
    assert kept is not None and kept == made.inputs
    layers = [layer for layer, _ in made.layers]
    assert kept.receptive_fields(made.network, layers) == {layer.name: layer.field for layer in layers}
    assert kept.receptive_fields("another", layers) == {} and manifest.read(tmp_path) is None
    (tmp_path / manifest.NAME).write_text('{"weights": 3')
    assert manifest.read(tmp_path) is None


@pytest.mark.long
def test_commands_of_the_page_work_in_turn(
    finished: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """docs/rerun.md, typed as it stands; only the network and the work are made smaller."""
    import shlex

    monkeypatch.setattr(cost_model, "TIME_LIMIT", 0.01)  # estimates need not be good here
    _, settings = finished
    text = (Path(__file__).resolve().parents[2] / "docs" / "rerun.md").read_text()
    commands = [
        shlex.split(line, comments=True)[1:]
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) >= 6 and all(verb in ("run", "plan", "export") for verb, *_ in commands)
    monkeypatch.chdir(tmp_path)
    settings = [o for o in settings if not o.startswith(("render", "layers"))]
    tour = ["layers.count=3", "layers.channels='0:2'", *TINY_PRESETS]
    for verb, *arguments in commands:
        own = [] if verb == "export" else [*settings, *tour]
        flags = [a for a in arguments if a == "--multirun"]
        # Settings of the page come last, and so count.
        typed = [verb, *flags, *own, *(a for a in arguments if a not in flags)]
        assert main(typed) == 0, (arguments, capsys.readouterr().err)
    printed = capsys.readouterr().out
    assert "from runs/distill: first pass over 20 images" in printed


def test_a_base_of_so_many_channels_that_it_stored_fewer_bins_is_not_cut(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Label statistics of a run of its own would be of more images than the base has bins of."""
    base, settings = finished
    plan = planner.make_plan(compose([*settings, *SMALL, f"run.root={tmp_path}"]).config, timed=False)
    assert PassSubset.of(plan, RunFolder(base)) is not None
    channels = sum(layer.channels for layer, _ in plan.layers)
    monkeypatch.setattr(sweep, "LABELLED_BYTES", 10 * channels)
    assert PassSubset.of(plan, RunFolder(base)) is None
