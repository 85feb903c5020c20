"""The whole path in small: what is missing is made, what is finished is kept, and bad input is told early."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY

import pipeline
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.engine.tasks import Task, write_shard
from pipeline.store import hdf5


def pictures(folder: Path) -> dict[tuple[str, int], np.ndarray]:
    with pipeline.open_atlas(folder) as atlas:
        return {(la.name, int(c)): la.image(c) for la in atlas for c in la.channels}


def shard_times(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (folder / "shards").rglob("*.h5")}


def test_the_whole_path_and_again(tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tiny"
    assert main(["run", *tiny_run]) == 0
    printed = capsys.readouterr()
    assert "conv_stem" in printed.out and "total:" in printed.out and "20 dataset images" in printed.out
    assert "is complete" in printed.err
    for name in ("config.yaml", "plan.csv", "atlas.h5", "failures.csv", "status.json", "site/index.html"):
        assert (folder / name).is_file(), name
    with pipeline.open_atlas(folder) as atlas:
        assert atlas.layers[0] == "conv_stem" and atlas.layers[-1] == "classifier"
        table = atlas.units()
        assert (
            len(table) == 3 * len(atlas.layers)
            and table["status"].isin(["converged", "limit", "retried", "failed"]).all()
        )
        # The energy of a first convolution has no counterpart over the dataset.
        assert (table["natural"].isna() == (table["layer"] == "conv_stem")).all()
        best = atlas["conv_stem"].examples("max")
        assert best is not None and best.index.shape == (3, 3) and (np.diff(best.value, axis=1) <= 0).all()
        assert atlas.input_image(int(best.index[0, 0])) is not None
        assert atlas.dataset()["label"].nunique() == 4 and "render:" in atlas.config
    before, times = pictures(folder), shard_times(folder)

    # Again: nothing is missing, so nothing is made.
    made = [(folder / name).stat().st_mtime_ns for name in ("atlas.h5", "site/index.html")]
    assert main(["run", *tiny_run]) == 0
    assert "Nothing is missing" in capsys.readouterr().err
    assert shard_times(folder) == times
    assert made == [(folder / name).stat().st_mtime_ns for name in ("atlas.h5", "site/index.html")]

    # One shard lost: only that one is made again, and it is the same.
    lost = next((folder / "shards" / "render").rglob("*.h5"))
    lost.unlink()
    assert main(["run", *tiny_run]) == 0
    assert not lost.exists()  # atlas.h5 holds its pictures
    (folder / "atlas.h5").unlink()
    assert main(["run", *tiny_run]) == 0
    after = shard_times(folder)
    # How work is cut follows from timing, so the lost pictures may come back in other portions.
    again = {n for n, t in after.items() if times.get(n) != t}
    assert again and all(n == lost.name or n not in times for n in again)
    assert all(np.array_equal(before[k], v) for k, v in pictures(folder).items())

    # More channels: the old pictures stay, the new ones join them.
    assert main(["run", *tiny_run, "layers.channels=0:5", "run.update=true"]) == 0
    times = shard_times(folder)
    more = pictures(folder)
    assert len(more) > len(before) and all(np.array_equal(before[k], more[k]) for k in before)
    assert all(times[n] == t for n, t in after.items())

    # Verbs that read.
    capsys.readouterr()
    assert main(["verify", str(folder), "run.trust=true"]) == 0
    assert main(["status", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "whole" in printed and "complete since" in printed
    assert main(["site", str(folder), "site.title=Another"]) == 0
    assert "Another" in (folder / "site" / "index.html").read_text()

    # A torn store is told, and mended by the next run.
    (folder / "atlas.h5").write_bytes((folder / "atlas.h5").read_bytes()[:5000])
    assert main(["verify", str(folder), "run.trust=true"]) == 1
    assert "can't be" in capsys.readouterr().out
    assert main(["run", *tiny_run, "layers.channels=0:5", "run.update=true"]) == 0
    assert main(["verify", str(folder), "run.trust=true"]) == 0


def test_another_configuration_is_refused_with_the_ways_out(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A plan alone binds nobody; finished work does.
    assert main(["plan", *tiny_run, "render.steps=6"]) == 0
    assert main(["examples", *tiny_run]) == 0
    assert main(["plan", *tiny_run, "engine.batch=1", "engine.workers=7"]) == 0
    capsys.readouterr()
    assert main(["plan", *tiny_run, "render.steps=5"]) == 2
    message = capsys.readouterr().err
    assert "render.steps: 4 → 5" in message and "run.name=" in message and "run.update=true" in message


@pytest.mark.long
def test_examples_alone_then_pictures_then_site(tiny_run: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    assert main(["examples", *tiny_run]) == 0
    with pipeline.open_atlas(folder) as atlas:
        assert atlas["conv_stem"].presets == () and atlas["conv_stem"].examples() is not None
    assert main(["site", str(folder)]) == 0
    times = shard_times(folder)
    assert main(["render", *tiny_run]) == 0
    assert all(shard_times(folder)[n] == t for n, t in times.items())
    with pipeline.open_atlas(folder) as atlas:
        assert atlas["conv_stem"].presets == ("distill",) and atlas["conv_stem"].examples() is not None


def test_connections_are_scaled_by_the_deviations_of_the_dataset_pass(tiny_run: list[str], tmp_path: Path) -> None:
    assert main(["examples", *tiny_run, "layers.channels=all", "layers.include=[blocks.1.0.*,conv_head]"]) == 0
    with pipeline.open_atlas(tmp_path / "tiny") as atlas:
        wired = {layer.name: layer.connectivity("inputs") for layer in atlas}
        assert wired["blocks.1.0.conv_pwl"] is not None
        for name, wiring in wired.items():
            if wiring is None:
                continue
            source = atlas[wiring.layer]
            sd = source.stats()["sd"]
            assert wiring.scale == "sd" and len(sd) == len(source.channels)
            # Between the last two layers are blocks with squeeze-and-excitation, whose gates are held constant.
            assert wiring.approximate == () or (
                wiring.linearized and all("se.gate" in one for one in wiring.approximate)
            )
            assert np.allclose(wiring.strength, wiring.norm * sd[wiring.channel], rtol=1e-5), name
            assert (np.diff(wiring.strength, axis=1) <= 0).all()
            assert (np.diff(wiring.norm, axis=1) > 0).any()  # another order than by weights alone
            back = source.connectivity("outputs")
            assert back is not None and np.allclose(back.strength, back.norm * sd[:, None], rtol=1e-5)


def test_unreadable_photographs_are_counted_and_listed(tiny_run: list[str], tmp_path: Path) -> None:
    photos = tmp_path / "mixed"
    photos.mkdir()
    rng = np.random.default_rng(0)
    from PIL import Image

    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(photos / f"{i}.png")
    (photos / "broken, and 'odd'.jpg").write_text("no")
    overrides = [o for o in tiny_run if not o.startswith("data.root")]
    assert main(["examples", *overrides, f"data.root={photos}"]) == 0
    failures = (tmp_path / "tiny" / "failures.csv").read_text()
    assert "broken, and 'odd'.jpg" in failures and "not a picture" in failures
    assert len(failures.strip().splitlines()) == 2


@pytest.mark.long
def test_a_failing_task_is_set_aside_and_the_run_goes_on(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.engine import worker

    tries: list[str] = []
    whole = worker.render

    def sometimes(job, units, start):  # type: ignore[no-untyped-def]
        if job.layer.name == "conv_head":
            tries.append(str(units))
            raise RuntimeError("out of luck")
        return whole(job, units, start)

    monkeypatch.setattr(worker, "render", sometimes)
    assert main(["run", *tiny_run]) == 1
    assert len(tries) == 3 * len(set(tries)) == 6
    failures = (tmp_path / "tiny" / "failures.csv").read_text()
    assert "out of luck" in failures and "Traceback" in failures and "conv_head:0" in failures
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "tiny"), "run.trust=true"]) == 1
    monkeypatch.setattr(worker, "render", whole)
    assert main(["run", *tiny_run]) == 0
    assert main(["verify", str(tmp_path / "tiny"), "run.trust=true"]) == 0


def test_too_many_failures_stop_the_run(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.engine import worker

    def never(*_: object, **__: object) -> None:
        raise RuntimeError("no disk")

    monkeypatch.setattr(worker, "render", never)
    assert main(["render", *tiny_run, "engine.max_failures=2", "engine.attempts=1"]) == 1
    assert "2 tasks in a row were set aside" in capsys.readouterr().err
    assert len((tmp_path / "tiny" / "failures.csv").read_text().split("no disk")) > 2


def test_two_runs_do_not_meet_in_one_folder(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.planning.folder import RunFolder

    with RunFolder(tmp_path / "tiny").locked():
        assert main(["plan", *tiny_run]) == 2
    assert "Another atlas command is at work" in capsys.readouterr().err


def test_a_running_command_is_visible_until_it_ends(tmp_path: Path) -> None:
    from pipeline.planning.folder import RunFolder

    folder = RunFolder(tmp_path / "tiny")
    assert not folder.is_running()
    with folder.locked():
        assert folder.is_running()
    assert not folder.is_running()
    with folder.locked():
        assert RunFolder(tmp_path / "tiny").is_running()


def test_a_lock_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    from pipeline.planning.folder import RunFolder

    (tmp_path / "tiny" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(AtlasError, match=r"can't be locked: .*tiny/\.lock must be writable"),
        RunFolder(tmp_path / "tiny").locked(),
    ):
        pass


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.long
def test_an_interrupted_run_stops_soon_and_goes_on_later(
    tiny_run: list[str], tmp_path: Path, kind: signal.Signals
) -> None:
    folder = tmp_path / "tiny"
    slow = [*tiny_run, "render.steps=100", "layers.include=[conv_stem,conv_head,classifier]"]
    command = [sys.executable, "-c", "import sys; from pipeline.cli.main import main; sys.exit(main())", "run", *slow]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((folder / "shards").rglob("*.h5")) and time.monotonic() < deadline:
        time.sleep(0.02)
    began = time.monotonic()
    os.kill(process.pid, kind)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 10
    assert "Finished work is kept" in errors
    kept = shard_times(folder)
    assert kept and main(["run", *slow]) == 0
    assert all(shard_times(folder)[n] == t for n, t in kept.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=resnet51"], "There is no model=resnet51. Nearest: resnet50"),
        (["render=distil"], "There is no render=distil. Nearest: distill"),
        (["model.name=test_eficientnet"], "Nearest: test_efficientnet"),
        (["layers.include=[conv_stme]"], "Nearest: conv_stem"),
        (["render.stepz=3"], "render.stepz is not a setting. Nearest: render.steps"),
        (["data.root=nowhere"], "there is no such folder"),
        (["render.steps=x"], "has the wrong type"),
        (["layers.channels=first"], "layers.channels='first'"),
        (["render.steps"], "render.steps"),
    ],
)
def test_bad_input_is_told_before_any_work(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert main(["run", *tiny_run, *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


@pytest.mark.long
def test_every_channel_of_a_transformer(tmp_path: Path, photo_folder: Path) -> None:
    tiny = [o for o in TINY if not o.startswith(("model.name", "layers", "model.input_size"))]
    overrides = [*tiny, "model.name=test_vit", "layers.include=[blocks.0,blocks.1.mlp.fc1,head]", "layers.channels=0:2"]
    folder = [f"run.root={tmp_path}", "run.name=vit", "data=folder", f"data.root={photo_folder}", "render.size=auto"]
    assert main(["run", *overrides, *folder]) == 0
    with pipeline.open_atlas(tmp_path / "vit") as atlas:
        assert atlas.layers == ("blocks.0", "blocks.1.mlp.fc1", "head")
        assert atlas["blocks.0"].receptive_field is None


@pytest.mark.long
def test_a_damaged_shard_is_made_again(tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tiny"
    assert main(["run", *tiny_run]) == 0
    before = pictures(folder)
    damaged = sorted((folder / "shards" / "render").rglob("*.h5"))[0]
    with h5py.File(damaged) as file:
        at = hdf5.dataset(file, "images").id.get_chunk_info(0).byte_offset
    data = bytearray(damaged.read_bytes())
    data[at + 20] ^= 1
    damaged.write_bytes(data)
    # As long as atlas.h5 holds its pictures, nothing needs it; without, what is whole of it is kept.
    (folder / "atlas.h5").unlink()
    times = shard_times(folder)
    capsys.readouterr()
    assert main(["run", *tiny_run]) == 0
    assert "1 intact visualizations kept, the file set aside as" in capsys.readouterr().err
    assert {n.split("-")[2] for n in shard_times(folder).keys() - times.keys()} == {"1"}
    assert main(["verify", str(folder), "run.trust=true"]) == 0
    assert all(np.array_equal(before[k], v) for k, v in pictures(folder).items())


@pytest.mark.long
def test_other_portions_of_the_dataset_give_the_same_examples(tiny_run: list[str], tmp_path: Path) -> None:
    assert main(["examples", *tiny_run]) == 0
    with pipeline.open_atlas(tmp_path / "tiny") as atlas:
        first = atlas["conv_stem"].examples()
    assert main(["examples", *tiny_run, "examples.per_task=12", "run.update=true"]) == 0
    with pipeline.open_atlas(tmp_path / "tiny") as atlas:
        second = atlas["conv_stem"].examples()
    assert first is not None and second is not None and np.array_equal(first.index, second.index)


def test_shards_that_nobody_sees_are_no_success(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a cluster's nodes share no file system: workers report, but the driver has nothing."""
    from pipeline.engine import worker

    def elsewhere(task: Task, data: bytes) -> None:
        write_shard(dataclasses.replace(task, path=f"{task.path}.elsewhere"), data)

    monkeypatch.setattr(worker, "write_shard", elsewhere)
    assert main(["render", *tiny_run]) == 1
    assert "do all workers and this driver see the run's folder" in (tmp_path / "tiny" / "failures.csv").read_text()


