"""What does the work: a loaded network and a loop body. Knows nothing of who hands out the tasks."""

import ctypes
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipeline import examples, shards
from pipeline.config import Config
from pipeline.errors import AtlasError
from pipeline.folding import fold
from pipeline.layers import Layer
from pipeline.models import Model, load
from pipeline.photos import Dataset
from pipeline.registry import canonical
from pipeline.render import render


@dataclasses.dataclass(frozen=True)
class Setup:
    """All a worker needs, as plain data."""

    config: Config
    weights: str
    layers: tuple[Layer, ...]
    dataset: Dataset
    threads: int
    device: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A piece of the plan that one worker finishes in minutes, and the shard it ends in.

    `examples` tasks cover photographs start … end - 1 for all layers; `render` tasks some channels of one layer.
    """

    stage: str
    path: str
    digest: str
    cost: float
    layer: str = ""
    channels: tuple[int, ...] = ()
    canvas: int = 0
    start: int = 0
    end: int = 0

    @property
    def name(self) -> str:
        """For messages: what this task is about."""
        if self.stage == "render":
            return f"{self.layer}:{self.channels[0]}…{self.channels[-1]}"
        return f"photographs {self.start}…{self.end - 1}"

    @property
    def size(self) -> int:
        """Units of progress: channels or photographs."""
        return len(self.channels) if self.stage == "render" else self.end - self.start


@dataclasses.dataclass(frozen=True)
class Done:
    """What a finished task reports: small, for the result itself is in the shard."""

    path: str
    seconds: float


def keep_memory() -> None:
    """Stop glibc from giving large tensors back to the kernel at every step and faulting them in again.

    Measured on two cores: a third of an image-step in early layers. Without glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for option, value in ((trim_threshold, 1 << 30), (top_pad, 1 << 26), (mmap_threshold, 1 << 30)):
        mallopt(option, value)


class Worker:
    """Loads the network once, then does tasks. The same class runs inline and as a Ray actor."""

    def __init__(self, setup: Setup, stop: Callable[[], None] = lambda: None) -> None:
        self.setup = setup
        self.stop = stop
        self.layers = {layer.name: layer for layer in setup.layers}

    @functools.cached_property
    def model(self) -> Model:
        """The network, loaded with the first task: an error then is a task's, with a cause, not a dead actor's.

        Raises `AtlasError` where the weights are not those that the driver planned with.
        """
        keep_memory()
        torch.set_num_threads(self.setup.threads)
        model = load(self.setup.config.model)
        if model.digest != self.setup.weights:
            raise AtlasError(
                f"This worker's weights of {model.name} are not the driver's "
                f"({model.digest[:12]} instead of {self.setup.weights[:12]}): install the same versions everywhere."
            )
        return model.to(self.setup.device)

    @functools.cached_property
    def folded(self) -> Model:
        """Its folded twin: pictures are optimised on this, a third faster; examples are measured on the original."""
        return fold(self.model)

    def do(self, task: Task) -> Done:
        """Finish one task and write its shard."""
        began = time.perf_counter()
        {"render": self._render, "examples": self._examples}[task.stage](task)
        return Done(task.path, time.perf_counter() - began)

    def _render(self, task: Task) -> None:
        config = self.setup.config
        preset = config.render
        units = [(c, v) for c in task.channels for v in range(preset.variants)]
        layer = self.layers[task.layer]
        pictures = render(self.folded, layer, units, preset, config.run.seed, task.canvas, self.stop)
        shape = (len(task.channels), preset.variants)

        def column(name: str, kind: type) -> np.ndarray:
            return np.array([getattr(p, name) for p in pictures], kind).reshape(shape)

        images = np.stack([p.image for p in pictures])
        arrays = {
            "channels": np.array(task.channels, np.int32),
            "images": images.reshape(*shape, *images.shape[1:]),
            "trace": np.stack([p.trace for p in pictures]).astype(np.float32).reshape(*shape, -1),
            "status": column("status", object),
            "seed": column("seed", np.int64),
            "steps": column("steps", np.int32),
            **{k: column(k, np.float32) for k in ("activation", "robust", "start", "seconds")},
        }
        attributes = {
            "digest": task.digest,
            "layer": task.layer,
            "objective": type(preset.objective).__name__.lower(),
            "natural": preset.objective.natural,
            "preset": preset.name,
        }
        shards.write(Path(task.path), attributes, arrays)

    def _examples(self, task: Task) -> None:
        setup = self.setup
        found = examples.sweep(
            self.model, setup.layers, setup.dataset, task.start, task.end, setup.config.examples, self.stop
        )
        attributes = {"digest": task.digest, "start": task.start, "end": task.end}
        shards.write(Path(task.path), attributes, found.arrays())


def render_digest(setup: Setup, layer: Layer, canvas: int) -> str:
    """Digest of everything that changes the pictures of `layer`: nothing else makes a shard out of date."""
    config = setup.config
    tap = [layer.name, layer.module, layer.call, layer.side, layer.layout]
    preset = canonical(config.render)
    preset.pop("name")  # the same settings under another name are the same pictures
    model = canonical(config.model)
    model.pop("weights")  # where they lie says nothing; what they are is in their digest
    return shards.digest_of(["render 1", setup.weights, model, tap, canvas, preset, config.run.seed])


def examples_digest(setup: Setup, fingerprint: str) -> str:
    """Digest of everything that changes examples and statistics."""
    taps = [[la.name, la.module, la.call, la.side, la.layout] for la in setup.layers]
    kept = [setup.config.examples.k, setup.config.examples.batch]
    return shards.digest_of(["examples 1", setup.weights, fingerprint, taps, kept])
