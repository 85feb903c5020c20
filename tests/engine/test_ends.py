"""Runs always end: time limits of tasks, versions of workers, limits of the machine, and losses of the connection."""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import EngineConfig
from pipeline.core import machine
from pipeline.core.errors import AtlasError, TryAgainError
from pipeline.core.machine import COMPILER_LIMIT
from pipeline.engine import connection, handshake, ray_engine
from pipeline.engine.deadlines import ENOUGH, Deadlines
from pipeline.engine.progress import WorkerStats, run_report
from pipeline.engine.resources import size_pool
from pipeline.engine.tasks import RangesTask, RenderTask


def task(cost: float, path: str = "x") -> RenderTask:
    return RenderTask(path, "d", cost, "layer", (0,), (8, 8), "distill")


def test_a_limit_follows_the_estimate_and_what_finished_tasks_took() -> None:
    deadlines = Deadlines(EngineConfig(timeout=10, timeout_seconds=300))
    assert deadlines.limit(task(5.0)) == 300 and deadlines.limit(task(100.0)) == 1000
    # Workers that are three times as slow as estimated have three times as long.
    deadlines.finished(task(10.0), 30.0)
    assert deadlines.limit(task(100.0)) == 3000
    # Another stage has another estimate.
    assert deadlines.limit(RangesTask("r", "d", 100.0, (0,))) == 1000
    # A task that was ended has twice as long the next time, and a finished one starts anew.
    late = task(100.0, "late")
    deadlines.expired(late)
    deadlines.expired(late)
    assert deadlines.limit(late) == 12000 and deadlines.limit(task(100.0)) == 3000
    deadlines.finished(late, 300.0)
    assert deadlines.limit(late) == 3000


def test_limits_of_workers_that_are_faster_than_estimated_shrink_when_enough_is_known() -> None:
    deadlines = Deadlines(EngineConfig(timeout=10, timeout_seconds=60))
    for i in range(ENOUGH):
        assert deadlines.limit(task(1000.0)) == 10_000
        deadlines.finished(task(100.0), 1.0 + i / 10)
    assert deadlines.limit(task(1000.0)) == pytest.approx(10 * 1000 * 0.017)
    assert deadlines.limit(task(1.0)) == 60


def package(root: Path, code: str) -> Path:
    folder = root / "some_project"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(code)
    (folder / "loop.c").write_text("int x;")
    (folder / "page.html").write_text("<p>")
    return folder


def test_a_changed_source_is_another_version_and_a_changed_page_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = package(tmp_path, "raise ImportError('not imported for its digest')")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = handshake.versions("some_project")
    assert len(before["project"]) == 12 and before["torch"][0].isdigit()
    assert before.keys() == {"project", *handshake.PACKAGES, "python", "platform"}
    (folder / "page.html").write_text("<p>another")
    assert handshake.differences(before, handshake.versions("some_project")) == []
    (folder / "loop.c").write_text("int y;")
    after = handshake.versions("some_project")
    (text,) = handshake.differences(before, after)
    assert text == f"project {after['project']} (driver: {before['project']})"
    assert handshake.differences(before, {**before, "torch": "1.0"}) == [f"torch 1.0 (driver: {before['torch']})"]
    assert handshake.versions("no_such_project")["project"] == handshake.MISSING


def test_the_report_lists_what_workers_had() -> None:
    one, other = {"torch": "2.6.0"}, {"torch": "2.5.0"}
    stats = [WorkerStats("a", 0.0, versions=one), WorkerStats("b", 0.0, versions=other), WorkerStats("c", 0.0)]
    stats.append(WorkerStats("d", 0.0, versions=one))
    assert run_report([], stats, 1.0, 0)["versions"] == [{**one, "workers": 2}, {**other, "workers": 1}]


