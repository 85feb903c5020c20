"""A layer's facts, as its page and its card on the first page tell them."""

import dataclasses
from collections.abc import Iterator

from pipeline.atlas import Atlas, LayerView
from pipeline.shards import safe


@dataclasses.dataclass(frozen=True)
class Link:
    """A layer to go to: its name and its page, from the site's root."""

    name: str
    href: str


@dataclasses.dataclass(frozen=True)
class Sheet:
    """One layer. `seen` is the (height, width) in input pixels that a unit sees, None for the whole image.

    `objectives` are (name, attributes) pairs, the most usual objective first.
    """

    name: str
    href: str
    kind: str
    channels: tuple[int, ...]
    total: int
    map_size: tuple[int, int]
    seen: tuple[int, int] | None
    input_size: tuple[int, int]
    objectives: tuple[tuple[str, dict[str, str]], ...]
    before: Link | None
    after: Link | None

    @property
    def complete(self) -> bool:
        """Whether all channels of the layer are in the atlas."""
        return len(self.channels) == self.total

    @property
    def aperture(self) -> tuple[float, float]:
        """(height, width) of what a unit sees as shares of the input: at most 1, and enough to be drawn."""
        if self.seen is None:
            return 1.0, 1.0
        down, across = (min(1.0, max(0.09, self.seen[i] / self.input_size[i])) for i in (0, 1))
        return down, across


def page_of(name: str) -> str:
    """Page of a layer, from the site's root."""
    return f"layers/{safe(name)}.html"


def neighbours(atlas: Atlas) -> Iterator[tuple[Link | None, Link | None]]:
    """(layer before, layer after) for each layer of the atlas, in order."""
    links = [Link(name, page_of(name)) for name in atlas.layers]
    # With no layers at all both lists must be empty.
    return zip([None, *links][: len(links)], [*links, None][1:], strict=True)


def objectives_of(layer: LayerView) -> tuple[str, ...]:
    """Objectives of a layer, `channel` before all others."""
    return layer.presets


def sheet_of(layer: LayerView, before: Link | None, after: Link | None) -> Sheet:
    """The facts of `layer`."""
    return Sheet(
        name=layer.name,
        href=page_of(layer.name),
        kind=layer.kind,
        channels=tuple(int(c) for c in layer.channels),
        total=layer.total_channels,
        map_size=layer.map_size,
        seen=layer.receptive_field,
        input_size=layer.input_size,
        objectives=tuple(
            (name, {k: str(v) for k, v in layer.render_attributes(name).items()}) for name in objectives_of(layer)
        ),
        before=before,
        after=after,
    )
