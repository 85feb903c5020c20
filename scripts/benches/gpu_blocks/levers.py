"""Block `levers`: what each switch of the code gains, and how far its images are from those without it.

`LEVERS` names the switches. What the present code does not have is left out, and said.
"""

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gpu_blocks import networks
from gpu_blocks.bench import Bench, attributes
from gpu_blocks.networks import BATCH, LAYERS, RESNET, Network
from gpu_blocks.rendering import Timed, spread, timed
from gpu_blocks.speed import GOAL, size_of
from pipeline.config.schema import EngineConfig
from pipeline.core.errors import AtlasError
from pipeline.core.validation import build


@dataclasses.dataclass(frozen=True)
class Switch:
    """One position of a lever.

    Attributes:
        engine: Settings of the engine.
        attributes: (module, path of the attribute in it, value).
        environment: Environment variables.
        caches: (module, function) whose cache is emptied, because it remembers the other position.
    """

    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attributes: tuple[tuple[str, str, Any], ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    caches: tuple[tuple[str, str], ...] = ()

    def missing(self) -> str:
        """Return why the present code does not have this position; empty if it does."""
        try:
            build(EngineConfig, {"name": "inline", **self.engine})
        except AtlasError as error:
            return str(error)[:120]
        for place, path in (*((place, path) for place, path, _ in self.attributes), *self.caches):
            try:
                found: Any = importlib.import_module(place)
            except ImportError as error:
                return str(error)[:120]
            for part in path.split("."):
                if not hasattr(found, part):
                    return f"{place} has no {path}"
                found = getattr(found, part)
        return ""

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Set attributes and environment variables, and restore them."""
        changes = []
        for place, path, value in self.attributes:
            *parents, name = path.split(".")
            owner: Any = importlib.import_module(place)
            for parent in parents:
                owner = getattr(owner, parent)
            changes.append((owner, name, value))
        before = {key: os.environ.get(key) for key in self.environment}
        try:
            os.environ.update(self.environment)
            with attributes(*changes):
                self._empty_caches()
                yield
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value
            self._empty_caches()

    def _empty_caches(self) -> None:
        for place, path in self.caches:
            getattr(importlib.import_module(place), path).cache_clear()


@dataclasses.dataclass(frozen=True)
class Lever:
    """A switch in two positions. An empty position is the code as it is."""

    name: str
    off: Switch = Switch()
    on: Switch = Switch()


def never(*_: Any, **__: Any) -> bool:
    """Stand in for a function that says whether something is possible."""
    return False


def unchanged(value: Any, *_: Any, **__: Any) -> Any:
    """Stand in for a function that returns a changed copy of its first argument."""
    return value


def in_this_thread(*_: Any, **__: Any) -> Any:
    """Stand in for the class of threads beside the device: one that calls everything where it is asked for."""
    background: Any = importlib.import_module("pipeline.engine.background")
    return background.Background("cpu", 1)


# All levers, at one place. Those of the code as it is now are found by name; the others are said to be absent.
LEVERS = (
    Lever("precision: tf32", on=Switch(engine={"precision": "tf32"})),
    Lever("precision: float32", on=Switch(engine={"precision": "float32"})),
    Lever("engine.batch: auto", on=Switch(engine={"batch": "auto"})),
    Lever("engine.batch: 16", on=Switch(engine={"batch": 16})),
    Lever("cuDNN benchmark", on=Switch(attributes=(("torch", "backends.cudnn.benchmark", True),))),
    Lever("cuDNN deterministic", on=Switch(attributes=(("torch", "backends.cudnn.deterministic", True),))),
    Lever("CUDA graph", off=Switch(attributes=(("pipeline.visualization.loop", "can_be_captured", never),))),
    Lever("Triton sampler", off=Switch(attributes=(("pipeline.kernels.affine_sample", "is_verified", never),))),
    Lever("Triton Adam", off=Switch(attributes=(("pipeline.kernels.adam", "is_verified", never),))),
    Lever(
        "fused convolutions",
        off=Switch(attributes=(("pipeline.acceleration.lowering", "fuse_rectifiers", unchanged),)),
    ),
)
# Measured by the block `whole`, since it shows in several batches only.
BESIDE_THE_DEVICE = Lever(
    "threads beside the device", off=Switch(attributes=(("pipeline.engine.worker", "Background", in_this_thread),))
)


def run(bench: Bench) -> None:
    """Time one layer with each lever in both positions, beside the code as it is."""
    net = networks.network(RESNET, bench.device, bench.carried)
    name = LAYERS[0] if bench.small else LAYERS[7]
    plain = measured(bench, net, name, Switch())
    bench.row("as it is", layer=name, **numbers(plain))
    for lever in LEVERS:
        reason = lever.on.missing() or lever.off.missing()
        if lever.on.engine.get("precision", "auto") not in ("auto", *networks.precisions(bench.device)):
            reason = reason or f"not on {bench.device}"
        if reason:
            bench.row("lever", lever=lever.name, absent=reason)
            continue
        if not bench.has(6, lever.name):
            continue
        try:
            off, on = (plain if s == Switch() else measured(bench, net, name, s) for s in (lever.off, lever.on))
        except Exception as error:
            bench.row("lever", lever=lever.name, failed=f"{type(error).__name__}: {error}"[:200])
            bench.synchronize()  # a lost device ends the block
            continue
        per_image = [timed.step / len(timed.pictures) for timed in (off, on)]
        bench.row("lever", lever=lever.name, **numbers(on), gain=per_image[0] / per_image[1], **differences(off, on))


def measured(bench: Bench, net: Network, name: str, switch: Switch) -> Timed:
    """Time the layer with a switch; the default is the best precision and the batch of the other blocks."""
    best, _ = networks.fast_precisions(bench.device)
    batch = 2 if bench.small else BATCH
    engine = {"precision": best, "batch": batch, **switch.engine}
    bench.clean()
    with switch.applied():
        worker = networks.worker(net, bench.device, **engine)
        # With "auto", the number of channels is that of the worker's own batch for this layer.
        count = engine["batch"]
        if isinstance(count, str):
            count = worker.setup.config.engine.images_per_batch(net.layers[name].channels, bench.device)
        count = min(count, 2) if bench.small else count
        channels = spread(count, net.layers[name].channels)
        return timed(bench, worker, name, channels, size_of(bench, net, GOAL, name), net.preset(name))


def numbers(one: Timed) -> dict[str, float]:
    images = len(one.pictures)
    return {
        "batch": images,
        "ms an image-step": 1e3 * one.step / images,
        "first steps ms": 1e3 * one.first,
        "outside s": one.outside,
    }


def differences(off: Timed, on: Timed) -> dict[str, float]:
    """Return how far the values at the second stored step are from each other, and the ratio of the activations."""
    others = {p.channel: p for p in off.pictures}
    pairs = [(others[p.channel], p) for p in on.pictures if p.channel in others]
    if not pairs:
        return {}
    early = [abs(b.trace[1] - a.trace[1]) / max(abs(a.trace[1]), 1e-6) for a, b in pairs]
    activations = [sum(p.activation for p in side) for side in zip(*pairs, strict=True)]
    return {"early difference": float(np.max(early)), "activation ratio": activations[1] / (activations[0] or 1.0)}
