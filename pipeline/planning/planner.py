"""Making the plan of a run: seconds of work that find every error of the input before the work starts."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter

import torch

from pipeline.acceleration.batchnorm_folding import ConvNormPair, fold, foldable_pairs
from pipeline.acceleration.precision import capability_of, usable
from pipeline.acceleration.variants import ModelVariants, layers_without_gradient, verified_variants
from pipeline.activation_atlas.request import ActivationAtlasRequest, request_activation_atlas
from pipeline.config.schema import Config
from pipeline.core.errors import AtlasError
from pipeline.data import datasets
from pipeline.data.datasets import Dataset
from pipeline.effects.request import request_effects
from pipeline.engine.devices import check_device, free_memory, prepare_device
from pipeline.engine.own_process import in_own_process
from pipeline.engine.resources import WorkerPool, local_resources, size_pool
from pipeline.engine.tasks import Setup, examples_digest
from pipeline.facets.request import request_facets
from pipeline.kernels.device_errors import is_device_lost
from pipeline.layers import selection
from pipeline.layers.dictionaries import channel_layers
from pipeline.layers.finding import Layer, ReceptiveField
from pipeline.layers.heads import HeadLayer
from pipeline.layers.path_depths import choose_depths
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.models.loading import Model, load_model
from pipeline.planning import execution, judging, manifest, natural_deviations
from pipeline.planning import heads as fitted_heads
from pipeline.planning.advice import known_rotation_numbers, linear_output_advice
from pipeline.planning.base_run import check_same_sources, find_base_run
from pipeline.planning.cost_model import (
    ZERO_SPAN,
    PlanRow,
    Span,
    Timings,
    estimate,
    time_batched_forward,
    time_image_loading,
)
from pipeline.planning.folder import RunFolder
from pipeline.planning.judging import PlannedJudge
from pipeline.planning.manifest import network_digest
from pipeline.planning.overheads import Overheads, Stopwatch, process_start
from pipeline.planning.plan import Plan, RemainingWork, Unrendered
from pipeline.planning.preset_inputs import with_files, with_penalty_layers
from pipeline.planning.unit_selection import Units, display_units, select_units
from pipeline.planning.validation import (
    channels_to_render,
    choose_canvas_sizes,
    display_sizes,
    validate_request,
    with_labels,
)
from pipeline.visualization.network_penalties import NaturalDeviations, Normalization, normalizations_before
from pipeline.visualization.preset import Preset, Size

log = logging.getLogger(__name__)

# A first check of the network's variants that takes less than this many seconds is mostly a warm-up of about a second.
MOSTLY_WARM_UP = 1.5


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Network and dataset of a run.

    Attributes:
        config: The configuration, with files read and `auto` settings of the engine resolved.
        model: The network, on the CPU.
        dataset: Listing of the dataset.
        fingerprint: Digest of the dataset and the preprocessing.
        base: The base run, if there is one.
        start: Seconds from the start of this process until now.
        loading: Seconds that loading the network took.
    """

    config: Config
    model: Model
    dataset: Dataset
    fingerprint: str
    base: RunFolder | None
    start: Span
    loading: Stopwatch

    @functools.cached_property
    def pairs(self) -> tuple[ConvNormPair, ...]:
        """Convolutions and batch normalizations that can be folded; a part of loading the network."""
        with self.loading:
            return foldable_pairs(self.model)

    @functools.cached_property
    def folded(self) -> Model:
        """The network with folded batch normalizations."""
        return fold(self.model, self.pairs)


@dataclasses.dataclass(frozen=True)
class _Units:
    """The units of a run.

    Attributes:
        layers: Layers with at least one channel, in the order of the network.
        channels: Channels of each layer.
        visualized: Those of them that get visualizations.
        reasons: Why layers cannot be visualized, by name.
        others: Layers that presets read besides the layer of the unit.
        class_layers: Names of those whose channels are the classes that the network has names of.
        depths: Fixed depths of the network; see `layers.path_depths`.
        candidates: All layers that units could be chosen from, in the order of the network.
        logits: Layers of logits.
    """

    layers: tuple[Layer, ...]
    channels: dict[str, tuple[int, ...]]
    visualized: dict[str, tuple[int, ...]]
    reasons: dict[str, str]
    others: tuple[Layer, ...]
    class_layers: tuple[str, ...] = ()
    depths: tuple[Layer, ...] = ()
    candidates: tuple[Layer, ...] = ()
    logits: tuple[Layer, ...] = ()

    @property
    def rendered(self) -> list[Layer]:
        """Layers that get visualizations."""
        return [layer for layer in self.layers if layer.name not in self.reasons]


