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
from pipeline.visualization.batch import NOTHING_COMPARED, ComparedImages
from pipeline.visualization.network_penalties import Normalization, weighted_penalties
from pipeline.visualization.objectives import Activations
from pipeline.visualization.preset import Preset
from pipeline.visualization.render_job import RenderJob
from pipeline.visualization.schedules import Stage


@dataclasses.dataclass(frozen=True)
class ForwardResult:
    """Result of a forward pass on B images.

    Attributes:
        values: (B,) values to be maximized: those of the objective, with the opposite sign for a negative preset.
        terms: (B,) weighted batch terms on layers minus weighted penalties on activations, in units of `values`; None
            if there are none, or if gradients are disabled.
        activations: (B, C, H, W) maps of the layer that the objective is computed from, in the network's precision.
        means: (B, C) float32 spatial means by depth; a depth that the network does not compute for the images, or
            computes after the layer of the objective, is absent.
        distances: (D, B) regularizers in the space of a layer, without weights; None if there are none, or if
            gradients are disabled.
    """

    values: Tensor
    terms: Tensor | None
    activations: Tensor
    means: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    distances: Tensor | None = None


@dataclasses.dataclass
class _Recorded:
    """What one forward pass recorded.

    Attributes:
        maps: Maps (B, C, H, W) by layer.
        deviations: Deviations (B,) of normalizations, each with the natural one.
        means: Spatial means (B, C) float32 by depth.
    """

    maps: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    deviations: list[tuple[Tensor, float]] = dataclasses.field(default_factory=list)
    means: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class _Float32Maps(Mapping[str, Tensor]):
    """Maps by layer, each converted to float32 when it is read: most objectives read one channel of one map."""

    def __init__(self, maps: Mapping[str, Tensor]) -> None:
        self._maps = maps

    def __getitem__(self, layer: str) -> Tensor:
        return self._maps[layer].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)


# Functions from images (B, C, H, W) to what a forward pass recorded, and to the activations of layers by name.
_Run = Callable[[Tensor], _Recorded]
_RunSeeds = Callable[[Tensor], Mapping[str, Tensor]]


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

    def __init__(self, job: RenderJob, model: Model, layer: str, run: _Run, run_seeds: _RunSeeds) -> None:
        self.model = model
        self._preset, self._layer, self._run, self._run_seeds = job.preset, layer, run, run_seeds
        self._layer_mean = None if job.layer_mean is None else job.layer_mean[None, :, None, None]
        preset = job.preset
        self._batch_terms = [term for term in preset.couplings if term.space == "layer"]

    def __call__(
        self, images: Tensor, channels: Tensor, variants: Tensor, compared: ComparedImages = NOTHING_COMPARED
    ) -> ForwardResult:
        """Run the network on (B, C, H, W) images in [0, 1] that belong to units `channels` and `variants`, (B,)."""
        preset, recorded = self._preset, self._run(images)
        maps, activations = _Float32Maps(recorded.maps), recorded.maps[self._layer]
        target = self._target_maps(compared.targets)
        values = preset.objective.value(Activations(activations, channels, variants, preset.variants, maps, target))
        if preset.negative:
            values = -values
        if not torch.is_grad_enabled():
            return ForwardResult(values, None, activations, recorded.means)
        penalties = weighted_penalties(preset.network_penalties, recorded.deviations)
        distances = self._distances(maps, compared.seeds)
        if not self._batch_terms and penalties is None:
            return ForwardResult(values, None, activations, recorded.means, distances)
        total = torch.zeros_like(values)
        if penalties is not None:
            total = total - penalties
        for term in self._batch_terms:
            term_maps = maps[getattr(term, "layer", None) or self._layer]
            groups = term_maps.unflatten(0, (-1, preset.variants))
            total = total + term.weight * term.value(groups).flatten()
        return ForwardResult(values, total * values.detach().abs(), activations, distances=distances)

    @torch.no_grad()
    def _target_maps(self, targets: Tensor | None) -> Tensor | None:
        """Return what the objective compares with: `Activations.compared`."""
        return self._layer_mean if targets is None else self._run(targets).maps[self._layer].float()

    def _distances(self, maps: Mapping[str, Tensor], seeds: Tensor | None) -> Tensor | None:
        """Return the regularizers in the space of a layer, (D, B), for maps (B, C, H, W) by layer."""
        if not self._preset.layer_penalties or seeds is None:
            return None
        with torch.no_grad():
            references = self._run_seeds(seeds)
        names = [(term, term.layer or self._layer) for term in self._preset.layer_penalties]
        return torch.stack([term.value(maps[name], references[name].float()) for term, name in names])