def test_workers_that_will_take_gpus_run_on_them_before_there_is_a_node() -> None:
    head = [(0.0, 0.0)]
    cluster = EngineConfig(address="auto", gpus_per_worker=1.0, cpus_per_worker=7.0, max_workers=4)
    pool = size_pool(cluster, head)
    assert (pool.device, pool.gpus, pool.cpus, pool.room(head)) == ("cuda", 1.0, 7.0, 0)
    assert size_pool(EngineConfig(address="auto"), head).device == "cpu"
    assert size_pool(EngineConfig(address="auto", gpus_per_worker=0.0), [(8.0, 1.0)]).device == "cpu"
    # On one machine there is nothing to wait for.
    assert size_pool(EngineConfig(gpus_per_worker=0.5), [(2.0, 0.0)]).device == "cpu"


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: types.SimpleNamespace(total=256 << 30))
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_the_quota_of_a_container_limits_its_threads(cgroups: Path) -> None:
    (cgroups / "own").write_text("0::/\n")
    assert machine.available_cores() == 64 and machine.available_memory() == 256 << 30
    write(cgroups / "cgroup", cpu__max="max 100000", memory__max="max")
    assert machine.available_cores() == 64
    write(cgroups / "cgroup", cpu__max="250000 100000", memory__max=str(8 << 30))
    assert machine.available_cores() == 2 and machine.available_memory() == 8 << 30
    write(cgroups / "cgroup", cpu__max="50000 100000")
    assert machine.available_cores() == 1


def test_limits_of_nested_groups_count_each(cgroups: Path) -> None:
    """As of a Slurm job: the step has no limit of its own, the job has, and the root has none."""
    step = cgroups / "cgroup" / "system.slice" / "slurmstepd.scope" / "job_7" / "step_0"
    (cgroups / "own").write_text("0::/system.slice/slurmstepd.scope/job_7/step_0\n")
    write(step, cpu__max="max 100000", memory__max="max", memory__high="max")
    write(step.parent, cpu__max="800000 100000", memory__max=str(32 << 30), memory__high=str(30 << 30))
    assert machine.available_cores() == 8 and machine.available_memory() == 30 << 30


