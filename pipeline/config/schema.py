"""The configuration as frozen dataclasses: the schema of `conf/`, and what workers receive.

Hydra composes a tree; `from_tree` turns it into a `Config` and rejects what it does not know, before any
work. Nothing below this module ever sees Hydra's own types.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.unit_filter import UnitFilter
from pipeline.core.errors import AtlasError
from pipeline.core.registry import build
from pipeline.data.config import DataConfig
from pipeline.examples.sweep import ExamplesConfig
from pipeline.layers.selection import LayersConfig
from pipeline.models.config import ModelConfig
from pipeline.site.config import SiteConfig
from pipeline.visualization.batch_terms import COUPLINGS
from pipeline.visualization.gradient_preconditioners import PRECONDITIONERS
from pipeline.visualization.image_regularizers import PENALTIES
from pipeline.visualization.network_perturbations import AUGMENTATIONS, Ensemble
from pipeline.visualization.objectives import OBJECTIVES
from pipeline.visualization.optimizers import OPTIMIZERS
from pipeline.visualization.parameterizations import CANVASES
from pipeline.visualization.preset import Preset
from pipeline.visualization.schedules import STOPS
from pipeline.visualization.transforms import TRANSFORMS


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run lives and the seed of everything random in it.

    `update=true` allows a run folder to be continued with another configuration: only what changed is made.
    `check` is the number of pictures that `atlas verify` renders again.
    """

    name: str
    root: str = "runs"
    seed: int = 0
    update: bool = False
    check: int = 4


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Who does the work. `auto` and null are decided from the machine or cluster when the run starts.

    `batch` is the number of pictures optimised together, halved where a GPU has no memory for so many; a task is
    as many batches as are estimated to take `task_seconds`, and less towards the end. `precision` is what steps are
    computed in, `float32`, `bfloat16`, or `auto`: see `lowering`; what a finished picture is measured by is float32.
    With `shared_fs=false` photographs travel to the workers, and finished shards back. A worker that has grown beyond
    `memory_gb` is replaced; `auto` is its share of the machine.
    """

    name: str = "ray"
    address: str | None = None
    workers: int | str = "auto"
    cpus_per_worker: float | str = "auto"
    gpus_per_worker: float | str = "auto"
    device: str = "auto"
    precision: str = "auto"
    shared_fs: bool = True
    batch: int = 16
    task_seconds: float = 120.0
    memory_gb: float | str = "auto"
    patience: float = 60.0
    attempts: int = 3
    max_failures: int = 20
    progress_seconds: float = 5.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is made from: the preset `render`, and those in `also`, by which all units get pictures too.

    `base` is the folder of a run that lends what it has of this one. `units`, a table, and `only`, a condition on the
    base's pictures, choose units in the place of `layers.policy` and `layers.channels`.
    """

    run: RunConfig
    model: ModelConfig
    layers: LayersConfig
    data: DataConfig
    render: Preset
    examples: ExamplesConfig
    engine: EngineConfig
    site: SiteConfig
    also: tuple[Preset, ...] = ()
    base: str | None = None
    units: str | None = None
    only: str | None = None

    @property
    def presets(self) -> tuple[Preset, ...]:
        """All presets of the run, the main one first; their names differ."""
        return (self.render, *self.also)

    def preset(self, name: str) -> Preset:
        """The preset of that name."""
        return next(preset for preset in self.presets if preset.name == name)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.root, self.run.name)


# What changes no result: a run folder may be continued under another engine or page layout, and with or without a base.
FREE = ("engine", "site", "run", "base")


