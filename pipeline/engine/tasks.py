"""What workers are told: the setup of a run and its tasks, as plain data, and the digests of what they make."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipeline.config.schema import Config
from pipeline.core.registry import canonical
from pipeline.data.datasets import Dataset
from pipeline.layers.finding import Layer
from pipeline.models.config import NAMES_ONLY
from pipeline.store import shards
from pipeline.visualization.initial_images import InitialImage
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.preset import Preset


@dataclasses.dataclass(frozen=True)
class Setup:
    """All a worker needs, as plain data.

    `others` are layers that presets look at besides a unit's own; `begins` is the digest of the dataset pass
    whose best examples some pictures begin with, if they do.
    """

    config: Config
    weights: str
    layers: tuple[Layer, ...]
    dataset: Dataset
    threads: int
    device: str
    others: tuple[Layer, ...] = ()
    begins: str = ""

    def others_of(self, preset: Preset) -> dict[str, Layer]:
        """Those of `others` that one preset looks at, by name."""
        return {layer.name: layer for layer in self.others if layer.name in preset.others}


@dataclasses.dataclass(frozen=True)
class Task:
    """A piece of the plan that one worker finishes in minutes, and the shard it ends in.

    `examples` tasks cover photographs start … end - 1 for all layers; `ranges` and `winners` tasks the listed
    `photographs`; `render` tasks some channels of one layer under one preset, each with the photograph that its picture
    begins with, if the canvas asks for that. `given` is what a task builds on, as bytes of a shard.
    """

    stage: str
    path: str
    digest: str
    cost: float
    layer: str = ""
    channels: tuple[int, ...] = ()
    canvas: tuple[int, int] = (0, 0)
    preset: str = ""
    start: int = 0
    end: int = 0
    photographs: tuple[int, ...] = ()
    given: bytes = b""
    starts: tuple[InitialImage, ...] = ()

    @property
    def name(self) -> str:
        """For messages: what this task is about."""
        if self.stage == "render":
            return f"{self.layer}:{self.channels[0]}…{self.channels[-1]}"
        if self.stage == "examples":
            return f"photographs {self.start}…{self.end - 1}"
        return f"{self.stage}, {len(self.photographs)} photographs"

    @property
    def size(self) -> int:
        """Units of progress: channels or photographs."""
        return len(self.channels) if self.stage == "render" else len(self.indices)

    @property
    def indices(self) -> Sequence[int]:
        """The photographs that this task reads."""
        return self.photographs or range(self.start, self.end)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a finished task reports: small, for the result itself is in the shard.

    `data` is the shard, where worker and driver share no file system. `batch` is (device, pictures that fitted on
    it) after it ran out of memory; `worn` says why this worker should be replaced.
    """

    path: str
    seconds: float
    data: bytes = b""
    batch: tuple[str, int] | None = None
    worn: str = ""


def render_digest(setup: Setup, layer: Layer, canvas: tuple[int, int], name: str) -> str:
    """Digest of everything that changes the pictures of `layer` by a preset: nothing else makes a shard stale."""
    config = setup.config
    own = config.preset(name)
    preset = canonical(own)
    preset.pop("name")  # the same settings under another name are the same pictures
    model = canonical(config.model)
    for key in NAMES_ONLY:
        model.pop(key)  # where weights and code lie says nothing; what they are is in their digest
    others = [other.tap for other in setup.others_of(own).values()]
    begins = setup.begins if own.needs_examples else ""
    if any(isinstance(augmentation, Ensemble) for augmentation in own.augmentations):
        # A file's content does not say which of its state dicts was loaded.
        chosen = [config.model.checkpoint_key, config.model.checkpoint_prefix]
        others += [f"{chosen}"] if any(value is not None for value in chosen) else []
    made_of = [setup.weights, model, layer.tap, list(canvas), preset, others, begins, config.run.seed]
    return shards.digest_of(["render 2", *made_of, *_built(config)])


def _built(config: Config) -> list[Any]:
    """What builds a network of a library beside its name, if anything does: weights alone do not tell of a stride.

    The digest of a network of the user's own code has its arguments in it.
    """
    arguments = config.model.arguments if config.model.source != "custom" else None
    return [canonical(arguments)] if arguments else []


def examples_digest(setup: Setup, fingerprint: str) -> str:
    """Digest of everything that changes examples and statistics: dataset, weights, layers, and what is kept."""
    taps = [layer.tap for layer in setup.layers]
    config = setup.config.examples
    kept = [config.k, config.batch, config.sample, config.subset, config.labelled]
    return shards.digest_of(["examples 2", setup.weights, fingerprint, taps, kept, *_built(setup.config)])


def winners_digest(setup: Setup, examples: str, channels: Sequence[Sequence[int]]) -> str:
    """Digest of everything that changes which examples are shown, and how."""
    config = setup.config.examples
    shown = [config.spectrum, config.per_bin, config.store, config.side, config.crop_side, config.jpeg_quality]
    return shards.digest_of(["winners 2", examples, channels, shown, config.maps])
