"""Block `correctness`: is what the device computes what it should be?

Responses and a pixel gradient of five layers against double precision; sampling and Adam against the CPU; initial
images and random numbers bit for bit; a whole rendering against that of a CPU; the values that finished images get; the
same rendering twice, and in batches of 1 and many. Rows with a verdict have `value`, `limit` and `ok`.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gpu_blocks import networks, references
from gpu_blocks.bench import Bench
from gpu_blocks.networks import LITE, Network
from gpu_blocks.rendering import spread
from gpu_blocks.speed import tf32
from pipeline.acceleration.variants import cosine_of, relative_difference
from pipeline.engine.worker import Worker
from pipeline.images.transforms import ROBUSTNESS_TRANSFORMS, apply_transforms, draw_random
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model
from pipeline.visualization.evaluation import Visualization
from pipeline.visualization.objectives import Channel, Energy, Objective, Rectified
from pipeline.visualization.optimizers import Adam

# Largest relative error of responses and of the gradient: rounding switches single rectifiers, which changes gradients.
LIMITS = {"IEEE": (1e-4, 5e-3), "TF32": (1e-2, 0.2), "bfloat16": (0.05, 0.0)}
SMALLEST_COSINE = 0.85
# Deviation of the activation of a single rendering, relative to the mean of its layer, between float32 and bfloat16 on
# one CPU: rounding grows to another image of the same unit (0.047 over 60 units of the five layers).
DEVIATION = 0.05
SIZE = (references.RENDERED_SIDE, references.RENDERED_SIDE)


def run(bench: Bench) -> None:
    net = networks.network(LITE, bench.device, bench.carried)
    if bench.references is None or not bench.references.is_file():
        bench.row("left out", of="all comparisons with references", reason="no file of references")
        known: Mapping[str, Any] = {}
    else:
        known = np.load(bench.references)
        responses(bench, net, known)
    images_and_steps(bench, net)
    names = references.LAYERS[1:2] if bench.small else references.LAYERS
    if known:
        draws(bench, net, known, names)
    renderings(bench, net, known, names)
    repeated(bench, net)


def judged(bench: Bench, what: str, value: float, limit: float, **more: Any) -> None:
    """Print a row with the verdict: `value` at most `limit`."""
    bench.row(what, **more, value=float(value), limit=limit, ok=bool(value <= limit))


def responses(bench: Bench, net: Network, known: Mapping[str, Any]) -> None:
    """Compare responses and gradients of the networks that a worker uses."""
    pixels = (torch.from_numpy(known["images"]).float() / 255).to(bench.device)
    exact = networks.worker(net, bench.device, precision="float32")
    fast = networks.worker(net, bench.device, precision="bfloat16")
    for name in references.LAYERS:
        layer, preset = net.layers[name], net.preset(name)
        means, gradient = (torch.from_numpy(known[f"{part}/{name}"]) for part in ("means", "gradient"))
        size = (references.SIDE, references.SIDE)
        for precision, worker in (("IEEE", exact), ("TF32", exact), ("bfloat16", fast)):
            if precision == "TF32" and bench.device != "cuda":
                continue
            variants = worker.variants(layer, preset, size)
            flag = contextlib.nullcontext() if precision == "bfloat16" else tf32(precision == "TF32")
            with flag:
                model = variants.steps if precision == "bfloat16" else variants.exact
                found, slope = (part.float().cpu() for part in references.observed(model, layer, pixels))
            of_values, of_gradient = LIMITS[precision]
            more = {"layer": name, "precision": precision}
            judged(bench, "responses", relative_difference(found, means), of_values, **more)
            if of_gradient:
                judged(bench, "pixel gradient", relative_difference(slope, gradient), of_gradient, **more)
            cosine = cosine_of(slope, gradient)
            judged(bench, "1 - cosine of the gradient", 1 - cosine, 1 - SMALLEST_COSINE, **more)


def images_and_steps(bench: Bench, net: Network) -> None:
    """Compare transformations and Adam in float32 on the device with double precision on the CPU."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(4, 3, 120, 120, generator=generator)
    draws = torch.stack([draw_random(ROBUSTNESS_TRANSFORMS, generator, 1)[0] for _ in range(4)])
    given = torch.rand(4, 3, 96, 96, generator=generator)

    def transformed(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = images.to(device, dtype).requires_grad_(True)
        result = apply_transforms(leaf, ROBUSTNESS_TRANSFORMS, draws.to(device, dtype), (96, 96))
        return result, torch.autograd.grad(result, leaf, given.to(device, dtype))[0]

    pairs = zip(transformed(bench.device, torch.float32), transformed("cpu", torch.float64), strict=True)
    for what, (found, expected) in zip(("sampling", "sampling, gradient"), pairs, strict=True):
        judged(bench, what, relative_difference(found.detach().cpu(), expected.detach()), 1e-4)

    def stepped(device: str, dtype: torch.dtype) -> torch.Tensor:
        source = torch.Generator().manual_seed(4)
        parameters = torch.randn(4, 3, 64, 33, 2, generator=source).to(device, dtype)
        state = Adam().init_state(parameters, True)
        for step in range(5):
            gradient = torch.randn(parameters.shape, generator=source).to(device, dtype)
            Adam().step(parameters, gradient, state, step, 0.05)
        return parameters

    found, expected = stepped(bench.device, torch.float32), stepped("cpu", torch.float64)
    judged(bench, "Adam, 5 steps", relative_difference(found.cpu(), expected), 1e-5)


def draws(bench: Bench, net: Network, known: Mapping[str, Any], names: Sequence[str]) -> None:
    """Compare initial parameters and random numbers with those of the references: the same bits on every machine."""
    worker = networks.worker(net, bench.device, batch=references.RENDERED, precision="float32")
    for name in names:
        channels = references.rendered_units(net.layers[name])
        job = worker.job(name, SIZE, references.preset_of(net, name))
        batch, random = networks.first_batch(job, channels)
        found = [references.digest(batch.initial), references.digest(random)]
        expected = known[f"initial/{name}"]
        part = batch.initial[:, ..., :4].reshape(references.RENDERED, -1)[:, : expected.shape[1]].detach().cpu().numpy()
        same = [a == b for a, b in zip(found, known[f"draws/{name}"].tolist(), strict=True)]
        judged(
            bench, "initial image", float(np.abs(part - expected).max()), 1e-5, layer=name,
            **{"same bits": same[0], "same draws": same[1]},
        )  # fmt: skip


def renderings(bench: Bench, net: Network, known: Mapping[str, Any], names: Sequence[str]) -> None:
    """Compare finished images with those of a CPU in float32, and their stored activations with double precision."""
    exact = references.in_double(net.model)
    for precision in networks.precisions(bench.device):
        worker = networks.worker(net, bench.device, batch=references.RENDERED, precision=precision)
        sums, units, distances, errors = np.zeros(2), [0.0], [], []
        for name in names:
            if not bench.has(3, f"rendering of {name}, {precision}"):
                continue
            channels = references.rendered_units(net.layers[name])
            pictures = worker.pictures(name, channels, SIZE, references.preset_of(net, name))
            objective = net.preset(name).objective
            errors += [stored_error(bench, exact, net.layers[name], objective, picture) for picture in pictures]
            if not known:
                continue
            found, expected = np.array([p.activation for p in pictures]), known[f"rendered/{name}/activation"]
            sums += (found / np.abs(expected).mean()).sum(), (expected / np.abs(expected).mean()).sum()
            units += np.abs(found / expected - 1).tolist()
            distances += map(rms_share, (p.image for p in pictures), known[f"rendered/{name}/image"])
        if errors:
            judged(bench, "stored activation against double precision", max(errors), 1e-4, precision=precision)
        if sums[1]:
            limit = 3 * DEVIATION / len(distances) ** 0.5
            judged(
                bench, "activation of renderings against a CPU", abs(sums[0] / sums[1] - 1), limit,
                precision=precision, **{"worst unit": max(units), "rms ÷ contrast": float(np.mean(distances))},
            )  # fmt: skip


def stored_error(bench: Bench, exact: Model, layer: Layer, objective: Objective, picture: Visualization) -> float:
    """Return the error of the activation of a finished image, relative to the mean absolute value of its layer."""
    pixels = torch.from_numpy(picture.image).permute(2, 0, 1)[None].to(bench.device).double() / 255
    with torch.no_grad(), capture(exact, [layer]) as forward:
        maps = forward(pixels)[layer.name]
    expected = value_of(objective, maps[0, picture.channel])
    return abs(picture.activation - float(expected)) / float(maps.abs().mean())


def value_of(objective: Objective, own: torch.Tensor) -> torch.Tensor:
    """Return the value of an objective that `auto` stands for, by its formula, on the map (h, w) of a unit."""
    if isinstance(objective, Energy):
        return own.var(correction=0)
    if isinstance(objective, Rectified):
        return torch.where(own > 0, own, objective.slope * own).mean()
    assert isinstance(objective, Channel), objective
    return own.mean()


def rms_share(image: np.ndarray, expected: np.ndarray) -> float:
    """Return the rms difference of two images relative to the standard deviation of the second."""
    difference = image.astype(float) - expected.astype(float)
    return float(np.sqrt((difference**2).mean()) / max(expected.astype(float).std(), 1e-6))


def repeated(bench: Bench, net: Network) -> None:
    """Render the same units twice, and one of them alone: how far are the images from each other?"""
    name = references.LAYERS[2]
    best, _ = networks.fast_precisions(bench.device)
    count = 2 if bench.small else 64
    worker = networks.worker(net, bench.device, batch=count, precision=best)
    channels = spread(count, net.layers[name].channels)
    first, again = (rendered(bench, net, worker, name, channels) for _ in range(2))
    bench.row(
        "the same batch twice", precision=best, **{"rms ÷ contrast": distance(first, again)},
        **{"same bytes": all((a.image == b.image).all() for a, b in zip(first, again, strict=True))},
    )  # fmt: skip
    alone = rendered(bench, net, worker, name, channels[:1])
    bench.row(
        "one unit alone and in its batch", precision=best, batch=len(channels),
        **{"rms ÷ contrast": distance(alone, first[:1]), "activation ratio": alone[0].activation / first[0].activation},
    )  # fmt: skip


def rendered(bench: Bench, net: Network, worker: Worker, name: str, channels: Sequence[int]) -> list[Visualization]:
    preset = references.preset_of(net, name)
    if bench.small:
        preset = networks.timing_preset(preset, 20)
    return worker.pictures(name, channels, SIZE, preset)


def distance(some: Sequence[Visualization], others: Sequence[Visualization]) -> float:
    return float(np.mean([rms_share(a.image, b.image) for a, b in zip(some, others, strict=True)]))