def make_plan(
    config: Config,
    timed: bool = True,
    remaining_work: Callable[[Plan], RemainingWork] | None = None,
    units: Units | None = None,
    listed: tuple[Dataset, str] | None = None,
) -> Plan:
    """Load the network, find and choose layers, list the dataset and estimate the time.

    Args:
        config: The configuration.
        timed: Whether to estimate times by timing a few steps. Without it each visualization costs one second.
        remaining_work: Returns the work that existing results leave; only this is timed. Without it, all work is left.
        units: Channels of each layer, instead of those that the configuration chooses.
        listed: Dataset and its fingerprint, where they are known: then nothing is listed.

    Raises:
        AtlasError: If anything in the input is wrong.
    """
    check_device(config.engine)
    cpus, gpus = local_resources()
    with _threads(cpus):
        inputs, chosen = _find_units(_load_inputs(config, listed), units)
        config = inputs.config
        judges = judging.check_judges(config.judges, inputs.model, chosen.class_layers)
        visualizations = sum(len(chosen.visualized[layer.name]) for layer in chosen.rendered) * len(config.presets)
        pool = size_pool(config.engine, [(cpus, gpus)], visualizations)
        network = network_digest(inputs.model, config.model)
        chosen = _with_receptive_fields(chosen, inputs, network)
    with _threads(min(pool.threads, cpus)):
        plan = dataclasses.replace(_assemble(inputs, chosen, pool, network), judges=judges)
        if remaining_work is not None:
            plan = dataclasses.replace(plan, left=remaining_work(plan))
        return _with_estimates(plan, inputs, chosen) if timed and not plan.left.nothing else plan


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load_inputs(config: Config, listed: tuple[Dataset, str] | None = None) -> _Inputs:
    """Load the network and list the dataset; check that the base run is about the same."""
    if config.model.folder is None:
        # Workers may have another working directory.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, folder=str(Path.cwd())))
    config = dataclasses.replace(config, judges=judging.with_folder(config.judges, Path.cwd()))
    config = dataclasses.replace(config, layers=config.layers.within(Path.cwd()))
    start, loading = process_start(), Stopwatch()
    with loading:
        model = load_model(config.model).to("cpu")
    if listed is None:
        dataset = datasets.list_dataset(config.data, model.preprocessing.channels)
        fingerprint = datasets.fingerprint(dataset, model.preprocessing)
    else:
        dataset, fingerprint = listed
    base = find_base_run(config)
    if base is not None:
        check_same_sources(base, config, model, fingerprint)
    engine = execution.resolved(config.engine, RunFolder(config.folder), base)
    check_device(engine)
    config = with_files(dataclasses.replace(config, engine=engine), dataset, model.preprocessing)
    return _Inputs(config, model, dataset, fingerprint, base, start, loading)


