"""Units: one channel of one layer, written `layer:channel`."""

import re
from typing import NamedTuple

from pipeline.core.errors import AtlasError


class Unit(NamedTuple):
    """A channel of a layer; ordered by layer, then by channel.

    Attributes:
        layer: Name of the layer. It may contain colons.
        channel: Number of the channel.
    """

    layer: str
    channel: int

    def __str__(self) -> str:
        return f"{self.layer}:{self.channel}"

    @staticmethod
    def split(text: str) -> tuple[str, str]:
        """Split `layer:channel` at its last colon, without parsing the channel; the layer is empty without a colon."""
        layer, _, channel = text.rpartition(":")
        return layer, channel

    @classmethod
    def parse(cls, text: str) -> "Unit":
        """Parse `layer:channel`, as `str` writes it: "blocks.3:17" → Unit("blocks.3", 17).

        Raises:
            AtlasError: If there is no layer, or the channel is not a number.
        """
        layer, channel = cls.split(text)
        if not layer or not re.fullmatch(r"[0-9]+", channel):
            raise AtlasError(f"{text!r} is not a unit: write layer:channel, e.g. blocks.3.0:17.")
        return cls(layer, int(channel))
