"""What a plan expects of the time: no warm-up counts as a step, no plan times for long, and few units take seconds."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import TINY, compose
from torch import nn

from pipeline.cli.compose import compose as composed_request
from pipeline.cli.main import main
from pipeline.planning import cost_model, overheads, planner
from pipeline.planning.cost_model import PlanRow, Span
from pipeline.planning.overheads import Amount, Overheads
from pipeline.planning.planner import Plan, make_plan
from pipeline.visualization.schedules import Fixed, Stage

PASS = 0.004  # seconds of two images' forward pass, on the patched clock


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class Begun:
    """Steps and passes that were begun: of steps a number for each timed layer."""

    steps: list[int] = dataclasses.field(default_factory=list)
    passes: int = 0


def clocked(
    monkeypatch: pytest.MonkeyPatch, steps: Sequence[float], passes: Sequence[float] = (), again: int = 0
) -> Begun:
    """Let the n-th step of a layer take steps[n] seconds, and the n-th forward pass passes[n], both the last for ever.

    The first `again` steps pass the network twice, and take twice as long.
    """
    clock, begun, passes = Clock(), Begun(), passes or [PASS]

    def render(job: Any, units: Any) -> None:
        begun.steps.append(0)
        for step in range(job.preset.steps):
            job.on_step()
            for _ in range(1 + (step < again)):
                with torch.no_grad(), contextlib.suppress(Exception):
                    for hook in job.step_model.module._forward_pre_hooks.values():
                        hook(job.step_model.module, ())
                clock.now += steps[min(step, len(steps) - 1)]
            begun.steps[-1] += 1

    @contextlib.contextmanager
    def capture(model: Any, layers: Any, each: Callable[[Any, Any], None]) -> Iterator[Callable[[Any], None]]:
        def forward(_: torch.Tensor) -> None:
            clock.now += passes[min(begun.passes, len(passes) - 1)]
            begun.passes += 1
            for layer in layers:
                each(layer, None)

        yield forward

    for module in (cost_model, overheads, planner):
        monkeypatch.setattr(module, "perf_counter", clock)
    monkeypatch.setattr(cost_model, "render", render)
    monkeypatch.setattr(cost_model, "capture", capture)
    return begun


def planned(photo_folder: Any, *overrides: str) -> Plan:
    # The networks of bfloat16 have a hook of their own, which these clocks would count.
    own = ["data=folder", f"data.root={photo_folder}", "render.steps=100", "render/network_penalties=[]",
           "engine.precision=float32"]  # fmt: skip
    return make_plan(compose([*TINY, *own, *overrides]).config)


def a_step(made: Plan) -> list[float]:
    """Estimated seconds of one step of one picture, by row."""
    return [row.seconds / len(row.channels) / made.config.preset(row.preset).steps for row in made.rows]


def test_a_slow_first_step_is_never_counted(monkeypatch: pytest.MonkeyPatch, photo_folder: Any) -> None:
    """Longer than ten times the patience, which used to end the timing with nothing but the warm-up."""
    steady = (clocked(monkeypatch, [0.1]), planned(photo_folder))[1]
    begun = clocked(monkeypatch, [11.0, 0.1])
    made = planned(photo_folder)
    # Two pictures a step. A layer's warm-up counts once, for its whole row, and not for each step.
    warm = [(row.seconds - 11.0) / len(row.channels) / 100 for row in made.rows]
    assert all(each == pytest.approx(0.05, rel=0.15) for each in a_step(steady))
    assert max(warm) == pytest.approx(0.05, rel=0.15) and max(a_step(made)) < 0.1
    assert begun.steps == [12]  # the warm-up, and a second of steps
    assert made.overheads is not None and made.overheads.warm_up.expected == pytest.approx(10.9)


def test_a_slow_first_forward_pass_is_never_counted(monkeypatch: pytest.MonkeyPatch, photo_folder: Any) -> None:
    begun = clocked(monkeypatch, [0.1], [11.0, 0.1])
    made = planned(photo_folder)
    assert made.overheads is not None
    assert made.overheads.forward == Span(*[pytest.approx(0.05)] * 3)  # two images a pass
    assert begun.passes == 12


@pytest.mark.parametrize(("seconds", "counted"), [(0.1, 11), (0.4, 3), (3.0, 3), (30.0, 1)])
def test_timing_ends_soon_but_not_before_some_were_counted(
    monkeypatch: pytest.MonkeyPatch, photo_folder: Any, seconds: float, counted: int
) -> None:
    begun = clocked(monkeypatch, [seconds], [seconds])
    planned(photo_folder)
    assert begun.passes == 1 + counted and begun.steps == [1 + counted]


def test_the_median_counts_and_unsteady_steps_give_a_range(monkeypatch: pytest.MonkeyPatch, photo_folder: Any) -> None:
    clocked(monkeypatch, [0.02])
    steady = planned(photo_folder)
    # One step takes very long, and one is very fast.
    clocked(monkeypatch, [5.0, 0.001, 0.5, *[0.01, 0.02, 0.03] * 7])
    unsteady = planned(photo_folder)
    assert all(row.spread == pytest.approx((1, 1)) for row in steady.rows)
    assert max(a_step(steady)) == pytest.approx(0.01, rel=0.2)
    assert [row.spread for row in unsteady.rows] == [pytest.approx((0.5, 1.5), rel=0.1)] * len(unsteady.rows)
    warm = max(row.seconds - 5.0 for row in unsteady.rows) / 3 / 100
    assert warm == pytest.approx(0.01, rel=0.2)
    span, rows = unsteady.span, sum(row.seconds for row in unsteady.rows)
    assert span.high - span.low > 0.3 * rows and span.low < span.expected < span.high
    assert span.text() in unsteady.outlook()[-1] and " to " in span.text()


# Seconds of a step on a GPU, on the patched clock: any batch, and each visualization.
ANY_BATCH, EACH = 0.02, 0.0005


def on_gpu(monkeypatch: pytest.MonkeyPatch, largest: int = 1000) -> list[int]:
    """Time plans as on a GPU that has memory for `largest` visualizations; the sizes of the batches that are timed."""
    clocked(monkeypatch, [1.0])
    clock: Any = cost_model.perf_counter
    sizes: list[int] = []

    def render(job: Any, units: Any) -> None:
        sizes.append(len(units))
        if len(units) > largest:
            raise RuntimeError("CUDA error: out of memory")
        for _ in range(job.preset.steps):
            job.on_step()
            for hook in job.step_model.module._forward_pre_hooks.values():
                hook(job.step_model.module, ())
            clock.now += ANY_BATCH + EACH * len(units)

    monkeypatch.setattr(cost_model, "render", render)
    monkeypatch.setattr(cost_model, "times_whole_batches", lambda device: True)
    return sizes


@pytest.mark.parametrize(
    ("channels", "largest", "timed", "batches"),
    [(24, 1000, [8, 2], 3), (12, 1000, [8, 2], 2), (3, 1000, [3], 1), (24, 5, [8, 4, 1], 3)],
)
def test_a_gpu_is_timed_with_whole_batches(
    monkeypatch: pytest.MonkeyPatch, photo_folder: Any, channels: int, largest: int, timed: list[int], batches: int
) -> None:
    """It takes as long for two visualizations as for a batch: a plan used to expect a multiple of the time."""
    sizes = on_gpu(monkeypatch, largest)
    own = ["layers.include=[conv_head]", f"layers.channels='0:{channels}'", "engine.batch=8"]
    (row,) = planned(photo_folder, *own).rows
    assert sizes == timed and len(row.channels) == channels
    steps = 100 * (batches * ANY_BATCH + channels * EACH)
    beside = channels * (cost_model.ROBUST_COPIES + 2) * PASS / 4  # to measure them: passes of four images
    assert row.seconds == pytest.approx(steps + beside * 32**2 / 64**2, rel=0.01)


def test_a_gpu_is_timed_in_a_process_of_its_own_unless_it_is_that_of_the_work(
    monkeypatch: pytest.MonkeyPatch, photo_folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A context of the driver would keep workers off a GPU in exclusive mode. Without an answer the CPU is timed."""
    clocked(monkeypatch, [0.1])
    places: list[str] = []

    def measure(plan: Plan, chosen: Any, pairs: Any, device: str) -> Any:
        places.append(device)
        raise ValueError("no kernel for this card")

    def in_own_process(function: Any, *arguments: Any) -> Any:
        places.append("process")
        return function(*arguments)

    monkeypatch.setattr(planner, "_local_device", lambda plan: "cuda")
    monkeypatch.setattr(planner, "_measure_on_gpu", measure)
    monkeypatch.setattr(planner, "in_own_process", in_own_process)
    for engine, expected in (("inline", ["cuda"]), ("ray", ["process", "cuda"])):
        places.clear()
        made = planned(photo_folder, f"engine={engine}")
        assert places == expected and made.timed_on == "cpu" and max(a_step(made)) > 0
    assert "could not be timed on cuda, so the estimates are those of the CPU: no kernel for this card" in caplog.text


