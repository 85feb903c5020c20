"""What a plan expects of the time: warm-ups are no steps, and no plan waits long for its estimate."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import TINY, compose

from pipeline import estimates
from pipeline.plan import Plan, make_plan


def planned(monkeypatch: pytest.MonkeyPatch, overrides: list[str], waits: list[float]) -> tuple[Plan, list[int]]:
    """A plan, and the steps begun for each of its timings, if the n-th step took waits[n] seconds."""
    begun: list[int] = []

    def render(
        model: Any, layer: Any, units: Any, config: Any, seed: int, size: Any, stop: Callable[[], None], **_: Any
    ) -> None:
        begun.append(0)
        for wait in waits:
            stop()
            begun[-1] += 1
            time.sleep(wait)

    monkeypatch.setattr(estimates, "render", render)
    return make_plan(compose([*TINY, *overrides]).config), begun


def test_a_slow_first_step_is_not_counted(monkeypatch: pytest.MonkeyPatch, photo_folder: Any) -> None:
    folder = ["data=folder", f"data.root={photo_folder}", "render.steps=10"]
    monkeypatch.setattr(estimates, "PATIENCE", 1.0)
    made, begun = planned(monkeypatch, folder, [0.5] + [0.01] * 40)
    units = sum(len(row.channels) for row in made.rows)
    # Two pictures a step: 5 ms each, or 0.25 s if the first step counted.
    assert sum(row.seconds for row in made.rows) < 10 * units * 0.05
    assert begun == [estimates.TIMED - 1] * 2


def test_a_step_that_takes_too_long_is_the_last(monkeypatch: pytest.MonkeyPatch, photo_folder: Any) -> None:
    folder = ["data=folder", f"data.root={photo_folder}", "render.steps=10"]
    monkeypatch.setattr(estimates, "PATIENCE", 0.02)
    made, begun = planned(monkeypatch, folder, [0.3] * 10)
    assert begun == [1, 1]  # ten times the patience, and nothing but the warm-up to go by
    units = sum(len(row.channels) for row in made.rows)
    assert sum(row.seconds for row in made.rows) > 10 * units * 0.05
