"""What a user says about a network, and how a picture becomes its input: two plain records."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network, and with which weights. Fields left null are taken from the network's own recipe.

    `target`, `arguments`, `channels`, `trust_checkpoint` and `strict` matter for `source=custom` alone, the last
    two for every checkpoint. `checkpoint_key` and `checkpoint_prefix` choose one of several state dicts in a
    checkpoint: by the dotted keys of the mappings around it, and by what its names begin with. `folder` is where
    relative paths begin: null is where the command was typed.
    """

    source: str
    name: str
    weights: str | None = "default"
    input_size: int | tuple[int, int] | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    target: str | None = None
    arguments: Mapping[str, Any] | None = None
    checkpoint: str | None = None
    checkpoint_key: str | None = None
    checkpoint_prefix: str | None = None
    channels: int | None = None
    value_range: tuple[float, float] | None = None
    labels: str | tuple[str, ...] | None = None
    trust_checkpoint: bool = False
    strict: bool = True
    aliases: Mapping[str, str] | None = None
    folder: str | None = None

    @property
    def own_weights(self) -> Path | None:
        """The user's own weights, as an absolute path; None for random or the network's usual ones.

        `checkpoint=file` and `weights=file` say the same.
        """
        if self.checkpoint is not None:
            return self.locate(self.checkpoint)
        own = self.weights is not None and self.weights != "default"
        return self.locate(str(self.weights)) if own else None

    def locate(self, path: str) -> Path:
        """A path as the user typed it, made absolute."""
        return Path(self.folder or Path.cwd(), Path(path).expanduser()).absolute()


# What of a model's configuration says where things lie or what they are called, but not what they are.
NAMES_ONLY = (
    "weights", "checkpoint", "checkpoint_key", "checkpoint_prefix", "target", "arguments", "folder", "labels",
    "trust_checkpoint", "strict", "aliases",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an input: resize the shorter side, crop the centre, bring into range, normalise.

    `size` is (height, width) in pixels; `value_range` is what black and white become before `mean` and `std`,
    which are per channel and in the same values.
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    value_range: tuple[float, float] = (0.0, 1.0)

    @property
    def channels(self) -> int:
        """Input channels of the network."""
        return len(self.mean)