@pytest.mark.long
def test_photographs_that_are_all_unreadable(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_text("no")
    overrides = [o for o in tiny_run if not o.startswith("data.root")]
    assert main(["run", *overrides, f"data.root={tmp_path / 'broken'}"]) == 2
    assert "None of the dataset images could be read" in capsys.readouterr().err


@pytest.mark.long
def test_a_file_name_that_is_no_text(tiny_run: list[str], tmp_path: Path, photo_folder: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    source = next(photo_folder.rglob("*.png")).read_bytes()
    (odd / "good.png").write_bytes(source)
    try:
        Path(os.fsdecode(os.fsencode(odd) + b"/caf\xe9.png")).write_bytes(source)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    overrides = [o for o in tiny_run if not o.startswith("data.root")]
    assert main(["run", *overrides, f"data.root={odd}"]) == 0
    with pipeline.open_atlas(tmp_path / "tiny") as atlas:
        assert sorted(atlas.dataset()["path"]) == ["caf\\udce9.png", "good.png"]


@pytest.mark.long
def test_a_network_of_one_size_gets_its_own(
    tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [o for o in TINY if not o.startswith(("model", "layers", "render.size"))]
    vit = [
        *tiny,
        "model=timm",
        "model.name=vit_tiny_patch16_224",
        "model.weights=null",
        "layers=logits",
        "layers.channels=0:2",
    ]
    folder = ["data=folder", f"data.root={photo_folder}", f"run.root={tmp_path}", "run.name=vit"]
    assert main(["plan", *vit, *folder, "render.size=96"]) == 2
    message = capsys.readouterr().err
    assert "render.size=96: vit_tiny_patch16_224 does not accept images of 96 x 96" in message and "or 224" in message
    assert main(["plan", *vit, *folder]) == 0
