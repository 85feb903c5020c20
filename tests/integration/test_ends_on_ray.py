"""Runs on Ray that always end: workers of another version, an autoscaler from no node, and a raylet that dies."""

import contextlib
import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_ray import moods

from pipeline.config.schema import EngineConfig
from pipeline.core.errors import AtlasError, TryAgainError
from pipeline.engine.connection import connected
from pipeline.engine.ray_engine import RayEngine
from pipeline.engine.tasks import Done, RenderTask

PROJECT = Path(__file__).resolve().parents[2]

# Ray's own start-up warns about what is none of ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.long]


@contextlib.contextmanager
def cluster_without_nodes() -> Iterator[Any]:
    """A cluster whose head has no room for workers."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def tasks(folder: Path, count: int) -> list[RenderTask]:
    return [RenderTask(str(folder / str(i)), "d", 1.0, "slow", (i,), (8, 8), "distill") for i in range(count)]


def test_an_autoscaler_sees_the_workers_that_are_wanted(tmp_path: Path) -> None:
    """From no node: the first one is asked for before the device is chosen, then as many as there may be workers."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    nodes: list[Any] = []
    results: list[Any] = []
    demands: list[Any] = []

    def scale() -> None:
        """Add a node if there is demand that no node can meet, as an autoscaler does, from the same record."""
        demand = get_cluster_status(cluster.address).resource_demands
        asked = [*demand.ray_task_actor_demand]
        bundles = [bundle.bundle for one in asked for bundle in one.bundles_by_count for _ in range(bundle.count)]
        if bundles and len(nodes) < 3 and len(cluster.list_all_nodes()) == len(nodes) + 1:
            demands.append(bundles)
            nodes.append(cluster.add_node(num_cpus=1, num_gpus=1, wait=False))

    with cluster_without_nodes() as cluster:
        config = EngineConfig(
            address=cluster.address, max_workers=2, gpus_per_worker=1.0, cpus_per_worker=1.0, patience=60.0
        )
        with connected(config) as ray:
            kind, setup = moods()
            engine = RayEngine(ray, config, kind)
            engine.await_nodes(scale)
            assert (engine.pool.workers, engine.pool.device, len(nodes)) == (2, "cuda", 1)
            engine.execute(tasks(tmp_path, 12), setup, lambda _, result: results.append(result), scale)
            engine.close()
    assert len(results) == 12 and all(isinstance(result, Done) for result in results)
    # One node has room for one worker: the second worker is demand, too, while the first one works.
    assert len(nodes) >= 2 and demands[:2] == [[{"CPU": 1.0, "GPU": 1.0}]] * 2


def test_the_patience_for_a_node_is_counted_from_the_last_one_that_joined(tmp_path: Path) -> None:
    """Nodes too small for a worker join one after the other; the wait ends with a reason when no more come."""
    nodes: list[float] = []

    def grow() -> None:
        if len(nodes) < 3 and (not nodes or time.monotonic() - nodes[-1] > 3.0):
            cluster.add_node(num_cpus=1, wait=False)
            nodes.append(time.monotonic())

    with cluster_without_nodes() as cluster:
        config = EngineConfig(address=cluster.address, cpus_per_worker=4.0, patience=6.0)
        with connected(config) as ray:
            engine = RayEngine(ray, config, moods()[0])
            began = time.monotonic()
            with (
                contextlib.closing(engine),
                pytest.raises(TryAgainError, match=r"No node had room .* \(engine\.patience=6\): one takes 4 CPUs"),
            ):
                engine.await_nodes(grow)
            assert len(nodes) == 3 and time.monotonic() - nodes[-1] > 6.0 and time.monotonic() - began > 12.0


def test_workers_with_another_project_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(PROJECT / "pipeline", tmp_path / "other" / "pipeline")
    changed = tmp_path / "other" / "pipeline" / "visualization" / "loop.py"
    changed.write_text(changed.read_text() + "\n# Another commit.\n")
    (tmp_path / "tasks").mkdir()
    monkeypatch.chdir(tmp_path)  # Ray lets workers import from the driver's working directory first
    kind, setup = moods()
    results: list[Any] = []
    with cluster_without_nodes() as cluster:
        cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path / "other")})
        config = EngineConfig(address=cluster.address)
        with connected(config) as ray:
            engine = RayEngine(ray, config, kind)
            with (
                contextlib.closing(engine),
                pytest.raises(AtlasError, match=r"has other versions than this driver: project \w{12} \(driver: \w"),
            ):
                engine.execute(tasks(tmp_path / "tasks", 1), setup, lambda *_: None, lambda: None)
            assert list((tmp_path / "tasks").iterdir()) == []
            engine = RayEngine(ray, dataclasses.replace(config, mixed_versions=True), kind)
            engine.execute(tasks(tmp_path / "tasks", 1), setup, lambda _, done: results.append(done), lambda: None)
            engine.close()
    assert isinstance(results[0], Done) and "Its results may differ" in caplog.text
    assert engine.stats[0].versions["project"] != engine._versions["project"]


def test_the_death_of_the_raylet_ends_a_run_in_words(tiny_run: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from pipeline.cli.main import main; sys.exit(main())", "render"]
    slow = [*tiny_run, "engine=ray", "engine.workers=1", "render.steps=300"]
    process = subprocess.Popen([*command, *slow], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    shards = tmp_path / "tiny" / "shards"
    deadline = time.monotonic() + 200
    while not list(shards.rglob("*.h5")) and time.monotonic() < deadline:
        time.sleep(0.05)
    kept = list(shards.rglob("*.h5"))
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.name() == "raylet":
            child.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "raylet) has ended" in errors and "Finished work is kept" in errors and "Traceback" not in errors
    assert kept and all(path.exists() for path in kept)
