"""Noise on the network instead of the image: its weights, its activations, or which of several checkpoints it is.

Does it regularise as noise on the image does? That is the question these exist for. What is drawn depends on the
run's seed, the step and the network, never on the batch: every picture of a run meets the same networks. All
changes undo themselves.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError
from pipeline.core.registry import Registry
from pipeline.core.seeds import seed_of

AUGMENTATIONS = Registry("augmentation")


@dataclasses.dataclass(frozen=True)
class NetworkPerturbation:
    """What `render` needs of an augmentation; it is redrawn every `every` steps."""

    every: int = 1

    def check(self) -> None:
        """Raise `AtlasError` for settings that make no sense."""
        if self.every < 1:
            raise AtlasError(f"render.augmentations: every={self.every} is too small: at least 1.")

    @contextlib.contextmanager
    def applied(self, module: nn.Module, seed: int) -> Iterator["ActivePerturbation"]:
        """The network under this augmentation: `drawn.to(step)` redraws; all is undone on exit."""
        raise NotImplementedError
        yield


class ActivePerturbation:
    """A running augmentation; the plain one does nothing."""

    def to(self, step: int) -> None:
        """Be what this step asks for."""

    def off(self) -> None:
        """Be the plain network again, until the next `to`."""


@AUGMENTATIONS.add("weight_noise")
@dataclasses.dataclass(frozen=True)
class WeightNoise(NetworkPerturbation):
    """Gaussian noise on every weight of two or more dimensions, `sd` × the standard deviation of its tensor.

    After NoiseGrad (Bykov et al. 2022), whose noise multiplies. Biases and normalisations keep their values.
    """

    sd: float = 0.1

    @contextlib.contextmanager
    def applied(self, module: nn.Module, seed: int) -> Iterator[ActivePerturbation]:
        """Noise is added to the tensors in place and taken out by copying the originals back."""
        weights = {name: p for name, p in module.named_parameters() if p.ndim > 1 and p.numel() > 1}
        kept = {name: p.detach().clone() for name, p in weights.items()}
        sd, every = self.sd, self.every

        class Noisy(ActivePerturbation):
            at: int | None = None

            @torch.no_grad()
            def to(self, step: int) -> None:
                now = step // every
                if now == self.at:
                    return
                self.at = now
                for name, weight in weights.items():
                    # One generator a tensor: its noise does not depend on which others there are.
                    generator = Generator().manual_seed(seed_of(seed, name, now))
                    noise = torch.randn(weight.shape, generator=generator).to(weight)
                    weight.copy_(kept[name] + noise * (sd * kept[name].std()))

            @torch.no_grad()
            def off(self) -> None:
                self.at = None
                for name, weight in weights.items():
                    weight.copy_(kept[name])

        noisy = Noisy()
        try:
            yield noisy
        finally:
            noisy.off()


@AUGMENTATIONS.add("dropout")
@dataclasses.dataclass(frozen=True)
class Dropout(NetworkPerturbation):
    """Whole channels of activations set to zero with probability `p`, the others divided by 1 - p.

    It works on the inputs of every convolution and linear layer but those that take the picture itself, and
    the same channels are dropped for all images of a step.
    """

    p: float = 0.1

    def check(self) -> None:
        """Also: p is a probability below 1."""
        super().check()
        if not 0 <= self.p < 1:
            raise AtlasError(f"render.augmentations.dropout.p={self.p} must lie in [0, 1).")

    @contextlib.contextmanager
    def applied(self, module: nn.Module, seed: int) -> Iterator[ActivePerturbation]:
        """Hooks before the layers, removed on exit."""
        p, every = self.p, self.every
        state: dict[str, int | None] = {"at": None}

        class Dropping(ActivePerturbation):
            def to(self, step: int) -> None:
                state["at"] = step // every

            def off(self) -> None:
                state["at"] = None

        handles = []
        first = True
        for name, child in module.named_modules():
            if not isinstance(child, (nn.Conv2d, nn.Linear)):
                continue
            if first:  # the first one of them takes the picture
                first = False
                continue

            def drop(child: nn.Module, args: tuple[Tensor, ...], name: str = name) -> tuple[Tensor, ...] | None:
                if state["at"] is None or not args:
                    return None
                axis = 1 if isinstance(child, nn.Conv2d) else -1
                count = args[0].shape[axis]
                generator = Generator().manual_seed(seed_of(seed, name, state["at"]))
                mask = (torch.rand(count, generator=generator) >= p).to(args[0]) / (1 - p)
                shape = [1] * args[0].ndim
                shape[axis] = count
                return (args[0] * mask.view(shape), *args[1:])

            handles.append(child.register_forward_pre_hook(drop))
        try:
            yield Dropping()
        finally:
            for handle in handles:
                handle.remove()


@AUGMENTATIONS.add("ensemble")
@dataclasses.dataclass(frozen=True)
class Ensemble(NetworkPerturbation):
    """Other checkpoints of the same network, in turn with its own: what all of them like.

    `checkpoints` are state dicts as `model.checkpoint` takes them. The finished picture is measured on the
    network itself.
    """

    checkpoints: tuple[ConfigFile, ...] = ()

    def check(self) -> None:
        """Also: there must be a checkpoint."""
        super().check()
        if not self.checkpoints:
            raise AtlasError("render.augmentations.ensemble.checkpoints is empty: name at least one file.")

    def member(self, step: int) -> int:
        """Which network step `step` uses: 0 is the model itself, i + 1 the i-th checkpoint."""
        return (step // self.every) % (len(self.checkpoints) + 1)

    @contextlib.contextmanager
    def applied(self, module: nn.Module, seed: int) -> Iterator[ActivePerturbation]:
        """Nothing is changed: `render` is given the other networks whole."""
        yield ActivePerturbation()
