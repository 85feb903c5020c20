"""Configuration of the network and its preprocessing."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Network and weights. Preprocessing fields that are None take the network's own values.

    Attributes:
        source: Where the network comes from: "package", "torchvision", "timm" or "custom".
        name: Name of the network in that source; for "custom", any name.
        weights: "default", the path of a checkpoint, or None for random weights.
        input_size: Side of the input in pixels, or (height, width).
        resize: Length in pixels that the shorter side of an image is resized to before the crop.
        mean: Mean of each input channel.
        std: Standard deviation of each input channel.
        interpolation: One of `INTERPOLATIONS`.
        target: For "custom": a builder, as file.py:function or package.module:function, or an exported program.
        arguments: Keyword arguments of the builder.
        checkpoint: Path of a checkpoint; the same as a path in `weights`.
        checkpoint_key: Dotted keys of the mappings around the state dict, if a checkpoint contains several.
        checkpoint_prefix: What the names of the state dict begin with, if a checkpoint contains several.
        channels: Number of input channels.
        value_range: Values of black and white before `mean` and `std` are applied.
        labels: Class names, or the path of a file with them.
        trust_checkpoint: Load files that can run code when they are unpickled.
        strict: Refuse a checkpoint of which only a part fits.
        aliases: Paths of modules by alternative name, e.g. {"mixed4c": "inception4c"}.
        folder: Folder that relative paths start from; None for the current one.
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
    def checkpoint_path(self) -> Path | None:
        """Absolute path of the user's checkpoint; None for the default weights and for random ones."""
        if self.checkpoint is not None:
            return self.absolute_path(self.checkpoint)
        if self.weights is None or self.weights == "default":
            return None
        return self.absolute_path(str(self.weights))

    def absolute_path(self, path: str) -> Path:
        """Return the absolute path for a path that the user typed."""
        return Path(self.folder or Path.cwd(), Path(path).expanduser()).absolute()


# Fields that locate or name parts of the model but do not define it: digests contain the content itself instead.
LOCATION_FIELDS = (
    "weights",
    "checkpoint",
    "checkpoint_key",
    "checkpoint_prefix",
    "target",
    "arguments",
    "folder",
    "labels",
    "trust_checkpoint",
    "strict",
    "aliases",
)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resize the shorter side, crop the center, scale to a range, normalize.

    Attributes:
        size: (height, width) of the crop in pixels.
        resize: Length in pixels that the shorter side is resized to.
        mean: Mean of each channel, in the units of `value_range`.
        std: Standard deviation of each channel, in the units of `value_range`.
        interpolation: One of `INTERPOLATIONS`.
        value_range: Values of black and white before normalization.
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    value_range: tuple[float, float] = (0.0, 1.0)

    @property
    def channels(self) -> int:
        """Number of input channels of the network."""
        return len(self.mean)