def _find_units(inputs: _Inputs, units: Units | None) -> tuple[_Inputs, _Units]:
    """Find the layers of the network and choose units; the network comes back with the labels of its classes."""
    model = inputs.model
    candidates = selection.list_layers(model, inputs.config.layers, inputs.config.model.aliases)
    config = with_penalty_layers(inputs.config, candidates)
    inputs = dataclasses.replace(inputs, config=config)
    requested = _requested(inputs, candidates) if units is None else units
    layers = [layer for layer in candidates if layer.name in requested]
    heads = selection.logit_layers(model, candidates)
    model = with_labels(model, heads, user_labels=config.model.labels is not None)
    config, unfitted = fitted_heads.with_heads(config, model, candidates, heads)
    inputs = dataclasses.replace(inputs, config=config)
    others = validate_request(config, model, [*candidates, *unfitted], layers, heads)
    channels = {layer.name: channels_to_render(layer, requested[layer.name], config) for layer in layers}
    empty = [name for name, numbers in channels.items() if not numbers]
    if len(empty) == len(layers):
        raise AtlasError(f"layers.channels={config.layers.channels} leaves no channel in any layer.")
    for name in empty:
        log.warning("%s has none of the channels %s and is left out", name, config.layers.channels)
    layers = [layer for layer in layers if channels[layer.name]]
    folders = [config.folder, *([inputs.base.path] if inputs.base else [])]
    known = known_rotation_numbers(folders, model.digest)
    advice = linear_output_advice(config, layers, {layer.name for layer in heads}, known)
    if advice:
        log.info(advice)
    reasons = layers_without_gradient(model, layers)
    for name, reason in reasons.items():
        log.warning("%s gets dataset examples but no visualizations: %s", name, reason)
    visualized = {
        layer.name: selection.visualized_of(layer, channels[layer.name], config.layers.visualized) for layer in layers
    }
    nothing = "layers.visualized selects none of its units"
    reasons |= {name: nothing for name, numbers in visualized.items() if not numbers}
    natural_deviations.check_normalizations(
        model, [layer for layer in layers if layer.name not in reasons], config.presets
    )
    classes = {layer.name for layer in heads if model.labels and layer.channels == len(model.labels)}
    class_layers = tuple(layer.name for layer in layers if layer.name in classes)
    inputs = dataclasses.replace(inputs, model=model)
    if unfitted:
        others = _with_fitted_heads(inputs, others, unfitted, heads[-1])
    depths = choose_depths(model, channel_layers(candidates), {path for pair in inputs.pairs for path in pair})
    return inputs, _Units(
        tuple(layers), channels, visualized, reasons, others, class_layers, depths, tuple(candidates), tuple(heads)
    )


def _with_fitted_heads(
    inputs: _Inputs, others: Sequence[Layer], heads: Sequence[HeadLayer], logits: Layer
) -> tuple[Layer, ...]:
    """Return the layers that presets read, with heads fitted to the dataset, or as an earlier plan has them."""
    source = fitted_heads.HeadSource(inputs.model, inputs.folded, inputs.dataset, inputs.fingerprint, logits)
    folders = [inputs.config.folder, *([inputs.base.path] if inputs.base else [])]
    found = fitted_heads.fitted(heads, source, folders)
    return tuple(found.get(layer.name, layer) for layer in others)


def _requested(inputs: _Inputs, candidates: Sequence[Layer]) -> Units:
    """Return the channels of each layer that the configuration chooses: by table and condition, or by policy."""
    config = inputs.config
    base = inputs.base.path if inputs.base else None
    listed = select_units(config.units, config.only, base, config.render.name, candidates)
    if listed is None:
        return {
            layer.name: selection.channels_of(layer, config.layers.channels)
            for layer in selection.select_layers(inputs.model, candidates, config.layers)
        }
    within = selection.filter_layers([layer for layer in candidates if layer.name in listed], candidates, config.layers)
    if not within:
        raise AtlasError("layers.include and layers.exclude leave none of the layers that units and only choose.")
    return {layer.name: listed[layer.name] for layer in within}


def _with_receptive_fields(chosen: _Units, inputs: _Inputs, network: str) -> _Units:
    """Return the units with the receptive fields of their layers, from an earlier plan of this network if possible."""
    fields: dict[str, ReceptiveField | None] = {}
    for folder in (inputs.base.path if inputs.base else None, inputs.config.folder):
        record = manifest.read(folder) if folder else None
        fields |= record.receptive_fields(network, chosen.layers) if record else {}
    unknown = [layer for layer in chosen.layers if layer.name not in fields]
    fields |= receptive_fields(inputs.folded, unknown) if unknown else {}
    layers = tuple(dataclasses.replace(layer, field=fields[layer.name]) for layer in chosen.layers)
    return dataclasses.replace(chosen, layers=layers)


