"""Captured steps: one step that reads a counter gives the images of the loop; where it does not, the loop runs."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_launches import Complete, Launches, preset_of, recorded, rendering_job

from pipeline.acceleration.cuda_graphs import capture_graph
from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.visualization import captured_steps
from pipeline.visualization.captured_steps import MIN_REPLAYS, WARM_UP, can_be_captured
from pipeline.visualization.loop import render
from pipeline.visualization.optimizers import Adam

Work = Callable[[], None]

UNITS = [(0, 0), (1, 0), (3, 0)]


class FakeGraph:
    """What `capture_graph` returns, on a CPU: the work itself; counts captures and replays."""

    def __init__(self) -> None:
        self.captures, self.replays = 0, 0

    def __call__(self, work: Work) -> Work:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


CAPTURED = {
    "distill": [],
    "budget": ["render=tv"],
    "maco": ["render=maco"],
    "sgd": ["render/optimizer=sgd"],
    "adamw": ["render/optimizer=adamw"],
    "nadam": ["render/optimizer=nadam"],
    "pixels that are clamped": ["render/canvas=pixel", "render.canvas.clip=true"],
    "noise": ["render/transforms=crops"],
    "normalizations": ["render/network_penalties=[normalization]"],
    "stages": ["render/schedule=coarse_to_fine", "render.steps=80"],
    "plateau": ["render/stop=plateau", "render.steps=80", "render.stop.least=24", "render.stop.patience=6"],
}


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_steps_give_the_images_of_the_loop(name: str) -> None:
    job = rendering_job(tiny_model(), preset_of("render.steps=40", *CAPTURED[name]), "late")
    graph = FakeGraph()
    expected, found = (render(dataclasses.replace(job, capture=capture), UNITS) for capture in (None, graph))
    assert graph.captures == (2 if name == "stages" else 1) and graph.replays > MIN_REPLAYS
    for ordinary, captured in zip(expected, found, strict=True):
        # Rounding turns single rectifiers on or off; the draws or the rate of another step give 17 levels and more.
        assert np.quantile(np.abs(ordinary.image.astype(int) - captured.image.astype(int)), 0.9) <= 10
        assert captured.trace == pytest.approx(ordinary.trace, rel=0, abs=0.01)
        assert captured.steps == ordinary.steps and captured.status != "failed"


@pytest.mark.parametrize("name", ["budget", "maco", "normalizations"])
def test_a_captured_step_launches_only(name: str) -> None:
    """No wait and no copy, which a capture does not allow, and nothing that depends on the number of the step."""
    job = rendering_job(tiny_model(), preset_of("render.steps=40", *CAPTURED[name]), "late", device="meta")
    launches: list[Launches] = []

    def capture(work: Work) -> Work:
        def replay() -> None:
            with recorded() as seen:
                work()
            launches.append(seen)

        return replay

    def on_step() -> None:
        if len(launches) == 3:
            raise Complete

    with recorded(lambda place: 0.0), pytest.raises(Complete):
        render(dataclasses.replace(job, capture=capture, on_step=on_step), UNITS[:2])
    for seen in launches:
        assert not seen.mixed and not seen.transfers and not seen.uploads and seen.kernels == launches[0].kernels


@pytest.mark.parametrize("broken", ["capture", "replay", "result"])
def test_what_cannot_be_captured_runs_step_by_step(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(captured_steps, "_reported", set())
    job = rendering_job(tiny_model(), preset_of("render.steps=40"), "late")
    replays = []

    def capture(work: Work) -> Work:
        if broken == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors")

        def replay() -> None:
            replays.append(broken)
            if broken == "replay":
                raise RuntimeError("a replay failed")
            # A step that does nothing.

        return replay

    with caplog.at_level(logging.WARNING):
        found = render(dataclasses.replace(job, capture=capture), UNITS)
    for ordinary, picture in zip(render(job, UNITS), found, strict=True):
        assert np.array_equal(ordinary.image, picture.image) and np.array_equal(ordinary.trace, picture.trace)
    assert len(caplog.messages) == 1 and "launched one by one" in caplog.text and len(replays) <= 1


def test_steps_that_change_otherwise_are_not_captured() -> None:
    @dataclasses.dataclass(frozen=True)
    class Own(Adam):
        def step(self, parameters, gradient, state, step, rate):  # type: ignore[no-untyped-def]
            super().step(parameters, gradient, state, step, rate / (step + 1))

    job = dataclasses.replace(rendering_job(tiny_model(), preset_of("render.steps=60"), "late"), capture=FakeGraph())
    first = REDIRECTED_STEPS + WARM_UP
    assert can_be_captured(job, first, 0) and not can_be_captured(job, first - 1, 0)
    assert not can_be_captured(job, 60 - MIN_REPLAYS, 0) and not can_be_captured(job, 30, 28)
    assert not can_be_captured(dataclasses.replace(job, capture=None), first, 0)
    others = [dataclasses.replace(job.preset, optimizer=Own())]
    for overrides in (["render/augmentations=[dropout]"], ["render=accentuate"], ["render=blur_image"]):
        others.append(preset_of(*overrides, "render.steps=60"))
    for preset in others:
        assert not can_be_captured(dataclasses.replace(job, preset=preset), first, 0)
    assert torch.is_grad_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["distill", "budget", "maco", "adamw", "normalizations"])
def test_a_graph_of_a_gpu_gives_the_images_of_the_loop(name: str, caplog: pytest.LogCaptureFixture) -> None:
    job = rendering_job(tiny_model(), preset_of("render.steps=40", *CAPTURED[name]), "late", device="cuda")
    graphs = []

    def capture(work: Work) -> Work:
        graphs.append(capture_graph(work))
        return graphs[-1]

    expected, found = (render(dataclasses.replace(job, capture=c), UNITS) for c in (None, capture))
    assert len(graphs) == 1 and not caplog.messages
    for ordinary, captured in zip(expected, found, strict=True):
        assert np.quantile(np.abs(ordinary.image.astype(int) - captured.image.astype(int)), 0.9) <= 10
        assert captured.trace == pytest.approx(ordinary.trace, rel=0, abs=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_gpu_cannot_capture_runs_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that reads a number of the device ends the capture, and the device goes on."""
    job = rendering_job(tiny_model(), preset_of("render.steps=40"), "late", device="cuda")
    monkeypatch.setattr(captured_steps, "_reported", set())

    def constrain(*arguments: Any) -> None:
        assert float(arguments[1].parameters.sum()) < float("inf")

    monkeypatch.setattr(captured_steps, "constrain", constrain)
    found = render(dataclasses.replace(job, capture=capture_graph), UNITS)
    assert captured_steps._reported and all(picture.status != "failed" for picture in found)
