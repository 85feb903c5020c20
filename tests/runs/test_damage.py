"""Damage costs what is damaged, and no advice costs more: what commands say and do about files that are not whole."""

import shutil
from pathlib import Path

import h5py
import pytest
from conftest import compose
from test_audit import a_chunked_dataset, flip, images_of

import pipeline
from pipeline.cli.main import main
from pipeline.planning.folder import RunFolder
from pipeline.planning.plan import Plan
from pipeline.planning.planner import make_plan
from pipeline.runs import maintenance, reuse
from pipeline.runs.artifacts import put_aside
from pipeline.store import shards
from pipeline.store.reader import SCHEMA_VERSION


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("inside", ["activation", "images"])
def test_advice_on_a_damaged_atlas_loses_nothing_but_what_is_damaged(
    finished: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """After `compact` there are no shards: removing atlas.h5, the advice of old, lost every visualization."""
    assert main(["compact", str(finished)]) == 0
    flip(finished / "atlas.h5", images_of("conv_stem").replace("images", inside))
    capsys.readouterr()
    assert main(["verify", str(finished), "run.check=0"]) == 1
    advice = printed(capsys)
    assert "`atlas repair` keeps" in advice and "remove" not in advice and "delete" not in advice
    assert main(["repair", str(finished)]) == 0
    lost = 1 if inside == "images" else 3  # an image, or the measurements of the layer
    assert f"{15 - lost} visualizations that no shard holds were kept" in printed(capsys)
    assert (finished / "atlas.h5.damaged").is_file()


def test_no_file_set_aside_replaces_another(tmp_path: Path) -> None:
    for content in ("one", "two", "three"):
        (tmp_path / "atlas.h5").write_text(content)
        put_aside(tmp_path / "atlas.h5")
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["one", "three", "two"]


def test_an_atlas_of_an_unknown_version_is_not_overwritten(finished: Path) -> None:
    with h5py.File(finished / "atlas.h5", "r+") as file:
        file.attrs["schema_version"] = SCHEMA_VERSION + 1
    maintenance.set_aside_unreadable_atlas(RunFolder(finished))
    assert (finished / "atlas.h5.damaged").is_file() and not (finished / "atlas.h5").exists()


def test_an_unreadable_shard_is_set_aside_by_run_and_one_of_another_version_is_not(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, old = sorted((finished / "shards" / "render" / "conv_head").glob("*.h5"))[0], finished / "shards" / "old.h5"
    shutil.copyfile(broken, old)
    with h5py.File(old, "r+") as file:
        file.attrs["shard_version"] = shards.SHARD_VERSION - 1
    broken.write_bytes(broken.read_bytes()[:4000])
    assert main(["verify", str(finished), "run.check=0"]) == 1
    assert "`atlas repair` keeps its intact parts" in printed(capsys)
    maintenance.set_aside_unreadable_shards(RunFolder(finished))
    assert not broken.exists() and broken.with_name(f"{broken.name}.damaged").is_file() and old.is_file()


@pytest.fixture
def plan_beside(finished: Path, tiny_run: list[str]) -> Plan:
    """The plan of a new run beside a finished one."""
    return make_plan(compose([*tiny_run, "run.name=new", "render.steps=3"]).config, timed=False)


def damage(run: Path, kind: str) -> None:
    """Flip a bit in the index of the second pass, or in the first pass without that index."""
    index = next((run / "shards" / "localize").glob("index-*.h5"))
    if kind == "index":
        flip(index, a_chunked_dataset(index))
        return
    index.unlink()
    part = sorted((run / "shards" / "examples").glob("*.h5"))[0]
    flip(part, a_chunked_dataset(part))


@pytest.mark.parametrize("kind", ["index", "first pass"])
def test_a_damaged_file_of_another_run_is_left_out_with_a_warning(
    finished: Path, plan_beside: Plan, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = reuse.remaining_work(plan_beside, RunFolder(plan_beside.config.folder))
    assert whole.images == 0 and whole.localizations == 0
    damage(finished, kind)
    left = reuse.remaining_work(plan_beside, RunFolder(plan_beside.config.folder))
    assert "it is left out" in caplog.text
    # The index is found again from the first pass; images of a damaged part must be read again.
    assert (left.images > 0) == (kind == "first pass") and left.images < 20
    assert not list(finished.rglob("*.damaged*"))  # nobody renames the files of another run


@pytest.mark.long
@pytest.mark.parametrize("kind", ["index", "first pass"])
def test_a_run_goes_on_with_its_own_damaged_files(finished: Path, tiny_run: list[str], kind: str) -> None:
    with pipeline.open_atlas(finished) as atlas:
        before = {layer.name: layer.stats()["mean"] for layer in atlas}
    (finished / "atlas.h5").unlink()
    damage(finished, kind)
    assert main(["plan", *tiny_run]) == 0
    assert main(["run", *tiny_run]) == 0
    with pipeline.open_atlas(finished) as atlas:
        assert all((layer.stats()["mean"] == before[layer.name]).all() for layer in atlas)
    assert main(["verify", str(finished), "run.check=0"]) == 0


def test_verify_and_compact_need_no_photographs(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = finished / "config.yaml"
    lines = [f"  root: {finished}/gone" if "photos" in line else line for line in config.read_text().splitlines()]
    config.write_text("\n".join(lines))
    assert main(["verify", str(finished), "run.check=1", "run.trust=true"]) == 0
    assert "intact" in printed(capsys)
    assert main(["compact", str(finished)]) == 0
    assert len(list((finished / "shards" / "examples").glob("*.h5"))) == 1


def test_images_may_move_but_not_become_others(
    finished: Path, tiny_run: list[str], photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(photo_folder, tmp_path / "moved"))
    assert main(["plan", *tiny_run, f"data.root={moved}"]) == 0
    fewer = Path(shutil.copytree(moved, tmp_path / "fewer"))
    next(fewer.rglob("*.png")).unlink()
    assert main(["plan", *tiny_run, f"data.root={fewer}"]) == 2
    assert "was made with other images" in capsys.readouterr().err


def test_a_run_of_another_owner_offers_nothing(plan_beside: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write beside a run could offer files with the right digests."""
    assert [run.path.name for run in reuse.candidate_runs(plan_beside)] == ["tiny"]
    monkeypatch.setattr(reuse, "_owner", lambda path: 12345 if path.name == "shards" else None)
    assert list(reuse.candidate_runs(plan_beside)) == []
