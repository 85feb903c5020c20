"""The optimisation loop: a batch of units of one layer → their pictures.

Pictures in a batch share only the network's forward and backward pass: each has its own start, its own
shaking and its own optimiser state, and the gradient is that of the *sum* over the batch; a mean would let the
batch size into Adam's epsilon.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS, redirected, silent
from pipeline.core.metric_specs import MEASURES
from pipeline.core.registry import registered_name
from pipeline.core.seeds import seed_of
from pipeline.data.natural_spectrum import packaged
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model
from pipeline.visualization import metrics
from pipeline.visualization.filters import rms
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.objectives import Activations
from pipeline.visualization.parameterizations import FromImage
from pipeline.visualization.preset import Preset, Size, canvas_size
from pipeline.visualization.schedules import Stage, StepSettings, expand_schedule, flat
from pipeline.visualization.transforms import STANDARD, centre, draw, shake

ROBUST_COPIES = 16
MARKS = 16

Unit = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Picture:
    """The finished picture of a unit and the numbers that prove it.

    `image` is (H, W, C) uint8. `activation` is the objective on exactly this image, untransformed; `robust`
    its mean over 16 copies shaken by the standard transforms, whatever the preset's own; `start` its value before
    the first step. `status` is converged, limit (all steps done, still rising), retried (rose with another seed)
    or failed; `reason` says why it failed. `trace` holds 16 values of the objective, evenly over the steps.
    `response` is the largest answer of each of the layer's channels to the image, (C,) float16; `measures` are
    `quality.MEASURES` of it.
    """

    channel: int
    variant: int
    image: np.ndarray
    activation: float
    robust: float
    start: float
    seed: int
    status: str
    reason: str
    steps: int
    seconds: float
    trace: np.ndarray
    response: np.ndarray
    measures: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is rendered on: everything but the units, the same for all attempts."""

    model: Model
    lowered: Model
    exact: Model
    layer: Layer
    config: Preset
    seed: int
    size: Size
    others: Mapping[str, Layer]
    ensemble: Sequence[Model]
    starts: Mapping[Unit, Tensor]
    stop: Callable[[], None]

    @property
    def networks(self) -> tuple[Model, ...]:
        """The networks of the steps: the model, then the others of an ensemble."""
        return (self.lowered, *self.ensemble)

    def canvas(self, stage: Stage) -> Size:
        """Size of the canvas in a stage, margins included."""
        return self._part(stage.canvas, 2 * self.config.margin)

    def view(self, stage: Stage) -> Size:
        """Size of what the network sees in a stage."""
        return self._part(stage.canvas if stage.view is None else stage.view, 0)

    def _part(self, share: float, more: int) -> Size:
        return round(self.size[0] * share) + more, round(self.size[1] * share) + more


def render(
    model: Model,
    layer: Layer,
    units: Sequence[Unit],
    config: Preset,
    seed: int,
    size: Size | None = None,
    stop: Callable[[], None] = lambda: None,
    *,
    lowered: Model | None = None,
    exact: Model | None = None,
    others: Mapping[str, Layer] | None = None,
    ensemble: Sequence[Model] = (),
    starts: Mapping[Unit, Tensor] | None = None,
) -> list[Picture]:
    """Pictures for `units`, pairs of (channel, variant), all in one batch on the model's device.

    They are `size` = (height, width) pixels; None leaves that to `canvas_size`. `lowered` is a twin of `model` that
    steps are made on, `exact` one that finished pictures are measured on, where there are faster ones: the second is
    the same function to float32's rounding. `others` are the layers that `config.others` names, `ensemble` the
    networks of an ensemble beside `model`, `starts` the photographs (C, H, W) in [0, 1] that an `image` canvas starts
    from, margins included.

    A picture whose objective did not rise, or went through NaN, is tried again with another seed and half the
    learning rate, at most `config.attempts` times in all; then it is kept and marked `failed`. Pictures that a
    coupling holds together are tried again together. `stop` is called at every step and may raise.
    """
    size = size or canvas_size(layer, model.recipe.size, config.size)
    lowered = model if lowered is None or config.requires_original_weights else lowered
    exact = model if exact is None or config.requires_original_weights else exact
    job = Job(model, lowered, exact, layer, config, seed, size, others or {}, ensemble, starts or {}, stop)
    done: dict[Unit, Picture] = {}
    todo = list(units)
    for attempt in range(config.attempts):
        pictures = _attempt(job, todo, attempt)
        failed = {p.channel if config.couplings else (p.channel, p.variant) for p in pictures if p.status == "failed"}
        again = {u for u in todo if (u[0] if config.couplings else u) in failed}
        last = attempt == config.attempts - 1
        done.update({(p.channel, p.variant): p for p in pictures if last or (p.channel, p.variant) not in again})
        todo = [u for u in todo if u in again]
        if not todo:
            break
    return [done[unit] for unit in units]