PLUGIN = """
import dataclasses

from pipeline.visualization.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Peak(Objective):
    def value(self, responses):
        return responses.maps.flatten(1).amax(1)
"""


@pytest.mark.long
def test_a_plan_with_code_of_the_user_can_be_timed_in_another_process(
    monkeypatch: pytest.MonkeyPatch, photo_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    send = planner.in_own_process
    monkeypatch.setattr(planner, "_local_device", lambda plan: "cuda")
    monkeypatch.setattr(planner, "in_own_process", lambda work, *parts: send(work, *parts[:-1], "cpu"))
    made = planned(photo_folder, "engine=ray", f"render.objective.name={tmp_path}/mine.py:Peak")
    assert "could not be timed" not in caplog.text and made.timed_on == "cpu"
    assert made.overheads is not None and made.overheads.warm_up.expected > 0
    assert all(row.seconds > 0 and row.seconds != len(row.channels) for row in made.rows)


def test_the_network_of_a_plan_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, photo_folder: Any) -> None:
    """What is timed on a GPU is another copy: to move a module changes the tensors of all variants that share them."""
    models: list[Any] = []
    measure = planner._measure

    def noted(plan: Plan, chosen: Any, model: Any, pairs: Any, device: str) -> Any:
        models.append(model.module)
        return measure(plan, chosen, model, pairs, "cpu")

    moved: list[Any] = []
    monkeypatch.setattr(planner, "_local_device", lambda plan: "cuda")
    monkeypatch.setattr(planner, "prepare_device", lambda device, config: moved.append(device))
    monkeypatch.setattr(planner, "_measure", noted)
    loaded: list[Any] = []
    load = planner.load_model
    monkeypatch.setattr(planner, "load_model", lambda config: loaded.append(load(config)) or loaded[-1])
    made = planned(photo_folder)
    assert moved == ["cuda"] and made.overheads is not None
    assert len(loaded) == 2 and models == [loaded[1].module] and loaded[0].module is not loaded[1].module


