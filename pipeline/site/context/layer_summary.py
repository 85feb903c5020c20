"""What the pages say of a layer as a whole, and the photographs and labels that all layers share."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.site.config import SiteConfig
from pipeline.store.layer_view import Examples
from pipeline.store.reader import Atlas, LayerView
from pipeline.store.shards import safe


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Pictures under one key of a layer: `variants` of each unit, (height, width) in pixels.

    `counts` are pictures by status, `seconds` the time that all of them took, `precisions` what their steps
    were computed in, `levels` on which variants of the network, and `fallbacks` why not on a faster one, where the
    atlas says so.
    """

    key: str
    title: str
    objective: str
    preset: str
    digest: str
    natural: str
    variants: int
    height: int
    width: int
    counts: tuple[tuple[str, int], ...]
    failed: tuple[int, ...]
    seconds: float
    steps: tuple[int, int]
    precisions: tuple[str, ...]
    levels: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()

    @property
    def pictures(self) -> int:
        """Pictures that are there."""
        return sum(count for status, count in self.counts if status != "missing")


@dataclasses.dataclass(frozen=True)
class Facts:
    """One layer. `seen` is the (height, width) in input pixels that a unit sees, None for the whole image.

    `whole` says that what a unit sees is no less than the network's input, so that crops show nothing of their own.
    `classifier` says that channels are the network's classes, `unrendered` why there are no visualizations by design.
    """

    name: str
    slug: str
    order: int
    kind: str
    channels: tuple[int, ...]
    total: int
    map_size: tuple[int, int]
    seen: tuple[int, int] | None
    input_size: tuple[int, int]
    unrendered: str
    rendered: tuple[Rendered, ...]
    classifier: bool

    @property
    def href(self) -> str:
        """Page of the layer, from the site's root."""
        return f"layers/{self.slug}.html"

    @property
    def complete(self) -> bool:
        """Whether all channels of the layer are in the atlas."""
        return len(self.channels) == self.total

    @property
    def whole(self) -> bool:
        """Whether a unit sees the whole input."""
        return self.seen is None or all(a >= b for a, b in zip(self.seen, self.input_size, strict=True))

    @property
    def failed(self) -> tuple[int, ...]:
        """Channels with a failed picture, in order."""
        return tuple(sorted({channel for r in self.rendered for channel in r.failed}))

    @property
    def pictures(self) -> int:
        """Pictures that are there, of all keys."""
        return sum(r.pictures for r in self.rendered)

    @property
    def aperture(self) -> tuple[float, float]:
        """(height, width) of what a unit sees as shares of the input: at most 1, and enough to be drawn."""
        if self.seen is None:
            return 1.0, 1.0
        down, across = (min(1.0, max(0.09, self.seen[i] / self.input_size[i])) for i in (0, 1))
        return down, across


def facts_of(layer: LayerView, order: int, classes: Sequence[str]) -> Facts:
    """The facts of `layer`, which is number `order` of its atlas; no picture is read."""
    channels = tuple(int(c) for c in layer.channels)
    rendered = []
    for key in layer.presets:
        numbers = layer.numbers(key, ("status", "steps", "seconds"))
        attributes = layer.render_attributes(key)
        _, variants, height, width, _ = layer.pictures(key).shape
        status = numbers["status"]
        failed = [c for c, row in zip(channels, status, strict=True) if (row == "failed").any()]
        steps = numbers["steps"][numbers["steps"] > 0] if "steps" in numbers else np.zeros(0, np.int32)
        seconds = float(np.nansum(numbers["seconds"])) if "seconds" in numbers else 0.0
        preset, objective = (str(attributes.get(name, "")) for name in ("preset", "objective"))
        rendered.append(
            Rendered(
                key=key,
                # In old atlases the key is an objective; where it is the only one, the preset says more.
                title=preset if preset and len(layer.presets) == 1 else key,
                objective=objective or key,
                preset=preset,
                digest=str(attributes.get("digest", "")),
                natural=str(attributes.get("natural", "")),
                variants=variants,
                height=height,
                width=width,
                counts=tuple(sorted(Counter(status.ravel().tolist()).items())),
                failed=tuple(failed),
                seconds=seconds,
                steps=(int(steps.min()), int(steps.max())) if steps.size else (0, 0),
                precisions=tuple(str(attributes.get("precision", "")).split()),
                levels=tuple(str(attributes.get("level", "")).splitlines()),
                fallbacks=tuple(str(attributes.get("level_reason", "")).splitlines()),
            )
        )
    return Facts(
        name=layer.name,
        slug=safe(layer.name),
        order=order,
        kind=layer.kind,
        channels=channels,
        total=layer.total_channels,
        map_size=layer.map_size,
        seen=layer.receptive_field,
        input_size=layer.input_size,
        unrendered=layer.unrendered,
        rendered=tuple(rendered),
        classifier=layer.kind == "linear" and len(classes) == layer.total_channels,
    )


@dataclasses.dataclass(frozen=True)
class Shown:
    """One list of examples as it is shown: (C', k) arrays of the atlas's list, cut to the places that are shown."""

    name: str
    value: np.ndarray
    index: np.ndarray
    y: np.ndarray
    x: np.ndarray
    pair: np.ndarray

    @property
    def count(self) -> int:
        """Places of each unit."""
        return self.index.shape[1]


def lists_of(layer: LayerView, config: SiteConfig) -> list[Shown]:
    """The lists that are shown of each unit: `max`, `min` and `spectrum`, as far as the atlas has them."""
    found = []
    for name, most in (("max", config.examples), ("min", config.least), ("spectrum", config.per_bin)):
        held = layer.examples(name) if most else None
        if held is None:
            continue
        places = np.arange(min(most, held.index.shape[1]))
        if name == "spectrum":
            bins = max(1, len(layer.spectrum_edges) - 1)
            each = held.index.shape[1] // bins
            places = np.concatenate([np.arange(min(most, each)) + each * i for i in range(bins)])
        found.append(_cut(name, held, places))
    return found


def _cut(name: str, held: Examples, places: np.ndarray) -> Shown:
    arrays = (held.value, held.index, held.y, held.x, held.map)
    return Shown(name, *(array[:, places] for array in arrays))


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Paths and labels of all photographs, names of the labels, and of the classes that the network tells apart."""

    paths: tuple[str, ...]
    labels: tuple[str, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]

    @staticmethod
    def of(atlas: Atlas) -> "Catalogue":
        """Read from an atlas once, for all layers."""
        table = atlas.dataset()
        return Catalogue(tuple(table["path"]), tuple(table["label"]), atlas.dataset_labels, atlas.labels)
