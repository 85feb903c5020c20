"""What the engine decides without Ray: crews, cuts, and what a worker does about memory."""

import contextlib
import dataclasses
import pickle
import signal
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import EngineConfig
from pipeline.core.errors import AtlasError, TryAgainError
from pipeline.engine import worker
from pipeline.engine.base import Failure, TooManyFailures, ordered
from pipeline.engine.batch_sizes import BatchSizes
from pipeline.engine.factory import open_engine
from pipeline.engine.progress import Stage, WorkerStats, report_lines, run_report
from pipeline.engine.resources import size_pool
from pipeline.engine.tasks import Done, RangesTask, RenderTask, SweepTask
from pipeline.engine.worker import DeviceLost, Worker
from pipeline.planning.cost_model import PlanRow
from pipeline.planning.plan import SHARE, Plan, portions
from pipeline.planning.planner import make_plan
from pipeline.runs.dataset_pass import gaps, without_overlap
from pipeline.store import shards
from pipeline.store.shards import Shard


def test_auto_fills_a_machine() -> None:
    laptop = size_pool(EngineConfig(), [(2, 0)], 100)
    assert (laptop.workers, laptop.threads, laptop.device) == (2, 1, "cpu")
    box = size_pool(EngineConfig(), [(16, 1)], 100)
    assert (box.workers, box.cpus, box.gpus, box.device) == (1, 16, 1, "cuda")
    shared = size_pool(EngineConfig(gpus_per_worker=0.5), [(16, 1)], 100)
    assert (shared.workers, shared.cpus) == (2, 8)
    no_gpu = size_pool(EngineConfig(gpus_per_worker=0), [(16, 1)], 100)
    assert (no_gpu.device, no_gpu.gpus) == ("cpu", 0)
    assert size_pool(EngineConfig(), [(64, 0)], 3).workers == 3
    one = size_pool(EngineConfig(workers=1), [(2, 0)], 100)
    assert (one.workers, one.threads) == (1, 2)


def test_auto_fills_a_cluster_of_mixed_nodes() -> None:
    # A head without cores, a node with 4 GPUs, one with 2 but few cores, and one with none, which rests.
    mixed = size_pool(EngineConfig(), [(0, 0), (32, 4), (6, 2), (64, 0)])
    assert (mixed.workers, mixed.cpus, mixed.gpus, mixed.device) == (6, 3, 1, "cuda")
    cores = size_pool(EngineConfig(), [(0, 0), (3, 0), (64, 0)])
    assert (cores.workers, cores.cpus, cores.device) == (67, 1, "cpu")
    # No worker spans two nodes.
    wide = size_pool(EngineConfig(cpus_per_worker=4), [(6, 0), (7, 0), (2, 0)])
    assert wide.workers == 2 and wide.room([(3, 0), (8, 0)]) == 2
    assert size_pool(EngineConfig(workers=12), [(8, 0), (8, 0)]).cpus == 1


# GPUs of one worker, and how many of them share a GPU. 1 // 0.2 is 4.0 and 1 // 0.1 is 9.0.
FRACTIONS = [(0.1, 10), (0.2, 5), (0.25, 4), (1 / 3, 3), (0.5, 2), (1.0, 1), (1 / 7, 7), (0.3, 3), (0.6, 1)]


@pytest.mark.parametrize(("each", "on_one"), FRACTIONS)
@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("cores", [2, 16, 96])
def test_fractions_of_gpus_lose_no_worker(each: float, on_one: int, gpus: int, cores: int) -> None:
    pool, workers = size_pool(EngineConfig(gpus_per_worker=each), [(cores, gpus)]), gpus * on_one
    assert (pool.workers, pool.room([(cores, gpus)])) == (workers, workers)
    # A worker has whole cores, or its share of one if there are not enough; all of them fit, also as Ray counts.
    assert pool.cpus == cores // workers if cores >= workers else pool.cpus == pytest.approx(cores / workers, abs=1e-4)
    assert round(pool.cpus * 1e4) * workers <= cores * 1e4
    assert round(pool.gpus * 1e4) * on_one <= 1e4


def test_fractions_of_cores_lose_no_worker() -> None:
    for each, workers in ((0.1, 20), (0.2, 10), (1 / 3, 6)):
        assert size_pool(EngineConfig(cpus_per_worker=each), [(2, 0)]).workers == workers
    # The node with the fewest cores for each GPU decides; one without cores has no workers.
    mixed = size_pool(EngineConfig(gpus_per_worker=0.2), [(5, 1), (20, 1), (0, 4)])
    assert (mixed.workers, mixed.cpus) == (10, 1)


