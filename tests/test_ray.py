"""The same tasks on Ray: the same pictures, also when workers are killed under them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_run import pictures

import pipeline
from pipeline import cli

ON_RAY = ["engine=ray", "engine.workers=2"]
TOO_MANY = ["engine=ray", "engine.workers=64", "engine.cpus_per_worker=1"]

# Ray's own start-up warns about what is none of ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def killer(stop: threading.Event, killed: list[int]) -> None:
    """Kill a worker of Ray as soon as one is at work, twice."""
    while not stop.is_set() and len(killed) < 2:
        for process in psutil.process_iter(["cmdline"]):
            if process.pid not in killed and "ray::Worker.do" in " ".join(process.info["cmdline"] or []):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                time.sleep(1.0)
                break
        time.sleep(0.05)


def test_killed_workers_change_nothing(tiny_run: list[str], tmp_path: Path) -> None:
    more = ["render.steps=30"]
    assert cli.main(["run", *tiny_run, *more]) == 0
    inline = pictures(tmp_path / "tiny")
    stop, killed = threading.Event(), []
    thread = threading.Thread(target=killer, args=(stop, killed))
    thread.start()
    try:
        assert cli.main(["run", *tiny_run, *more, *ON_RAY, "run.name=killed"]) == 0
    finally:
        stop.set()
        thread.join()
    assert len(killed) == 2
    on_ray = pictures(tmp_path / "killed")
    assert on_ray.keys() == inline.keys()
    assert max(np.abs(on_ray[k].astype(int) - inline[k].astype(int)).max() for k in inline) <= 1
    with pipeline.open_atlas(tmp_path / "tiny") as a, pipeline.open_atlas(tmp_path / "killed") as b:
        for layer in a:
            ours, theirs = layer.examples(), b[layer.name].examples()
            assert ours is not None and theirs is not None
            assert np.array_equal(ours.index, theirs.index) and np.array_equal(ours.y, theirs.y)
            assert np.array_equal(layer.numbers()["seed"], b[layer.name].numbers()["seed"])


def test_bad_input_on_a_worker_ends_the_run_at_once(
    tiny_run: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import run

    whole = run.make_plan

    def other_weights(config):  # type: ignore[no-untyped-def]
        import dataclasses

        made = whole(config)
        return dataclasses.replace(made, setup=dataclasses.replace(made.setup, weights="0" * 64))

    monkeypatch.setattr(run, "make_plan", other_weights)
    assert cli.main(["render", *tiny_run, *ON_RAY]) == 2
    assert "weights of test_efficientnet are not the driver's" in capsys.readouterr().err


def test_more_workers_than_room_are_cut_and_too_large_ones_refused(
    tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["render", *tiny_run, *TOO_MANY]) == 0
    assert "but the cluster has room for" in capsys.readouterr().err
    assert (
        cli.main(["render", *tiny_run, *ON_RAY, "engine.cpus_per_worker=999", "render.steps=5", "run.update=true"]) == 2
    )
    assert "No node of the cluster has room for a worker of 999 CPUs" in capsys.readouterr().err


def test_no_cluster_at_the_address(tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render", *tiny_run, *ON_RAY, "engine.address=127.0.0.1:1"]) == 2
    assert "No Ray cluster at engine.address=127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_its_workers(tiny_run: list[str], tmp_path: Path, kind: signal.Signals) -> None:
    """A terminal sends Ctrl-C to the whole process group: driver, Ray's own processes and workers.

    A job system sends SIGTERM to the driver.
    """
    command = [sys.executable, "-c", "import sys; from pipeline.cli import main; sys.exit(main())", "render"]
    slow = [*tiny_run, *ON_RAY, "render.steps=400"]
    process = subprocess.Popen([*command, *slow], stderr=subprocess.PIPE, text=True, start_new_session=True)
    shards = tmp_path / "tiny" / "shards"
    deadline = time.monotonic() + 120
    while not list(shards.rglob("*.h5")) and time.monotonic() < deadline:
        time.sleep(0.05)
    kept = list(shards.rglob("*.h5"))
    workers = [p for p in psutil.process_iter(["cmdline"]) if "ray::Worker.do" in " ".join(p.info["cmdline"] or [])]
    began = time.monotonic()
    (os.killpg if kind == signal.SIGINT else os.kill)(process.pid, kind)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - began < 15
    assert "Everything finished is kept" in errors
    assert kept and all(path.exists() for path in kept)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert workers and not alive
