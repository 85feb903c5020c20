"""What a worker does beside the device: same numbers, same shards, errors where they belong."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, compose

from pipeline.engine.background import Background
from pipeline.engine.tasks import RenderTask
from pipeline.engine.worker import Worker
from pipeline.planning.plan import Plan
from pipeline.planning.planner import make_plan
from pipeline.store import shards
from pipeline.visualization import loop
from pipeline.visualization.render_job import draw_start

# A device whose batches are prepared in threads, as those of a GPU are.
KEY = ("layer", "preset")
OTHER_DEVICE = "meta"


@pytest.fixture(scope="module")
def tiny_plan(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Plan:
    where = [f"run.root={tmp_path_factory.mktemp('plan')}", "run.name=tiny", "data=folder", f"data.root={photo_folder}"]
    return make_plan(compose([*TINY, *where, "engine.batch=2"]).config, timed=False)


def worker(plan: Plan, device: str) -> Worker:
    one = Worker(plan.setup)
    one.background = Background(device, 2)
    return one


def test_the_next_batch_is_prepared_beside_a_device_and_not_beside_the_cpu(tiny_plan: Plan) -> None:
    calls: list[str] = []
    prepared = {3: threading.Event(), 6: threading.Event()}

    def prepare(units: list[int]) -> list[int]:
        calls.append(f"prepare {units[0]}")
        prepared.get(units[0], threading.Event()).set()
        return units

    def work_beside(units: list[int]) -> list[int]:
        assert units[-1] == 6 or prepared[units[-1] + 1].wait(20)  # the next batch is prepared before this one ends
        return units

    def work_alone(units: list[int]) -> list[int]:
        calls.append(f"work {units[0]}")
        return units

    batches = list(worker(tiny_plan, OTHER_DEVICE).in_batches(KEY, list(range(7)), 3, prepare, work_beside))
    assert batches == [[0, 1, 2], [3, 4, 5], [6]] and sorted(calls) == ["prepare 0", "prepare 3", "prepare 6"]
    calls.clear()
    assert list(worker(tiny_plan, "cpu").in_batches(KEY, list(range(5)), 3, prepare, work_alone)) == [
        [0, 1, 2],
        [3, 4],
    ]
    assert calls == ["prepare 0", "work 0", "prepare 3", "work 3"]


@pytest.mark.parametrize("device", ["cpu", OTHER_DEVICE])
def test_halved_batches_hold_every_unit_once(tiny_plan: Plan, device: str) -> None:
    def work(units: list[int]) -> list[int]:
        if len(units) > 3:
            raise torch.OutOfMemoryError
        return units

    one = worker(tiny_plan, device)
    batches = list(one.in_batches(KEY, list(range(10)), 8, list, work))
    assert batches == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]] and one.fits[KEY] == 2


@pytest.mark.parametrize("device", ["cpu", OTHER_DEVICE])
def test_an_error_of_the_next_batch_appears_after_the_present_one(tiny_plan: Plan, device: str) -> None:
    def prepare(units: list[int]) -> list[int]:
        if units[0] == 2:
            raise OSError("unreadable")
        return units

    batches = worker(tiny_plan, device).in_batches(KEY, [0, 1, 2, 3], 2, prepare, list)
    assert next(batches) == [0, 1]
    with pytest.raises(OSError, match="unreadable"):
        next(batches)


def test_a_start_that_cannot_be_pinned_is_used_as_it_is(
    tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
    row = tiny_plan.rows[0]
    one = worker(tiny_plan, OTHER_DEVICE)
    job = one.job(row.layer.name, row.canvas, tiny_plan.config.preset_for(row.preset, row.layer))
    start = draw_start(job, [(0, 0), (1, 0)], 0)
    assert start.pinned().initial is start.initial
    assert [record.getMessage().count("page-locked") for record in caplog.records] == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinned_start_has_the_same_numbers(tiny_plan: Plan) -> None:
    row = tiny_plan.rows[0]
    one = worker(tiny_plan, "cuda")
    job = one.job(row.layer.name, row.canvas, tiny_plan.config.preset_for(row.preset, row.layer))
    start = draw_start(job, [(0, 0), (1, 0)], 0)
    ahead = one.background.begin(lambda: draw_start(job, [(0, 0), (1, 0)], 0).pinned())()
    assert ahead.initial.is_pinned() and ahead.seeds == start.seeds
    for name in ("initial", "transform_random", "robustness_random"):
        assert torch.equal(getattr(ahead, name).to("cuda", non_blocking=True).cpu(), getattr(start, name))


def test_shards_are_those_of_a_worker_without_threads(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.time, "perf_counter", lambda: 0.0)  # shards hold the seconds of each image
    row = tiny_plan.rows[0]
    task = RenderTask("", "d", 1.0, row.layer.name, tuple(range(5)), row.canvas, row.preset)
    for device in ("cpu", OTHER_DEVICE):
        worker(tiny_plan, device).do(dataclasses.replace(task, path=str(tmp_path / device)))
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / OTHER_DEVICE).read_bytes()
    shard = shards.read(tmp_path / OTHER_DEVICE)
    assert shard is not None and shard.damage() == "" and len(np.unique(shard.arrays()["seed"])) == 5
