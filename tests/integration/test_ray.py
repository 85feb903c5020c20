"""The same tasks on Ray: the same pictures, also when workers are killed under them."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from test_run import pictures

import pipeline
from pipeline.cli.main import main
from pipeline.config.schema import EngineConfig
from pipeline.core.errors import AtlasError
from pipeline.engine.base import Failure, TooManyFailures
from pipeline.engine.connection import connected
from pipeline.engine.ray_engine import RayEngine
from pipeline.engine.tasks import Done, RenderTask, write_result
from pipeline.engine.worker import DeviceLost
from pipeline.store import shards

ON_RAY = ["engine=ray", "engine.workers=2"]
TOO_MANY = ["engine=ray", "engine.workers=64", "engine.cpus_per_worker=1"]

# Ray's own start-up warns about what is none of ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def at_work(pid: int | None = None) -> list[psutil.Process]:
    """Actors that are at a task now, of this process's Ray or another's; Ray shows it in a process's title."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::VersionedActor.do" in " ".join(process.cmdline()):
                found.append(process)
    return found


def killer(stop: threading.Event, killed: list[int]) -> None:
    """Kill a worker of Ray as soon as one is at work, twice."""
    while not stop.is_set() and len(killed) < 2:
        for process in at_work():
            if process.pid not in killed:
                process.kill()
                killed.append(process.pid)
                time.sleep(1.0)
                break
        time.sleep(0.05)


@pytest.mark.long
def test_killed_workers_change_nothing(tiny_run: list[str], tmp_path: Path) -> None:
    more = ["render.steps=30"]
    assert main(["run", *tiny_run, *more]) == 0
    inline = pictures(tmp_path / "tiny")
    stop, killed = threading.Event(), []
    thread = threading.Thread(target=killer, args=(stop, killed))
    thread.start()
    try:
        assert main(["run", *tiny_run, *more, *ON_RAY, "run.name=killed"]) == 0
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
            assert np.array_equal(layer.measurements()["seed"], b[layer.name].measurements()["seed"])


