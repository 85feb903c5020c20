"""The forward pass from images to the value of the objective."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.core.units import Unit
from pipeline.layers.finding import capture
from pipeline.models.loading import Model
from pipeline.visualization.batch import RenderJob
from pipeline.visualization.objectives import Activations
from pipeline.visualization.preset import Preset
from pipeline.visualization.schedules import Stage


@dataclasses.dataclass(frozen=True)
class ForwardResult:
    """Result of a forward pass on B images.

    Attributes:
        values: (B,) values to be maximized: those of the objective, with the opposite sign for a negative preset.
        batch_terms: (B,) weighted batch terms on layers, in units of `values`; None if there are none, or if gradients
            are disabled.
        activations: (B, C, H, W) float32 maps of the layer that the objective is computed from.
    """

    values: Tensor
    batch_terms: Tensor | None
    activations: Tensor


class ObjectiveForward:
    """Function (images, channels, variants) → `ForwardResult` for one network and one layer.

    Attributes:
        model: The network that is run.
    """

    def __init__(self, preset: Preset, model: Model, layer: str, run: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self.model = model
        self._preset, self._layer, self._run = preset, layer, run
        self._batch_terms = [term for term in preset.couplings if term.space == "layer"]

    def __call__(self, images: Tensor, channels: Tensor, variants: Tensor) -> ForwardResult:
        """Run the network on (B, C, H, W) images in [0, 1] that belong to units `channels` and `variants`, (B,)."""
        preset = self._preset
        maps = {name: output.float() for name, output in self._run(images).items()}
        activations = maps[self._layer]
        values = preset.objective.value(Activations(activations, channels, variants, preset.variants, maps))
        if preset.negative:
            values = -values
        if not self._batch_terms or not torch.is_grad_enabled():
            return ForwardResult(values, None, activations)
        total = torch.zeros_like(values)
        for term in self._batch_terms:
            term_maps = maps[getattr(term, "layer", None) or self._layer]
            groups = term_maps.unflatten(0, (-1, preset.variants))
            total = total + term.weight * term.value(groups).flatten()
        return ForwardResult(values, total * values.detach().abs(), activations)


@contextlib.contextmanager
def objective_forward(job: RenderJob, model: Model, stage: Stage) -> Iterator[ObjectiveForward]:
    """Return the forward pass of a stage through `model`; its hooks are removed on exit."""
    preset = job.preset
    layer = job.layers[stage.layer] if stage.layer else job.layer
    captured = {layer.name: layer}
    for name in preset.others:
        if name not in captured and not _only_in_schedule(preset, name):
            captured[name] = job.layers[name]
    with capture(model, list(captured.values())) as run:
        yield ObjectiveForward(preset, model, layer.name, run)


def _only_in_schedule(preset: Preset, layer: str) -> bool:
    """Return whether a layer is used only by a stage of the schedule: neither by the objective nor by a batch term."""
    used = [Unit.parse(unit).layer for unit in preset.objective.units]
    used += [getattr(term, "layer", None) for term in preset.couplings]
    return layer not in used
