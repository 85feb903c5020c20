"""The configuration as frozen dataclasses: the schema of `conf/`, and what workers receive.

Hydra composes a tree; `from_tree` turns it into a `Config` and rejects what it does not know, before any
work. Nothing below this module ever sees Hydra's own types.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.activation_atlas.config import ActivationAtlasConfig
from pipeline.config.unit_filter import UnitFilter
from pipeline.core.config_files import is_url
from pipeline.core.errors import AtlasError
from pipeline.core.validation import Keyed, NullMeans, Use, build
from pipeline.data.config import DataConfig
from pipeline.effects.config import EffectsConfig
from pipeline.examples.sweep import ExamplesConfig
from pipeline.facets.config import FacetsConfig
from pipeline.layers.finding import Layer
from pipeline.layers.selection import LayersConfig
from pipeline.models.config import ModelConfig
from pipeline.site.config import SiteConfig
from pipeline.store.remote import local_root
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.preset import Preset

# Preset names of display images end with this.
DISPLAY_SUFFIX = "-display"
# `engine.batch` is for canvases of about this area; those of display images are larger.
USUAL_AREA = 224**2
# Images of a batch with `engine.batch` "auto". With few images a GPU waits for its kernels to be launched. Early layers
# have the largest maps and the fewest channels: smaller batches need less memory and are divided among more workers.
CPU_BATCH, GPU_BATCH, EARLY_GPU_BATCH = 16, 128, 64
EARLY_CHANNELS = 64

AUTO_OR_POSITIVE = Use("auto or a number above 0")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The run folder, and the seed of everything random in a run.

    Attributes:
        name: Name of the run folder.
        root: Folder of all runs, or its URL in an object store.
        scratch: Folder for working copies of runs in an object store; None for one in the cache of this user.
        seed: Seed of visualizations.
        update: Whether an existing run folder may continue with another configuration: only what changed is made again.
        check: Number of visualizations that `atlas verify` makes again.
        trust: Whether `atlas verify`, and `atlas site` for `site.own_image`, may load the network, code and
            checkpoints that the config.yaml of a run folder names. Only what is typed counts, never what a run folder
            has stored.
    """

    name: str
    root: str = "runs"
    scratch: Annotated[str | None, NullMeans("a folder in the cache of this user")] = None
    seed: int = 0
    update: bool = False
    check: int = 4
    trust: bool = False


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Workers and their resources. `auto` and null are resolved from the machine or the cluster when the run starts.

    Attributes:
        name: "ray", or "inline" for one worker in this process.
        address: Address of a Ray cluster; None for a private instance on this machine.
        workers: Number of workers; "auto" for as many as there is room for.
        max_workers: With `workers` "auto", the number of workers that an autoscaler is asked for; None uses the nodes
            that there are.
        cpus_per_worker: CPUs of one worker.
        gpus_per_worker: GPUs of one worker; fractions share one, 0 uses none.
        device: Device of the workers: "cpu", "cuda", or inline also a certain GPU such as "cuda:1". "auto" keeps the
            one that the results of the run folder were made on.
        precision: Precision of the optimization steps, "float32" (IEEE 754), "tf32" (on NVIDIA GPUs) or "bfloat16";
            everything that is measured, such as finished images, is computed in IEEE float32. "auto" keeps that of
            the results of the run folder, and is bfloat16 for a new run on a CPU with instructions for it or on an
            NVIDIA GPU from compute capability 8.0 on.
        shared_fs: Whether workers see the photographs of the driver. Without, dataset images are sent to them. Finished
            shards are sent back by all workers that do not see the run folder.
        batch: Number of images that are optimized together; halved where a GPU runs out of memory. "auto" is 16 on a
            CPU, and on a GPU 128, or 64 in layers of at most 64 channels.
        cuda_graphs: Whether a GPU repeats a captured optimization step instead of launching each; where that does not
            give the same, steps are launched.
        task_seconds: Upper bound of the estimated seconds of one task.
        memory_gb: A worker that uses more is replaced; "auto" is its share of the machine.
        patience: Seconds to wait for a node with room for a worker, from the last time that a node joined.
        timeout: A worker that takes more than this multiple of the estimated seconds of its task is replaced, and the
            task counts as failed; in other processes only, not inline.
        timeout_seconds: Lower bound of this time, in seconds.
        mixed_versions: Whether workers may have other versions of the project, of libraries or of Python than the
            driver, with a warning.
        attempts: Failures after which a task is set aside.
        max_failures: Number of consecutive tasks that are set aside before the run stops.
        progress_seconds: Seconds between two lines of progress.
    """

    name: Literal["ray", "inline"] = "ray"
    address: str | None = None
    workers: Annotated[Annotated[int, Field(gt=0)] | Literal["auto"], AUTO_OR_POSITIVE] = "auto"
    max_workers: Annotated[Annotated[int, Field(ge=1)] | None, NullMeans("the nodes that there are")] = None
    cpus_per_worker: Annotated[Annotated[float, Field(gt=0)] | Literal["auto"], AUTO_OR_POSITIVE] = "auto"
    # 0: no GPUs
    gpus_per_worker: Annotated[Annotated[float, Field(ge=0)] | Literal["auto"], AUTO_OR_POSITIVE] = "auto"
    device: Annotated[
        Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")], Use("auto, cpu, cuda or, inline, cuda:N")
    ] = "auto"
    precision: Annotated[
        Literal["auto", "float32", "tf32", "bfloat16"], Use("auto, float32, tf32 (NVIDIA GPUs) or bfloat16")
    ] = "auto"
    shared_fs: bool = True
    batch: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], AUTO_OR_POSITIVE] = "auto"
    cuda_graphs: bool = True
    task_seconds: Annotated[float, Field(ge=0.001)] = 120.0
    memory_gb: Annotated[Annotated[float, Field(gt=0)] | Literal["auto"], AUTO_OR_POSITIVE] = "auto"
    patience: Annotated[float, Field(ge=1)] = 60.0
    timeout: Annotated[float, Field(ge=2)] = 10.0
    timeout_seconds: Annotated[float, Field(ge=1)] = 600.0
    mixed_versions: bool = False
    attempts: Annotated[int, Field(ge=1)] = 3
    max_failures: Annotated[int, Field(ge=1)] = 20
    progress_seconds: float = 5.0

    def images_per_batch(self, channels: int, device: str) -> int:
        """Return the number of images that are optimized together.

        Args:
            channels: Number of channels of the layer.
            device: Device of the workers.
        """
        if not isinstance(self.batch, str):
            return self.batch
        if device == "cpu":
            return CPU_BATCH
        return EARLY_GPU_BATCH if channels <= EARLY_CHANNELS else GPU_BATCH


@dataclasses.dataclass(frozen=True)
class DisplayConfig:
    """Display images: units that the main preset visualizes once more on a larger canvas, for the site only.

    Attributes:
        units: The units, as layer:channel; "all"; or "wall", those on the home page of the atlas in the run folder.
        size: Longer side of a display image in pixels.
    """

    units: Annotated[
        tuple[str, ...] | Literal["all", "wall"] | None, Use("all, wall, a list [layer:channel,…], or null")
    ] = None
    size: Annotated[int, Field(ge=64, le=2048)] = 512


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run.

    Attributes:
        run: Run folder and seed.
        model: Network and weights.
        layers: Selection of layers and channels.
        data: Dataset.
        render: The main preset.
        examples: Settings of the dataset pass.
        engine: Workers.
        site: Settings of the site.
        also: Further presets that visualize all units.
        judges: Other networks that the visualizations are shown to, by name.
        effects: Settings of the effects of units on the outputs.
        activation_atlas: Settings of the activation atlases of layers.
        facets: Settings of the facets of units.
        base: Folder of a run whose results are reused.
        units: Table of units that replaces the selection of layers and channels.
        only: Condition on the visualizations of the base run that selects units.
        display: Display images.
    """

    run: RunConfig
    model: ModelConfig
    layers: LayersConfig
    data: DataConfig
    render: Preset
    examples: ExamplesConfig
    engine: EngineConfig
    site: SiteConfig
    also: Annotated[tuple[Preset, ...], Keyed] = ()
    judges: Mapping[str, ModelConfig] = dataclasses.field(default_factory=dict)
    effects: EffectsConfig = dataclasses.field(default_factory=EffectsConfig)
    activation_atlas: ActivationAtlasConfig = dataclasses.field(default_factory=ActivationAtlasConfig)
    facets: FacetsConfig = dataclasses.field(default_factory=FacetsConfig)
    base: str | None = None
    units: str | None = None
    only: str | None = None
    display: DisplayConfig = DisplayConfig()

    @property
    def presets(self) -> tuple[Preset, ...]:
        """All presets whose visualizations are measured, the main one first. Their names are unique."""
        return (self.render, *self.also)

    @property
    def display_preset(self) -> Preset | None:
        """The main preset under another name, for display images; None if there are none.

        Only the first variant is made, unless the variants influence each other.
        """
        if not self.display.units:
            return None
        variants = self.render.variants if self.render.couplings else 1
        return dataclasses.replace(self.render, name=self.render.name + DISPLAY_SUFFIX, variants=variants)

    @property
    def rendered_presets(self) -> tuple[Preset, ...]:
        """All presets, with that of display images as the last."""
        display = self.display_preset
        return self.presets if display is None else (*self.presets, display)

    def preset(self, name: str) -> Preset:
        """Return the preset called `name`."""
        return next(preset for preset in self.rendered_presets if preset.name == name)

    def preset_for(self, name: str, layer: Layer) -> Preset:
        """Return the preset called `name` with the objective that it has for `layer`."""
        return self.preset(name).for_layer(layer)

    def channels_per_batch(self, preset: Preset, channels: int, device: str) -> int:
        """Return the number of channels that are optimized together: all variants of a channel are in one batch.

        Args:
            preset: A preset of the run.
            channels: Number of channels of the layer.
            device: Device of the workers.
        """
        batch = self.engine.images_per_batch(channels, device)
        display = self.display_preset
        if display is not None and preset.name == display.name:
            batch = math.ceil(batch * min(1.0, USUAL_AREA / self.display.size**2))
        return max(1, batch // preset.variants)

    @property
    def root(self) -> Path:
        """The folder of all runs on this machine; of runs in an object store, that of their working copies."""
        return local_root(self.run.root, self.run.scratch)

    @property
    def folder(self) -> Path:
        """The run folder on this machine."""
        return self.root / self.run.name

    @property
    def url(self) -> str:
        """URL of the run in an object store; empty for a run on this machine."""
        return f"{self.run.root.rstrip('/')}/{self.run.name}" if is_url(self.run.root) else ""


# Sections that a run folder may change between commands. Device and precision are in the digests of visualizations;
# judges, effects, activation atlases, facets and display images change no other result, and the identity of an atlas
# contains what they add.
FREE_SECTIONS = ("engine", "site", "run", "base", "judges", "effects", "activation_atlas", "facets", "display")


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Return the `Config` of a resolved plain tree.

    Raises:
        AtlasError: If a key is unknown or missing, a value invalid, or settings contradict each other.
    """
    config = build(Config, tree)
    twice = [name for name, count in Counter(preset.name for preset in config.rendered_presets).items() if count > 1]
    if twice:
        raise AtlasError(f"Two presets of this run are called {twice[0]!r}: give one another name, also.KEY.name=…")
    name = config.run.name
    if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise AtlasError(f"run.name={name!r} must be a plain folder name.")
    if config.only is not None:
        UnitFilter.of(config.only)
        if config.base is None:
            raise AtlasError(f"only={config.only} needs base=runs/NAME: the run whose visualizations it refers to.")
    _check_checkpoint(config)
    edges = config.examples.spectrum
    if list(edges) != sorted(set(edges)) or len(edges) < 2 or edges[0] != 0 or edges[-1] != 100:
        raise AtlasError(f"examples.spectrum={list(edges)}: per cent, rising from 0 to 100.")
    return config


def _check_checkpoint(config: Config) -> None:
    """Raise `AtlasError` for settings that choose within a checkpoint if there is none."""
    ensembles = any(isinstance(a, Ensemble) for preset in config.presets for a in preset.augmentations)
    for key in ("checkpoint_key", "checkpoint_prefix"):
        value = getattr(config.model, key)
        if value is not None and config.model.checkpoint_path is None and not ensembles:
            raise AtlasError(f"model.{key}={value} chooses within a checkpoint: add model.checkpoint=FILE.")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return "key: old → new" for every setting in which two plain trees differ."""
    changes = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changes += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changes.append(f"{prefix}{key}: {a!r} → {b!r}")
    return changes