@pytest.mark.long
def test_bad_input_on_a_worker_ends_the_run_at_once(
    tiny_run: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.runs import runner

    whole = runner.make_plan

    def other_weights(config, **rest):  # type: ignore[no-untyped-def]
        import dataclasses

        made = whole(config, **rest)
        return dataclasses.replace(made, setup=dataclasses.replace(made.setup, weights="0" * 64))

    monkeypatch.setattr(runner, "make_plan", other_weights)
    assert main(["render", *tiny_run, *ON_RAY]) == 2
    assert "loaded other weights of test_efficientnet than the driver" in capsys.readouterr().err


@pytest.mark.long
def test_more_workers_than_room_are_cut_and_too_large_ones_refused(
    tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", *tiny_run, *TOO_MANY]) == 0
    assert "but the cluster has room for" in capsys.readouterr().err
    assert main(["render", *tiny_run, *ON_RAY, "engine.cpus_per_worker=999", "render.steps=5", "run.update=true"]) == 2
    assert "No node of the cluster has room for a worker of 999 CPUs" in capsys.readouterr().err


def test_no_cluster_at_the_address(tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", *tiny_run, *ON_RAY, "engine.address=127.0.0.1:1"]) == 2
    assert "No Ray cluster at engine.address=127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_its_workers(tiny_run: list[str], tmp_path: Path, kind: signal.Signals) -> None:
    """A terminal sends Ctrl-C to the whole process group: driver, Ray's own processes and workers.

    A job system sends SIGTERM to the driver.
    """
    command = [sys.executable, "-c", "import sys; from pipeline.cli.main import main; sys.exit(main())", "render"]
    slow = [*tiny_run, *ON_RAY, "render.steps=400"]
    process = subprocess.Popen([*command, *slow], stderr=subprocess.PIPE, text=True, start_new_session=True)
    shards = tmp_path / "tiny" / "shards"
    deadline = time.monotonic() + 120
    while not list(shards.rglob("*.h5")) and time.monotonic() < deadline:
        time.sleep(0.05)
    kept = list(shards.rglob("*.h5"))
    workers = at_work(process.pid)
    began = time.monotonic()
    (os.killpg if kind == signal.SIGINT else os.kill)(process.pid, kind)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - began < 15
    assert "Finished work is kept" in errors
    assert kept and all(path.exists() for path in kept)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert workers and not alive


def moods() -> tuple[type, Any]:
    """A class of workers with moods, and a setup for it; made here, so that Ray sends them along."""

    @dataclasses.dataclass(frozen=True)
    class Little:
        threads: int = 1
        device: str = "cpu"

    class Moody:
        def __init__(self, setup: Any, stop: Any = None, weights: Any = None) -> None:
            self.done = 0

        def do(self, task: RenderTask, fits: Any = None, files: Any = None) -> Done:
            self.done += 1
            mark = Path(task.path)
            tries = int(mark.read_text()) + 1 if mark.exists() else 1
            mark.write_text(str(tries))
            if task.layer == "slow":
                time.sleep(0.5)
            if task.layer == "broken" or (task.layer == "moody" and tries < 2):
                raise ValueError(f"no, for the {tries}. time")
            if task.layer == "poisoned" and tries < 2:
                raise DeviceLost("CUDA error: an illegal memory access was encountered")
            if task.layer == "deadly" and tries < 3:
                os._exit(1)
            if task.layer == "killer":
                os._exit(1)
            if task.layer == "hung" or (task.layer == "stopped" and tries < 2):
                # As in a dead mount or in a call of the GPU: no signal handler runs, and no other thread.
                os.kill(os.getpid(), signal.SIGSTOP)
            batch = ("cpu", 4) if task.layer == "tight" else None
            return Done(task.path, 0.01, batch=batch, restart_reason="grew" if task.layer == "growing" else "")

    return Moody, Little()


def do_all(
    folder: Path, layers: list[str], idle: Callable[[], None] = lambda: None, **settings: Any
) -> tuple[list[Any], RayEngine]:
    tasks = [
        RenderTask(str(folder / str(i)), "d", -float(i), layer, (i,), (8, 8), "distill")
        for i, layer in enumerate(layers)
    ]
    results: list[Any] = []
    config = EngineConfig(**settings)
    with connected(config) as ray:
        kind, setup = moods()
        engine = RayEngine(ray, config, kind)
        try:
            engine.execute(tasks, setup, lambda task, result: results.append((task.layer, result)), idle)
        except TooManyFailures as error:
            results.append(("", error))
        finally:
            engine.close()
    return results, engine


@pytest.mark.long
def test_every_way_a_task_can_end(tmp_path: Path) -> None:
    """Raising, poisoned, killed and outgrown workers: each task is tried again, and each unfit worker replaced."""
    layers = ["good", "moody", "broken", "poisoned", "deadly", "killer", "growing", "tight", "good", "growing", "good"]
    results, engine = do_all(tmp_path, layers, workers=2, cpus_per_worker=0.5, attempts=2)
    by_layer = {layer: result for layer, result in results}
    assert len(results) == len(layers)
    assert {layer for layer, result in results if isinstance(result, Failure)} == {"broken", "killer"}
    assert "no, for the 2. time" in by_layer["broken"].reason and "in do" in by_layer["broken"].detail
    assert "worker lost" in by_layer["killer"].reason
    # A worker that is lost need not be its task's fault: it is tried three times as often as what raises.
    assert (tmp_path / "5").read_text() == "6" and (tmp_path / "2").read_text() == "2"
    # 6 + 2 deaths, 1 poisoned, 2 grown: each had another take its place.
    ends = [post.end for post in engine.stats if post.end]
    assert len(ends) == 11 and ends.count("grew") == 2 and any("illegal memory access" in end for end in ends)
    assert len({post.name for post in engine.stats}) >= 11
    assert sum(post.tasks for post in engine.stats) == len(layers) - 2
    assert all(post.left is not None for post in engine.stats)


@pytest.mark.long
def test_a_hung_worker_is_replaced_and_its_task_counts(tmp_path: Path) -> None:
    """Workers that answer nothing at all, not even a signal, but are not dead."""
    layers = ["hung", "good", "stopped", "good"]
    results, engine = do_all(tmp_path, layers, workers=2, cpus_per_worker=0.5, attempts=2, timeout_seconds=2.0)
    by_layer = dict(results)
    assert len(results) == 4 and all(isinstance(by_layer[layer], Done) for layer in ("good", "stopped"))
    reason = by_layer["hung"].reason
    assert re.match(r"did not end within 4 s, at an estimate of .* \(engine\.timeout", reason), reason
    assert (tmp_path / "0").read_text() == "2" and (tmp_path / "2").read_text() == "2"
    hung = [post.name.partition(":")[2] for post in engine.stats if "hangs" in post.end]
    assert len(hung) == 3
    gone = time.monotonic() + 10
    while any(psutil.pid_exists(int(pid)) for pid in hung) and time.monotonic() < gone:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(int(pid)) for pid in hung)


@pytest.mark.long
def test_too_many_failures_stop_it_on_ray(tmp_path: Path) -> None:
    class Stillborn:
        def __init__(self, *_: object, **__: object) -> None:
            raise ValueError("no such library")

    with connected(EngineConfig(workers=1, cpus_per_worker=0.5)) as ray:
        engine = RayEngine(ray, EngineConfig(workers=1, cpus_per_worker=0.5), Stillborn)
        with (
            contextlib.closing(engine),
            pytest.raises(AtlasError, match=r"(?s)3 workers in a row could not start.*no such library"),
        ):
            engine.execute(
                [RenderTask("x", "d", 1.0, "layer", (0,), (8, 8), "distill")], moods()[1], lambda *_: None, lambda: None
            )
    results, _ = do_all(tmp_path, ["broken"] * 6, workers=1, cpus_per_worker=0.5, attempts=1, max_failures=3)
    assert [type(r) for _, r in results] == [Failure, Failure, Failure, TooManyFailures]


HOLD = """
import faulthandler, sys, ray
faulthandler.dump_traceback_later(60, exit=True)  # Ray may wait in `init` without end: tried again
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=int(sys.argv[2]))
class Holder:
    def hold(self): return True
holder = Holder.remote()
print(ray.get(holder.hold.remote()), flush=True)
faulthandler.cancel_dump_traceback_later()
sys.stdin.read()
"""


@contextlib.contextmanager
def holding(address: str, cpus: int) -> Iterator[None]:
    """Somebody else's actor on a cluster, with so many of its CPUs."""
    command = [sys.executable, "-c", HOLD, address, str(cpus)]
    for _ in range(3):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if process.stdout.readline() == "True\n":
                yield  # its stdin is closed on exit, and with it the process ends
                return
    raise AssertionError("no connection to the cluster of this test in three attempts")


@pytest.mark.long
def test_workers_join_and_leave_with_their_nodes(tmp_path: Path) -> None:
    """`engine.workers=auto`: a run that begins on no node goes on with one, then three, and after one has died."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes: list[Any] = []
    beats: list[float] = []

    def idle() -> None:
        beats.append(time.monotonic())
        finished = len(list(tmp_path.iterdir()))
        if not nodes:
            nodes.append(cluster.add_node(num_cpus=1, wait=False))
        elif finished >= 4 and len(nodes) == 1:
            nodes.append(cluster.add_node(num_cpus=2, wait=False))
        elif finished >= 16 and len(nodes) == 2:
            nodes.append(None)
            cluster.remove_node(nodes[0], allow_graceful=False)

    try:
        results, engine = do_all(tmp_path, ["slow"] * 40, idle, address=cluster.address, patience=120.0)
        assert len(results) == 40 and all(isinstance(r, Done) for _, r in results)
        assert len(nodes) == 3 and len(engine.stats) >= 3 and sum(post.tasks for post in engine.stats) == 40
        assert any(post.end for post in engine.stats)
        with pytest.raises(AtlasError, match=r"within \d+ s \(engine\.patience=1\)"):
            do_all(tmp_path, ["good"], address=cluster.address, patience=1.0, cpus_per_worker=64)
    finally:
        cluster.shutdown()


@pytest.mark.long
def test_a_node_that_others_occupy_is_waited_for(tmp_path: Path) -> None:
    """It has room, so that a worker may start later: the wait is longer, and the message says why it ended."""
    from ray._private.services import node_ip_address_from_perspective
    from ray.cluster_utils import Cluster

    # Ray replaces 127.0.0.1 in an address by the machine's own, where a head that was started on the loopback device
    # does not listen: one in a process that has used Ray on it before is.
    own = node_ip_address_from_perspective()
    head = {"num_cpus": 2, "include_dashboard": False, "node_ip_address": own}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        with (
            holding(cluster.address, cpus=2),
            pytest.raises(AtlasError, match=r"No worker has started within .* though a node has room"),
        ):
            do_all(tmp_path, ["good"], address=cluster.address, patience=0.5, cpus_per_worker=2)
    finally:
        cluster.shutdown()


@pytest.mark.long
def test_workers_that_share_no_files_with_the_driver(tiny_run: list[str], tmp_path: Path) -> None:
    """Weights and photographs travel there, shards travel back, and everything is the same as inline."""
    from conftest import compose
    from safetensors.torch import save

    from pipeline.models.loading import load_model, serialize_weights

    config = compose(tiny_run).config.model
    checkpoint = tmp_path / "weights.safetensors"
    checkpoint.write_bytes(save(load_model(config).module.state_dict()))
    own = [*tiny_run, f"model.weights={checkpoint}"]
    assert serialize_weights(compose(own).config.model) is not None
    settings = ["engine.cpus_per_worker=1", "engine.task_seconds=0.001"]  # the same cuts
    assert main(["run", *own, *settings]) == 0
    assert main(["run", *own, *settings, *ON_RAY, "engine.shared_fs=false", "run.name=far"]) == 0
    ours, theirs = ({p.name: p for p in (tmp_path / name / "shards").rglob("*.h5")} for name in ("tiny", "far"))
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        mine, other = shards.read(path), shards.read(theirs[name])
        assert mine is not None and other is not None
        attributes = [{key: np.asarray(v).tolist() for key, v in s.attributes.items()} for s in (mine, other)]
        assert attributes[0] == attributes[1]
        a, b = mine.arrays(), other.arrays()
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            near = key in ("images", "images_sha256") or (a[key].dtype.kind == "f" and "/" not in key)
            if key == "images":
                assert np.abs(a[key].astype(int) - b[key]).max() <= 1
            elif not near:
                assert np.array_equal(a[key], b[key], equal_nan=a[key].dtype.kind == "f"), (name, key)


@pytest.mark.long
def test_shards_of_workers_that_do_not_see_the_run_folder_come_back(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a setting: the file by which they would know the folder is not there for them."""
    sent: list[str] = []

    def noted(task: Any, done: Done) -> None:
        sent.extend([task.path] if done.data else [])
        write_result(task, done)

    hidden = contextlib.nullcontext(tmp_path / "of another machine")
    monkeypatch.setattr("pipeline.runs.runner._marked", lambda folder: hidden)
    monkeypatch.setattr("pipeline.engine.ray_engine.write_result", noted)
    assert main(["render", *tiny_run, *ON_RAY]) == 0
    assert sent and set(sent) == {str(path) for path in (tmp_path / "tiny/shards").rglob("*.h5")}


def test_a_process_starts_ray_more_than_once() -> None:
    """As a study and a notebook do: Ray's client keeps the first token of a process."""
    code = """
import os
os.environ.pop("RAY_AUTH_MODE", None)
from pipeline.engine.connection import connected
from pipeline.config.schema import EngineConfig
for start in range(2):
    with connected(EngineConfig()) as ray:
        assert ray.get(ray.remote(lambda: start).remote()) == start
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_nothing_listens_to_the_outside() -> None:
    """A private Ray: loopback only, no dashboard, no token on disk, and workers with the driver's own priority."""
    code = """
import os, psutil, sys
os.environ.pop("RAY_AUTH_MODE", None)
from pipeline.engine.connection import connected
from pipeline.config.schema import EngineConfig
with connected(EngineConfig()) as ray:
    actor = ray.remote(num_cpus=1)(type("A", (), {"f": lambda self: os.nice(0)}))
    assert ray.get(actor.remote().f.remote()) == os.nice(0)
    me = psutil.Process()
    for p in [me, *me.children(recursive=True)]:
        for c in p.net_connections(kind="inet"):
            if c.status == "LISTEN":
                print(p.name(), c.laddr.ip, c.laddr.port)
"""
    home = tempfile.mkdtemp()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"HOME": home}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 4 and all(line.split()[1] in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for line in lines), lines
    assert not any(line.endswith(" 8265") for line in lines) and not Path(home, ".ray").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_chaos_in_small() -> None:
    """Some faults of workers, the driver, nodes and, where root may mount them, disks; scripts/chaos makes hundreds."""
    chaos = Path(__file__).with_name("chaos.py")
    command = [sys.executable, chaos, "5", "1", "--channels=6", "--steps=10", "--limit=700"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout[done.stdout.index("\n{") :])
    assert sum(outcome["faults"].values()) == 5 and outcome["shards_read"] > 0
    assert not any(outcome[what] for what in ("unreadable", "lost", "different", "crashes")), done.stdout
