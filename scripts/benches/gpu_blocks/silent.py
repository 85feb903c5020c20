"""Block `silent`: units without gradient at the start, and what their second pass costs."""

import torch

from gpu_blocks import networks, references
from gpu_blocks.bench import Bench
from gpu_blocks.networks import BATCH, LITE, Network
from gpu_blocks.rendering import spread, timed
from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.engine.worker import Worker
from pipeline.images.transforms import apply_transforms
from pipeline.visualization.forward import objective_forward
from pipeline.visualization.preset import Size
from pipeline.visualization.schedules import Stage

LAYERS = (*references.LAYERS[1:], "blocks.6.0.conv_pwl")


def run(bench: Bench) -> None:
    net = networks.network(LITE, bench.device, bench.carried)
    best, _ = networks.fast_precisions(bench.device)
    worker = networks.worker(net, bench.device, batch=2 if bench.small else BATCH, precision=best)
    for name in LAYERS[:1] if bench.small else LAYERS:
        if not bench.has(3, name):
            continue
        size = (48, 48) if bench.small else net.sizes[name]
        channels = spread(worker.setup.config.engine.batch, net.layers[name].channels)
        ours = timed(bench, worker, name, channels, size, net.preset(name))
        bench.row(
            "silent",
            layer=name,
            batch=len(channels),
            **{"share silent": share(net, worker, name, channels, size)},
            **{"first step ms": 1e3 * ours.first / REDIRECTED_STEPS, "steady step ms": 1e3 * ours.step},
        )


def share(net: Network, worker: Worker, name: str, channels: list[int], size: Size) -> float:
    """Return the share of units whose initial image gets no gradient at the first step."""
    job = worker.job(name, size, networks.timing_preset(net.preset(name), 2))
    batch, random = networks.first_batch(job, channels)
    stage = job.preset.stages[0]
    canvas = job.preset.canvas.image(batch.parameters, job.canvas(stage)).detach().requires_grad_(True)
    seen = apply_transforms(canvas, job.preset.transforms, random, job.view(stage))
    with objective_forward(job, job.step_models[0], Stage()) as forward:
        values = forward(seen, batch.channels, batch.variants).values
        gradient = torch.autograd.grad(values.sum(), canvas)[0]
    return float((gradient.flatten(1).abs().amax(1) == 0).float().mean())