class _Batch:
    """The pictures still being worked on; `keep` gives up the places of the others."""

    def __init__(self, job: Job, units: Sequence[Unit], attempt: int) -> None:
        config, model = job.config, job.model
        self.units = list(units)
        self.seeds, starts, draws, proofs = [], [], [], []
        for channel, variant in units:
            own = 0 if config.objective.aligned else variant
            kind = registered_name(config.objective)
            seed = seed_of(job.seed, model.name, job.layer.name, channel, kind, own, attempt)
            # The generator is on the CPU whatever the device, so that starts are the same on all machines.
            generator = torch.Generator().manual_seed(seed)
            starts.append(self._start(job, (channel, variant), generator))
            draws.append(draw(config.transforms, generator, config.steps))
            proofs.append(draw(STANDARD, generator, ROBUST_COPIES))
            self.seeds.append(seed)
        device = next(model.module.parameters()).device
        self.places = torch.arange(len(units), device=device)
        self.first = torch.stack(starts).to(device)
        self.parameters = self.first.clone().requires_grad_(True)
        self.shaking = torch.stack(draws, dim=1).to(device)  # (steps, B, draws)
        self.proofs = torch.stack(proofs, dim=1).to(device)  # (copies, B, draws)
        self.channels = torch.tensor([c for c, _ in units], device=device)
        self.variants = torch.tensor([v for _, v in units], device=device)
        self.state = config.optimizer.start(self.parameters, config.canvas.paired)
        self.since = 0

    @staticmethod
    def _start(job: Job, unit: Unit, generator: torch.Generator) -> Tensor:
        canvas, side = job.config.canvas, job.canvas(job.config.stages[0])
        parameters = canvas.start(generator, job.model.recipe.channels, side)
        if isinstance(canvas, FromImage):
            image = job.starts[unit]
            fitted = torch.nn.functional.interpolate(image[None], side, mode="bilinear", antialias=True)
            parameters = canvas.fit(fitted)[0] + parameters
        return parameters

    def keep(self, which: Tensor) -> None:
        """Go on with the pictures `which` (bool, of those still here) only."""
        self.units = [u for u, kept in zip(self.units, which.tolist(), strict=True) if kept]
        self.places, self.channels, self.variants = self.places[which], self.channels[which], self.variants[which]
        self.parameters = self.parameters.detach()[which].requires_grad_(True)
        self.shaking = self.shaking[:, which]
        self.state = tuple(s[which] for s in self.state)

    def resize(self, job: Job, old: Size, new: Size) -> None:
        """Go on at another size of canvas, with a fresh optimiser state."""
        grown = job.config.canvas.resized(self.parameters.detach(), old, new)
        self.parameters = grown.requires_grad_(True)
        self.state, self.since = job.config.optimizer.start(self.parameters, job.config.canvas.paired), 0


