"""What does the work: a loaded network and a loop body. Knows nothing of who hands out the tasks."""

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from safetensors.torch import load as unpacked

from pipeline.acceleration.batchnorm_folding import Pair, foldable
from pipeline.acceleration.cpu_lowering import precision_of
from pipeline.acceleration.variants import ModelVariants, verified_fold, verified_variants
from pipeline.core.errors import AtlasError
from pipeline.core.metric_specs import MEASURES
from pipeline.core.registry import registered_name
from pipeline.engine.tasks import Done, Setup, Task
from pipeline.examples import localize, sweep
from pipeline.examples.channel_stats import HistogramRange
from pipeline.kernels.allocator import keep_memory, memory_share
from pipeline.layers.finding import Layer
from pipeline.models.loading import Model, load, load_other
from pipeline.store import shards
from pipeline.visualization import initial_images
from pipeline.visualization.initial_images import InitialImage
from pipeline.visualization.loop import Picture, render
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.preset import Preset

log = logging.getLogger(__name__)

# Words of errors after which a CUDA context is of no use to anybody any more.
DEVICE_LOST_ERRORS = (
    "CUDA error",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "device-side assert",
)

# A worker is worn out when it has outgrown its share of memory and its own beginnings.
GROWTH = 1.5

T = TypeVar("T")


class DeviceLost(Exception):
    """This worker can do nothing more, and its process must end: a CUDA context was poisoned."""


