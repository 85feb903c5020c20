"""Check one network on a worker's path against plain PyTorch: layers, visualizations, values, input gradients."""

import dataclasses
import glob
import time
from collections.abc import Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from pipeline.arguments import conf_folder
from pipeline.cli import request_of
from pipeline.config import Config
from pipeline.layers import Layer, capture
from pipeline.layouts import Axes, as_maps
from pipeline.models import Model, load
from pipeline.plan import Row, make_plan
from pipeline.policies import found_layers
from pipeline.trace import tensor_of
from pipeline.variants import cosine_of, relative_difference
from pipeline.worker import Worker

STEPS = 4
UNITS = 2
LAYERS = 5


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found for one network.

    Attributes:
        size: Side of the input in pixels.
        layers: Number of layers found.
        rendered: Number of visualizations made.
        failed: Number of those whose objective did not rise, which random weights may cause.
        levels: Levels of lowering taken, one a layer that was rendered.
        reasons: Why a plainer level than asked was taken.
        value: Largest relative difference of an objective at the start from plain PyTorch's.
        gradient: Largest relative difference of the input gradient at the start from plain PyTorch's.
        nearer: The same, of the unit where it is smaller: rounding can switch single units on or off, and with them a
            part of the gradient, which concerns some images and not others.
        rounding: The difference of plain PyTorch's own gradient from its gradient in double precision, at that layer.
        cosine: Least cosine of the input gradient with plain PyTorch's.
        precision: Precision of the steps.
        convolutional: Whether there is a convolution besides the one that makes patches.
        seconds: Wall time.
    """

    size: int
    layers: int
    rendered: int
    failed: int
    levels: tuple[str, ...]
    reasons: tuple[str, ...]
    value: float
    gradient: float
    nearer: float
    rounding: float
    cosine: float
    precision: str
    convolutional: bool
    seconds: float

    @property
    def wrong(self) -> str:
        """What deviates beyond the stated tolerance; empty if nothing does."""
        if self.precision != "float32":
            return "" if self.cosine >= 0.9 else f"cosine of the input gradient {self.cosine:.3f}"
        if self.value > 1e-3:
            return f"objective differs by {self.value:.2g}"
        if self.nearer > max(1e-3, 4 * self.rounding):
            return f"input gradient differs by {self.nearer:.2g}"
        return ""


def configuration(overrides: Sequence[str]) -> Config:
    """The configuration that the command line would make of `overrides`, for a short inline run of all layers."""
    settings = ["layers=all", f"layers.channels=spread:{UNITS}", f"render.steps={STEPS}", "render.attempts=1"]
    settings.append("data.limit=4")
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return request_of(compose("config", overrides=[*settings, "engine=inline", *overrides])).config


def check(config: Config, layers: int = LAYERS) -> Checked:
    """Render a few units of layers spread over the network with a worker's code, and compare with plain PyTorch."""
    began = time.monotonic()
    # A network of its own, on which nothing was changed but what loading does: modes, types and memory.
    plain = load(config.model)
    names = [layer.name for layer in found_layers(plain.to("cpu"), config.layers)]
    include = tuple(map(glob.escape, spread(names, layers)))
    chosen = dataclasses.replace(config.layers, include=include)
    plan = make_plan(dataclasses.replace(config, layers=chosen), timed=False)
    worker = Worker(plan.setup)
    rows = plan.rows
    failed, rendered = 0, 0
    levels, reasons, numbers = [], [], []
    for row in rows:
        pictures = worker.pictures(row.layer.name, row.channels, row.canvas, config.render)
        rendered += len(pictures)
        failed += sum(picture.status == "failed" for picture in pictures)
        variants = worker.variants(worker.layers[row.layer.name], config.render, row.canvas)
        levels.append(variants.level)
        reasons += [variants.reason] if variants.reason else []
        numbers.append(compared(plain, variants.steps, row, config))
    nothing = {"value": 0.0, "gradient": 0.0, "nearer": 0.0, "cosine": 1.0}
    worst = max(numbers, key=lambda n: n["nearer"], default=nothing)
    double = in_double(plain, rows[numbers.index(worst)], config) if worst["nearer"] > 1e-3 else 0.0
    return Checked(
        size=plain.recipe.size[0],
        layers=len(names),
        rendered=rendered,
        failed=failed,
        levels=tuple(levels),
        reasons=tuple(dict.fromkeys(reasons)),
        value=max((n["value"] for n in numbers), default=0.0),
        gradient=max((n["gradient"] for n in numbers), default=0.0),
        nearer=worst["nearer"],
        rounding=double,
        cosine=min((n["cosine"] for n in numbers), default=1.0),
        precision=levels[0].rpartition(" ")[2] if levels else "float32",
        convolutional=sum(isinstance(m, nn.Conv2d) for m in plain.module.modules()) > 1,
        seconds=time.monotonic() - began,
    )


