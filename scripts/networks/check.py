"""Check one network on a worker's code path against plain PyTorch: layers, visualizations, values, input gradients."""

import dataclasses
import glob
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.acceleration.cpu_lowering import in_precision
from pipeline.acceleration.variants import BFLOAT16_COSINE, cosine_of, relative_difference, smallest_cosine
from pipeline.cli.compose import compose
from pipeline.config.schema import Config
from pipeline.engine.worker import Worker
from pipeline.layers.finding import Layer, capture
from pipeline.layers.layouts import Axes, as_maps
from pipeline.layers.selection import list_layers
from pipeline.layers.tracing import tensor_of
from pipeline.models.loading import Model, load_model
from pipeline.planning.planner import PlanRow, make_plan

STEPS = 4
UNITS = 2
LAYERS = 5

# Largest allowed relative difference from plain PyTorch in float32, and number of starts for a unit that exceeds it.
TOLERANCE = 1e-3
STARTS = 8


@dataclasses.dataclass(frozen=True)
class Compared:
    """Differences between a worker's code path and plain PyTorch, in one layer or the maximum over several.

    Attributes:
        value: Largest relative difference of an objective at the start.
        gradient: Largest relative difference of a unit's input gradient, at its first start.
        least: The same, except that a unit whose difference exceeds `TOLERANCE` is compared at `STARTS` starts and its
            smallest difference counts: rounding can switch single rectifiers on or off, and with them a part of the
            gradient, for some images and not for others. A wrong operator changes the gradient for all.
        repeated: Number of units that were compared at more than one start.
        rounding: For these units, the largest difference of plain PyTorch's own gradients from those in double
            precision, at the further starts.
        cosine: Lowest cosine of the input gradient with that of plain PyTorch.
        below: Largest amount by which a layer's cosine is below the smallest one allowed, which depends on that of
            plain PyTorch in bfloat16; 0 if none is. A layer that is below is compared at `STARTS` starts and its
            smallest amount counts, for the reason given for `least`.
    """

    value: float
    gradient: float
    least: float
    repeated: int
    rounding: float
    cosine: float
    below: float


@dataclasses.dataclass(frozen=True)
class Checked(Compared):
    """The result for one network.

    Attributes:
        size: Side of the input in pixels.
        layers: Number of layers found.
        rendered: Number of visualizations made.
        failed: Number of those whose objective did not increase, which random weights may cause.
        levels: Levels of the network variants used, one per rendered layer.
        reasons: Reasons for using a simpler level than requested.
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
    precision: str
    convolutional: bool
    seconds: float

    @property
    def wrong(self) -> str:
        """Description of the deviations beyond the stated tolerance; empty if there are none."""
        if self.precision != "float32":
            return f"cosine of the input gradient {self.below:.3f} below the smallest allowed" if self.below else ""
        if self.value > TOLERANCE:
            return f"objective differs by {self.value:.2g}"
        if self.least > TOLERANCE:
            return f"input gradient differs by {self.least:.2g}"
        return ""


def configuration(overrides: Sequence[str]) -> Config:
    """Return the configuration of `overrides`, as the command line makes it, for a short inline run of all layers."""
    settings = ["layers=all", f"layers.channels=spread:{UNITS}", f"render.steps={STEPS}", "render.attempts=1"]
    settings.append("data.limit=4")
    return compose([*settings, "engine=inline", *overrides]).config


def check(config: Config, layers: int = LAYERS) -> Checked:
    """Render a few units of layers spread over the network with a worker's code, and compare with plain PyTorch."""
    began = time.monotonic()
    # A separate copy of the network, changed only by loading: modes, types and memory format.
    plain = load_model(config.model)
    names = [layer.name for layer in list_layers(plain.to("cpu"), config.layers)]
    include = tuple(map(glob.escape, spread(names, layers)))
    chosen = dataclasses.replace(config.layers, include=include)
    plan = make_plan(dataclasses.replace(config, layers=chosen), timed=False)
    worker = Worker(plan.setup)
    rows = plan.rows
    failed, rendered = 0, 0
    levels, reasons, numbers = [], [], []
    for row in rows:
        pictures = worker.pictures(row.layer.name, row.channels, row.canvas, config.render.for_layer(row.layer))
        rendered += len(pictures)
        failed += sum(picture.status == "failed" for picture in pictures)
        variants = worker.variants(worker.layers[row.layer.name], config.render, row.canvas)
        levels.append(variants.level)
        reasons += [variants.reason] if variants.reason else []
        numbers.append(compared(plain, variants.steps, row, config, variants.precision == "float32"))
    return Checked(
        size=plain.preprocessing.size[0],
        layers=len(names),
        rendered=rendered,
        failed=failed,
        levels=tuple(levels),
        reasons=tuple(dict.fromkeys(reasons)),
        value=max((n.value for n in numbers), default=0.0),
        gradient=max((n.gradient for n in numbers), default=0.0),
        least=max((n.least for n in numbers), default=0.0),
        repeated=sum(n.repeated for n in numbers),
        rounding=max((n.rounding for n in numbers), default=0.0),
        cosine=min((n.cosine for n in numbers), default=1.0),
        below=max((n.below for n in numbers), default=0.0),
        precision=levels[0].rpartition(" ")[2] if levels else "float32",
        convolutional=sum(isinstance(m, nn.Conv2d) for m in plain.module.modules()) > 1,
        seconds=time.monotonic() - began,
    )


