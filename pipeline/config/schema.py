"""The configuration as frozen dataclasses: the schema of `conf/`, and what workers receive.

Hydra composes a tree; `from_tree` turns it into a `Config` and rejects what it does not know, before any
work. Nothing below this module ever sees Hydra's own types.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.config.unit_filter import UnitFilter
from pipeline.core.errors import AtlasError
from pipeline.core.validation import Keyed, Use, build
from pipeline.data.config import DataConfig
from pipeline.examples.sweep import ExamplesConfig
from pipeline.layers.selection import LayersConfig
from pipeline.models.config import ModelConfig
from pipeline.site.config import SiteConfig
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.preset import Preset

AUTO_OR_POSITIVE = Use("auto or a number above 0")


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

    name: Literal["ray", "inline"] = "ray"
    address: str | None = None
    workers: Annotated[Annotated[int, Field(gt=0)] | Literal["auto"], AUTO_OR_POSITIVE] = "auto"
    cpus_per_worker: Annotated[Annotated[float, Field(gt=0)] | Literal["auto"], AUTO_OR_POSITIVE] = "auto"
    # 0: no GPUs
    gpus_per_worker: Annotated[Annotated[float, Field(ge=0)] | Literal["auto"], AUTO_OR_POSITIVE] = "auto"
    device: str = "auto"
    precision: Annotated[Literal["auto", "float32", "bfloat16"], Use("auto, float32 or bfloat16")] = "auto"
    shared_fs: bool = True
    batch: Annotated[int, Field(ge=1)] = 16
    task_seconds: Annotated[float, Field(ge=0.001)] = 120.0
    memory_gb: Annotated[Annotated[float, Field(gt=0)] | Literal["auto"], AUTO_OR_POSITIVE] = "auto"
    patience: Annotated[float, Field(ge=1)] = 60.0
    attempts: Annotated[int, Field(ge=1)] = 3
    max_failures: Annotated[int, Field(ge=1)] = 20
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
    also: Annotated[tuple[Preset, ...], Keyed] = ()
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
    """Return the `Config` of a resolved plain tree.

    Raises:
        AtlasError: If a key is unknown or missing, a value invalid, or settings contradict each other.
    """
    config = build(Config, tree)
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
    edges = config.examples.spectrum
    if list(edges) != sorted(set(edges)) or len(edges) < 2 or edges[0] != 0 or edges[-1] != 100:
        raise AtlasError(f"examples.spectrum={list(edges)}: per cent, rising from 0 to 100.")
    return config


def _check_checkpoint(config: Config) -> None:
    """Settings that choose within a checkpoint need one: the network's own, or one of an ensemble."""
    ensembles = any(isinstance(a, Ensemble) for preset in config.presets for a in preset.augmentations)
    for key in ("checkpoint_key", "checkpoint_prefix"):
        value = getattr(config.model, key)
        if value is not None and config.model.checkpoint_path is None and not ensembles:
            raise AtlasError(f"model.{key}={value} chooses within a checkpoint: add model.checkpoint=FILE.")


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