@contextlib.contextmanager
def objective_forward(
    job: RenderJob, model: Model, stage: Stage, penalized: bool = False, depths: Sequence[Layer] = ()
) -> Iterator[ObjectiveForward]:
    """Return the forward pass of a stage through `model`; its hooks are removed on exit.

    Args:
        job: What is visualized.
        model: The network, or a variant of it.
        stage: The stage of the schedule.
        penalized: Whether to compute the penalties on activations.
        depths: Layers whose spatial means are recorded, if the network computes them for the images and before the
            layer of the objective.
    """
    preset = job.preset
    layer = job.layers[stage.layer] if stage.layer else job.layer
    captured = {name: read.ungated for name, read in _captured(job, layer).items()}
    seed_layers = {term.layer or layer.name: captured[term.layer or layer.name] for term in preset.layer_penalties}
    normalizations = job.normalizations if penalized else ()
    with (
        _recording(model, list(captured.values()), normalizations, depths) as run,
        capture(model, list(seed_layers.values())) as run_seeds,
    ):
        yield ObjectiveForward(job, model, layer.name, run, run_seeds)


def _captured(job: RenderJob, layer: Layer) -> dict[str, Layer]:
    """Return the layers that the objective on `layer`, batch terms and regularizers read, by name."""
    captured = {layer.name: layer}
    for name in job.preset.others:
        if name not in captured and not _only_in_schedule(job.preset, name):
            captured[name] = job.layers[name]
    return captured


@contextlib.contextmanager
def _recording(
    model: Model, layers: Sequence[Layer], normalizations: Sequence[Normalization], depths: Sequence[Layer]
) -> Iterator[_Run]:
    """Provide a function from images to the maps of layers, deviations of normalizations and means at depths."""
    if not normalizations and not depths:
        with capture(model, layers) as forward:
            yield lambda images: _Recorded(forward(images))
        return
    # The maps of normalizations and depths are not kept: all together are many times as large as those of the layers.
    by_tap = {id(normalization.tap): normalization for normalization in normalizations}
    names, depth_names = {layer.name for layer in layers}, {depth.name for depth in depths}
    recorded = _Recorded()
    unchanged = _Unchanged()

    def record(layer: Layer, maps: Tensor) -> None:
        normalization = by_tap.get(id(layer))
        if normalization is not None:
            kept = unchanged.of(id(layer), maps)
            recorded.deviations.append((normalization.deviation(kept), normalization.natural))
            return
        if layer.name in depth_names:
            recorded.means[layer.name] = spatial_means(maps)
        if layer.name in names:
            recorded.maps[layer.name] = maps.clone()  # the rest of the forward pass may change it in place

    taps = [normalization.tap for normalization in normalizations]
    with capture(model, [*layers, *taps], each=record, optional=depths) as forward:

        def run(images: Tensor) -> _Recorded:
            nonlocal recorded
            recorded = _Recorded()
            forward(images)
            unchanged.learn()
            return recorded

        yield run


class _Unchanged:
    """Returns tensors of a forward pass as the backward pass needs them: a copy of those that the network overwrites.

    A residual block may add its input to the output of a normalization in place (`out += identity`, as in torchvision's
    ResNets). Which tensors are overwritten is learnt in the first pass, in which all are copied.
    """

    def __init__(self) -> None:
        self._overwritten: set[int] | None = None
        self._watched: list[tuple[int, Tensor, int]] = []

    def of(self, key: int, tensor: Tensor) -> Tensor:
        """Return the tensor, or a copy; `key` names it in all passes."""
        if self._overwritten is None:
            self._watched.append((key, tensor, tensor._version))
            return tensor.clone()
        return tensor.clone() if key in self._overwritten else tensor

    def learn(self) -> None:
        """End a pass."""
        if self._overwritten is None:
            self._overwritten = {key for key, tensor, version in self._watched if tensor._version != version}
            self._watched.clear()


def _only_in_schedule(preset: Preset, layer: str) -> bool:
    """Return whether a layer is used only by a stage of the schedule: neither by the objective nor by a batch term."""
    used = [Unit.parse(unit).layer for unit in preset.objective.units]
    used += [getattr(term, "layer", None) for term in preset.couplings]
    used += preset.penalty_layers
    return layer not in used