class Worker:
    """Loads the network once, then does tasks. The same class runs inline and as a Ray actor.

    `weights` are the network's, as safetensors, where they are sent; without, they are found as the driver did.
    """

    def __init__(self, setup: Setup, stop: Callable[[], None] = lambda: None, weights: bytes | None = None) -> None:
        self.setup = setup
        self.stop = stop
        self.weights = weights
        self.layers = {layer.name: layer for layer in setup.layers}
        self.dataset = setup.dataset
        self.fits: dict[str, int] = {}  # pictures of a layer that fit on this device together
        self.first_memory = 0.0
        self._ensembles: dict[str, tuple[Model, ...]] = {}
        self._variants: tuple[tuple[Any, ...], ModelVariants] | None = None  # of one layer and preset
        self._fallbacks: set[tuple[str, str]] = set()  # levels and causes that the log has

    def hello(self) -> str:
        """Who this is: node and process."""
        return f"{os.uname().nodename}:{os.getpid()}"

    @functools.cached_property
    def model(self) -> Model:
        """The network, loaded with the first task: an error then is a task's, with a cause, not a dead actor's.

        Raises `AtlasError` where the weights are not those that the driver planned with.
        """
        keep_memory()
        torch.set_num_threads(self.setup.threads)
        model = load(self.setup.config.model, unpacked(self.weights) if self.weights else None)
        self.weights = None
        if model.digest != self.setup.weights:
            raise AtlasError(
                f"This worker's weights of {model.name} are not the driver's "
                f"({model.digest[:12]} instead of {self.setup.weights[:12]}): install the same versions everywhere."
            )
        return model.to(self.setup.device)

    @functools.cached_property
    def _foldable(self) -> tuple[Pair, ...]:
        return foldable(self.model)

    def variants(self, layer: Layer, preset: Preset, size: tuple[int, int]) -> ModelVariants:
        """Return the fastest variants of the network that equal it at `layer`, for visualizations of `size` pixels.

        Batch normalizations that `layer` and the preset look into are not folded. They are kept until another layer or
        preset is asked for.
        """
        key = (layer.name, size, *preset.others)
        if self._variants is None or self._variants[0] != key:
            self._variants = None
            layers = [layer, *self.setup.others_of(preset).values()]
            made = verified_variants(self.model, self._foldable, layers, self.precision, size)
            told = (made.level, made.reason)
            if made.reason and told not in self._fallbacks:
                self._fallbacks.add(told)
                log.warning("%s: steps of %s run on the %s network: %s", self.model.name, layer.name, *told)
            self._variants = key, made
        return self._variants[1]

    @functools.cached_property
    def precision(self) -> torch.dtype:
        """What steps are computed in."""
        return precision_of(self.setup.config.engine.precision, torch.device(self.setup.device).type)

    @functools.cached_property
    def measured(self) -> Model:
        """The network that dataset examples are measured on: folded where its values are the same at all layers."""
        return verified_fold(self.model, self._foldable, self.setup.layers)

    @functools.cached_property
    def device_name(self) -> str:
        """What batches that fit are remembered by."""
        on_gpu = self.setup.device.startswith("cuda") and torch.cuda.is_available()
        return torch.cuda.get_device_name() if on_gpu else self.setup.device

    def ensemble(self, preset: Preset) -> tuple[Model, ...]:
        """The other checkpoints of a preset's ensemble, folded as well, loaded once."""
        if preset.name not in self._ensembles:
            files = [f for a in preset.augmentations if isinstance(a, Ensemble) for f in a.checkpoints]
            members = [load_other(self.setup.config.model, f).to(self.setup.device) for f in files]
            layers = [*self.setup.layers, *self.setup.others_of(preset).values()]
            self._ensembles[preset.name] = tuple(verified_fold(m, foldable(m), layers) for m in members)
        return self._ensembles[preset.name]

    def do(self, task: Task, fits: Mapping[str, int] | None = None, files: Mapping[str, bytes] | None = None) -> Done:
        """Finish one task and write its shard.

        `fits` says how many pictures of this layer fitted on which device elsewhere; `files` holds the
        photographs, where this worker can't read them itself. Raises `DeviceLost` when this process must end.
        """
        began = time.perf_counter()
        if fits and self.device_name in fits:
            self.fits[task.layer] = min(fits[self.device_name], self.fits.get(task.layer, fits[self.device_name]))
        known = self.fits.get(task.layer)
        try:
            with self._photographs(files):
                data = getattr(self, f"_{task.stage}")(task)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and any(word in str(error) for word in DEVICE_LOST_ERRORS):
                raise DeviceLost(f"{type(error).__name__}: {error}") from error
            raise
        if self.setup.config.engine.shared_fs:
            shards.place(Path(task.path), data)
            data = b""
        learnt = self.fits.get(task.layer)
        batch = (self.device_name, learnt) if learnt is not None and learnt != known else None
        return Done(task.path, time.perf_counter() - began, data, batch, self._worn())

    @contextlib.contextmanager
    def _photographs(self, files: Mapping[str, bytes] | None) -> Iterator[None]:
        """Lay photographs that were sent into a folder of this machine, for as long as a task needs them."""
        if files is None:
            yield
            return
        with tempfile.TemporaryDirectory(prefix="neuron-atlas-") as folder:
            for name, data in files.items():
                path = Path(folder, name)
                if not path.resolve().is_relative_to(Path(folder).resolve()):
                    raise AtlasError(f"{name!r} leads out of its folder.")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            self.dataset = dataclasses.replace(self.setup.dataset, roots={"": folder}, sent=True)
            yield

    def _worn(self) -> str:
        """Why this worker should be replaced: its memory has outgrown its share and its own beginnings."""
        memory = float(psutil.Process().memory_info().rss)
        self.first_memory = self.first_memory or memory
        asked = self.setup.config.engine.memory_gb
        limit = memory_share(self.setup.threads) if isinstance(asked, str) else asked * 1e9
        if memory <= limit or memory <= GROWTH * self.first_memory:
            return ""
        return f"grew from {self.first_memory / 1e9:.1f} to {memory / 1e9:.1f} GB of memory"

    def _in_batches(
        self, layer: str, units: list[T], size: int, each: int, work: Callable[[list[T]], list[Any]]
    ) -> list[Any]:
        """`work` on portions of `units`, of which each gives `each` pictures.

        A portion is halved whenever a GPU runs out of memory, and that size is remembered for the layer.
        """
        size = min(size, self.fits.get(layer, size))
        done: list[Any] = []
        while len(done) < each * len(units):
            part = units[len(done) // each :][:size]
            try:
                done += work(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                size = self.fits[layer] = len(part) // 2
                log.warning("%s: out of memory with %d channels; going on with %d", layer, len(part), size)
            else:
                continue
            self._let_go()
        return done

    def _let_go(self) -> None:
        """Free a failed attempt's memory; only outside of its handler nothing holds its tensors any more."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def pictures(
        self,
        name: str,
        channels: Sequence[int],
        canvas: tuple[int, int],
        preset: Preset,
        begins: Sequence[InitialImage] = (),
    ) -> list[Picture]:
        """All variants of some channels of a layer, channel by channel; `begins` what each starts from, if anything."""
        config, layer = self.setup.config, self.layers[name]
        variants = self.variants(layer, preset, canvas)
        others = self.setup.others_of(preset)

        own_starts = dict(zip(channels, begins, strict=False))

        def work(part: list[int]) -> list[Picture]:
            # All pictures of a channel stay together: a coupling compares them.
            own = [(c, v) for c in part for v in range(preset.variants)]
            return render(
                variants.folded,
                layer,
                own,
                preset,
                config.run.seed,
                canvas,
                self.stop,
                lowered=variants.steps,
                exact=variants.exact,
                others=others,
                ensemble=self.ensemble(preset),
                starts=initial_images.pictures(preset, canvas, self.model.recipe.channels, own, own_starts),
            )

        per_batch = max(1, config.engine.batch // preset.variants)
        return self._in_batches(name, list(channels), per_batch, preset.variants, work)

    def _render(self, task: Task) -> bytes:
        preset = self.setup.config.preset(task.preset)
        pictures = self.pictures(task.layer, task.channels, task.canvas, preset, task.starts)
        variants = self.variants(self.layers[task.layer], preset, task.canvas)
        shape = (len(task.channels), preset.variants)

        def column(name: str, kind: type) -> np.ndarray:
            return np.array([getattr(p, name) for p in pictures], kind).reshape(shape)

        images = np.stack([p.image for p in pictures])
        arrays = {
            "channels": np.array(task.channels, np.int32),
            "images": images.reshape(*shape, *images.shape[1:]),
            "trace": np.stack([p.trace for p in pictures]).astype(np.float32).reshape(*shape, -1),
            "status": column("status", object),
            "reason": column("reason", object),
            "seed": column("seed", np.int64),
            "steps": column("steps", np.int32),
            **{k: column(k, np.float32) for k in ("activation", "robust", "start", "seconds")},
            **{k: np.array([p.measures[k] for p in pictures], np.float32).reshape(shape) for k in MEASURES},
            "response": np.stack([p.response for p in pictures]).reshape(*shape, -1),
        }
        attributes = {
            "digest": task.digest,
            "layer": task.layer,
            "objective": registered_name(preset.objective),
            "natural": preset.natural,
            "preset": preset.name,
            "precision": "float32" if preset.requires_original_weights else variants.precision,
            "level": variants.plain_level if preset.requires_original_weights else variants.level,
            "level_reason": "" if preset.requires_original_weights else variants.reason,
        }
        return shards.image(attributes, arrays)

    def _portioned(self, work: Callable[[sweep.ExamplesConfig], T]) -> T:
        """`work` with the configured batch, halved while a GPU runs out of memory.

        A smaller batch rounds its last bit otherwise: the price of photographs too large for a GPU.
        """
        own = self.setup.config.examples
        while True:
            config = dataclasses.replace(own, batch=self.fits.get("", own.batch))
            try:
                return work(config)
            except torch.OutOfMemoryError:
                if config.batch == 1:
                    raise
                self.fits[""] = config.batch // 2
                log.warning("out of memory with %d photographs; going on with %d", config.batch, self.fits[""])
            self._let_go()

    @functools.cached_property
    def drawn(self) -> sweep.ImageSubsets:
        """What is drawn from the dataset by hash."""
        return sweep.ImageSubsets.of(self.setup.dataset, self.setup.config.examples)

    def _ranges(self, task: Task) -> bytes:
        layers, model = self.setup.layers, self.measured
        arrays = self._portioned(
            lambda config: sweep.ranges_of(model, layers, self.dataset, config, task.photographs)
        ).arrays()
        return shards.image({"digest": task.digest, "content": shards.content(arrays)}, arrays)

    def _examples(self, task: Task) -> bytes:
        layers, model, threads = self.setup.layers, self.measured, max(2, self.setup.threads)
        given = shards.unpack(task.given)
        ranges = HistogramRange(**given)
        found = self._portioned(
            lambda config: sweep.sweep(
                model, layers, self.dataset, task.indices, config, ranges, self.drawn, self.stop, threads
            )
        )
        attributes = {"digest": task.digest, "start": task.start, "end": task.end, "ranges": shards.content(given)}
        return shards.image(attributes, found.arrays(), "lzf")

    def _winners(self, task: Task) -> bytes:
        layers, model, threads = self.setup.layers, self.measured, max(2, self.setup.threads)
        table = localize.SecondPassIndex.from_arrays(shards.unpack(task.given))
        found = self._portioned(
            lambda config: localize.localize(
                model, layers, table, task.photographs, self.dataset, config, self.stop, threads
            )
        )
        return shards.image({"digest": task.digest, "start": task.start, "end": task.end}, found, "lzf")