def test_limits_of_the_first_version_of_control_groups_count(cgroups: Path) -> None:
    (cgroups / "own").write_text("4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n")
    root = cgroups / "cgroup"
    write(root / "memory" / "docker" / "abc", memory__limit_in_bytes=str(4 << 30))
    write(root / "memory", memory__limit_in_bytes="9223372036854771712")
    write(root / "cpu" / "docker" / "abc", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    write(root / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert machine.available_memory() == 4 << 30 and machine.available_cores() == 3


def test_the_address_of_a_dashboard_is_told_from_that_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with (
        pytest.raises(AtlasError, match=r"RAY_ADDRESS=http://head:8265 is the address of a dashboard.*unset"),
        connection.connected(EngineConfig(address="auto")),
    ):
        pass
    with (
        pytest.raises(AtlasError, match=r"engine\.address=http://head:8265 is the address of a dashboard"),
        connection.connected(EngineConfig(address="http://head:8265")),
    ):
        pass


@pytest.mark.parametrize(("address", "code"), [(None, 75), ("auto", 2)])
def test_a_bare_exception_of_ray_is_explained(address: str | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def fails(**_: object) -> None:
        raise Exception("The current node timed out during startup. Some text.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", fails)
    with (
        pytest.raises(AtlasError, match="timed out during startup") as caught,
        connection.connected(EngineConfig(address=address)),
    ):
        pass
    assert caught.value.exit_code == code
    if address is None:
        assert "Finished work is kept" in str(caught.value) and "engine=inline" in str(caught.value)


def test_little_shared_memory_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for free, said in ((64e6, True), (2e9, False)):
        caplog.clear()
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: types.SimpleNamespace(free=free))
        with caplog.at_level(logging.WARNING, "pipeline"):
            connection._warn_of_little_shared_memory()
        assert ("has only 64 MB free" in caplog.text) == said


class DeadRay:
    """What the watch asks of Ray; nothing listens at the address of the head, and no raylet can be seen."""

    def get_runtime_context(self) -> Any:
        return types.SimpleNamespace(get_node_id=lambda: "n", gcs_address="127.0.0.1:1")

    def nodes(self) -> list[Any]:
        return []


def test_a_head_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_LOST_AFTER", 0.2)
    monkeypatch.setattr(connection, "LOOK_EVERY", 0.05)
    watch = connection.ConnectionWatch(DeadRay())
    watch.check()  # not yet
    for _ in range(100):
        if watch.reason:
            break
        watch._thread.join(0.05)
    with pytest.raises(TryAgainError, match=r"The head of the Ray cluster at 127\.0\.0\.1:1 has not answered.*is kept"):
        watch.check()
    watch._thread.join(5)
    assert not watch._thread.is_alive()  # noticed in time: the process goes on


def test_the_settings_of_time_limits_have_bounds() -> None:
    from conftest import TINY, compose

    engine = compose([*TINY, "engine.timeout=3", "engine.timeout_seconds=60"]).config.engine
    assert (engine.timeout, engine.timeout_seconds) == (3, 60)
    for setting in ("engine.timeout=1", "engine.timeout_seconds=0", "engine.max_workers=0"):
        with pytest.raises(AtlasError, match=setting.partition("=")[0].replace(".", r"\.")):
            compose([*TINY, setting])


def test_the_driver_loop_distributes_thousands_of_units_a_second_in_flat_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of a run on stub workers, of which one in a hundred is lost at each task."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "benches" / "engine.py"
    spec = importlib.util.spec_from_file_location("bench_engine", path)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_engine", bench)
    spec.loader.exec_module(bench)
    (tmp_path / "plan.csv").write_text("layer,units,seconds\nearly,64,64\nlate,640,6400\n,704,6464\n")
    found = bench.simulate(tmp_path / "plan.csv", 20_000, 64, 0.01, 0.3)
    assert found["units"] == 20_000 and found["workers_started"] > 64 + found["tasks"] // 200
    assert found["units_per_second"] > 1000 and found["efficiency"] > 0.9
    assert max(found["memory_mb"]) - found["memory_mb"][0] < 40


def test_waiting_threads_are_limited_on_every_way_into_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys, pipeline.cli; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    for own, expected in (({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | own
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [expected, "False"]  # before PyTorch, which reads it once
    # Workers set it before they import anything, too.
    monkeypatch.setenv("ATLAS_TEST_SET", "own")
    monkeypatch.delenv("ATLAS_TEST_UNSET", raising=False)
    handshake.VersionedActor("pipeline", [], None, {"ATLAS_TEST_SET": "3000", "ATLAS_TEST_UNSET": "3000"})
    assert (os.environ["ATLAS_TEST_SET"], os.environ.pop("ATLAS_TEST_UNSET")) == ("own", "3000")


def test_workers_get_the_limits_of_threads_and_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    found = []

    def remote(package: str, arguments: object, weights: object, environment: dict[str, str]) -> Any:
        found.append(environment)
        return types.SimpleNamespace(hello=types.SimpleNamespace(remote=lambda _: "hello"))

    engine = types.SimpleNamespace(
        _arguments=((), b""),
        config=EngineConfig(),
        _versions={},
        target=1,
        _calls={},
        _idle=[],
        _actor_class=types.SimpleNamespace(remote=remote),
    )
    ray_engine.RayEngine._start_workers(engine, 1)  # type: ignore[arg-type]
    assert found == [COMPILER_LIMIT | machine.SPIN_LIMIT]


@pytest.mark.long
def test_workers_start_no_pool_of_compilers() -> None:
    """Each would start as many processes as the machine has cores."""
    code = "import torch._inductor.config as config; print(config.compile_threads)"
    environment = dict(os.environ) | COMPILER_LIMIT
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
