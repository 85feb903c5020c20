"""How everything changes over the steps: a list of stages, and when to stop."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.errors import AtlasError
from pipeline.core.registry import Registry

STOPS = Registry("stop")

Ramp = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the steps. Pairs are values at its begin and end, with a straight line between.

    `share` is its part of all steps. `layer` is another layer to excite, at the unit's own channel number (another
    head of the network). `lr` and `penalties` multiply the preset's own. `blur` is the sigma in pixels by which the
    picture is blurred after every step, `gradient_blur` that of the gradient's blur. `canvas` is the side of the
    canvas as a share of the finished picture's, `view` that of what the network sees (null: all of the canvas).
    """

    share: float = 1.0
    layer: str | None = None
    lr: Ramp = (1.0, 1.0)
    blur: Ramp = (0.0, 0.0)
    gradient_blur: Ramp | None = None
    penalties: Ramp = (1.0, 1.0)
    canvas: float = 1.0
    view: float | None = None


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What holds at one step; `stage` is the number of its stage."""

    stage: int
    lr: float
    blur: float
    gradient_blur: float | None
    penalties: float


def check(stages: Sequence[Stage]) -> None:
    """Raise `AtlasError` for stages that make no sense."""
    for i, stage in enumerate(stages):
        where = f"render.schedule[{i}]"
        if not stage.share > 0:
            raise AtlasError(f"{where}.share={stage.share} must be above 0.")
        if min(stage.blur) < 0 or min(stage.gradient_blur or (0.0, 0.0)) < 0:
            raise AtlasError(f"{where}: a blur can't be negative.")
        if not 0 < stage.canvas <= 1 or not 0 < (stage.view or stage.canvas) <= stage.canvas:
            raise AtlasError(f"{where}: canvas={stage.canvas} and view={stage.view} must fulfil 0 < view ≤ canvas ≤ 1.")
    if stages and stages[-1].canvas != 1:
        raise AtlasError("render.schedule: the last stage must have canvas=1, the size of the finished picture.")


def expand_schedule(stages: Sequence[Stage], steps: int) -> list[StepSettings]:
    """One moment a step: the stages' shares of `steps`, each stage at least one step while they last."""
    stages = list(stages) or [Stage()]
    total = sum(stage.share for stage in stages)
    found: list[StepSettings] = []
    passed = 0.0
    for number, stage in enumerate(stages):
        passed += stage.share
        behind = len(stages) - 1 - number
        end = max(len(found) + 1, min(round(steps * passed / total), steps - behind)) if behind else steps
        count = min(end, steps) - len(found)
        for i in range(count):
            at = i / count

            def on(ramp: Ramp, at: float = at) -> float:
                return ramp[0] + (ramp[1] - ramp[0]) * at

            blur = None if stage.gradient_blur is None else on(stage.gradient_blur)
            found.append(StepSettings(number, on(stage.lr), on(stage.blur), blur, on(stage.penalties)))
    return found


@dataclasses.dataclass(frozen=True)
class Stop:
    """What `render` needs to know when a picture is finished."""

    def every(self, steps: int) -> int:
        """After how many steps to look; `steps` or more for never."""
        raise NotImplementedError

    def finished(self, trace: Tensor) -> Tensor:
        """(steps so far, B) objective values → (B,) bool."""
        raise NotImplementedError


@STOPS.add("fixed")
@dataclasses.dataclass(frozen=True)
class Fixed(Stop):
    """All steps, always: what every picture costs is known beforehand."""

    def every(self, steps: int) -> int:
        """Never."""
        return steps

    def finished(self, trace: Tensor) -> Tensor:
        """None."""
        return torch.zeros(trace.shape[1], dtype=torch.bool, device=trace.device)


@STOPS.add("plateau")
@dataclasses.dataclass(frozen=True)
class Plateau(Stop):
    """Stop a picture when its mean objective over `patience` steps gained less than `tolerance` of all it gained.

    Held against the `patience` steps before those; never within the first `least` steps, and only in the last
    stage of a schedule. Its place in the batch is given up at once.
    """

    patience: int = 16
    tolerance: float = 0.02
    least: int = 48

    def every(self, steps: int) -> int:
        """Every `patience` steps."""
        return self.patience

    def finished(self, trace: Tensor) -> Tensor:
        """(B,) bool."""
        if len(trace) < max(self.least, 2 * self.patience):
            return torch.zeros(trace.shape[1], dtype=torch.bool, device=trace.device)
        return flat(trace, self.patience, self.tolerance)


def flat(trace: Tensor, width: int, tolerance: float) -> Tensor:
    """(steps, B) → (B,) bool: the last `width` steps gained less than `tolerance` of the whole rise.

    A trace that never rose is not flat but failed.
    """
    late, before = trace[-width:].mean(0), trace[-2 * width : -width].mean(0)
    rise = late - trace[0]
    return (rise > 0) & (late - before < tolerance * rise)
