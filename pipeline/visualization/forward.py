"""The forward pass from images to the value of the objective."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.core.units import Unit
from pipeline.layers.finding import Layer, capture
from pipeline.layers.path_depths import spatial_means
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
def measuring_forward(
    job: RenderJob, model: Model, depths: Sequence[Layer]
) -> Iterator[tuple[ObjectiveForward, Mapping[str, Tensor]]]:
    """Return the forward pass of the objective, and a mapping that each call fills with spatial means at `depths`.

    The means are (B, C) float32 by the name of the depth; one that the network does not compute for the images, or
    computes after the layer of the objective, is absent.
    """
    captured, names = _captured(job, job.layer), {depth.name for depth in depths}
    maps_by_layer: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}

    def keep(layer: Layer, maps: Tensor) -> None:
        # Only the means of a depth are kept: its maps are large, and later layers may overwrite them.
        if layer.name in names:
            means[layer.name] = spatial_means(maps)
        if layer.name in captured:
            maps_by_layer[layer.name] = maps.clone()

    with capture(model, list(captured.values()), keep, optional=depths) as forward:

        def run(images: Tensor) -> dict[str, Tensor]:
            maps_by_layer.clear()
            means.clear()
            forward(images)
            return dict(maps_by_layer)

        yield ObjectiveForward(job.preset, model, job.layer.name, run), means


@contextlib.contextmanager
def objective_forward(job: RenderJob, model: Model, stage: Stage) -> Iterator[ObjectiveForward]:
    """Return the forward pass of a stage through `model`; its hooks are removed on exit."""
    layer = job.layers[stage.layer] if stage.layer else job.layer
    with capture(model, list(_captured(job, layer).values())) as run:
        yield ObjectiveForward(job.preset, model, layer.name, run)


def _captured(job: RenderJob, layer: Layer) -> dict[str, Layer]:
    """Return the layers that the objective on `layer` and the batch terms read, by name."""
    captured = {layer.name: layer}
    for name in job.preset.others:
        if name not in captured and not _only_in_schedule(job.preset, name):
            captured[name] = job.layers[name]
    return captured


def _only_in_schedule(preset: Preset, layer: str) -> bool:
    """Return whether a layer is used only by a stage of the schedule: neither by the objective nor by a batch term."""
    used = [Unit.parse(unit).layer for unit in preset.objective.units]
    used += [getattr(term, "layer", None) for term in preset.couplings]
    return layer not in used