@given(
    count=st.integers(1, 3000),
    each=st.floats(0.001, 500),
    other=st.floats(0, 1e5),
    workers=st.integers(1, 600),
    batch=st.integers(1, 64),
)
def test_portions_are_short_whole_and_finer_at_the_end(
    count: int, each: float, other: float, workers: int, batch: int
) -> None:
    left, longest, least = other + count * each, 120.0, min(batch, 4)
    sizes = list(portions(count, each, left, workers, longest, batch, least))
    assert sum(sizes) == count and min(sizes) >= 1
    for size in sizes:
        # Never longer than asked (unless one alone is), and only the smallest exceed their share of what is left.
        assert size * each <= longest * (1 + 1e-9) or size == 1
        assert size <= least or size * each <= left / (SHARE * workers) * (1 + 1e-6) or size == 1
        left -= size * each


@pytest.fixture(scope="module")
def tiny_plan(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Plan:
    from conftest import TINY

    where = [f"run.root={tmp_path_factory.mktemp('plan')}", "run.name=tiny", "data=folder", f"data.root={photo_folder}"]
    return make_plan(compose([*TINY, *where]).config, timed=False)


def test_tasks_cover_the_plan_once_longest_first(tiny_plan: Plan, tmp_path: Path) -> None:
    nothing: dict[PlanRow, set[int]] = {row: set() for row in tiny_plan.rows}
    tasks = tiny_plan.render_tasks(tmp_path, nothing, 1)
    units = [(task.layer, c) for task in tasks for c in task.channels]
    assert sorted(units) == sorted((row.layer.name, c) for row in tiny_plan.rows for c in row.channels)
    costs = [task.cost for task in ordered(tasks)]
    assert costs == sorted(costs, reverse=True) and len({task.path for task in tasks}) == len(tasks)
    # What is done is not cut again.
    first = next(row for row in tiny_plan.rows if row.layer.name == tasks[0].layer)
    done = nothing | {first: set(tasks[0].channels)}
    rest = tiny_plan.render_tasks(tmp_path, done, 1)
    assert not {(t.layer, c) for t in rest for c in t.channels} & {(tasks[0].layer, c) for c in tasks[0].channels}
    pieces = tiny_plan.examples_tasks(tmp_path, [(0, 6), (14, 20)], 1)
    assert sorted(i for t in pieces for i in range(t.start, t.end)) == [*range(6), *range(14, 20)]


def test_a_photograph_counts_once_however_ranges_overlap() -> None:
    found = [Shard(Path("x"), {"start": a, "end": b}) for a, b in ((0, 8), (8, 16), (0, 12), (16, 20))]
    assert list(without_overlap(found)) == [(0, 12), (16, 20)]
    assert gaps([(0, 12), (16, 20)], 25) == [(12, 16), (20, 25)] and gaps([(0, 25)], 25) == []


ALLOCATOR_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
DRIVER_FULL = RuntimeError("CUDA error: out of memory")
CONTEXT_LOST = RuntimeError("CUDA error: an illegal memory access was encountered")


def out_of_memory_over(limit: int, sizes: list[int], error: RuntimeError = ALLOCATOR_FULL) -> Any:
    whole = worker.render

    def render(job: Any, units: list[Any], start: Any) -> Any:
        sizes.append(len(units))
        if len(units) > limit:
            raise error
        return whole(job, units, start)

    return render


def render_tasks(plan: Plan, folder: Path, starts: Sequence[int]) -> list[RenderTask]:
    """Tasks of six channels of one layer."""
    row = plan.rows[0]
    return [
        RenderTask(str(folder / f"{i}.h5"), "d", 1.0, row.layer.name, tuple(range(i, i + 6)), row.canvas, row.preset)
        for i in starts
    ]


def with_batch(plan: Plan, batch: int) -> Any:
    config = dataclasses.replace(plan.config, engine=dataclasses.replace(plan.config.engine, batch=batch))
    return dataclasses.replace(plan.setup, config=config)


def test_out_of_memory_halves_the_batch_and_is_remembered(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, tasks = with_batch(tiny_plan, 8), render_tasks(tiny_plan, tmp_path, (0, 6, 12))
    sizes: list[int] = []
    monkeypatch.setattr(worker, "render", out_of_memory_over(3, sizes))
    one = Worker(setup)
    first, second = one.do(tasks[0]), one.do(tasks[1])
    assert sizes == [6, 3, 3, 3, 3] and first.batch == ("cpu", 3) and second.batch is None
    # Another worker on the same kind of device starts with what was learnt.
    assert Worker(setup).do(tasks[2], {"cpu": 3, "NVIDIA H100": 1}).batch is None
    assert sizes[5:] == [3, 3]
    # Batches are no part of a picture.
    monkeypatch.setattr(worker, "render", out_of_memory_over(99, []))
    Worker(setup).do(dataclasses.replace(tasks[0], path=str(tmp_path / "whole.h5")))
    halves, whole = (shards.read(tmp_path / name) for name in ("0.h5", "whole.h5"))
    assert halves is not None and whole is not None
    a, b = halves.arrays(), whole.arrays()
    assert np.abs(a["images"].astype(int) - b["images"]).max() <= 1 and np.array_equal(a["seed"], b["seed"])
    # A single picture that does not fit is a failure with its reason.
    monkeypatch.setattr(worker, "render", out_of_memory_over(0, sizes))
    with pytest.raises(torch.OutOfMemoryError):
        Worker(setup).do(tasks[0])


def test_a_driver_that_is_out_of_memory_halves_the_batch_of_one_preset_only(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to count as a lost context: the next worker began with the same batch."""
    setup, tasks = with_batch(tiny_plan, 8), render_tasks(tiny_plan, tmp_path, (0,))
    sizes: list[int] = []
    monkeypatch.setattr(worker, "render", out_of_memory_over(3, sizes, DRIVER_FULL))
    one = Worker(setup)
    assert one.do(tasks[0]).batch == ("cpu", 3) and sizes == [6, 3, 3]
    # The memory of another preset of the same layer is another one.
    preset = dataclasses.replace(setup.config.render, name="other")
    one.pictures(tasks[0].layer, range(6), tasks[0].canvas, preset)
    assert sizes[3:] == [6, 3, 3]


def test_a_batch_that_fits_outlives_the_worker_that_learnt_it(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def render(_: Any, units: list[Any], __: Any) -> Any:
        sizes.append(len(units))
        raise DRIVER_FULL if len(units) > 3 else CONTEXT_LOST

    monkeypatch.setattr(worker, "render", render)
    task, batches = render_tasks(tiny_plan, tmp_path, (0,))[0], BatchSizes()
    for _ in range(2):
        with pytest.raises(DeviceLost) as lost:
            Worker(with_batch(tiny_plan, 8)).do(task, batches.of(task))
        again = pickle.loads(pickle.dumps(lost.value))  # as Ray brings it to the driver
        assert str(again) == str(lost.value)
        batches.note(task, again.batch)
    assert sizes == [6, 3, 3] and batches.of(task) == {"cpu": 3}
    # Late reports of larger batches do not count, and other presets and stages have sizes of their own.
    batches.note(task, ("cpu", 5))
    assert batches.of(task) == {"cpu": 3}
    assert batches.of(dataclasses.replace(task, preset="other")) == {}
    assert batches.of(RangesTask("r", "d", 1.0, (0,))) == {}


def test_an_inline_run_ends_when_its_process_has_lost_the_gpu(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All further tasks would fail in this process; a new one may go on, as the exit code says."""
    begun: list[int] = []

    def render(*_: object) -> None:
        begun.append(1)
        raise CONTEXT_LOST

    monkeypatch.setattr(worker, "render", render)
    with (
        open_engine(EngineConfig(name="inline")) as engine,
        pytest.raises(TryAgainError, match="The GPU failed") as end,
    ):
        engine.execute(render_tasks(tiny_plan, tmp_path, (0, 6)), tiny_plan.setup, lambda *_: None, lambda: None)
    assert begun == [1] and end.value.exit_code == 75 and "run the same command again" in str(end.value)


def test_an_inline_engine_keeps_batches_that_fit_for_the_next_setup(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(worker, "render", out_of_memory_over(3, sizes))
    with open_engine(EngineConfig(name="inline")) as engine:
        for task in render_tasks(tiny_plan, tmp_path, (0, 6)):
            engine.execute([task], with_batch(tiny_plan, 8), lambda *_: None, lambda: None)
    assert sizes == [6, 3, 3, 3, 3]


def test_photographs_too_many_for_memory_are_halved(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sizes = worker.sweep.sweep, []

    def sweep(context: Any, *rest: Any) -> Any:
        sizes.append(context.config.batch)
        if context.config.batch > 2:
            raise torch.OutOfMemoryError
        return whole(context, *rest)

    monkeypatch.setattr(worker.sweep, "sweep", sweep)
    one = Worker(tiny_plan.setup)
    one.do(RangesTask(str(tmp_path / "r.h5"), "d", 1.0, (0, 3)))
    ranges = shards.read(tmp_path / "r.h5")
    assert ranges is not None
    histogram_ranges = shards.to_bytes({}, ranges.arrays())
    one.do(SweepTask(str(tmp_path / "a.h5"), "d", 1.0, 0, 4, histogram_ranges))
    one.do(SweepTask(str(tmp_path / "b.h5"), "d", 1.0, 4, 8, histogram_ranges))
    assert sizes == [4, 2, 2] and shards.read(tmp_path / "b.h5") is not None


def test_a_poisoned_context_makes_a_worker_unfit(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(*_: object, **__: object) -> None:
        raise CONTEXT_LOST

    monkeypatch.setattr(worker, "render", poisoned)
    row = tiny_plan.rows[0]
    with pytest.raises(DeviceLost, match="illegal memory access"):
        Worker(tiny_plan.setup).do(
            RenderTask(str(tmp_path / "x.h5"), "d", 1.0, row.layer.name, (0,), row.canvas, row.preset)
        )


def test_a_worker_that_grew_is_worn(tiny_plan: Plan) -> None:
    engine = dataclasses.replace(tiny_plan.config.engine, memory_gb=0.001)
    setup = dataclasses.replace(tiny_plan.setup, config=dataclasses.replace(tiny_plan.config, engine=engine))
    one = Worker(setup)
    assert one._restart_reason() == ""  # over the limit from the start: another one would be no better
    one.first_memory /= 2
    assert "grew from" in one._restart_reason()
    assert Worker(tiny_plan.setup)._restart_reason() == ""


def test_the_memory_of_a_worker_is_first_read_when_its_network_is_loaded(tiny_plan: Plan, tmp_path: Path) -> None:
    """CUDA maps gigabytes of host memory into a process: they are no growth."""
    one = Worker(tiny_plan.setup)
    assert one.first_memory == 0
    one.do(render_tasks(tiny_plan, tmp_path, (0,))[0])
    assert "model" in vars(one) and one.first_memory > 0


def test_photographs_that_are_sent_stay_in_their_folder(tiny_plan: Plan) -> None:
    one = Worker(tiny_plan.setup)
    with pytest.raises(AtlasError, match="leads out of its folder"), one._dataset_files({"../x.png": b""}):
        pass
    with one._dataset_files({"a/b.png": b"1"}):
        assert Path(one.dataset.roots[""], "a/b.png").read_bytes() == b"1"


class Moody:
    """A worker that does nothing but count, and fails for some tasks."""

    def __init__(self, setup: Any, stop: Any = None, weights: Any = None) -> None:
        self.calls: dict[str, int] = {}

    def do(self, task: RenderTask, *_: object) -> Done:
        self.calls[task.path] = self.calls.get(task.path, 0) + 1
        if task.layer == "broken" or (task.layer == "moody" and self.calls[task.path] < 3):
            raise ValueError(f"no {task.path}")
        return Done(task.path, 0.0)


def do_all(layers: list[str], **settings: Any) -> list[Any]:
    tasks = [RenderTask(str(i), "d", float(-i), layer, (i,), (8, 8), "distill") for i, layer in enumerate(layers)]
    told_of: list[Any] = []
    setup: Any = types.SimpleNamespace()
    with open_engine(EngineConfig(name="inline", **settings), Moody) as engine:
        try:
            engine.execute(tasks, setup, lambda task, result: told_of.append(result), lambda: None)
        except TooManyFailures as error:
            told_of.append(error)
    return told_of


def test_three_tries_then_set_aside_and_on() -> None:
    told_of = do_all(["good", "moody", "broken", "good"])
    assert [type(t) for t in told_of] == [Done, Done, Failure, Done]
    assert told_of[2].reason == "ValueError: no 2" and "Traceback" in told_of[2].detail


def test_too_many_in_a_row_stop_the_run() -> None:
    told_of = do_all(["good", *["broken"] * 5], max_failures=3)
    assert [type(t) for t in told_of] == [Done, Failure, Failure, Failure, TooManyFailures]
    assert len(do_all(["broken", "broken", "good", "broken", "broken", "good"], max_failures=3)) == 6


def test_the_report_says_who_was_idle() -> None:
    stage = Stage("render", "units", 10, 8, fresh=8, failed=2, began=0.0, ended=4.0, seconds=6.0)
    posts = [WorkerStats("a:1", 0.0, 4.0, 4.0, 5), WorkerStats("b:2", 0.0, 4.0, 1.0, 3, "worker lost")]
    summary = run_report([stage], posts, 5.0, 2)
    assert summary["stages"]["render"] == {
        "units": 8, "failed": 2, "seconds": 4.0, "worker_seconds": 6.0, "per_second": 2.0,
    }  # fmt: skip
    lines = report_lines(summary, most=1)
    assert lines[0] == "render: 8 units in 4 s, 2/s" and "62%" in lines[1]
    assert lines[2] == "  b:2: 3 tasks, 25% of 4 s; worker lost" and "1 busier" in lines[3]


def test_a_signal_that_an_exception_was_lost_of_is_remembered() -> None:
    from pipeline.core import interrupts

    before = signal.getsignal(signal.SIGTERM)
    with interrupts.InterruptHandlers():
        interrupts.raise_if_interrupted()
        with contextlib.suppress(KeyboardInterrupt):  # as Python does inside a destructor
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_if_interrupted()
    interrupts.raise_if_interrupted()
    assert signal.getsignal(signal.SIGTERM) is before