def test_steps_that_pass_the_network_twice_are_not_taken_for_all(
    monkeypatch: pytest.MonkeyPatch, photo_folder: Any
) -> None:
    """Only the first 16 do, and of slow ones no others are timed."""
    made = {}
    for again in (0, 16):
        clocked(monkeypatch, [0.3], again=again)
        made[again] = planned(photo_folder)
    for once, twice in zip(made[0].rows, made[16].rows, strict=True):
        assert twice.seconds == pytest.approx(once.seconds * 1.16, rel=0.02)
    short = planned(photo_folder, "render.steps=8")  # all of its steps do
    assert sum(row.seconds for row in short.rows) == pytest.approx(
        sum(row.seconds for row in made[0].rows) * 2 * 8 / 100, rel=0.05
    )


def test_stages_count_by_their_share_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(
        compose(TINY).config.render, steps=100, schedule=(Stage(0.25, canvas=0.5), Stage(0.75)), stop=Fixed()
    )
    watch = cost_model._StepTimer(torch.device("cpu"), [nn.Identity()], 1e6)
    ends = [0.0, 5.0, 5.1, 5.2, 5.3, 5.4, 5.8, 6.2, 6.6]  # five of 21 steps belong to the first stage
    watch.times, watch.passes = ends, [1] * 8
    assert watch.timing(config, 2).seconds.expected == pytest.approx((0.25 * 0.1 + 0.75 * 0.4) / 2)
    # A stage that was not reached costs as much more as its canvas is larger.
    watch.times, watch.passes = ends[:4], [1] * 3
    assert watch.timing(config, 2).seconds.expected == pytest.approx((0.25 * 0.1 + 0.75 * 0.4) / 2)