def from_tree(tree: Mapping[str, Any]) -> Config:
    """A `Config` from a resolved plain tree; an unknown key or a wrong type is an `AtlasError`."""
    sections = dict(tree)
    sections["render"] = render_config(_section(sections, "render"))
    sections["also"] = tuple(render_config(preset, f"also.{key}") for key, preset in _section(sections, "also").items())
    config = build(Config, sections)
    twice = [name for name, count in Counter(preset.name for preset in config.presets).items() if count > 1]
    if twice:
        raise AtlasError(f"Two presets of this run are called {twice[0]!r}: give one another name, also.KEY.name=…")
    name = config.run.name
    if not name or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise AtlasError(f"run.name={name!r} must be a plain folder name.")
    if config.only is not None:
        UnitFilter.of(config.only)
        if config.base is None:
            raise AtlasError(f"only={config.only} needs base=runs/NAME: the run whose pictures it judges.")
    _check_checkpoint(config)
    if config.engine.name not in ("ray", "inline"):
        raise AtlasError(f"engine.name={config.engine.name!r} is not one of ray, inline.")
    for value, key, least in (
        *(
            (getattr(preset, key), f"{where}.{key}", least)
            for where, preset in (("render", config.render), *((f"also.{p.name}", p) for p in config.also))
            for key, least in (("steps", 1), ("variants", 1), ("margin", 0), ("attempts", 1))
        ),
        (config.examples.k, "examples.k", 1),
        (config.examples.batch, "examples.batch", 1),
        (config.examples.sample, "examples.sample", 1),
        (config.examples.subset, "examples.subset", 0),
        (config.examples.labelled, "examples.labelled", 0),
        (config.examples.per_bin, "examples.per_bin", 0),
        (config.examples.side, "examples.side", 32),
        (config.examples.crop_side, "examples.crop_side", 8),
        (config.examples.maps, "examples.maps", 1),
        (config.examples.jpeg_quality, "examples.jpeg_quality", 1),
        (config.engine.batch, "engine.batch", 1),
        (config.engine.attempts, "engine.attempts", 1),
        (config.engine.max_failures, "engine.max_failures", 1),
        (config.engine.patience, "engine.patience", 1),
        (config.engine.task_seconds, "engine.task_seconds", 0.001),
        (config.layers.count, "layers.count", 1),
    ):
        if value < least:
            raise AtlasError(f"{key}={value} is too small: at least {least}.")
    if config.data.limit is not None and config.data.limit < 1:
        raise AtlasError(f"data.limit={config.data.limit} is too small: at least 1, or null for all.")
    if config.data.max_pixels is not None and config.data.max_pixels < 1:
        raise AtlasError(f"data.max_pixels={config.data.max_pixels} is too small: at least 1, or null for no limit.")
    _check_examples(config.examples)
    if config.engine.precision not in ("auto", "float32", "bfloat16"):
        raise AtlasError(f"engine.precision={config.engine.precision!r}: use auto, float32 or bfloat16.")
    for preset in config.presets:
        size = preset.size
        sides = (size,) if isinstance(size, int) else size
        if (size not in ("auto", "field")) if isinstance(sides, str) else min(sides) < 16:
            where = "render" if preset is config.render else f"also.{preset.name}"
            raise AtlasError(f"{where}.size={size!r}: use auto, field, or pixels from 16: a number or [height, width].")
    for value, key in (
        (config.engine.workers, "engine.workers"),
        (config.engine.cpus_per_worker, "engine.cpus_per_worker"),
        (config.engine.gpus_per_worker, "engine.gpus_per_worker"),
        (config.engine.memory_gb, "engine.memory_gb"),
    ):
        zero = key.endswith("gpus_per_worker") and value == 0
        if (isinstance(value, str) and value != "auto") or (not isinstance(value, str) and value <= 0 and not zero):
            raise AtlasError(f"{key}={value!r}: use auto or a number above 0.")
    return config


def _check_checkpoint(config: Config) -> None:
    """Settings that choose within a checkpoint need one: the network's own, or one of an ensemble."""
    ensembles = any(isinstance(a, Ensemble) for preset in config.presets for a in preset.augmentations)
    for key in ("checkpoint_key", "checkpoint_prefix"):
        value = getattr(config.model, key)
        if value is not None and config.model.checkpoint_path is None and not ensembles:
            raise AtlasError(f"model.{key}={value} chooses within a checkpoint: add model.checkpoint=FILE.")


def _check_examples(config: ExamplesConfig) -> None:
    for value, key in ((config.per_task, "per_task"), (config.compile, "compile")):
        if (isinstance(value, str) and value != "auto") or (key == "per_task" and isinstance(value, int) and value < 1):
            raise AtlasError(
                f"examples.{key}={value!r}: use auto or {'a number from 1' if key == 'per_task' else 'true, false'}."
            )
    if config.store not in ("images", "crops", "ids"):
        raise AtlasError(f"examples.store={config.store!r} is not one of images, crops, ids.")
    edges = config.spectrum
    if list(edges) != sorted(set(edges)) or len(edges) < 2 or edges[0] != 0 or edges[-1] != 100:
        raise AtlasError(f"examples.spectrum={list(edges)}: per cent, rising from 0 to 100.")


def render_config(tree: Mapping[str, Any], where: str = "render") -> Preset:
    """A preset from its plain tree: each group member is found by its `name`. Errors call it `where`."""
    if not isinstance(tree, Mapping):
        raise AtlasError(f"{where} must be a preset: also=[negative,diverse] names some.")
    values = dict(tree)
    for key, registry in (("objective", OBJECTIVES), ("canvas", CANVASES), ("optimizer", OPTIMIZERS), ("stop", STOPS)):
        if key in values or key != "stop":
            values[key] = registry.build(values.get(key) or {}, f"{where}.{key}")
    for key, registry in (
        ("transforms", TRANSFORMS),
        ("penalties", PENALTIES),
        ("preconditioners", PRECONDITIONERS),
        ("augmentations", AUGMENTATIONS),
        ("couplings", COUPLINGS),
    ):
        # A member is called by its key unless it says otherwise, so that one kind can come twice.
        values[key] = tuple(
            registry.build({"name": name, **(settings or {})}, f"{where}.{key}.{name}")
            for name, settings in _section(values, key).items()
        )
    # The keys of stages are for people and overrides; their order is the order of work.
    values["schedule"] = list(_section(values, "schedule").values())
    return build(Preset, values, where)


def _section(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = tree.get(key) or {}
    if not isinstance(section, Mapping):
        raise AtlasError(f"{key} must be a group of settings, not {section!r}.")
    return section


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old → new` of every setting in which two plain trees differ."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} → {b!r}")
    return found
