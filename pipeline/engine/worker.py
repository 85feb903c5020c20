"""Execution of tasks with one loaded network, the same inline and in a Ray actor."""

import contextlib
import dataclasses
import functools
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from safetensors.torch import load as unpacked

from pipeline.acceleration.batchnorm_folding import ConvNormPair, foldable_pairs
from pipeline.acceleration.cuda_graphs import capture_graph
from pipeline.acceleration.precision import capability_of, ieee, usable
from pipeline.acceleration.variants import ModelVariants, verified_fold, verified_variants
from pipeline.activation_atlas import sampling
from pipeline.core import hashing
from pipeline.core.errors import AtlasError
from pipeline.core.metric_specs import IMAGE_METRICS, RENDER_METRICS
from pipeline.core.registry import registered_name
from pipeline.effects import connections, measurement, relevance
from pipeline.effects.measurement import EffectsContext
from pipeline.engine.background import Background
from pipeline.engine.devices import device_name, free_memory, halved_until_it_fits, prepare_device
from pipeline.engine.resources import memory_share
from pipeline.engine.tasks import (
    CellsTask,
    ConnectionsTask,
    Done,
    EffectsTask,
    FacetsTask,
    LocalizeTask,
    MemoryKey,
    PartTask,
    RangesTask,
    RelevanceTask,
    RenderTask,
    ResponsesTask,
    SamplesTask,
    Setup,
    SweepTask,
    Task,
    device_kind,
    memory_key,
    write_shard,
)
from pipeline.examples import localize, sweep
from pipeline.examples.channel_stats import HistogramRange
from pipeline.facets import images as facet_images
from pipeline.facets.responses import ResponsesContext, measure_responses
from pipeline.kernels.allocator import retain_freed_memory
from pipeline.kernels.device_errors import is_device_lost, is_out_of_memory
from pipeline.layers.finding import Layer
from pipeline.layers.path_depths import depths_before
from pipeline.models.loading import Model, load_ensemble_member, load_model
from pipeline.store import hdf5, shards
from pipeline.visualization import initial_images
from pipeline.visualization.evaluation import SILENT, Visualization
from pipeline.visualization.initial_images import InitialImage
from pipeline.visualization.loop import render, restart
from pipeline.visualization.network_penalties import Normalization, normalizations_before
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.preset import Preset
from pipeline.visualization.render_job import BatchStart, RenderJob, draw_start

log = logging.getLogger(__name__)

# A worker is replaced when its memory exceeds its share of the machine and this multiple of its first reading.
MAX_GROWTH = 1.5

T = TypeVar("T")
U = TypeVar("U")
R = TypeVar("R")

# Dataset images by path, or why they cannot be read.
ImageFiles = Mapping[str, bytes | str]


class DeviceLost(Exception):
    """The context of this process on its GPU is lost: the worker must be replaced.

    Args:
        message: The error.
        batch: (device, number of images) that fit into memory, if the device ran out of it before.
    """

    def __init__(self, message: str, batch: tuple[str, int] | None = None) -> None:
        super().__init__(message)
        self.batch = batch