def _attempt(job: Job, units: Sequence[Unit], attempt: int) -> list[Picture]:
    began = time.perf_counter()
    config = job.config
    batch = _Batch(job, units, attempt)
    everyone, final = batch.places.clone(), batch.parameters.detach().clone()
    ran = torch.full((len(units),), config.steps)
    plan = expand_schedule(config.schedule, config.steps)
    trace = torch.zeros(config.steps, len(units), device=batch.first.device)
    anchor = config.canvas.image(batch.first, job.canvas(config.stages[0])) if _anchored(config) else batch.first
    stages, last_stage = config.stages, plan[-1].stage
    final_size = job.canvas(stages[last_stage])
    look = config.stop.every(config.steps)
    at: int | None = None
    with contextlib.ExitStack() as network, contextlib.ExitStack() as stack:
        drawn = [
            network.enter_context(a.applied(job.model.module, seed_of(job.seed, job.model.name, i, registered_name(a))))
            for i, a in enumerate(config.augmentations)
        ]
        forwards: list[_Forward] = []
        for step, moment in enumerate(plan):
            job.stop()
            stage = stages[moment.stage]
            if moment.stage != at:
                stack.close()
                forwards = [stack.enter_context(_forward(job, m, stage)) for m in job.networks]
                if at is not None and job.canvas(stages[at]) != job.canvas(stage):
                    batch.resize(job, job.canvas(stages[at]), job.canvas(stage))
                at = moment.stage
            for one in drawn:
                one.to(step)
            values, gradient = _gradient(job, batch, forwards, moment, stage, step, anchor[batch.places])
            trace[step, batch.places] = values
            rate = config.optimizer.rate(step, config.steps) * moment.lr * 0.5**attempt
            config.optimizer.step(batch.parameters, gradient, batch.state, batch.since, rate)
            batch.since += 1
            with torch.no_grad():
                config.canvas.project(batch.parameters)
                if moment.blur > 0:
                    batch.parameters.copy_(config.canvas.blurred(batch.parameters, moment.blur, job.canvas(stage)))
            if (step + 1) % look == 0 and step + 1 < config.steps and moment.stage == last_stage:
                finished = config.stop.finished(trace[: step + 1, batch.places])
                if config.couplings:
                    finished = finished.view(-1, config.variants).all(1).repeat_interleave(config.variants)
                if bool(finished.any()):
                    if final.shape[1:] != batch.parameters.shape[1:]:
                        final = batch.parameters.new_zeros(len(units), *batch.parameters.shape[1:])
                    final[batch.places[finished]] = batch.parameters.detach()[finished]
                    ran[batch.places[finished].cpu()] = step + 1
                    if bool(finished.all()):
                        batch.keep(~finished)
                        break
                    batch.keep(~finished)
        if final.shape[1:] != batch.parameters.shape[1:]:
            final = batch.parameters.new_zeros(len(units), *batch.parameters.shape[1:])
        final[batch.places] = batch.parameters.detach()
        stack.close()
        for one in drawn:
            one.off()
        with torch.no_grad(), _forward(job, job.exact, Stage()) as forward:
            channels, variants = (torch.tensor(n, device=everyone.device) for n in zip(*units, strict=True))

            def value(images: Tensor) -> Tensor:
                return forward(images, channels, variants)[0]

            start = centre(config.canvas.image(batch.first, job.canvas(stages[0])), job._part(stages[0].canvas, 0))
            if start.shape[-2:] != job.size:
                start = torch.nn.functional.interpolate(start, job.size, mode="bilinear", antialias=True)
            before = value(saved(start))
            images = saved(centre(config.canvas.image(final, final_size), job.size))
            after, _, answers = forward(images, channels, variants)
            robust = torch.stack([value(shake(images, STANDARD, u, job.size)) for u in batch.proofs]).mean(0)
        peaks, measured = _judged(job, images, answers, channels)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    sign = -1 if config.negative else 1
    numbers = torch.stack([after, robust, before]).mul(sign).T.cpu().tolist()
    each = (time.perf_counter() - began) / len(units)
    traces = trace.cpu()
    pictures = []
    for i, (channel, variant) in enumerate(units):
        own = traces[: int(ran[i]), i]
        activation, held, begun = numbers[i]
        status, reason = _verdict(own, sign * activation, sign * begun, len(own) < config.steps, attempt)
        marks = np.linspace(0, len(own) - 1, min(config.steps, MARKS)).round().astype(int)
        told = sign * own[torch.from_numpy(marks)].numpy()
        pictures.append(
            Picture(
                channel=channel, variant=variant, image=pixels[i], activation=activation, robust=held, start=begun,
                seed=batch.seeds[i], status=status, reason=reason, steps=len(own), seconds=each, trace=told,
                response=peaks[i], measures={name: values[i] for name, values in measured.items()},
            )
        )  # fmt: skip
    return pictures


def _judged(job: Job, images: Tensor, answers: Tensor, channels: Tensor) -> tuple[np.ndarray, dict[str, list[float]]]:
    """(B, C) float16 largest of the layer's `answers` to finished pictures, and `quality.MEASURES` of each."""
    config, layer, maps = job.config, job.layer, answers.flatten(2)
    # Units are ranked by what the objective raises: the mean of a map, or its largest value.
    raised = -maps if config.negative else maps
    strengths = raised.amax(2) if config.objective.natural == "max" else raised.mean(2)
    ranks = metrics.rank(strengths, channels)
    if config.objective.whole:  # such a picture is no unit's
        ranks = torch.full_like(ranks, torch.nan)
    size = job.model.recipe.size
    apart = max(layer.field.stride) if layer.field else round(min(size[0] / layer.height, size[1] / layer.width))
    found = metrics.of_pictures(images, metrics.strides(apart), packaged()) | {"rank": ranks}
    return metrics.kept(maps.amax(2)), {name: found[name].tolist() for name in MEASURES}


def _verdict(trace: Tensor, after: float, before: float, early: bool, attempt: int) -> tuple[str, str]:
    """(status, reason) of a picture, by its objective at each step and before and after; signs as raised."""
    lost = (~torch.isfinite(trace)).nonzero()
    if len(lost):
        return "failed", f"the objective was not a finite number at step {int(lost[0])}"
    if not after > before:
        if bool((trace == trace[0]).all()):
            return "failed", "no gradient: the unit stayed silent at every step"
        return "failed", "the objective did not rise over the start"
    if attempt > 0:
        return "retried", ""
    width = max(1, len(trace) // 10)
    return ("converged" if early or bool(flat(trace[:, None], width, 0.02)) else "limit"), ""


_Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor]]


