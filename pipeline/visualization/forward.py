"""The forward pass from images to the value of the objective."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from pipeline.core.units import Unit
from pipeline.layers.finding import capture
from pipeline.models.loading import Model
from pipeline.visualization.batch import NOTHING_COMPARED, ComparedImages, RenderJob
from pipeline.visualization.objectives import Activations
from pipeline.visualization.preset import Preset
from pipeline.visualization.schedules import Stage

# Function from images (B, C, H, W) to the activations of layers by name.
Run = Callable[[Tensor], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class ForwardResult:
    """Result of a forward pass on B images.

    Attributes:
        values: (B,) values to be maximized: those of the objective, with the opposite sign for a negative preset.
        terms: (B,) weighted batch terms on layers minus weighted regularizers in the space of a layer, in units of
            `values`; None if there are none, or if gradients are disabled.
        activations: (B, C, H, W) float32 maps of the layer that the objective is computed from.
    """

    values: Tensor
    terms: Tensor | None
    activations: Tensor


class ObjectiveForward:
    """Function (images, channels, variants, compared images) → `ForwardResult` for one network and one layer.

    Args:
        job: The job.
        model: The network that is run.
        layer: Name of the layer of the objective.
        run: Returns the activations of all layers that the preset reads.
        run_seeds: Returns those of the layers that regularizers in the space of a layer read.

    Attributes:
        model: The network that is run.
    """

    def __init__(self, job: RenderJob, model: Model, layer: str, run: Run, run_seeds: Run) -> None:
        self.model = model
        self._preset, self._layer, self._run, self._run_seeds = job.preset, layer, run, run_seeds
        self._layer_mean = None if job.layer_mean is None else job.layer_mean[None, :, None, None]
        preset = job.preset
        self._batch_terms = [term for term in preset.couplings if term.space == "layer"]

    def __call__(
        self, images: Tensor, channels: Tensor, variants: Tensor, compared: ComparedImages = NOTHING_COMPARED
    ) -> ForwardResult:
        """Run the network on (B, C, H, W) images in [0, 1] that belong to units `channels` and `variants`, (B,)."""
        preset = self._preset
        maps = {name: output.float() for name, output in self._run(images).items()}
        activations = maps[self._layer]
        target = self._target_maps(compared.targets)
        values = preset.objective.value(Activations(activations, channels, variants, preset.variants, maps, target))
        if preset.negative:
            values = -values
        if not (self._batch_terms or preset.layer_penalties) or not torch.is_grad_enabled():
            return ForwardResult(values, None, activations)
        total = -self._layer_penalties(maps, compared.seeds, values)
        for term in self._batch_terms:
            term_maps = maps[getattr(term, "layer", None) or self._layer]
            groups = term_maps.unflatten(0, (-1, preset.variants))
            total = total + term.weight * term.value(groups).flatten()
        return ForwardResult(values, total * values.detach().abs(), activations)

    @torch.no_grad()
    def _target_maps(self, targets: Tensor | None) -> Tensor | None:
        """Return what the objective compares with: `Activations.compared`."""
        return self._layer_mean if targets is None else self._run(targets)[self._layer].float()

    def _layer_penalties(self, maps: Mapping[str, Tensor], seeds: Tensor | None, values: Tensor) -> Tensor:
        """Return the weighted sum of the regularizers in the space of a layer, (B,), for maps (B, C, H, W) by layer."""
        total = torch.zeros_like(values)
        if not self._preset.layer_penalties or seeds is None:
            return total
        with torch.no_grad():
            references = self._run_seeds(seeds)
        for term in self._preset.layer_penalties:
            name = term.layer or self._layer
            total = total + term.weight * term.value(maps[name], references[name].float())
        return total


@contextlib.contextmanager
def objective_forward(job: RenderJob, model: Model, stage: Stage) -> Iterator[ObjectiveForward]:
    """Return the forward pass of a stage through `model`; its hooks are removed on exit."""
    preset = job.preset
    layer = job.layers[stage.layer] if stage.layer else job.layer
    captured = {layer.name: layer}
    for name in preset.others:
        if name not in captured and not _only_in_schedule(preset, name):
            captured[name] = job.layers[name]
    seed_layers = {term.layer or layer.name: captured[term.layer or layer.name] for term in preset.layer_penalties}
    with capture(model, list(captured.values())) as run, capture(model, list(seed_layers.values())) as run_seeds:
        yield ObjectiveForward(job, model, layer.name, run, run_seeds)


def _only_in_schedule(preset: Preset, layer: str) -> bool:
    """Return whether a layer is used only by a stage of the schedule: neither by the objective nor by a batch term."""
    used = [Unit.parse(unit).layer for unit in preset.objective.units]
    used += [getattr(term, "layer", None) for term in preset.couplings]
    used += preset.penalty_layers
    return layer not in used
