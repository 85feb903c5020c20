"""How long a plan may take, from a few timed passes on this machine."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Sequence

import torch

from pipeline.augmentations import Ensemble
from pipeline.config import Config
from pipeline.layers import Layer, capture
from pipeline.models import Model
from pipeline.presets import RenderConfig, Size
from pipeline.rectifiers import REDIRECTED_STEPS
from pipeline.render import ROBUST_COPIES, render

# At most so many steps are begun to be timed, and none after so many seconds. The first warms up (it compiles loops and
# kernels) and may take ten times as long; in the next ones silent units pass twice, so a few come after those.
TIMED = REDIRECTED_STEPS + 5
PATIENCE = 1.0


class _Enough(Exception):
    """Raised out of a picture that was begun for its time only."""


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

    def cost(self, count: int) -> float:
        """Seconds of one worker for so many of the channels."""
        return self.seconds * count / len(self.channels)


def estimate(
    folded: Model, chosen: Sequence[Layer], rows: Sequence[Row], config: Config, others: Sequence[Layer], lowered: Model
) -> tuple[list[Row], float]:
    """The same rows with estimated seconds, and seconds a photograph, from a few timed passes on this machine.

    The forward pass is timed up to every one of the `chosen` layers, which hold those of all rows, at once; for each
    preset its ratio to a whole step, and what a step costs beside the network, are measured by rendering two pictures
    for a few steps in the cheapest and the dearest layer.
    """
    batch = 2
    device = next(folded.module.parameters()).device
    images = torch.rand(batch, folded.recipe.channels, *folded.recipe.size, device=device)
    best: dict[str, float] = {}
    start = time.perf_counter()
    while not best or time.perf_counter() - start < PATIENCE:
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
    timed: dict[tuple[str, str], Row] = {}
    for preset in config.presets:
        own = [row for row in rows if row.preset == preset.name]
        if own:
            found = _preset_rows(folded, lowered, own, preset, others, reach)
            timed |= {(row.layer.name, row.preset): row for row in found}
    # Decoding and reduction cost about as much again as half the forward pass.
    return [timed[row.layer.name, row.preset] for row in rows], 1.5 * max(reach.values())


def _preset_rows(
    folded: Model,
    lowered: Model,
    rows: Sequence[Row],
    config: RenderConfig,
    others: Sequence[Layer],
    reach: dict[str, float],
) -> list[Row]:
    """The rows of one preset; `reach` is the seconds of an image's forward pass up to each layer."""
    chosen, channels = [row.layer for row in rows], {row.layer.name: row.channels for row in rows}
    canvases = {row.layer.name: row.canvas for row in rows}
    pixels = folded.recipe.size[0] * folded.recipe.size[1]
    named = {layer.name: layer for layer in others if layer.name in config.others}
    device = next(folded.module.parameters()).device

    def canvas(layer: Layer) -> Size:
        return canvases[layer.name]

    def network(layer: Layer) -> float:
        return reach[layer.name] * canvas(layer)[0] * canvas(layer)[1] / pixels

    def area(layer: Layer) -> float:
        height, width = canvas(layer)
        return (height + 2 * config.margin) * (width + 2 * config.margin)

    def step(layer: Layer) -> float:
        """Seconds of one step of one picture: of those timed the fastest, for whatever else happens slows them."""
        preset = dataclasses.replace(config, steps=TIMED, attempts=1)
        # Two pictures, as a little of a batch; of a dear layer one tells enough.
        few = 1 if network(layer) > PATIENCE / 10 else 2
        units = [(c, v) for c in channels[layer.name][:few] for v in range(preset.variants)]
        blank = torch.full((folded.recipe.channels, *canvas(layer)), 0.5)
        times: list[float] = []

        def stop() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            waited = times[-1] - times[0] > 10 * PATIENCE or (len(times) > 2 and times[-1] - times[1] > PATIENCE)
            if len(times) == TIMED or waited:
                raise _Enough

        with contextlib.suppress(_Enough):
            # Other checkpoints cost what this one does, and any picture what a grey one does.
            render(
                folded, layer, units, preset, 0, canvas(layer), stop,
                lowered=lowered, others=named, starts=dict.fromkeys(units, blank),
                ensemble=[folded] * sum(len(a.checkpoints) for a in preset.augmentations if isinstance(a, Ensemble)),
            )  # fmt: skip
        return max(min(after - before for before, after in itertools.pairwise(times)), 1e-4) / len(units)

    first, last = min(chosen, key=network), max(chosen, key=network)
    fixed = max(step(first) - 2.7 * network(first), 0.0) / area(first)
    ratio = max(step(last) - fixed * area(last), 0.0) / network(last)
    timed = []
    for row in rows:
        layer, pictures = row.layer, len(row.channels) * config.variants
        each = fixed * area(layer) + ratio * network(layer)
        # Measuring the finished picture costs forward passes on its shaken copies.
        extra = (ROBUST_COPIES + 2) * network(layer)
        timed.append(dataclasses.replace(row, seconds=pictures * (each * config.steps + extra)))
    return timed