class Worker:
    """Loads the network with its first task, then executes tasks.

    Args:
        setup: Everything besides the tasks.
        stop: Called at each optimization step; raises to interrupt the work.
        weights: Weights of the network as safetensors; without, they are loaded as the driver loaded them.
    """

    def __init__(self, setup: Setup, stop: Callable[[], None] = lambda: None, weights: bytes | None = None) -> None:
        self.setup = setup
        self.stop = stop
        self.weights = weights
        self.layers = {layer.name: layer for layer in setup.layers}
        self.dataset = setup.dataset
        self.fits: dict[MemoryKey, int] = {}  # largest batch that fits on this device
        self.first_memory = 0.0
        self._ensembles: dict[str, tuple[Model, ...]] = {}
        self._variants: tuple[tuple[Any, ...], ModelVariants] | None = None  # of one layer and preset
        self._fallbacks: set[tuple[str, str]] = set()  # (level, reason) pairs that were logged

    @functools.cached_property
    def model(self) -> Model:
        """The network, loaded with the first task: an error is then reported as a task's, with its cause.

        Raises:
            AtlasError: If the weights are not those that the run was planned with.
        """
        retain_freed_memory()
        torch.set_num_threads(self.setup.threads)
        model = load_model(self.setup.config.model, unpacked(self.weights) if self.weights else None)
        self.weights = None
        if model.digest != self.setup.weights:
            raise AtlasError(
                f"This worker loaded other weights of {model.name} than the driver "
                f"({model.digest[:12]} instead of {self.setup.weights[:12]}): install the same versions everywhere."
            )
        return model.to(self._device)

    @functools.cached_property
    def _device(self) -> str:
        """The device, set up for this process before its first use."""
        prepare_device(self.setup.device, self.setup.config.engine)
        return self.setup.device

    @functools.cached_property
    def background(self) -> Background:
        """Threads for what the CPU does while the device computes."""
        return Background(self.setup.device, max(2, self.setup.threads))

    @functools.cached_property
    def _foldable(self) -> tuple[ConvNormPair, ...]:
        with ieee():
            return foldable_pairs(self.model)

    def variants(self, layer: Layer, preset: Preset, size: tuple[int, int]) -> ModelVariants:
        """Return the fastest variants of the network that equal it at `layer`, for visualizations of `size` pixels.

        Batch normalizations whose output `layer` or the preset reads are not folded. The variants of the last layer
        and preset are cached.
        """
        key = (layer.name, size, bool(preset.network_penalties), *preset.others)
        if self._variants is None or self._variants[0] != key:
            self._variants = None
            layers = [layer, *self.setup.others_of(preset).values()]
            norms = {norm.path: norm.tap for norm in self.normalizations(layer, preset)}
            variants = verified_variants(self.model, self._foldable, layers, self.precision, size, norms)
            fallback = (variants.level, variants.reason)
            if variants.reason and fallback not in self._fallbacks:
                self._fallbacks.add(fallback)
                log.warning("%s: steps of %s run on the %s network: %s", self.model.name, layer.name, *fallback)
            self._variants = key, variants
        return self._variants[1]

    def normalizations(self, layer: Layer, preset: Preset) -> list[Normalization]:
        """Return the normalizations before `layer` that `preset` compares, with their natural deviations."""
        if not preset.network_penalties or self.setup.natural is None:
            return []
        return self.setup.natural.of(normalizations_before(self.model, layer), self.setup.device)

    @functools.cached_property
    def precision(self) -> str:
        """Precision of the optimization steps: that of the run, if the device of this worker has it."""
        capability = capability_of(self.setup.device)
        precision = usable(self.setup.precision, self._kind, capability)
        if precision != self.setup.precision:
            found = ".".join(map(str, capability or ()))
            log.warning(
                "steps run in %s: a GPU of compute capability %s lacks %s", precision, found, self.setup.precision
            )
        return precision

    @property
    def _kind(self) -> str:
        """Kind of the device, which results record."""
        return device_kind(self.setup.device)

    @functools.cached_property
    def measured(self) -> Model:
        """The network of the dataset pass: with folded batch normalizations where all layers keep their values."""
        return verified_fold(self.model, self._foldable, self.setup.layers)

    @functools.cached_property
    def device_name(self) -> str:
        """Name of the device, under which the driver shares batch sizes that fit among workers."""
        return device_name(self._device)

    def ensemble(self, preset: Preset) -> tuple[Model, ...]:
        """Return the networks of the other checkpoints of a preset's ensemble; they are loaded once."""
        if preset.name not in self._ensembles:
            files = [f for a in preset.augmentations if isinstance(a, Ensemble) for f in a.checkpoints]
            members = [load_ensemble_member(self.setup.config.model, f).to(self.setup.device) for f in files]
            layers = [*self.setup.layers, *self.setup.others_of(preset).values()]
            self._ensembles[preset.name] = tuple(verified_fold(m, foldable_pairs(m), layers) for m in members)
        return self._ensembles[preset.name]

    def do(self, task: Task, fits: Mapping[str, int] | None = None, files: ImageFiles | None = None) -> Done:
        """Execute one task and write its shard.

        Args:
            task: The task.
            fits: Batch sizes for such tasks that fitted into memory, by device name, learnt by other workers.
            files: Dataset images by path, or why they can't be read, if this worker cannot read the dataset itself.

        Raises:
            DeviceLost: If this process must be replaced.
        """
        began = time.perf_counter()
        key = memory_key(task)
        if fits and self.device_name in fits:
            self.fits[key] = min(fits[self.device_name], self.fits.get(key, fits[self.device_name]))
        fitted_before = self.fits.get(key)
        try:
            # The default in a worker is that of measurements; steps choose their precision by name.
            with ieee(), self._dataset_files(files):
                data = self._result(task)
        except Exception as error:
            if is_device_lost(error):
                raise DeviceLost(f"{type(error).__name__}: {error}", self._learnt(key, fitted_before)) from error
            raise
        if self._sees_run_folder:
            write_shard(task, data)
            data = b""
        batch = self._learnt(key, fitted_before)
        return Done(task.path, time.perf_counter() - began, data, batch, self._restart_reason())

    def _learnt(self, key: MemoryKey, before: int | None) -> tuple[str, int] | None:
        """Return the device and the batch size that fits on it, if it is another one than `before`."""
        now = self.fits.get(key)
        return (self.device_name, now) if now is not None and now != before else None

    @functools.cached_property
    def _sees_run_folder(self) -> bool:
        """Whether this worker writes shards to the run folder itself."""
        mark = self.setup.mark
        return self.setup.config.engine.shared_fs and (not mark or Path(mark).is_file())

    def _result(self, task: Task) -> bytes:
        match task:
            case RenderTask():
                return self._render(task)
            case RangesTask():
                return self._ranges(task)
            case SweepTask():
                return self._sweep(task)
            case LocalizeTask():
                return self._localize(task)
            case RelevanceTask():
                return self._relevance(task)
            case EffectsTask():
                return self._effects(task)
            case ConnectionsTask():
                return self._connections(task)
            case SamplesTask():
                return self._samples(task)
            case CellsTask():
                return self._cells(task)
            case ResponsesTask():
                return self._responses(task)
            case FacetsTask():
                return self._facets(task)

    @contextlib.contextmanager
    def _dataset_files(self, files: ImageFiles | None) -> Iterator[None]:
        """Write dataset images that were sent to a temporary folder of this machine, for the time of one task."""
        if files is None:
            yield
            return
        with tempfile.TemporaryDirectory(prefix="neuron-atlas-") as folder:
            unreadable = dict(self.setup.dataset.unreadable)
            for name, data in files.items():
                if isinstance(data, str):
                    unreadable[name] = data
                    continue
                path = Path(folder, name)
                if not path.resolve().is_relative_to(Path(folder).resolve()):
                    raise AtlasError(f"{name!r} leads out of its folder.")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            self.dataset = dataclasses.replace(
                self.setup.dataset, roots={"": folder}, copied=True, unreadable=unreadable
            )
            yield

    def _restart_reason(self) -> str:
        """Return why this worker should be replaced: its memory has grown too much. Empty if it can go on."""
        memory = float(psutil.Process().memory_info().rss)
        self.first_memory = self.first_memory or memory
        memory_gb = self.setup.config.engine.memory_gb
        limit = memory_share(self.setup.threads) if isinstance(memory_gb, str) else memory_gb * 1e9
        if memory <= limit or memory <= MAX_GROWTH * self.first_memory:
            return ""
        return f"grew from {self.first_memory / 1e9:.1f} to {memory / 1e9:.1f} GB of memory"

    def in_batches(
        self,
        key: MemoryKey,
        units: list[T],
        size: int,
        prepare: Callable[[list[T]], U],
        work: Callable[[U], list[R]],
    ) -> Iterator[list[R]]:
        """Yield the results of `work` on batches of `size` units.

        A batch is halved whenever the device runs out of memory; the size that fits is kept under `key`.

        Args:
            key: What the size is kept under.
            units: All units.
            size: Largest number of units in a batch.
            prepare: Returns what `work` takes for some units; called for a batch while the one before is worked on
                (`Background`).
            work: Returns the results of a batch.
        """
        size = min(size, self.fits.get(key, size))
        done = 0
        ahead: tuple[list[T], Callable[[], U]] | None = None
        while done < len(units):
            part, following = units[done : done + size], units[done + size : done + 2 * size]
            prepared = ahead[1] if ahead and ahead[0] == part else self.background.begin(prepare, part)
            ahead = (following, self.background.begin(prepare, following)) if following else None
            try:
                results = work(prepared())
            except Exception as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                size = self.fits[key] = len(part) // 2
                log.warning("%s: out of memory with %d channels; continuing with %d", key[0], len(part), size)
            else:
                done += len(part)
                yield results
                continue
            free_memory()

    def pictures(
        self,
        name: str,
        channels: Sequence[int],
        canvas: tuple[int, int],
        preset: Preset,
        begins: Sequence[InitialImage] = (),
        layer_mean: Sequence[float] = (),
    ) -> list[Visualization]:
        """Return all variants of some channels of a layer, channel by channel; see `picture_batches`."""
        batches = self.picture_batches(name, channels, canvas, preset, begins, layer_mean)
        return [picture for batch in batches for picture in batch]

    def picture_batches(
        self,
        name: str,
        channels: Sequence[int],
        canvas: tuple[int, int],
        preset: Preset,
        begins: Sequence[InitialImage] = (),
        layer_mean: Sequence[float] = (),
    ) -> Iterator[list[Visualization]]:
        """Yield all variants of some channels of a layer in batches, channel by channel.

        Args:
            name: Name of the layer.
            channels: Its channels.
            canvas: (height, width) of the finished images in pixels.
            preset: The preset, with the objective for this layer (`Preset.for_layer`).
            begins: Initial image of each channel; empty if none is needed. If the preset starts from noise, the
                channels were silent, and are restarted from these images.
            layer_mean: Mean of each channel of the layer over the dataset; empty if it is not needed.
        """
        config = self.setup.config
        job = self.job(name, canvas, preset, layer_mean)
        own_starts = dict(zip(channels, begins, strict=True)) if begins else {}
        restarted = bool(begins) and not preset.needs_examples

        def prepare(part: list[int]) -> tuple[RenderJob, BatchStart]:
            # All variants of a channel stay together: batch terms compare them.
            own = [(c, v) for c in part for v in range(preset.variants)]
            recipe = self.model.preprocessing
            starts = initial_images.load_initial_images(preset, canvas, recipe, own, own_starts)
            part_job = dataclasses.replace(job, initial_images=starts)
            start = draw_start(part_job, own, preset.attempts if restarted else 0)
            return part_job, start.pinned() if self.background.pins_memory else start

        def work(prepared: tuple[RenderJob, BatchStart]) -> list[Visualization]:
            part_job, start = prepared
            return (restart if restarted else render)(part_job, start.units, start)

        per_batch = config.channels_per_batch(preset, self.layers[name].channels, self.setup.device)
        return self.in_batches((name, preset.name), list(channels), per_batch, prepare, work)

    def job(self, name: str, canvas: tuple[int, int], preset: Preset, layer_mean: Sequence[float] = ()) -> RenderJob:
        """Return everything that the visualizations of a layer depend on but the initial images of units.

        The arguments are those of `pictures`.
        """
        layer = self.layers[name]
        variants = self.variants(layer, preset, canvas)
        return RenderJob(
            variants.folded,
            layer,
            preset,
            self.setup.config.run.seed,
            canvas,
            self.stop,
            step_model=variants.steps,
            exact_model=variants.exact,
            layers=self.setup.others_of(preset),
            ensemble=self.ensemble(preset),
            depths=self.setup.depths,
            target_image=initial_images.load_target_image(preset, canvas, self.model.preprocessing),
            layer_mean=torch.tensor(layer_mean, device=self.setup.device) if layer_mean else None,
            normalizations=self.normalizations(layer, preset),
            precision="float32" if preset.requires_original_weights else variants.precision,
            capture=capture_graph if self._captures_graphs else None,
        )

    @property
    def _captures_graphs(self) -> bool:
        """Whether optimization steps are captured as a CUDA graph."""
        return self.setup.config.engine.cuda_graphs and torch.device(self.setup.device).type == "cuda"

    def _render(self, task: RenderTask) -> bytes:
        preset = self.setup.config.preset_for(task.preset, self.layers[task.layer])
        batches = self.picture_batches(task.layer, task.channels, task.canvas, preset, task.starts, task.layer_mean)
        pictures, chunks = self._compressed(batches, compress=not task.restart)
        pictures = _without_example_failed(pictures, dict(zip(task.channels, task.starts, strict=False)))
        variants = self.variants(self.layers[task.layer], preset, task.canvas)
        shape = (len(task.channels), preset.variants)

        def column(values: Sequence[object], kind: type) -> np.ndarray:
            return np.array(values, kind).reshape(shape)

        images = np.stack([p.image for p in pictures])
        arrays = {
            "channels": np.array(task.channels, np.int32),
            "images": images.reshape(*shape, *images.shape[1:]),
            "mask": np.stack([p.mask for p in pictures]).reshape(*shape, *images.shape[1:3]),
            "trace": np.stack([p.trace for p in pictures]).astype(np.float32).reshape(*shape, -1),
            "status": column([p.status for p in pictures], object),
            "reason": column([p.reason for p in pictures], object),
            **{m.name: column([getattr(p, m.name) for p in pictures], m.dtype) for m in RENDER_METRICS},
            **{m.name: column([p.measures[m.name] for p in pictures], m.dtype) for m in IMAGE_METRICS},
            "response": np.stack([p.response for p in pictures]).reshape(*shape, -1),
            "path_means": np.stack([p.path_means for p in pictures]).reshape(*shape, -1),
        }
        path = [*depths_before(self.layers[task.layer], self.setup.depths), self.layers[task.layer]]
        attributes: dict[str, Any] = {
            "digest": task.digest,
            "layer": task.layer,
            "objective": registered_name(preset.objective),
            "natural": preset.natural,
            "preset": preset.name,
            "precision": "float32" if preset.requires_original_weights else variants.precision,
            "requested_precision": self.setup.precision,
            "device": self._kind,
            "level": variants.plain_level if preset.requires_original_weights else variants.level,
            "level_reason": "" if preset.requires_original_weights else variants.reason,
            "path_layers": [layer.name for layer in path],
        }
        if preset.budgets:
            arrays["budget_value"] = np.stack([p.budget_values for p in pictures]).reshape(*shape, -1)
            attributes["budget_names"] = [registered_name(regularizer) for regularizer in preset.budgets]
            attributes["budget_target"] = np.array([regularizer.target for regularizer in preset.budgets], np.float32)
        if task.restart:
            attributes["restart"] = task.restart
            arrays = _restarted_arrays(hdf5.from_bytes(task.silent), arrays)
        return shards.to_bytes(attributes, arrays, chunks={name: [wait() for wait in w] for name, w in chunks.items()})

    def _compressed(
        self, batches: Iterable[list[Visualization]], compress: bool
    ) -> tuple[list[Visualization], dict[str, list[Callable[[], bytes]]]]:
        """Return the visualizations of all batches, and the chunks of their shard by the name of the stack.

        The images and masks of a batch are compressed while the device works on the next ones, unless that device is
        the CPU. The shard itself is written before the task ends: an error of the disk is then one of its task.
        """
        pictures: list[Visualization] = []
        chunks: dict[str, list[Callable[[], bytes]]] = {}
        compress = compress and self.background.is_active and hdf5.compresses_alike()
        for batch in batches:
            pictures += batch
            if compress:
                for picture in batch:
                    for name, pixels in (("images", picture.image), ("mask", picture.mask)):
                        wait = self.background.begin(hdf5.compressed_chunk, pixels)
                        chunks.setdefault(name, []).append(wait)
        return pictures, chunks

    def _portioned(self, task: Task, work: Callable[[sweep.ExamplesConfig], T]) -> T:
        """Return the result of `work` with the configured batch, halved while the device runs out of memory."""
        configured = self.setup.config.examples
        return self._halved(
            memory_key(task), configured.batch, lambda batch: work(dataclasses.replace(configured, batch=batch))
        )

    def _halved(self, key: MemoryKey, batch: int, work: Callable[[int], T]) -> T:
        """Return the result of `work` with batches of `batch` images, halved while the device runs out of memory.

        Values of a smaller batch may differ in their last bit: the price of images that do not fit on the device.
        """

        def note(size: int, smaller: int) -> None:
            self.fits[key] = smaller
            log.warning("%s: out of memory with %d images; continuing with %d", key[0], size, smaller)

        return halved_until_it_fits(min(batch, self.fits.get(key, batch)), work, note)

    @functools.cached_property
    def drawn(self) -> sweep.ImageSubsets:
        """The subsets of the dataset that are drawn by hash."""
        channels = sum(layer.channels for layer in self.setup.layers)
        return sweep.ImageSubsets.of(self.setup.dataset, self.setup.config.examples, channels)

    def _ranges(self, task: RangesTask) -> bytes:
        layers, model = self.setup.layers, self.measured
        arrays = self._portioned(
            task,
            lambda config: sweep.measure_ranges(sweep.PassContext(model, layers, self.dataset, config), task.images),
        ).arrays()
        attributes = {"digest": task.digest, "content": hashing.arrays_digest(arrays), "device": self._kind}
        return shards.to_bytes(attributes, arrays)

    def _sweep(self, task: SweepTask) -> bytes:
        layers, model, threads = self.setup.layers, self.measured, max(2, self.setup.threads)
        range_arrays = hdf5.from_bytes(task.ranges)
        ranges = HistogramRange(**range_arrays)
        result = self._portioned(
            task,
            lambda config: sweep.sweep(
                sweep.PassContext(model, layers, self.dataset, config, self.stop, threads),
                task.images,
                ranges,
                self.drawn,
            ),
        )
        return self._part_bytes(task, result.arrays(), ranges=hashing.arrays_digest(range_arrays))

    def _localize(self, task: LocalizeTask) -> bytes:
        layers, model, threads = self.setup.layers, self.measured, max(2, self.setup.threads)
        table = localize.SecondPassIndex.from_arrays(hdf5.from_bytes(task.index))
        arrays = self._portioned(
            task,
            lambda config: localize.localize(
                sweep.PassContext(model, layers, self.dataset, config, self.stop, threads, self.setup.depths),
                table,
                task.images,
            ),
        )
        return self._part_bytes(task, arrays)

    def _effects_context(self, task: EffectsTask | ConnectionsTask) -> EffectsContext:
        request, means = self.setup.effects, hdf5.from_bytes(task.means)
        assert request is not None
        return EffectsContext(
            model=self.measured,
            layers=request.layers,
            outputs=request.outputs,
            means=[means[str(i)] for i in range(len(request.layers))],
            ablated=request.ablated,
            dataset=self.dataset,
            batch=request.batch,
            stop=self.stop,
            threads=max(2, self.setup.threads),
        )

    def _connections(self, task: ConnectionsTask) -> bytes:
        request, context = self.setup.effects, self._effects_context(task)
        assert request is not None
        arrays = self._halved(
            memory_key(task),
            request.batch,
            lambda batch: connections.measure_connections(
                dataclasses.replace(context, batch=batch), request.channels, task.images
            ),
        )
        return self._part_bytes(task, arrays)

    def _effects(self, task: EffectsTask) -> bytes:
        context = self._effects_context(task)
        result = self._halved(
            memory_key(task),
            context.batch,
            lambda batch: measurement.measure(dataclasses.replace(context, batch=batch), task.images),
        )
        return self._part_bytes(task, result.arrays())

    def _relevance(self, task: RelevanceTask) -> bytes:
        request = self.setup.effects
        assert request is not None
        context = relevance.RelevanceContext(
            model=self.measured,
            layers=request.layers,
            outputs=request.outputs,
            dataset=self.dataset,
            config=self.setup.config.examples,
            stop=self.stop,
            threads=max(2, self.setup.threads),
        )
        index = relevance.RelevanceIndex.from_arrays(hdf5.from_bytes(task.index))
        arrays = relevance.measure_relevance(context, index, task.images)
        return self._part_bytes(task, arrays)

    def _samples(self, task: SamplesTask) -> bytes:
        request = self.setup.activation_atlas
        assert request is not None
        context = sampling.SamplingContext(
            model=self.measured,
            layers=request.layers,
            outputs=request.outputs,
            dataset=self.dataset,
            positions=request.config.positions,
            seed=self.setup.config.run.seed,
            batch=request.batch,
            stop=self.stop,
            threads=max(2, self.setup.threads),
        )
        result = self._halved(
            memory_key(task),
            request.batch,
            lambda batch: sampling.sample(dataclasses.replace(context, batch=batch), task.images),
        )
        return self._part_bytes(task, result.arrays())

    def _cells(self, task: CellsTask) -> bytes:
        request, config = self.setup.activation_atlas, self.setup.config
        assert request is not None
        layer, directions = self.layers[task.layer], hdf5.from_bytes(task.directions)["directions"]
        preset = request.preset(config.render, layer, directions)
        job = self.job(task.layer, request.canvas(layer), preset)
        cells = [(0, cell) for cell in range(len(directions))]
        size = config.engine.images_per_batch(layer.channels, self.setup.device)
        batches = self.in_batches(
            memory_key(task),
            cells,
            size,
            lambda part: draw_start(job, part, 0),
            lambda start: render(job, start.units, start),
        )
        pictures = [picture for batch in batches for picture in batch]
        arrays = {
            "images": np.stack([p.image for p in pictures])[:, None],
            "activation": np.array([p.activation for p in pictures], np.float32),
            "failed": np.array([p.status == "failed" for p in pictures], bool),
        }
        place = {"digest": task.digest, "start": task.start, "end": task.end, "device": self._kind}
        return shards.to_bytes({**place, "precision": job.precision}, arrays)

    def _responses(self, task: ResponsesTask) -> bytes:
        request = self.setup.facets
        assert request is not None
        context = ResponsesContext(
            model=self.measured,
            layers=request.layers,
            channels=request.channels,
            embeddings=request.embeddings,
            reference=request.reference,
            count=request.count,
            dataset=self.dataset,
            batch=request.batch,
            stop=self.stop,
            threads=max(2, self.setup.threads),
        )
        result = self._halved(
            memory_key(task),
            request.batch,
            lambda batch: measure_responses(dataclasses.replace(context, batch=batch), task.images),
        )
        return self._part_bytes(task, result.arrays())

    def _facets(self, task: FacetsTask) -> bytes:
        request, config = self.setup.facets, self.setup.config
        assert request is not None
        layer, facets = self.layers[task.layer], hdf5.from_bytes(task.facets)
        targets = {name: facets[name] for name in ("center", "mean", "deviation")}
        preset = request.preset(config.render, layer, targets)
        job = self.job(task.layer, request.canvas(layer), preset)
        units = [(channel, number) for number, channel in enumerate(facets["channel"].tolist())]
        loaded = facet_images.load(self.dataset, task.images, self.model.preprocessing, max(2, self.setup.threads))
        starts = facet_images.starts(job, units, facets["nearest"], loaded)
        job = dataclasses.replace(job, initial_images=starts)
        batches = self.in_batches(
            memory_key(task),
            units,
            config.engine.images_per_batch(layer.channels, self.setup.device),
            lambda part: draw_start(job, part, 0),
            lambda start: render(job, start.units, start),
        )
        pictures = [picture for batch in batches for picture in batch]
        side = 0 if config.examples.store == "ids" else config.examples.crop_side
        arrays = facet_images.arrays(job, pictures, facet_images.thumbnails(facets["nearest"], loaded, side))
        place = {"digest": task.digest, "start": task.start, "end": task.end, "device": self._kind}
        return shards.to_bytes({**place, "precision": job.precision}, arrays)

    def _part_bytes(self, task: SweepTask | PartTask, arrays: Mapping[str, np.ndarray], **attributes: str) -> bytes:
        """Return the result of a part of a list of images as bytes of a shard, which knows its place in the list."""
        place = {"digest": task.digest, "start": task.start, "end": task.end, "device": self._kind}
        return shards.to_bytes({**place, **attributes}, arrays, "lzf")


def _without_example_failed(
    pictures: Sequence[Visualization], starts: Mapping[int, InitialImage]
) -> list[Visualization]:
    """Return the visualizations; those that had no dataset example to start from are marked as failed."""
    missing = {channel for channel, start in starts.items() if start.missing}
    why = {"status": "failed", "reason": initial_images.NO_EXAMPLE}
    return [dataclasses.replace(p, **why) if p.channel in missing else p for p in pictures]


def _restarted_arrays(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of a shard with the visualizations of silent units replaced by restarted ones.

    Other variants of these units stay as they were. So do silent ones that were restarted in vain, but for the reason.

    Args:
        before: Arrays of the units from noise, by name.
        after: Arrays of the same units, all variants restarted.
    """
    silent = (before["status"] == "failed") & (before["reason"] == SILENT)
    replaced = silent & (after["status"] != "failed")
    arrays = {name: np.array(array) for name, array in before.items() if name in after}
    for name, array in arrays.items():
        if name != "channels":
            array[replaced] = after[name][replaced]
    arrays["reason"][silent] = after["reason"][silent]
    return arrays