def _assemble(inputs: _Inputs, chosen: _Units, pool: WorkerPool, network: str) -> Plan:
    """Return the plan without estimates."""
    config, model, channels = inputs.config, inputs.model, chosen.channels
    rows = []
    for preset in config.presets:
        sizes = choose_canvas_sizes(model, chosen.rendered, preset)
        for layer in chosen.rendered:
            numbers = chosen.visualized[layer.name]
            rows.append(PlanRow(layer, numbers, sizes[layer.name], len(numbers), preset.name))
    rows += _display_rows(config, model, rows[: len(chosen.rendered)])
    setup = Setup(config, model.digest, chosen.layers, inputs.dataset, pool.threads, pool.device, chosen.others)
    setup = execution.on_device(dataclasses.replace(setup, depths=chosen.depths), pool.device)
    if any(preset.needs_dataset_pass for preset in config.presets):
        setup = dataclasses.replace(setup, begins=examples_digest(setup, inputs.fingerprint))
    chosen_units = [(layer, channels[layer.name]) for layer in chosen.layers]
    effects = request_effects(config.effects, inputs.dataset, chosen_units, chosen.candidates, chosen.logits)
    setup = dataclasses.replace(setup, effects=effects, activation_atlas=_activation_atlas(inputs, chosen))
    setup = _with_facets(setup, inputs, chosen)
    compared = natural_deviations.compared_layers(model, chosen.rendered, config.presets, inputs.dataset)
    if compared:
        setup = dataclasses.replace(setup, natural=_natural_deviations(inputs, compared, network))
    images = len(inputs.dataset.images)
    return Plan(
        config=config,
        rows=tuple(rows),
        setup=setup,
        pool=pool,
        examples_seconds=images,
        labels=model.labels,
        class_layers=chosen.class_layers,
        recipe=model.preprocessing,
        dataset_fingerprint=inputs.fingerprint,
        network=network,
        left=RemainingWork(
            {(row.layer.name, row.preset): len(row.channels) for row in rows},
            images,
            effects=len(effects.images) if effects else 0,
            relevant=effects.relevant_images if effects else 0,
            connected=len(effects.connected) if effects else 0,
            samples=len(setup.activation_atlas.images) if setup.activation_atlas else 0,
            cells=setup.activation_atlas.expected if setup.activation_atlas else {},
            responses=images if setup.facets else 0,
            facets=setup.facets.expected if setup.facets else {},
        ),
        unrendered=tuple(
            Unrendered(layer, channels[layer.name], chosen.reasons[layer.name])
            for layer in chosen.layers
            if layer.name in chosen.reasons
        ),
        network_layers=chosen.candidates,
        channels=channels,
    )


def _activation_atlas(inputs: _Inputs, chosen: _Units) -> ActivationAtlasRequest | None:
    """Return the activation atlases of a run; None without any."""
    config, model = inputs.config, inputs.model
    size, batch = model.preprocessing.size, config.examples.batch
    request = request_activation_atlas(
        config.activation_atlas, inputs.dataset, chosen.rendered, config.render, chosen.logits, batch, size
    )
    if request is None:
        return None
    return dataclasses.replace(request, canvases=_canvases(model, request.layers, request.sized(config.render)))


def _canvases(model: Model, layers: Sequence[Layer], preset: Preset) -> tuple[Size, ...]:
    """Return the (height, width) of the images of layers by a preset, or that of the network's input."""
    try:
        sizes = choose_canvas_sizes(model, layers, preset)
    except AtlasError:
        # A network with one input size, such as many transformers.
        sizes = choose_canvas_sizes(model, layers, dataclasses.replace(preset, size="input"))
    return tuple(sizes[layer.name] for layer in layers)


def _with_facets(setup: Setup, inputs: _Inputs, chosen: _Units) -> Setup:
    """Return the setup of workers with the units that get facets, and the layers that their images read."""
    config, model = inputs.config, inputs.model
    request = request_facets(
        config.facets,
        inputs.dataset,
        [(layer, chosen.visualized[layer.name]) for layer in chosen.rendered],
        config.render,
        chosen.candidates,
        chosen.logits,
        config.examples.batch,
    )
    if request is None:
        return setup
    canvases = _canvases(model, request.layers, request.sized(config.render))
    others = {layer.name: layer for layer in (*setup.others, *request.embeddings)}
    facets = dataclasses.replace(request, input_size=model.preprocessing.size, canvases=canvases)
    return dataclasses.replace(setup, facets=facets, others=tuple(others.values()))