def spread(names: Sequence[str], count: int) -> list[str]:
    """`count` names from the first to the last, evenly."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def starts(plan_row: Row, model: Model, config: Config) -> Tensor:
    """(units, C, H, W) in [0, 1]: what visualizations start from."""
    canvas = config.render.canvas
    drawn = [
        canvas.start(torch.Generator().manual_seed(i), model.recipe.channels, plan_row.canvas)
        for i in range(len(plan_row.channels))
    ]
    with torch.no_grad():
        return canvas.image(torch.stack(drawn), plan_row.canvas)


def compared(plain: Model, steps: Model, row: Row, config: Config) -> dict[str, float]:
    """Objective and input gradient of a row's units at the start, on a worker's network and in plain PyTorch."""
    images = starts(row, plain, config)
    with capture(steps, [row.layer]) as forward:
        theirs = objective(images, lambda x: forward(x)[row.layer.name].float(), row)
    ours = objective(images, lambda x: hooked(plain, row.layer, x), row)
    scale = float(ours[2])
    differences = [relative_difference(one, other) for one, other in zip(theirs[1], ours[1], strict=True)]
    return {
        "value": float((theirs[0] - ours[0]).abs().max()) / scale,
        "gradient": max(differences),
        "nearer": min(differences),
        "cosine": cosine_of(theirs[1], ours[1]),
    }


def objective(images: Tensor, maps_of: Any, row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """(units,) means of each unit's map, the gradient of their sum by the images, and the scale of the layer."""
    images = images.clone().requires_grad_(True)
    maps = maps_of(images)
    values = torch.stack([maps[i, channel].mean() for i, channel in enumerate(row.channels)])
    (gradient,) = torch.autograd.grad(values.sum(), images)
    return values.detach(), gradient, maps.detach().abs().mean().clamp_min(1e-12)


def hooked(model: Model, layer: Layer, images: Tensor) -> Tensor:
    """(B, C, H, W) of a layer in a plain forward pass with one PyTorch hook."""
    seen: list[Tensor] = []

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensor = tensor_of(output if layer.side == "out" else (args, kwargs))
        assert tensor is not None
        seen.append(tensor.clone())

    module = model.module.get_submodule(layer.module)
    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        mean, std = (images.new_tensor(v)[:, None, None] for v in (model.recipe.mean, model.recipe.std))
        low, high = model.recipe.value_range
        model.module((images * (high - low) + low - mean) / std)
    finally:
        handle.remove()
    axes = Axes(layer.layout, layer.prefix, layer.grid)
    size = (images.shape[-2] / model.recipe.size[0], images.shape[-1] / model.recipe.size[1])
    return as_maps(seen[layer.call - 1], axes, len(images), layer.part, size)


def in_double(plain: Model, row: Row, config: Config) -> float:
    """Relative difference of plain PyTorch's own input gradient from that in double precision; 0 where that fails."""
    images = starts(row, plain, config)
    single = objective(images, lambda x: hooked(plain, row.layer, x), row)[1]
    try:
        plain.module.double()
        double = objective(images.double(), lambda x: hooked(plain, row.layer, x), row)[1]
    except RuntimeError:
        return 0.0
    finally:
        plain.module.float()
    return relative_difference(single, double)