@contextlib.contextmanager
def _forward(job: Job, model: Model, stage: Stage) -> Iterator[_Forward]:
    """A function (images, channels, variants) → ((B,) values, (B,) couplings or None, the layer's maps) for a stage."""
    config = job.config
    own = job.others[stage.layer] if stage.layer else job.layer
    taps = {own.name: own, **{n: job.others[n] for n in config.others if n != own.name and not _head(config, n)}}
    groups = (-1, config.variants)
    terms = [c for c in config.couplings if c.space == "layer"]
    with capture(model, list(taps.values())) as run:

        def forward(images: Tensor, channels: Tensor, variants: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
            maps = {name: found.float() for name, found in run(images).items()}
            responses = Activations(maps[own.name], channels, variants, config.variants, maps)
            values = config.objective.value(responses)
            if config.negative:
                values = -values
            if not terms or not torch.is_grad_enabled():
                return values, None, maps[own.name]
            total = torch.zeros_like(values)
            for term in terms:
                seen = maps[getattr(term, "layer", None) or own.name]
                total = total + term.weight * term.value(seen.unflatten(0, groups)).flatten()
            return values, total * values.detach().abs(), maps[own.name]

        yield forward


def _head(config: Preset, name: str) -> bool:
    """True for a layer that only some stage of the schedule needs."""
    elsewhere = [unit.rpartition(":")[0] for unit in config.objective.units]
    elsewhere += [getattr(c, "layer", None) for c in config.couplings]
    return name not in elsewhere


def _member(config: Preset, step: int) -> int:
    """Which of the model and its ensemble a step uses."""
    return next((a.member(step) for a in config.augmentations if isinstance(a, Ensemble)), 0)


def _anchored(config: Preset) -> bool:
    return any(p.anchored for p in config.penalties)


def _gradient(
    job: Job, batch: _Batch, forwards: Sequence[_Forward], moment: StepSettings, stage: Stage, step: int, anchor: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,) objective values and the gradient of all terms with respect to the parameters, at one step."""
    config = job.config
    member = _member(config, step)
    forward, network = forwards[member], job.networks[member]
    view = job.view(stage)
    painted = config.canvas.image(batch.parameters, job.canvas(stage))
    images = painted.detach().requires_grad_(True)

    def excite(images: Tensor, which: slice | Tensor = slice(None)) -> tuple[Tensor, Tensor]:
        seen = shake(images, config.transforms, batch.shaking[step, which], view)
        values, coupled, _ = forward(seen, batch.channels[which], batch.variants[which])
        total = values.sum() if coupled is None else values.sum() + coupled.sum()
        return values.detach(), torch.autograd.grad(total, images)[0]

    values, gradient = excite(images)
    if step < REDIRECTED_STEPS:
        dead = silent(gradient).flatten()
        if bool(dead.any()):
            # A coupling compares all pictures of a channel.
            groups = dead.view(-1, config.variants if config.couplings else 1)
            again = groups.any(1).repeat_interleave(groups.shape[1])
            with redirected(network.module):
                _, helped = excite(images.detach()[again].requires_grad_(True), again)
            gradient = gradient.index_put((dead,), helped[dead[again]])
    pulls: dict[bool, Tensor] = {}
    for penalty in config.penalties:
        if _anchored(config) and anchor.shape != images.shape:
            anchor = torch.nn.functional.interpolate(anchor, images.shape[-2:], mode="bilinear", antialias=True)
        value = moment.penalties * penalty.weight * penalty.value(images, anchor).sum()
        pulls[penalty.relative] = pulls.get(penalty.relative, torch.zeros(())) + value
    for coupling in config.couplings:
        if coupling.space == "image":
            groups = images.unflatten(0, (-1, config.variants))
            pulls[True] = pulls.get(True, torch.zeros(())) - coupling.weight * coupling.value(groups).sum()
    size = rms(gradient) if pulls else gradient
    for relative, pull in pulls.items():
        (against,) = torch.autograd.grad(pull, images)
        gradient = gradient - (size * against if relative else against)
    for preconditioner in config.preconditioners:
        gradient = preconditioner.apply(gradient, moment.gradient_blur)
    (own,) = torch.autograd.grad(painted, batch.parameters, gradient)
    return values, own


def saved(images: Tensor) -> Tensor:
    """Images in [0, 1] as they will be after saving in 8 bits; NaN becomes black."""
    return (images.nan_to_num(0.0).clamp(0, 1) * 255).round() / 255
