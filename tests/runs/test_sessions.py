"""Whole runs: what is kept, made again or refused when settings, files or other commands change."""

import dataclasses
import os
import platform
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose

import pipeline
from pipeline.cli.main import main
from pipeline.config.schema import EngineConfig
from pipeline.core import machine
from pipeline.core.errors import AtlasError, TryAgainError
from pipeline.engine.base import NODE_LOSSES_PER_FAILURE, Failure, FailureTracker
from pipeline.engine.resources import WorkerPool, memory_share
from pipeline.engine.tasks import RangesTask
from pipeline.engine.worker import Worker
from pipeline.planning import execution
from pipeline.planning.folder import RunFolder
from pipeline.planning.planner import make_plan
from pipeline.runs import pages, runner

ONE_LAYER = ["layers.include=[conv_stem]"]


def precisions(folder: Path) -> set[str]:
    with pipeline.open_atlas(folder) as atlas:
        return {str(view.render_attributes("distill")["requested_precision"]) for view in atlas}


@pytest.mark.long
def test_another_precision_makes_visualizations_again_and_auto_keeps_them(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [o for o in (*tiny_run, *ONE_LAYER) if not o.startswith("engine.precision")]
    assert main(["run", *overrides, "engine.precision=bfloat16"]) == 0
    assert precisions(tmp_path / "tiny") == {"bfloat16"}
    capsys.readouterr()
    for has_instructions in (False, True):  # a processor without and with instructions for bfloat16
        monkeypatch.setattr("pipeline.acceleration.precision.multiplies_bfloat16", lambda has=has_instructions: has)
        assert main(["run", *overrides]) == 0
        assert "nothing is missing" in capsys.readouterr().out
    assert main(["run", *overrides, "engine.precision=float32"]) == 0
    assert "3 visualizations" in capsys.readouterr().out
    assert precisions(tmp_path / "tiny") == {"float32"}


@pytest.mark.parametrize(
    ("own", "base", "settings", "device", "precision"),
    [
        ({"device": "cpu", "precision": "bfloat16"}, {}, {}, "cpu", "bfloat16"),
        ({}, {"device": "cpu", "precision": "bfloat16"}, {}, "cpu", "bfloat16"),
        ({"precision": "bfloat16"}, {}, {}, "auto", "bfloat16"),  # of a former version
        ({"device": "cpu", "precision": "bfloat16"}, {}, {"precision": "float32"}, "cpu", "float32"),
        # Made again on another kind of device: in the precision that is best there.
        ({"device": "cuda", "precision": "tf32"}, {}, {"device": "cpu"}, "cpu", "auto"),
        ({"device": "cpu", "precision": "float32"}, {}, {"device": "cuda:1"}, "cuda:1", "auto"),
        ({}, {"device": "cuda", "precision": "tf32"}, {}, "auto", "auto"),
        ({"device": "cuda", "precision": "tf32"}, {}, {"device": "cuda:1"}, "cuda:1", "tf32"),
    ],
)
def test_device_and_precision_of_a_run_are_those_of_its_results(
    own: dict[str, str],
    base: dict[str, str],
    settings: dict[str, str],
    device: str,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(execution, "recorded", lambda folder: own if folder.path.name == "own" else base)
    found = execution.resolved(EngineConfig(**settings), RunFolder(tmp_path / "own"), RunFolder(tmp_path / "base"))  # type: ignore[arg-type]
    assert (found.device, found.precision) == (device, precision)


@pytest.mark.long
def test_a_run_that_began_on_a_gpu_is_not_mixed_with_cpus(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *tiny_run, *ONE_LAYER]) == 0
    monkeypatch.setattr("pipeline.planning.execution.recorded", lambda folder: {"device": "cuda"})
    assert main(["plan", *tiny_run, *ONE_LAYER]) == 2
    message = capsys.readouterr().err
    assert "has visualizations made on a GPU" in message and "engine.device=cpu" in message
    assert main(["plan", *tiny_run, *ONE_LAYER, "engine.device=cpu"]) == 0


def test_one_worker_does_all_rounds(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    begin = Worker.__init__

    def counted(self: Worker, *arguments: Any, **more: Any) -> None:
        started.append(1)
        begin(self, *arguments, **more)

    monkeypatch.setattr(Worker, "__init__", counted)
    assert main(["run", *tiny_run, *ONE_LAYER]) == 0
    assert len(started) == 1  # for ranges, first pass, second pass and visualizations


def test_a_run_that_was_planned_first_cannot_mix_with_another(tiny_run: list[str], tmp_path: Path) -> None:
    """Two commands plan a new run in one folder before either has results: the first one to run keeps it."""
    one, other = compose([*tiny_run, *ONE_LAYER]), compose([*tiny_run, *ONE_LAYER, "render.steps=7"])
    plans = [(request, runner.plan_run(request)) for request in (one, other)]
    assert "steps: 7" in (tmp_path / "tiny" / "config.yaml").read_text()
    assert runner.run(*plans[0]) == 0
    assert "steps: 4" in (tmp_path / "tiny" / "config.yaml").read_text()
    with pytest.raises(AtlasError, match=r"made with another configuration:\n  render\.steps: 4 → 7"):
        runner.run(*plans[1])


@pytest.mark.long
def test_the_site_follows_its_files_and_the_code(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["run", *tiny_run, *ONE_LAYER]
    assert main(run) == 0
    index = tmp_path / "tiny" / "site" / "index.html"
    first = index.stat().st_mtime_ns
    assert main(run) == 0 and index.stat().st_mtime_ns == first
    (tmp_path / "tiny" / "families.yaml").write_text(
        "families:\n- name: Edges\n  comment: All edges.\n  units: ['conv_stem:0']\n"
    )
    assert main(run) == 0
    second = index.stat().st_mtime_ns
    assert second != first and "Edges" in index.read_text()
    monkeypatch.setattr(pages, "package_digest", lambda: "another version")
    assert main(run) == 0 and index.stat().st_mtime_ns != second


def test_a_task_that_takes_down_every_node_is_set_aside() -> None:
    from pipeline.engine.ray_engine import RayEngine

    class ActorDiedError(Exception):
        preempted = False

    ray = types.SimpleNamespace(exceptions=types.SimpleNamespace(RayTaskError=KeyError))
    engine: Any = types.SimpleNamespace(ray=ray)
    preempted = ActorDiedError("The actor died.")
    preempted.preempted = True
    for lost in (preempted, ActorDiedError("The actor died because its node has died.")):
        error = RayEngine._explained(engine, lost)
        assert error.weight == pytest.approx(1 / NODE_LOSSES_PER_FAILURE)
    assert error.lost and error.weight == pytest.approx(1 / NODE_LOSSES_PER_FAILURE)
    tracker, task = FailureTracker(EngineConfig(attempts=3)), RangesTask("x", "d", 1.0, (0,))
    results = [
        tracker.failed(task, error.reason, error.detail, error.weight) for _ in range(3 * NODE_LOSSES_PER_FAILURE)
    ]
    assert isinstance(results[-1], Failure) and not any(results[:-1])


def test_a_container_of_two_cores_shares_its_memory_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's share is that of the cores that this process may use, not of all cores of the host."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    assert memory_share(1) == pytest.approx(memory_share(2) / 2)


def test_the_lock_is_held_over_plan_and_run(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second command is refused while the first one still plans, and is told who holds the lock."""
    overrides, whole, codes = [*tiny_run, *ONE_LAYER], runner.make_plan, []

    def planning(*arguments: Any, **more: Any) -> Any:
        if not codes:
            codes.append(main(["render", *overrides, "render.steps=7"]))
        return whole(*arguments, **more)

    monkeypatch.setattr(runner, "make_plan", planning)
    assert main(["render", *overrides]) == 0
    error = capsys.readouterr().err
    assert codes == [2] and "steps: 4" in (tmp_path / "tiny" / "config.yaml").read_text()
    assert f"at work in {tmp_path / 'tiny'}: process {os.getpid()} on {platform.node()}, since 20" in error


def test_bad_input_leaves_no_folder(tiny_run: list[str], tmp_path: Path) -> None:
    root = tmp_path / "not" / "there"
    assert main(["run", *tiny_run, f"run.root={root}", "layers.include=[nothing]"]) == 2
    assert not (tmp_path / "not").exists()


def test_a_run_that_cannot_be_written_ends_before_it_is_planned(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "make_plan", lambda *_, **__: pytest.fail("planned"))
    (tmp_path / "file").write_text("")
    assert main(["run", *tiny_run, f"run.root={tmp_path / 'file'}"]) == 2
    assert f"{tmp_path / 'file'} can't be written to" in capsys.readouterr().err


def test_every_end_has_its_exit_code(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code, text in (
        (AtlasError("wrong setting"), 2, "atlas: wrong setting"),
        (TryAgainError("no cluster any more"), 75, "atlas: no cluster any more"),
        (KeyError("layer"), 70, "KeyError: 'layer'"),
        (OSError(5, "Input/output error"), 75, "A disk or file server failed"),
        (OSError(22, "Invalid argument"), 70, "Finished work is kept"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ):

        def fails(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(runner, "make_plan", fails)
        assert main(["run", *tiny_run]) == code
        assert text in capsys.readouterr().err


def test_the_batches_of_gpu_workers_are_not_divided_by_the_seconds_of_a_head_without_one(
    tiny_run: list[str], tmp_path: Path
) -> None:
    plan = make_plan(compose([*tiny_run, *ONE_LAYER, "engine.batch=16", "layers.channels='0:32'"]).config, timed=False)
    slow = tuple(dataclasses.replace(row, seconds=60.0 * len(row.channels)) for row in plan.rows)
    gpu = WorkerPool(2, 8.0, 1.0, "cuda")
    for timed_on, sizes in (("cuda", {2}), ("cpu", {16, 8})):  # 24 channels
        own = dataclasses.replace(plan, rows=slow, pool=gpu, timed_on=timed_on)
        tasks = own.render_tasks(tmp_path, {row: set() for row in slow}, 2)
        assert {task.size for task in tasks} == sizes
    assert "as timed on cpu" in dataclasses.replace(plan, pool=gpu, timed_on="cpu").outlook()[-1]
