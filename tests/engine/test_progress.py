"""Progress: plain lines where there is no terminal, and an ETA that learns."""

import time

import pytest

from pipeline.core.formatting import clock
from pipeline.engine.progress import ProgressReporter, Stage


def test_times_as_a_person_says_them() -> None:
    assert [clock(s) for s in (0.4, 48, 423, 12_000)] == ["0 s", "48 s", "7 min 03 s", "3 h 20 min"]


def test_the_eta_learns_from_finished_tasks() -> None:
    told: list[dict] = []
    stage = Stage("render", "units", 10, 2, cost=8.0)
    with ProgressReporter([stage], 2, lambda **fields: told.append(fields), 60.0) as board:
        assert board.eta is None
        # Two of eight seconds' work took six: the other six will take 18, on two workers 9.
        board.add("render", 2, 2.0, 6.0)
        assert board.eta == pytest.approx(9, abs=0.5)
        # What was set aside is behind us, but teaches nothing.
        board.add("render", 1, 2.0, 0.0, failed=True)
        assert board.eta == pytest.approx(6, abs=0.5)
    assert (stage.done, stage.fresh, stage.failed) == (4, 2, 1)
    assert told[-1]["stages"]["render"]["done"] == 4 and told[-1]["eta_seconds"] is None


def test_an_estimate_that_ran_out_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a task of two minutes must not read "0 s left" all that time."""
    now = 50.0
    monkeypatch.setattr("pipeline.engine.progress.time.monotonic", lambda: now)
    stage = Stage("render", "units", 10, 0, cost=10.0)
    with ProgressReporter([stage], 2, lambda **_: None, 60.0, after=3.0) as board:
        board.add("render", 4, 4.0, 4.0)
        assert board.eta == pytest.approx(3 + 3)  # pictures, and what comes after them
        now = 52.0
        assert board.eta == pytest.approx(1 + 3)
        now = 54.0
        assert board.eta is None
        # More than was estimated in all: nothing is left to do but what comes after.
        board.add("render", 6, 7.0, 20.0)
        assert stage.left == 0 and board.eta == pytest.approx(3)


def test_without_a_terminal_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter([Stage("render", "units", 3, 0, cost=3.0)], 1, lambda **_: None, 0.05) as board:
        for _ in range(3):
            time.sleep(0.06)
            board.add("render", 1, 1.0, 0.06)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "render 0 of 3 units" and lines[-1] == "render 3 of 3 units"
    assert any("left" in line and "/s" in line for line in lines)
