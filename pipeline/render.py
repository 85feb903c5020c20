"""The optimisation loop: a batch of units of one layer → their pictures.

Pictures in a batch share only the network's forward and backward pass: each has its own start, its own
shaking and, Adam being element-wise, its own optimiser state. The loss is the *sum* over the batch; a mean
would let the batch size into Adam's epsilon.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.canvases import Canvas
from pipeline.layers import Layer, capture
from pipeline.models import Model
from pipeline.objectives import Objective
from pipeline.optimizers import Optimizer
from pipeline.transforms import Geometric, centre, draw, shake

ROBUST_COPIES = 16


@dataclasses.dataclass(frozen=True)
class RenderConfig:
    """One preset: what is excited, on what canvas, how it is shaken and for how long."""

    name: str
    objective: Objective
    canvas: Canvas
    transforms: tuple[Geometric, ...]
    optimizer: Optimizer
    steps: int
    size: int | str = "auto"
    margin: int = 24
    variants: int = 1
    attempts: int = 3


@dataclasses.dataclass(frozen=True)
class Picture:
    """The finished picture of a unit and the numbers that prove it.

    `image` is (H, W, C) uint8. `activation` is the objective on exactly this image, untransformed; `robust`
    its mean over 16 shaken copies; `start` its value before the first step.
    """

    channel: int
    variant: int
    image: np.ndarray
    activation: float
    robust: float
    start: float
    seed: int
    status: str
    steps: int
    seconds: float
    trace: np.ndarray


def seed_of(*identity: Any) -> int:
    """A non-negative 63-bit seed from what a picture *is*: never from the order of work."""
    digest = hashlib.sha256("\x1f".join(map(str, identity)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def canvas_size(layer: Layer, model_size: tuple[int, int], asked: int | str) -> int:
    """Side of the canvas in pixels.

    `auto` gives a layer a map of about 8 × 8 units: enough for its channel mean to be a texture, and no
    pixel more, for the time of a step grows with the area. Never under 128 nor over the network's own size,
    which small networks keep.
    """
    if not isinstance(asked, str):
        return asked
    side = min(model_size)
    stride = max(1, round(side / max(1, min(layer.height, layer.width))))
    if layer.layout not in ("maps", "maps_last") or min(layer.height, layer.width) == 1:
        return side
    return min(side, max(128, 8 * stride))


def render(
    model: Model,
    layer: Layer,
    units: Sequence[tuple[int, int]],
    config: RenderConfig,
    seed: int,
    size: int | None = None,
    stop: Callable[[], None] = lambda: None,
) -> list[Picture]:
    """Pictures for `units`, pairs of (channel, variant), all in one batch on the model's device.

    They are `size` pixels high and wide; None leaves that to `canvas_size`.

    A picture whose objective did not rise, or went through NaN, is tried again with another seed and half
    the learning rate, at most `config.attempts` times in all; then it is kept and marked `failed`.
    `stop` is called at every step and may raise, to end the work early.
    """
    size = size or canvas_size(layer, model.recipe.size, config.size)
    done: dict[tuple[int, int], Picture] = {}
    todo = list(units)
    for attempt in range(config.attempts):
        pictures = _attempt(model, layer, todo, config, seed, size, attempt, stop)
        last = attempt == config.attempts - 1
        todo = [(p.channel, p.variant) for p in pictures if p.status == "failed"]
        done.update({(p.channel, p.variant): p for p in pictures if last or p.status != "failed"})
        if not todo:
            break
    return [done[unit] for unit in units]


def _attempt(
    model: Model,
    layer: Layer,
    units: Sequence[tuple[int, int]],
    config: RenderConfig,
    seed: int,
    size: int,
    attempt: int,
    stop: Callable[[], None],
) -> list[Picture]:
    began = time.perf_counter()
    device = next(model.module.parameters()).device
    side = size + 2 * config.margin
    steps, optimizer = config.steps, config.optimizer
    objective_name = type(config.objective).__name__.lower()
    starts, draws, seeds = [], [], []
    for channel, variant in units:
        own = seed_of(seed, model.name, layer.name, channel, objective_name, variant, attempt)
        # The generator is on the CPU whatever the device, so that starts are the same on all machines.
        generator = torch.Generator().manual_seed(own)
        starts.append(config.canvas.start(generator, model.recipe.channels, side))
        draws.append(draw(config.transforms, generator, steps + ROBUST_COPIES))
        seeds.append(own)
    parameters = torch.stack(starts).to(device).requires_grad_(True)
    shaking = torch.stack(draws, dim=1).to(device)  # (steps + copies, B, draws)
    channels = torch.tensor([c for c, _ in units], device=device)
    state = optimizer.start(parameters)
    trace = torch.zeros(steps, len(units))
    with capture(model, [layer]) as forward:

        def value(images: Tensor) -> Tensor:
            return config.objective.value(forward(images)[layer.name].float(), channels)

        for step in range(steps):
            stop()
            values = value(shake(config.canvas.image(parameters, side), config.transforms, shaking[step], size))
            (gradient,) = torch.autograd.grad(values.sum(), parameters)
            optimizer.step(parameters, gradient, state, step, steps, 0.5**attempt)
            trace[step] = values.detach()
        with torch.no_grad():
            before = value(saved(centre(config.canvas.image(torch.stack(starts).to(device), side), size)))
            final = saved(centre(config.canvas.image(parameters, side), size))
            after = value(final)
            shaken = [value(shake(final, config.transforms, u, size)) for u in shaking[steps:]]
            robust = torch.stack(shaken).mean(0)
    images = (final * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    each = (time.perf_counter() - began) / len(units)
    pictures = []
    for i, (channel, variant) in enumerate(units):
        rose = bool(after[i] > before[i]) and bool(torch.isfinite(trace[:, i]).all())
        status = ("done" if attempt == 0 else "retried") if rose else "failed"
        numbers = (float(after[i]), float(robust[i]), float(before[i]))
        marks = np.linspace(0, steps - 1, min(steps, 16)).round().astype(int)
        pictures.append(
            Picture(
                channel, variant, images[i], *numbers, seeds[i], status, steps, each,
                trace[torch.from_numpy(marks), i].numpy(),
            )
        )  # fmt: skip
    return pictures


def saved(images: Tensor) -> Tensor:
    """Images in [0, 1] as they will be after saving in 8 bits; NaN becomes black."""
    return (images.nan_to_num(0.0).clamp(0, 1) * 255).round() / 255