def _display_rows(config: Config, model: Model, measured: Sequence[PlanRow]) -> list[PlanRow]:
    """Return the rows of display images, given those of the main preset."""
    preset = config.display_preset
    if preset is None:
        return []
    channels = display_units(config, {row.layer.name: row.channels for row in measured})
    sizes = display_sizes(model, {row.layer.name: row.canvas for row in measured if channels[row.layer.name]}, config)
    rows = []
    for row in measured:
        numbers, name = channels[row.layer.name], row.layer.name
        if numbers and max(row.canvas) >= config.display.size:
            log.info("%s has no display images: its visualizations have %d x %d pixels", name, *row.canvas)
        elif numbers:
            rows.append(PlanRow(row.layer, numbers, sizes[name], len(numbers), preset.name, display=True))
    return rows


def _natural_deviations(inputs: _Inputs, layers: Sequence[Layer], network: str) -> NaturalDeviations:
    """Return the deviations of natural images as an earlier plan has them, or measure them."""
    folders = [inputs.config.folder, *([inputs.base.path] if inputs.base else [])]
    key = natural_deviations.identity(network, inputs.fingerprint)
    found = natural_deviations.kept(folders, key, inputs.model, layers)
    if found is not None:
        return found
    return natural_deviations.measure(inputs.model, inputs.folded, inputs.dataset, layers, inputs.fingerprint)


def _with_estimates(plan: Plan, inputs: _Inputs, chosen: _Units) -> Plan:
    """Return the plan with the estimated seconds of its rows, its dataset pass and everything else."""
    measured = _measured(plan, inputs, chosen)
    groups = measured.groups
    # A worker decodes images with as many threads as it has.
    loading = time_image_loading(inputs.dataset, inputs.model.preprocessing) if plan.left.reads else ZERO_SPAN
    read = loading * (1 / plan.pool.threads)
    warm_up = max(timings.warm_up for _, timings in groups)
    costs = Overheads(
        inputs.start,
        Span.exact(inputs.loading.seconds),
        Span.exact(warm_up),
        groups[0][1].forward,
        read,
        measured.batched,
    )
    rows = {(row.layer.name, row.preset): row for estimated, _ in groups for row in estimated}
    return dataclasses.replace(
        plan,
        rows=tuple(rows.get((row.layer.name, row.preset), row) for row in plan.rows),
        examples_seconds=costs.image_seconds * len(inputs.dataset.images),
        overheads=costs,
        timed_on=measured.device,
        judges=measured.judges,
    )


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What was timed on a device.

    Attributes:
        device: The device.
        groups: Rows that run on one variant of the network, with estimated seconds, and the timings of no row.
        judges: The judges, with estimates of their time.
        batched: See `Overheads.batched`.
    """

    device: str
    groups: Sequence[tuple[list[PlanRow], Timings]]
    judges: tuple[PlannedJudge, ...]
    batched: Span | None = None


def _measured(plan: Plan, inputs: _Inputs, chosen: _Units) -> _Measured:
    """Time the plan on the device of its workers; on the CPU if this machine has no such device or it fails.

    The driver of Ray workers opens no context on a GPU: it would keep memory beside theirs, and on a GPU in exclusive
    mode none of them could start.
    """
    device = _local_device(plan)
    if device != "cpu":
        try:
            if plan.config.engine.name == "inline":
                return _measure_on_gpu(plan, chosen, inputs.pairs, device)
            return in_own_process(_measure_on_gpu, plan, chosen, inputs.pairs, device)
        except AtlasError:
            raise
        except Exception as error:
            if is_device_lost(error):
                raise
            # The estimates of another device are better than no run. If it is an error of the work, workers report it.
            log.warning("steps could not be timed on %s, so the estimates are those of the CPU: %s", device, error)
        finally:
            free_memory()
    return _measure(plan, chosen, inputs.model, inputs.pairs, "cpu")


def _measure_on_gpu(plan: Plan, chosen: _Units, pairs: tuple[ConvNormPair, ...], device: str) -> _Measured:
    """Time the plan on a GPU, in this process, with a network of its own: that of the plan stays on the CPU."""
    prepare_device(device, plan.config.engine)
    cpus, _ = local_resources()
    with _threads(min(plan.pool.threads, cpus)):
        return _measure(plan, chosen, load_model(plan.config.model), pairs, device)


def _measure(plan: Plan, chosen: _Units, model: Model, pairs: tuple[ConvNormPair, ...], device: str) -> _Measured:
    """Time the plan on a device, to which the network is moved."""
    open_rows = [row for row in plan.rows if plan.left.channels[row.layer.name, row.preset]]
    place = _Place(model.to(device), pairs, device)
    groups = [_estimated(plan, place, chosen, rows) for rows in _by_normalizations(plan, open_rows)]
    effects, batched = plan.setup.effects, None
    if effects is not None and (plan.left.effects or plan.left.relevant or plan.left.connected):
        batched = time_batched_forward(fold(place.model, pairs), effects.outputs, effects.batch)
    return _Measured(device, groups, tuple(judge.timed(device) for judge in plan.judges), batched)


@dataclasses.dataclass(frozen=True)
class _Place:
    """The network on the device that a plan is timed on, and the pairs of its modules that can be folded."""

    model: Model
    pairs: tuple[ConvNormPair, ...]
    device: str


def _by_normalizations(plan: Plan, rows: Sequence[PlanRow]) -> list[list[PlanRow]]:
    """Return rows whose steps read no normalizations, then those that do: the latter run on another variant.

    At least one list, which may be empty: the dataset pass is timed without rows too.
    """
    with_them = [
        plan.setup.natural is not None and bool(plan.config.preset_for(row.preset, row.layer).network_penalties)
        for row in rows
    ]
    groups = [[row for row, reads in zip(rows, with_them, strict=True) if reads is wanted] for wanted in (False, True)]
    return [group for group in groups if group] or [[]]


def _estimated(plan: Plan, place: _Place, chosen: _Units, rows: Sequence[PlanRow]) -> tuple[list[PlanRow], Timings]:
    """Return rows that run on one variant of the network with estimated seconds, and the timings of no row."""
    deepest = max(rows, key=lambda row: row.layer.cost, default=None)
    norms = _normalizations(plan, place.model, rows)
    variants, seconds = _timed_variants(plan, place, deepest, norms.get(deepest.layer.name, []) if deepest else [])
    if variants.reason:
        log.info("steps run on the %s network: %s", variants.level, variants.reason)
    # A worker verifies variants for each layer, as far as that layer.
    seconds /= max(1.0, deepest.layer.cost if deepest else 1.0)
    reads = plan.left.reads
    estimated, timings = estimate(chosen.layers, rows, plan.config, chosen.others, variants, reads, norms)
    return [dataclasses.replace(row, seconds=row.seconds + seconds * row.layer.cost) for row in estimated], timings


def _normalizations(plan: Plan, model: Model, rows: Sequence[PlanRow]) -> dict[str, list[Normalization]]:
    """Return the normalizations that presets compare with natural images, by the name of the unit's layer."""
    natural = plan.setup.natural
    if natural is None:
        return {}
    device = str(model.device)
    layers = [row.layer for row in rows if plan.config.preset_for(row.preset, row.layer).network_penalties]
    return {layer.name: natural.of(normalizations_before(model, layer), device) for layer in layers}


