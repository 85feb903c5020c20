"""Training of a top-k sparse autoencoder on the activations of a layer (Gao et al. 2024, arXiv 2406.04093)."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.seeds import seed_of
from pipeline.dictionaries.config import DictionaryConfig
from pipeline.layers.dictionary_files import BIAS, CENTER, DECODER, ENCODER, Arrays

# Weight of the auxiliary loss of dead latents, and after how many rows without activity a latent counts as dead, as a
# number of passes through the data.
AUXILIARY, DEAD_PASSES = 1 / 32, 2.0
# The learning rate rises in the first and falls linearly to 0 in the last so much of the steps.
WARM_UP, COOL_DOWN = 0.02, 0.2


@dataclasses.dataclass
class TrainingState:
    """Everything that training goes on with.

    Attributes:
        step: Number of finished steps.
        parameters: W_enc (C, N), W_dec (N, C), b_enc (N,) and b_dec (C,), in units of the scaled activations.
        moments: Adam's first and second moments, by parameter.
        silent: Rows since each latent was active, (N,).
    """

    step: int
    parameters: dict[str, Tensor]
    moments: dict[str, tuple[Tensor, Tensor]]
    silent: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return all but the step by name, to be stored."""
        moments = {f"{name}.{i}": part for name, parts in self.moments.items() for i, part in enumerate(parts)}
        stored = {**self.parameters, **moments, "silent": self.silent}
        return {name: tensor.detach().contiguous() for name, tensor in stored.items()}

    @classmethod
    def of(cls, step: int, tensors: Mapping[str, Tensor]) -> "TrainingState":
        """Return the state of some tensors of `tensors`."""
        names = (ENCODER, DECODER, BIAS, CENTER)
        moments = {name: (tensors[f"{name}.0"], tensors[f"{name}.1"]) for name in names}
        return cls(step, {name: tensors[name] for name in names}, moments, tensors["silent"])


@dataclasses.dataclass(frozen=True)
class Scaling:
    """x → (x − center) / scale: zero mean, and a mean squared norm of C.

    Attributes:
        center: Mean of the rows, (C,).
        scale: Root mean square of the centered rows' entries.
    """

    center: Tensor
    scale: float

    @classmethod
    def of(cls, rows: Tensor) -> "Scaling":
        """Return the scaling of rows (n, C)."""
        center = rows.double().mean(0)
        return cls(center.float(), float((rows.double() - center).square().mean().sqrt()) or 1.0)


def initial_state(channels: int, latents: int, seed: int) -> TrainingState:
    """Return the state before the first step: random unit directions, the encoder is the transposed decoder."""
    generator = torch.Generator().manual_seed(seed_of(seed, "autoencoder", channels, latents))
    decoder = functional.normalize(torch.randn(latents, channels, generator=generator), dim=1)
    parameters = {
        ENCODER: decoder.T.contiguous().clone(),
        DECODER: decoder,
        BIAS: torch.zeros(latents),
        CENTER: torch.zeros(channels),
    }
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in parameters.items()}
    return TrainingState(0, parameters, moments, torch.zeros(latents))


def train(
    rows: np.ndarray,
    config: DictionaryConfig,
    state: TrainingState,
    after_step: Callable[[TrainingState, float], None] = lambda *_: None,
) -> Arrays:
    """Train to the end and return the arrays of the dictionary, in units of the activations.

    A step reads random rows, drawn from the seed and the number of the step: training that goes on from a stored state
    gives the same as training without a break.

    Args:
        rows: Activations, (n, C) float32.
        config: `k`, `steps`, `batch`, `rate` and `seed` are used.
        state: The state to go on from; it is changed.
        after_step: Called with the state and the share of the variance that was not explained in the step.
    """
    data = torch.from_numpy(rows)
    scaling = Scaling.of(data)
    dead_after = DEAD_PASSES * len(rows)
    while state.step < config.steps:
        generator = torch.Generator().manual_seed(seed_of(config.seed, "batch", state.step))
        batch = data[torch.randint(len(rows), (config.batch,), generator=generator)]
        error = _step(state, (batch - scaling.center) / scaling.scale, config, dead_after)
        state.step += 1
        after_step(state, error)
    return _unscaled(state.parameters, scaling)


def learning_rate(config: DictionaryConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, constant, linear fall to 0."""
    done = (step + 1) / config.steps
    return config.rate * min(1.0, done / WARM_UP, (1 - step / config.steps) / COOL_DOWN)


def _step(state: TrainingState, x: Tensor, config: DictionaryConfig, dead_after: float) -> float:
    """Do one step on scaled rows (B, C) and return the unexplained share of their variance."""
    parameters = {name: value.requires_grad_() for name, value in state.parameters.items()}
    encoder, decoder, bias, center = (parameters[name] for name in (ENCODER, DECODER, BIAS, CENTER))
    values = (x - center) @ encoder + bias
    top = values.topk(min(config.k, values.shape[1]), dim=1)
    kept = top.values.relu()
    reconstruction = _decoded(top.indices, kept, decoder) + center
    error = (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum().clamp_min(1e-12)
    loss = error
    dead = torch.nonzero(state.silent >= dead_after).flatten()
    if len(dead):
        loss = loss + AUXILIARY * _auxiliary(values[:, dead], decoder[dead], (x - reconstruction).detach())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    with torch.no_grad():
        # The part of a gradient along its row would only change the norm, which is kept at 1.
        along = (gradients[1] * decoder).sum(1, keepdim=True)
        gradients = (gradients[0], gradients[1] - along * decoder, *gradients[2:])
        for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
            _adam(value, gradient, state.moments[name], state.step + 1, learning_rate(config, state.step))
        decoder.copy_(functional.normalize(decoder, dim=1))
        state.silent += len(x)
        state.silent[top.indices[kept > 0]] = 0
    state.parameters = {name: value.detach() for name, value in parameters.items()}
    return float(error.detach())


def _decoded(indices: Tensor, values: Tensor, decoder: Tensor) -> Tensor:
    """Return the sum of the decoder's rows `indices` (B, k) with weights `values` (B, k)."""
    return functional.embedding_bag(indices, decoder, per_sample_weights=values, mode="sum")


def _auxiliary(values: Tensor, decoder: Tensor, residual: Tensor) -> Tensor:
    """Return how much of a residual the dead latents leave unexplained, relative to its size (section A.2)."""
    top = values.topk(min(max(1, residual.shape[1] // 2), values.shape[1]), dim=1)
    found = _decoded(top.indices, top.values, decoder)
    return (residual - found).square().sum() / residual.square().sum().clamp_min(1e-12)


def _adam(value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int, rate: float) -> None:
    """Do one step of Adam (Kingma & Ba 2015) in place, with β₁ = 0.9 and β₂ = 0.999."""
    first, second = moments
    first.lerp_(gradient, 1 - 0.9)
    second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
    denominator = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
    value.addcdiv_(first, denominator, value=-rate / (1 - 0.9**step))


def _unscaled(parameters: dict[str, Tensor], scaling: Scaling) -> Arrays:
    """Return the arrays for activations as they are; values of latents are in their units, rows of the decoder unit."""
    encoder = parameters[ENCODER].detach()
    inner = parameters[CENTER].detach()
    center = scaling.center + scaling.scale * inner
    bias = scaling.scale * parameters[BIAS].detach() - center @ encoder
    arrays = {ENCODER: encoder, DECODER: parameters[DECODER].detach(), BIAS: bias, CENTER: center}
    return {name: value.numpy().astype(np.float32) for name, value in arrays.items()}