def spread(names: Sequence[str], count: int) -> list[str]:
    """Return `count` names, evenly spaced from the first to the last."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def starts(plan_row: PlanRow, model: Model, config: Config, first: int = 0) -> Tensor:
    """Return the images (units, C, H, W) in [0, 1] that visualizations start from, drawn with seeds from `first`."""
    canvas = config.render.canvas
    drawn = [
        canvas.initial(torch.Generator().manual_seed(first + i), model.preprocessing.channels, plan_row.canvas)
        for i in range(len(plan_row.channels))
    ]
    with torch.no_grad():
        return canvas.image(torch.stack(drawn), plan_row.canvas)


def compared(plain: Model, steps: Model, row: PlanRow, config: Config, single: bool) -> Compared:
    """Compare objectives and input gradients of a row's units, at further starts too if steps are in float32."""
    images = starts(row, plain, config)
    values, differences, cosine = at_start(plain, steps, row, images)
    below = 0.0 if single or cosine >= BFLOAT16_COSINE else cosine_below(plain, steps, row, config)
    least, rounding = list(differences), 0.0
    beyond = [i for i, difference in enumerate(differences) if single and difference > TOLERANCE]
    for again in range(1, STARTS) if beyond else ():
        images = starts(row, plain, config, first=again * len(row.channels))
        _, further, _ = at_start(plain, steps, row, images)
        rounded = in_double(plain, row, images)
        for i in beyond:
            least[i] = min(least[i], further[i])
            rounding = max(rounding, rounded[i])
    return Compared(values, max(differences), max(least), len(beyond), rounding, cosine, below)


def cosine_below(plain: Model, steps: Model, row: PlanRow, config: Config) -> float:
    """Return by how much the cosine of input gradients is below the smallest allowed, at the best of several starts."""
    rough, below = in_precision(plain, torch.bfloat16), 1.0
    for again in range(STARTS):
        images = starts(row, plain, config, first=again * len(row.channels))
        cosine, cosine_of_rough = (at_start(plain, network, row, images)[2] for network in (steps, rough))
        below = min(below, max(0.0, smallest_cosine(cosine_of_rough) - cosine))
        if not below:
            break
    return below


def at_start(plain: Model, steps: Model, row: PlanRow, images: Tensor) -> tuple[float, list[float], float]:
    """Return the differences of objectives and of input gradients, and the cosine of these, one image per unit."""
    with capture(steps, [row.layer]) as forward:
        theirs = objective(images, lambda x: forward(x)[row.layer.name].float(), row)
    ours = objective(images, lambda x: hooked(plain, row.layer, x), row)
    differences = [relative_difference(one, other) for one, other in zip(theirs[1], ours[1], strict=True)]
    return float((theirs[0] - ours[0]).abs().max()) / float(ours[2]), differences, cosine_of(theirs[1], ours[1])


def objective(images: Tensor, maps_of: Any, row: PlanRow) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means of the units' maps (units,), the gradient of their sum, and the scale of the layer."""
    images = images.clone().requires_grad_(True)
    maps = maps_of(images)
    values = torch.stack([maps[i, channel].mean() for i, channel in enumerate(row.channels)])
    (gradient,) = torch.autograd.grad(values.sum(), images)
    return values.detach(), gradient, maps.detach().abs().mean().clamp_min(1e-12)


def hooked(model: Model, layer: Layer, images: Tensor) -> Tensor:
    """Return the maps (B, C, H, W) of a layer from a plain forward pass with one PyTorch hook."""
    seen: list[Tensor] = []

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensor = tensor_of(output if layer.side == "out" else (args, kwargs))
        assert tensor is not None
        seen.append(tensor.clone())

    module = model.module.get_submodule(layer.module)
    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        mean, std = (images.new_tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
        low, high = model.preprocessing.value_range
        model.module((images * (high - low) + low - mean) / std)
    finally:
        handle.remove()
    axes = Axes(layer.layout, layer.prefix, layer.grid)
    size = (images.shape[-2] / model.preprocessing.size[0], images.shape[-1] / model.preprocessing.size[1])
    return as_maps(seen[layer.call - 1], axes, len(images), layer.part, size)


def in_double(plain: Model, row: PlanRow, images: Tensor) -> list[float]:
    """Return the relative differences of plain PyTorch's input gradients from double precision; 0 if that fails."""
    single = objective(images, lambda x: hooked(plain, row.layer, x), row)[1]
    try:
        plain.module.double()
        double = objective(images.double(), lambda x: hooked(plain, row.layer, x), row)[1]
    except RuntimeError:
        return [0.0] * len(images)
    finally:
        plain.module.float()
    return [relative_difference(one, other) for one, other in zip(single, double, strict=True)]