def test_passes_through_the_network_are_counted(monkeypatch: pytest.MonkeyPatch, photo_folder: Any) -> None:
    """By the real `render`, whose silent units pass twice: here all of them, for the network gives nothing."""
    seen: list[cost_model._StepTimer] = []
    measured = cost_model._StepTimer.timing

    def noted(watch: cost_model._StepTimer, *rest: Any) -> Any:
        seen.append(watch)
        return measured(watch, *rest)

    monkeypatch.setattr(cost_model._StepTimer, "timing", noted)
    monkeypatch.setattr(
        "pipeline.visualization.step.has_zero_gradient",
        lambda gradient: torch.ones(len(gradient), 1, 1, 1, dtype=torch.bool),
    )
    monkeypatch.setattr(cost_model, "_timing_complete", lambda counted, *_: counted >= cost_model.MAX_STEPS)
    planned(photo_folder)
    assert [watch.passes for watch in seen] == [[2] * 16 + [1] * 4] * 2
    assert not any(module._forward_pre_hooks for watch in seen for module in watch.modules if watch.modules[1:])


def test_a_photograph_that_is_unreadable_tells_nothing(photo_folder: Any, tmp_path: Path) -> None:
    made = planned(photo_folder)
    few = cost_model.time_image_loading(made.setup.dataset, made.recipe)
    assert 0 < few.low <= few.expected <= few.high
    (tmp_path / "empty.jpg").write_bytes(b"")
    broken = dataclasses.replace(made.setup.dataset, images=made.setup.dataset.images[:1], roots={"": str(tmp_path)})
    gone = dataclasses.replace(broken, images=(dataclasses.replace(broken.images[0], path="empty.jpg"),))
    assert cost_model.time_image_loading(gone, made.recipe) == cost_model.ZERO_SPAN


def costs(**other: Any) -> Overheads:
    fixed = Overheads(Span.exact(4.0), Span.exact(0.5), Span.exact(3.0), Span.exact(0.01), Span.exact(0.005))
    return dataclasses.replace(fixed, **other)


def amount(**other: Any) -> Amount:
    few = Amount(
        workers=2, ray=True, joins_cluster=False, sample=16, images=16, second_pass_images=16, rendered_units=12,
        units=12, batch=32
    )  # fmt: skip
    return dataclasses.replace(few, **other)


def test_workers_start_once_in_a_session_and_this_process_only_once() -> None:
    own, few = costs(), amount()
    start = 4.0
    ray = own.workers(few).expected
    # One worker starts for the first task, the others after it.
    starts = 2 * (0.5 + overheads.WORKER * start)
    assert few.starts == 2 and ray == pytest.approx(
        starts + (overheads.CONNECT + overheads.CLOSE + 3 * overheads.FIRST_IMAGES) * start + 3.0
    )
    only_pictures = amount(sample=0, images=0, second_pass_images=0)
    assert only_pictures.starts == 1 and own.workers(only_pictures).expected < 0.7 * ray
    # Workers of a cluster join it, and Ray itself is there already.
    assert own.workers(amount(joins_cluster=True)).expected == pytest.approx(ray - overheads.CONNECT * start)
    inline = own.workers(amount(ray=False, workers=1)).expected
    assert inline == pytest.approx(0.5 + overheads.FIRST_IMAGES * start)
    # Pictures that begin with the best photographs wait for the whole pass, and for Ray once more.
    apart = amount(render_after_pass=True)
    assert apart.starts == 3 and own.workers(apart).expected > ray + overheads.CONNECT * start
    # Twice as slow a machine, twice as slow a start; and it is uncertain.
    slow = costs(start=Span(4.0, 8.0, 10.0)).workers(few)
    assert slow.low < slow.expected < slow.high and slow.expected > 1.8 * ray - 2 * 4.5


