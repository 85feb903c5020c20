"""Perturbations of the network during optimization: of its weights, its activations, or the checkpoint.

They regularize a visualization by varying the network instead of the image. Random numbers depend on the seed of the
run, the network and the step, and not on the batch: all images of a run see the same perturbed networks, unless
`per_image` is set. The network is restored afterwards.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError
from pipeline.core.registry import ADDED_LATER, Registry
from pipeline.core.seeds import seed_of
from pipeline.kernels.transfers import upload

AUGMENTATIONS = Registry("augmentation")

# Threads that draw noise beside a GPU: 25 million numbers take a quarter of a second on one.
DRAWING_THREADS = 8


class ActivePerturbation:
    """A perturbation that is applied to a network; this base class does nothing."""

    def set_step(self, step: int, progress: float = 0.0) -> None:
        """Perturb the network as an optimization step requires.

        Args:
            step: The step, from 0.
            progress: Fraction of the optimization that is done before it, in [0, 1).
        """


@dataclasses.dataclass(frozen=True)
class NetworkPerturbation:
    """Base class of network perturbations.

    Attributes:
        every: Number of steps after which the perturbation is drawn again.
        per_image: Whether each image has draws of its own. Every image is then optimized alone, which takes several
            times as long.
    """

    every: Annotated[int, Field(ge=1)] = 1
    per_image: bool = dataclasses.field(default=False, metadata=ADDED_LATER, kw_only=True)

    def check(self) -> None:
        """Raise `AtlasError` for settings that are invalid beyond the limits of their fields; there are none here."""

    @contextlib.contextmanager
    def applied(self, module: nn.Module, seed: int) -> Iterator[ActivePerturbation]:
        """Apply the perturbation to `module`, and restore it on exit; `set_step` draws the perturbation of a step."""
        raise NotImplementedError
        yield


@AUGMENTATIONS.add("weight_noise")
@dataclasses.dataclass(frozen=True)
class WeightNoise(NetworkPerturbation):
    """Gaussian noise on every weight tensor of two or more dimensions.

    Additive noise has the standard deviation `sd` times that of the tensor: w + sd · std(w) · n. Multiplicative noise
    is that of NoiseGrad (Bykov et al., "NoiseGrad: Enhancing Explanations by Introducing Stochasticity to Model
    Weights", 2022): w · (1 + sd · n). With `anneal` the standard deviation falls linearly to 0 over the steps, so that
    the image is finished with the network itself. Biases and normalization parameters are not changed.
    """

    sd: float = 0.1
    kind: Literal["additive", "multiplicative"] = dataclasses.field(default="additive", metadata=ADDED_LATER)
    anneal: bool = dataclasses.field(default=False, metadata=ADDED_LATER)

    @contextlib.contextmanager
    def applied(self, module: nn.Module, seed: int) -> Iterator[ActivePerturbation]:
        """Add noise to the weights in place; on exit, copy the original weights back."""
        weights = {name: p for name, p in module.named_parameters() if p.ndim > 1 and p.numel() > 1}
        active = _ActiveWeightNoise(weights, self, seed)
        try:
            yield active
        finally:
            active.restore()


class _ActiveWeightNoise(ActivePerturbation):
    """Noise on the weights of a network.

    It is drawn on the CPU for every device, so that all machines draw the same. Beside a GPU, which would wait for it,
    threads draw the noise of the next step during the present one.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], settings: WeightNoise, seed: int) -> None:
        self._weights, self._settings, self._seed = weights, settings, seed
        self._originals = {name: weight.detach().clone() for name, weight in weights.items()}
        self._drawn_for: tuple[int, float] | None = None
        devices = {weight.device.type for weight in weights.values()}
        self._threads = None if devices == {"cpu"} else ThreadPoolExecutor(DRAWING_THREADS)
        self._ahead: tuple[int, dict[str, Future[Tensor]]] = (-1, {})

    @torch.no_grad()
    def set_step(self, step: int, progress: float = 0.0) -> None:
        draw = step // self._settings.every
        sd = self._settings.sd * (1 - progress if self._settings.anneal else 1)
        if (draw, sd) == self._drawn_for:
            return
        self._drawn_for = draw, sd
        for name, weight, noise in self._noise(draw):
            original = self._originals[name]
            on_device = upload(noise, weight.device).to(weight.dtype)
            size = original.std() if self._settings.kind == "additive" else original
            weight.copy_(original + on_device * (sd * size))

    def _noise(self, draw: int) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Return the name, the tensor and the noise of each weight."""
        if self._threads is None:
            for name, weight in self._weights.items():
                yield name, weight, self._drawn(name, weight.shape, draw)
            return
        number, pending = self._ahead
        if number != draw:
            pending = self._start_drawing(draw)
        self._ahead = draw + 1, self._start_drawing(draw + 1)
        for name, weight in self._weights.items():
            yield name, weight, pending[name].result()

    def _start_drawing(self, draw: int) -> dict[str, Future[Tensor]]:
        assert self._threads is not None
        return {n: self._threads.submit(self._drawn, n, weight.shape, draw) for n, weight in self._weights.items()}

    def _drawn(self, name: str, shape: torch.Size, draw: int) -> Tensor:
        # One generator for each tensor: its noise does not depend on the other tensors.
        generator = Generator().manual_seed(seed_of(self._seed, name, draw))
        return torch.randn(shape, generator=generator)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the original weights back."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for name, weight in self._weights.items():
            weight.copy_(self._originals[name])


@AUGMENTATIONS.add("dropout")
@dataclasses.dataclass(frozen=True)
class Dropout(NetworkPerturbation):
    """Channel dropout: activations of a channel are set to 0 with probability `p`, the others divided by 1 - p.

    It applies to the inputs of all convolutions and linear layers except the first, whose input is the image. The same
    channels are dropped for all images.
    """

    p: float = 0.1

    def check(self) -> None:
        """Also check that `p` is a probability below 1."""
        super().check()
        if not 0 <= self.p < 1:
            raise AtlasError(f"render.augmentations.dropout.p={self.p} must lie in [0, 1).")

    @contextlib.contextmanager
    def applied(self, module: nn.Module, seed: int) -> Iterator[ActivePerturbation]:
        """Register hooks before the layers; remove them on exit."""
        layers = {name: m for name, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        active = _ActiveDropout(self, seed)
        handles = []
        for name, layer in list(layers.items())[1:]:  # the input of the first one is the image

            def drop(layer: nn.Module, args: tuple[Tensor, ...], name: str = name) -> tuple[Tensor, ...] | None:
                return active.drop(name, layer, args)

            handles.append(layer.register_forward_pre_hook(drop))
        try:
            yield active
        finally:
            for handle in handles:
                handle.remove()


class _ActiveDropout(ActivePerturbation):
    def __init__(self, settings: Dropout, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self._draw: int | None = None

    def set_step(self, step: int, progress: float = 0.0) -> None:
        self._draw = step // self._settings.every

    def drop(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Return the arguments of a layer with channels dropped; None, which changes nothing, before the first step."""
        if self._draw is None or not args:
            return None
        p = self._settings.p
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        num_channels = args[0].shape[axis]
        generator = Generator().manual_seed(seed_of(self._seed, name, self._draw))
        kept = torch.rand(num_channels, generator=generator) >= p
        mask = upload(kept, args[0].device).to(args[0].dtype) / (1 - p)
        shape = [1] * args[0].ndim
        shape[axis] = num_channels
        return (args[0] * mask.view(shape), *args[1:])


@AUGMENTATIONS.add("ensemble")
@dataclasses.dataclass(frozen=True)
class Ensemble(NetworkPerturbation):
    """Alternate between the network and other checkpoints of it, to find what activates the unit in all of them.

    `checkpoints` are state dicts, as for `model.checkpoint`. The finished image is evaluated with the network itself.
    """

    checkpoints: tuple[ConfigFile, ...] = ()

    def check(self) -> None:
        """Also check that there is a checkpoint."""
        super().check()
        if not self.checkpoints:
            raise AtlasError("render.augmentations.ensemble.checkpoints is empty: name at least one file.")

    def member(self, step: int) -> int:
        """Return which network a step is computed with: 0 for the network itself, i + 1 for checkpoint i."""
        return (step // self.every) % (len(self.checkpoints) + 1)

    @contextlib.contextmanager
    def applied(self, module: nn.Module, seed: int) -> Iterator[ActivePerturbation]:
        """Change nothing: `render` gets the other networks in `RenderJob.ensemble` and chooses with `member`."""
        yield ActivePerturbation()
