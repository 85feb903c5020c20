"""Block `lucent`: Lucent 0.1.8 on the same device and network, one channel at a time and batched by hand.

Lucent optimizes one channel at 224 px for 512 steps, and runs the whole network. Its API takes a batch of images, so
that several channels can be optimized together by an objective of one's own: that is the fair comparison of the loops.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from gpu_blocks import networks, references
from gpu_blocks.bench import Bench
from gpu_blocks.networks import BATCH, LAYERS, LITE, RESNET, Network
from gpu_blocks.rendering import REDIRECTED_STEPS, spread, timed
from gpu_blocks.speed import GOAL, OWN, size_of
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model

# Steps that Lucent's documentation uses, and those that are timed.
STEPS, TIMED_STEPS = 512, 64


def restore_moved_functions() -> None:
    """Restore two functions of kornia that Lucent 0.1.8 needs, and kornia has moved."""
    kornia: Any = importlib.import_module("kornia")
    geometry: Any = importlib.import_module("kornia.geometry.transform")
    for name in ("get_rotation_matrix2d", "warp_affine"):
        if not hasattr(kornia, name):
            setattr(kornia, name, getattr(geometry, name))


class Lucent:
    """Lucent's `render_vis`, called as in its README; two functions that kornia has moved are restored."""

    def __init__(self, bench: Bench, net: Network) -> None:
        restore_moved_functions()
        self.optvis: Any = importlib.import_module("lucent.optvis.render")
        self.objectives: Any = importlib.import_module("lucent.optvis.objectives")
        self.param: Any = importlib.import_module("lucent.optvis.param")
        transform: Any = importlib.import_module("lucent.optvis.transform")
        recipe = net.model.preprocessing
        mean, sd = (torch.tensor(v, device=bench.device).view(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
        self.transforms = [*transform.standard_transforms, lambda image: (image - mean) / sd]
        self.module, self.side = net.model.module, 64 if bench.small else recipe.size[0]

    def render(self, layer: str, channels: list[int], steps: int) -> np.ndarray:
        """Return images (channels, H, W, 3) in [0, 1]."""
        torch.manual_seed(0)
        np.random.seed(0)  # its transformations use this generator
        name = layer.replace(".", "_")
        objective: Any = f"{name}:{channels[0]}"
        if len(channels) > 1:

            def total(maps: Callable[[str], torch.Tensor]) -> torch.Tensor:
                own = maps(name)[torch.arange(len(channels)), torch.tensor(channels)]
                return -own.mean(dim=(1, 2)).sum()

            objective = self.objectives.Objective(total)
        with own_hooks(self.module):
            return self.optvis.render_vis(
                self.module, objective, lambda: self.param.image(self.side, batch=len(channels)),
                transforms=self.transforms, preprocess=False, thresholds=(steps,), progress=False, show_image=False,
            )[-1]  # fmt: skip


@contextlib.contextmanager
def own_hooks(module: torch.nn.Module) -> Iterator[None]:
    """Remove the hooks that Lucent leaves behind."""
    before = [(child, dict(child._forward_hooks)) for child in module.modules()]
    try:
        yield
    finally:
        for child, hooks in before:
            child._forward_hooks.clear()
            child._forward_hooks.update(hooks)


def run(bench: Bench) -> None:
    net = networks.network(RESNET, bench.device, bench.carried)
    lucent = Lucent(bench, net)
    for name in (LAYERS[0],) if bench.small else (LAYERS[2], LAYERS[7]):
        if bench.has(12, name):
            speed(bench, net, lucent, name)
    if bench.has(12, "activations of both on EfficientNet-Lite0"):
        activations(bench)


def speed(bench: Bench, net: Network, lucent: Lucent, name: str) -> None:
    """Print the time of a channel by Lucent, frozen and not, single and batched, and by this project."""
    steps, several = (2, 2) if bench.small else (TIMED_STEPS, 16)
    channels = spread(several, net.layers[name].channels)
    parameters = list(net.model.module.parameters())
    seconds: dict[str, float] = {}
    for kind, frozen, own in (
        ("as in its README", False, channels[:1]),
        ("weights frozen", True, channels[:1]),
        (f"frozen, {len(channels)} channels together", True, channels),
    ):
        for parameter in parameters:
            parameter.requires_grad_(not frozen)
        try:
            lucent.render(name, own, 2)
            seconds[kind] = bench.wall(lambda own=own: lucent.render(name, own, steps)) / steps / len(own)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        bench.row(
            "Lucent", layer=name, how=kind, **{"ms an image-step": 1e3 * seconds[kind]},
            **{"s a channel of 512 steps": STEPS * seconds[kind]},
        )  # fmt: skip
    bench.clean()
    best, _ = networks.fast_precisions(bench.device)
    worker = networks.worker(net, bench.device, batch=2 if bench.small else BATCH, precision=best)
    channels = spread(2 if bench.small else BATCH, net.layers[name].channels)
    goal = timed(bench, worker, name, channels, size_of(bench, net, GOAL, name), net.preset(name))
    ours = timed(bench, worker, name, channels, size_of(bench, net, OWN, name), net.preset(name))
    whole = ours.first + (net.config.render.steps - REDIRECTED_STEPS) * ours.step + ours.outside
    theirs, batched = seconds["as in its README"], min(seconds.values())
    bench.row(
        "against Lucent", layer=name, **{"s a channel": whole / len(channels)},
        **{"times faster a channel": STEPS * theirs / (whole / len(channels))},
        **{"times faster than its best batched loop a channel": STEPS * batched / (whole / len(channels))},
        **{"times faster an image-step at 224 px": theirs / (goal.step / len(channels))},
    )  # fmt: skip


def activations(bench: Bench) -> None:
    """Compare the activations of both, measured alike on the saved images, on a trained network."""
    net = networks.network(LITE, bench.device, bench.carried)
    lucent = Lucent(bench, net)
    best, _ = networks.fast_precisions(bench.device)
    worker = networks.worker(net, bench.device, batch=2, precision=best)
    steps = 2 if bench.small else STEPS
    for name in references.LAYERS[2:3] if bench.small else references.LAYERS[2:4]:
        (channel,) = references.units(net.layers[name])[1:2]
        images = lucent.render(name, [channel], steps)
        theirs = mean_of(net.model, net.layers[name], channel, (images[0] * 255).round().clip(0, 255) / 255)
        preset = net.preset(name)
        if bench.small:
            preset = networks.timing_preset(preset, 20)
        (own,) = worker.pictures(name, [channel], size_of(bench, net, OWN, name), preset)
        ours = mean_of(net.model, net.layers[name], channel, own.image / 255)
        bench.row("activation", layer=name, channel=channel, lucent=theirs, ours=ours, ratio=ours / theirs)


def mean_of(model: Model, layer: Layer, channel: int, image: np.ndarray) -> float:
    """Return the mean of a channel over its map for an image (H, W, 3) in [0, 1]."""
    device = next(model.module.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float().to(device)
    with torch.no_grad(), capture(model, [layer]) as run:
        return run(pixels)[layer.name][0, channel].mean().item()
