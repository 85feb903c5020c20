"""Units as a page shows them: pictures, examples and numbers, all in words and file names."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.atlas import Atlas, LayerView
from pipeline.site.media import Media, Shown
from pipeline.site.photos import Photos
from pipeline.site.sheets import objectives_of
from pipeline.site.values import NONE, Value, number, ratio, seed, share, whole


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of a unit with what was measured of it."""

    objective: str
    variant: int
    image: Shown
    alt: str
    status: str
    activation: Value
    robust: Value
    start: Value
    natural: Value
    ratio: Value
    seed: Value
    steps: Value
    seconds: Value
    measure: str
    preset: str
    digest: str

    @property
    def failed(self) -> bool:
        """Whether the optimisation did not lift the unit above its start."""
        return self.status == "failed"


@dataclasses.dataclass(frozen=True)
class Example:
    """One photograph: what the unit answered to it, and where on the map."""

    image: Shown | None
    value: Value
    label: str
    path: str
    place: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """One channel of one layer. `mean`, `largest` and `above` are over all photographs."""

    layer: str
    channel: int
    label: str
    pictures: tuple[Picture, ...]
    examples: tuple[Example, ...]
    mean: Value | None
    largest: Value | None
    above: Value | None

    @property
    def name(self) -> str:
        """`layer:channel`."""
        return f"{self.layer}:{self.channel}"

    @property
    def thumb(self) -> Shown | None:
        """What stands for the unit in a grid: its first picture, or else its best example."""
        if self.pictures:
            return self.pictures[0].image
        return next((e.image for e in self.examples if e.image is not None), None)

    @property
    def thumb_alt(self) -> str:
        """What `thumb` shows, in words."""
        return f"{'Picture' if self.pictures else 'Best photograph'} of {self.name}"

    @property
    def failed(self) -> bool:
        """Whether any picture of the unit failed."""
        return any(p.failed for p in self.pictures)

    @property
    def silent(self) -> bool:
        """Whether no photograph drove the unit above zero."""
        return self.largest is not None and self.largest.exact != "" and float(self.largest.exact) <= 0


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Paths and labels of all photographs, and the names of the classes that the network tells apart."""

    paths: tuple[str, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]

    @staticmethod
    def of(atlas: Atlas) -> "Catalogue":
        """Read from an atlas once, for all layers."""
        table = atlas.dataset()
        return Catalogue(tuple(table["path"]), tuple(table["label"]), atlas.labels)

    def class_of(self, layer: LayerView, channel: int) -> str:
        """Class that a channel answers for, if the layer is the network's classifier; else nothing."""
        if layer.kind == "linear" and self.classes and layer.total_channels == len(self.classes):
            return self.classes[channel]
        return ""


def units_of(
    layer: LayerView,
    catalogue: Catalogue,
    media: Media,
    photos: Photos,
    most: int,
    tick: Callable[[], None] = lambda: None,
) -> list[Unit]:
    """All units of a layer with at most `most` examples each; their images are saved on the way.

    `tick` is called after every unit.
    """
    stats = layer.stats()
    best = layer.examples("max") if most > 0 else None
    sources = [(o, layer.pictures(o), layer.numbers(o), layer.natural(o), layer.render_attributes(o))
               for o in objectives_of(layer)]  # fmt: skip
    units = []
    for row, channel in enumerate(int(c) for c in layer.channels):
        pictures = []
        for objective, images, numbers, natural, attributes in sources:
            stack: np.ndarray = images[row]
            for variant in range(stack.shape[0]):
                image = media.picture(layer.name, channel, objective, variant, stack[variant])
                measured = {k: v[row, variant] for k, v in numbers.items() if v.ndim >= 2}
                pictures.append(
                    _picture(
                        f"{layer.name}:{channel}",
                        objective,
                        variant,
                        image,
                        measured,
                        natural[row],
                        attributes,
                    )
                )
        examples: tuple[Example, ...] = ()
        if best is not None:
            places = zip(best.value[row], best.index[row], best.y[row], best.x[row], strict=True)
            found = [(float(v), int(i), int(y), int(x)) for v, i, y, x in places if i >= 0][:most]
            crops = [photos.crop(layer, i, y, x) for _, i, y, x in found]
            strip = media.strip(layer.name, channel, crops)
            examples = tuple(
                Example(
                    image,
                    number(value),
                    catalogue.labels[i] if i < len(catalogue.labels) else "",
                    catalogue.paths[i] if i < len(catalogue.paths) else f"photograph {i}",
                    f"row {y}, column {x}" if max(layer.map_size) > 1 else "",
                )
                for image, (value, i, y, x) in zip(strip, found, strict=True)
            )
        units.append(
            Unit(
                layer=layer.name,
                channel=channel,
                label=catalogue.class_of(layer, channel),
                pictures=tuple(pictures),
                examples=examples,
                mean=number(stats["mean"][row]) if "mean" in stats else None,
                largest=number(stats["max"][row]) if "max" in stats else None,
                above=share(stats["nonzero"][row]) if "nonzero" in stats else None,
            )
        )
        tick()
    return units


def _picture(
    unit: str,
    objective: str,
    variant: int,
    image: Shown,
    measured: dict[str, Any],
    natural: float,
    attributes: dict[str, Any],
) -> Picture:
    def measure(key: str) -> Value:
        return number(measured[key]) if key in measured else Value(NONE, "")

    def count(key: str, form: Callable[[int], Value]) -> Value:
        return form(measured[key]) if key in measured else Value(NONE, "")

    activation = measure("activation")
    times = ratio(measured.get("activation", np.nan), natural)
    status = str(measured.get("status", ""))
    alt = f"Feature visualisation of {unit}, {objective} objective"
    alt += f", variant {variant}" if variant else ""
    alt += f": activation {activation.text}"
    alt += f", {times.text} times the best photograph" if times.exact else ""
    alt += "; failed" if status == "failed" else ""
    return Picture(
        objective=objective,
        variant=variant,
        image=image,
        alt=alt,
        status=status,
        activation=activation,
        robust=measure("robust"),
        start=measure("start"),
        natural=number(natural),
        ratio=times,
        seed=count("seed", seed),
        steps=count("steps", whole),
        seconds=measure("seconds"),
        measure=str(attributes.get("natural", "mean")),
        preset=str(attributes.get("preset", "")),
        digest=str(attributes.get("digest", "")),
    )
