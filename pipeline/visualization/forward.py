"""The forward pass from images to the value of the objective."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.core.units import Unit
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model
from pipeline.visualization.batch import RenderJob
from pipeline.visualization.network_penalties import Normalization, weighted_penalties
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
        penalties: (B,) weighted penalties on activations, in units of `values`; None if there are none.
        activations: (B, C, H, W) float32 maps of the layer that the objective is computed from.
    """

    values: Tensor
    batch_terms: Tensor | None
    penalties: Tensor | None
    activations: Tensor


class ObjectiveForward:
    """Function (images, channels, variants) → `ForwardResult` for one network and one layer.

    Attributes:
        model: The network that is run.
    """

    def __init__(self, preset: Preset, model: Model, layer: str, run: Callable[[Tensor], "_Recorded"]) -> None:
        self.model = model
        self._preset, self._layer, self._run = preset, layer, run
        self._batch_terms = [term for term in preset.couplings if term.space == "layer"]

    def __call__(self, images: Tensor, channels: Tensor, variants: Tensor) -> ForwardResult:
        """Run the network on (B, C, H, W) images in [0, 1] that belong to units `channels` and `variants`, (B,)."""
        preset, recorded = self._preset, self._run(images)
        maps = {name: output.float() for name, output in recorded.maps.items()}
        activations = maps[self._layer]
        values = preset.objective.value(Activations(activations, channels, variants, preset.variants, maps))
        if preset.negative:
            values = -values
        penalties = weighted_penalties(preset.network_penalties, recorded.deviations)
        if penalties is not None:
            penalties = penalties * values.detach().abs()
        if not self._batch_terms or not torch.is_grad_enabled():
            return ForwardResult(values, None, penalties, activations)
        total = torch.zeros_like(values)
        for term in self._batch_terms:
            term_maps = maps[getattr(term, "layer", None) or self._layer]
            groups = term_maps.unflatten(0, (-1, preset.variants))
            total = total + term.weight * term.value(groups).flatten()
        return ForwardResult(values, total * values.detach().abs(), penalties, activations)


@dataclasses.dataclass
class _Recorded:
    """What one forward pass recorded: maps by layer, and the deviations of normalizations with the natural ones."""

    maps: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    deviations: list[tuple[Tensor, float]] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def objective_forward(
    job: RenderJob, model: Model, stage: Stage, penalized: bool = False
) -> Iterator[ObjectiveForward]:
    """Return the forward pass of a stage through `model`; its hooks are removed on exit.

    Args:
        job: What is visualized.
        model: The network, or a variant of it.
        stage: The stage of the schedule.
        penalized: Whether to compute the penalties on activations.
    """
    preset = job.preset
    layer = job.layers[stage.layer] if stage.layer else job.layer
    captured = {layer.name: layer}
    for name in preset.others:
        if name not in captured and not _only_in_schedule(preset, name):
            captured[name] = job.layers[name]
    with _recording(model, list(captured.values()), job.normalizations if penalized else ()) as run:
        yield ObjectiveForward(preset, model, layer.name, run)


@contextlib.contextmanager
def _recording(
    model: Model, layers: Sequence[Layer], normalizations: Sequence[Normalization]
) -> Iterator[Callable[[Tensor], _Recorded]]:
    """Provide a function from images to the maps of layers and the deviations of normalizations."""
    if not normalizations:
        with capture(model, layers) as forward:
            yield lambda images: _Recorded(forward(images))
        return
    # The maps of normalizations are not kept: all together are many times as large as those of the layers.
    by_tap = {id(normalization.tap): normalization for normalization in normalizations}
    recorded = _Recorded()

    def record(layer: Layer, maps: Tensor) -> None:
        normalization = by_tap.get(id(layer))
        if normalization is None:
            recorded.maps[layer.name] = maps.clone()  # the rest of the forward pass may change it in place
        else:
            recorded.deviations.append((normalization.deviation(maps), normalization.natural))

    with capture(model, [*layers, *(normalization.tap for normalization in normalizations)], each=record) as forward:

        def run(images: Tensor) -> _Recorded:
            nonlocal recorded
            recorded = _Recorded()
            forward(images)
            return recorded

        yield run


def _only_in_schedule(preset: Preset, layer: str) -> bool:
    """Return whether a layer is used only by a stage of the schedule: neither by the objective nor by a batch term."""
    used = [Unit.parse(unit).layer for unit in preset.objective.units]
    used += [getattr(term, "layer", None) for term in preset.couplings]
    return layer not in used
