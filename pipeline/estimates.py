"""How long a plan may take, from a few timed passes on this machine."""

import dataclasses
import time
from collections.abc import Sequence

import torch

from pipeline.augmentations import Ensemble
from pipeline.config import Config
from pipeline.layers import Layer, capture
from pipeline.models import Model
from pipeline.presets import RenderConfig, Size
from pipeline.render import ROBUST_COPIES, render


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of the plan under one preset, with the channels to be rendered and the estimated seconds of it all.

    The seconds are those of one worker; `Plan.eta` divides them among the crew.
    """

    layer: Layer
    channels: tuple[int, ...]
    canvas: Size
    seconds: float
    preset: str


def estimate(
    folded: Model,
    chosen: Sequence[Layer],
    channels: dict[str, tuple[int, ...]],
    canvases: dict[str, dict[str, Size]],
    config: Config,
    others: Sequence[Layer],
) -> tuple[list[Row], float]:
    """Rows with estimated seconds, and seconds a photograph, from a few timed passes on this machine.

    `canvases` are the sizes by preset and layer. The forward pass is timed up to every layer at once; for each preset
    its ratio to a whole step, and what a step costs beside the network, are measured by rendering two pictures for
    a few steps in the cheapest and the dearest layer.
    """
    batch = 4
    device = next(folded.module.parameters()).device
    images = torch.rand(batch, folded.recipe.channels, *folded.recipe.size, device=device)
    best: dict[str, float] = {}
    for _ in range(3):
        seen: dict[str, float] = {}
        began = time.perf_counter()

        def note(layer: Layer, _: torch.Tensor, seen: dict[str, float] = seen, began: float = began) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            seen[layer.name] = time.perf_counter() - began

        with capture(folded, chosen, each=note) as forward, torch.no_grad():
            forward(images)
        best = {name: min(best.get(name, t), t) for name, t in seen.items()}
    reach = {name: t / batch for name, t in best.items()}
    rows = [
        row
        for preset in config.presets
        for row in _preset_rows(folded, chosen, channels, canvases[preset.name], preset, others, reach)
    ]
    # Decoding and reduction cost about as much again as half the forward pass.
    return rows, 1.5 * max(reach.values())


def _preset_rows(
    folded: Model,
    chosen: Sequence[Layer],
    channels: dict[str, tuple[int, ...]],
    canvases: dict[str, Size],
    config: RenderConfig,
    others: Sequence[Layer],
    reach: dict[str, float],
) -> list[Row]:
    """The rows of one preset; `reach` is the seconds of an image's forward pass up to each layer."""
    pixels = folded.recipe.size[0] * folded.recipe.size[1]
    named = {layer.name: layer for layer in others if layer.name in config.others}

    def canvas(layer: Layer) -> Size:
        return canvases[layer.name]

    def network(layer: Layer) -> float:
        return reach[layer.name] * canvas(layer)[0] * canvas(layer)[1] / pixels

    def area(layer: Layer) -> float:
        height, width = canvas(layer)
        return (height + 2 * config.margin) * (width + 2 * config.margin)

    def step(layer: Layer) -> float:
        """Seconds of one step of one picture, by difference: what comes before and after the steps falls out."""
        times = []
        for steps in (1, 4):
            preset = dataclasses.replace(config, steps=steps, attempts=1)
            units = [(c, v) for c in channels[layer.name][:2] for v in range(preset.variants)]
            blank = torch.full((folded.recipe.channels, *canvas(layer)), 0.5)
            began = time.perf_counter()
            # Other checkpoints cost what this one does, and any picture what a grey one does.
            render(
                folded, layer, units, preset, 0, canvas(layer), others=named, starts=dict.fromkeys(units, blank),
                ensemble=[folded] * sum(len(a.checkpoints) for a in preset.augmentations if isinstance(a, Ensemble)),
            )  # fmt: skip
            times.append(time.perf_counter() - began)
        return max(times[1] - times[0], 1e-4) / 3 / len(units)

    first, last = min(chosen, key=network), max(chosen, key=network)
    fixed = max(step(first) - 2.7 * network(first), 0.0) / area(first)
    ratio = max(step(last) - fixed * area(last), 0.0) / network(last)
    rows = []
    for layer in chosen:
        own = channels[layer.name]
        pictures = len(own) * config.variants
        each = fixed * area(layer) + ratio * network(layer)
        # Measuring the finished picture costs forward passes on its shaken copies.
        extra = (ROBUST_COPIES + 2) * network(layer)
        rows.append(Row(layer, own, canvas(layer), pictures * (each * config.steps + extra), config.name))
    return rows