def test_few_photographs_are_a_whole_batch_of_one_worker() -> None:
    own = costs()
    few, more = (own.examples(amount(sample=0, second_pass_images=0, images=n)).expected for n in (16, 64))
    assert few == pytest.approx(32 * 0.01 * overheads.REDUCTION + 16 * 0.005)
    assert more == pytest.approx(32 * 0.01 * overheads.REDUCTION + 32 * 0.005)  # each of two workers has a batch
    many = own.examples(amount(sample=0, second_pass_images=0, images=64_000)).expected
    assert many == pytest.approx(32_000 * own.image_seconds)
    assert own.examples(amount(sample=0, second_pass_images=0, images=0)) == cost_model.ZERO_SPAN


def test_photographs_that_will_be_looked_at_again() -> None:
    config = compose(TINY).config.examples
    assert overheads.expected_second_pass_images(20, 100, config) == 20
    random = 128  # images that paths are compared with
    expected = random + 10 * (3 * 3 + 3 * 6)
    assert overheads.expected_second_pass_images(1_000_000, 10, config) == pytest.approx(expected, rel=0.01)
    assert overheads.expected_second_pass_images(20, 0, config) == 0


def test_the_age_of_an_old_process_says_nothing_about_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(age: float, used: float) -> Span:
        class Process:
            def create_time(self) -> float:
                return 1000.0

            def cpu_times(self) -> tuple[float, float]:
                return used - 1, 1.0

        monkeypatch.setattr(overheads.psutil, "Process", Process)
        monkeypatch.setattr(overheads.time, "time", lambda: 1000.0 + age)
        overheads.process_start.cache_clear()
        return overheads.process_start()

    try:
        assert started(8.0, 7.0) == Span(7.0, 8.0, 8.0)
        assert started(40.0, 7.0) == Span(7.0, 14.0, 40.0)  # a cold disk, which is warm for those that come after
        assert started(7200.0, 90.0).expected == started(7200.0, 5.0).expected == overheads.DEFAULT_START
    finally:
        monkeypatch.undo()
        overheads.process_start.cache_clear()


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_plan_of_a_few_units_says_the_same_seconds_everywhere(
    monkeypatch: pytest.MonkeyPatch, photo_folder: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    monkeypatch.setattr(planner, "process_start", lambda: Span(4.0, 5.0, 8.0))
    clocked(monkeypatch, [3.0, 0.02])
    made: list[Plan] = []
    whole = planner.make_plan

    def noted(*arguments: Any, **more: Any) -> Plan:
        made.append(whole(*arguments, **more))
        return made[-1]

    monkeypatch.setattr("pipeline.runs.runner.make_plan", noted)
    own = [
        *TINY,
        f"engine={engine}",
        "data=folder",
        f"data.root={photo_folder}",
        f"run.root={tmp_path}",
        "run.name=few",
    ]
    assert main(["plan", *own]) == 0
    (found,) = made
    printed = re.search(r"about (.+) with \d+ × \d+ threads", capsys.readouterr().out)
    assert printed is not None and printed[1] == found.span.text()
    table = pd.read_csv(tmp_path / "few" / "plan.csv")
    total = table[table["kind"] == "total"]["seconds"].item()
    assert total == round(found.eta, 1) == pytest.approx(table["seconds"].sum() - total, abs=1.0)
    assert table["units"].map(str).str.fullmatch(r"\d+").all()
    # Ray starts, and three times its workers; inline, this process is there already.
    beside = found.eta - sum(row.seconds for row in found.rows) / found.pool.workers
    assert beside > 3 * 5.0 if engine == "ray" else 1.0 < beside < 5.0


def test_steps_that_read_normalizations_are_timed_apart(monkeypatch: pytest.MonkeyPatch, photo_folder: Any) -> None:
    """They run on another variant of the network and take longer: by default those of classes, not of hidden units."""
    timed: list[tuple[str, int]] = []
    monkeypatch.setattr(
        cost_model, "render", lambda job, _: [timed.append((job.layer.name, len(job.normalizations))), run(job)]
    )

    def run(job: Any) -> None:
        for _ in range(4):
            job.on_step()

    units = ["layers.include=[blocks.1.0.conv_pwl,classifier]", "layers.channels=0:2"]
    own = ["data=folder", f"data.root={photo_folder}", *units]
    made = make_plan(compose([*TINY, *own, "+render@also.natural=natural", "also.natural.size=32"]).config)
    read = {(layer, count > 0) for layer, count in timed}
    assert read == {("blocks.1.0.conv_pwl", False), ("classifier", True), ("blocks.1.0.conv_pwl", True)}
    assert all(row.seconds > 0 for row in made.rows)


def test_a_plan_counts_the_images_that_judges_look_at(photo_folder: Any, tmp_path: Path) -> None:
    """Of 20 dataset images none is shown to a judge: hidden units need 60. A canvas counts by its area."""
    judged = ["judges=[timm]", "judges.timm.name=test_efficientnet", "judges.timm.weights=null"]
    own = [*TINY, "data=folder", f"data.root={photo_folder}", f"run.root={tmp_path}", "run.name=judged"]
    more = ["judges.timm.input_size=64", "also=[negative]", "also.negative.steps=4"]
    config = composed_request([*own, *judged, *more]).config
    found = make_plan(config, timed=False)
    classes = len({row.layer.name for row in found.rows} & set(found.class_layers))
    assert classes == 1 and found.judge_span == cost_model.ZERO_SPAN
    second, tenth = Span.exact(1.0), Span.exact(0.1)
    judge = dataclasses.replace(found.judges[0], load=second, forward=tenth)
    found = dataclasses.replace(found, judges=(judge,), overheads=Overheads(second, second, second, second, second))
    # Three classes by the main preset; minimized classes are not judged.
    assert found.judge_span.expected == pytest.approx(1.0 + 0.1 * 3)
    without = dataclasses.replace(found, judges=())
    assert found.eta - without.eta == pytest.approx(1.3)
    assert found.finish_seconds - without.finish_seconds == pytest.approx(1.3)
    assert not without.outlook()[1:] and found.outlook()[1] == "of this, judges (timm): about 1 s"
    lines = found.written().set_index("kind")["seconds"]
    assert lines["judges"] == 1.3 and lines["total"] == pytest.approx(found.eta, abs=0.1)
    assert "judges" not in without.written()["kind"].tolist()
    # With enough images, also hidden units: 64 images of the dataset, and a quarter of an image for each of 32 pixels.
    images = [*found.setup.dataset.images] * 4
    larger = dataclasses.replace(found.setup, dataset=dataclasses.replace(found.setup.dataset, images=images[:64]))
    hidden = [row for row in found.rows if row.layer.name not in found.class_layers]
    raising = [row for row in hidden if not row.layer.linear_in_pixels or row.preset == "negative"]
    assert len(hidden) > len(raising)  # those of the first convolution raise the energy
    shown = sum(3 * row.canvas[0] * row.canvas[1] / 64**2 for row in raising)
    many = dataclasses.replace(found, setup=larger)
    assert many.judge_span.expected == pytest.approx(1.0 + 0.1 * (3 + shown + 64) + 64 * 1.0)
    assert judge.timed("cpu").forward.expected > 0


def test_a_row_costs_what_is_left_of_it() -> None:
    made = PlanRow(None, (1, 2, 3, 4), (64, 64), 8.0, "distill", (0.5, 2.0))  # type: ignore[arg-type]
    assert made.span(1) == Span(1.0, 2.0, 4.0) and made.span(0) == cost_model.ZERO_SPAN
    assert made.span(2).text() == "4 s (2 s to 8 s)" and Span(4.0, 5.0, 5.9).text() == "5 s"