def _local_device(plan: Plan) -> str:
    """Return the device of the workers, or the CPU if this machine has no such device."""
    device = plan.pool.device
    return "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device


def _timed_variants(
    plan: Plan, place: _Place, deepest: PlanRow | None, read: Sequence[Normalization]
) -> tuple[ModelVariants, float]:
    """Return the variants of the network for the deepest layer, and the seconds that a worker takes to verify them.

    Args:
        plan: The plan.
        place: The network on the device.
        deepest: Row of the deepest layer.
        read: Normalizations that its steps read.
    """
    layers = [*([deepest.layer] if deepest else plan.setup.layers[-1:]), *plan.setup.others]
    precision = execution.precision_name(plan.config.engine.precision, place.device)
    precision = usable(precision, torch.device(place.device).type, capability_of(place.device))
    size = deepest.canvas if deepest else None
    norms = {norm.path: norm.tap for norm in read}
    verify = functools.partial(verified_variants, place.model, place.pairs, layers, precision, size, norms)
    cpus, _ = local_resources()
    with _threads(cpus):
        began = perf_counter()
        variants = verify()
        if perf_counter() - began < MOSTLY_WARM_UP:
            # The warm-up would be counted once for each layer.
            began = perf_counter()
            verify()
        seconds = perf_counter() - began
    # The threads of a worker do not change the speed of a GPU.
    return variants, seconds * cpus / min(plan.pool.threads, cpus) if place.device == "cpu" else seconds
