"""What the first page tells: the network as a list of layers, and how its pictures were made."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.atlas import Atlas
from pipeline.site.media import Shown
from pipeline.site.sheets import Sheet
from pipeline.site.units import Picture, Unit
from pipeline.site.values import Value, share, whole

T = TypeVar("T")

AIMS = {
    "channel": "raises the mean of the channel over its whole map, and so shows it as a texture",
    "neuron": "raises the channel at the centre of its map only, and so shows one thing in its place",
}


@dataclasses.dataclass(frozen=True)
class Thumb:
    """A unit in a strip: where its article is, from the site's root, and its picture."""

    href: str
    image: Shown
    alt: str
    failed: bool


@dataclasses.dataclass(frozen=True)
class Card:
    """A layer on the first page."""

    sheet: Sheet
    strip: tuple[Thumb, ...]
    failed: int


@dataclasses.dataclass
class Making:
    """How the pictures of one objective and preset were made, counted over all layers.

    A digest names all that shapes a picture, the layer included, so layers have different ones.
    """

    objective: str
    preset: str
    measure: str
    pictures: int = 0
    seconds: float = 0.0
    digests: set[str] = dataclasses.field(default_factory=set)
    seeds: set[str] = dataclasses.field(default_factory=set)
    steps: set[int] = dataclasses.field(default_factory=set)
    sides: set[int] = dataclasses.field(default_factory=set)
    statuses: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def aim(self) -> str:
        """What the objective does, in words; nothing for objectives of a user's own."""
        return AIMS.get(self.objective, "")

    @property
    def step_range(self) -> str:
        """Steps of one picture: a number, or the least and the most."""
        return _range(self.steps)

    @property
    def side_range(self) -> str:
        """Width of a picture in pixels: a number, or the least and the most."""
        return _range(self.sides)

    @property
    def status_counts(self) -> list[tuple[str, int]]:
        """(status, pictures), the most frequent first."""
        return sorted(self.statuses.items(), key=lambda item: (-item[1], item[0]))

    @property
    def time(self) -> str:
        """Time of computation, in the unit that a person would choose."""
        for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
            if self.seconds >= 2 * size:
                return f"{self.seconds / size:.1f} {unit}"
        return f"{self.seconds:.1f} seconds"

    def add(self, picture: Picture) -> None:
        """Count one more picture."""
        self.pictures += 1
        self.seconds += float(picture.seconds.exact or 0)
        self.digests.add(picture.digest)
        self.seeds.add(picture.seed.exact)
        if picture.steps.exact:
            self.steps.add(int(picture.steps.exact))
        self.sides.add(picture.image.width)
        self.statuses[picture.status] += 1


@dataclasses.dataclass
class Overview:
    """The first page, filled layer by layer. `download` links to the atlas file, if the site is beside it."""

    title: str
    strip: int
    attributes: dict[str, Any]
    config: str
    file: str
    download: str | None
    photographs: int
    cards: list[Card] = dataclasses.field(default_factory=list)
    makings: dict[tuple[str, str], Making] = dataclasses.field(default_factory=dict)
    failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    classes: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    pictures: int = 0
    examples: bool = False

    @staticmethod
    def of(atlas: Atlas, folder: Path, title: str, strip: int) -> "Overview":
        """An overview of `atlas` without its layers, for a site in `folder`."""
        beside = atlas.path.resolve().parent == folder.resolve().parent
        return Overview(
            title=title,
            strip=strip,
            attributes=atlas.attributes,
            config=atlas.config,
            file=atlas.path.name,
            download=f"../{atlas.path.name}" if beside else None,
            photographs=len(atlas.dataset()),
        )

    def add(self, sheet: Sheet, units: Sequence[Unit]) -> None:
        """Append one layer with all its units."""
        failed = [u for u in units if u.failed]
        self.failed += [(u.name, f"{sheet.href}#{u.channel}") for u in failed]
        self.classes += [(u.label, len(self.cards), u.channel) for u in units if u.label]
        self.pictures += sum(len(u.pictures) for u in units)
        self.examples = self.examples or any(u.examples for u in units)
        for unit in units:
            for picture in unit.pictures:
                key = (picture.objective, picture.preset)
                self.makings.setdefault(key, Making(*key, picture.measure)).add(picture)
        thumbs = (
            Thumb(f"{sheet.href}#{u.channel}", u.thumb, u.thumb_alt, u.failed)
            for u in spaced(units, self.strip)
            if u.thumb is not None
        )
        self.cards.append(Card(sheet, tuple(thumbs), len(failed)))

    @property
    def units(self) -> int:
        """Units in the atlas."""
        return sum(len(card.sheet.channels) for card in self.cards)

    @property
    def total(self) -> int:
        """Units that its layers have in the network."""
        return sum(card.sheet.total for card in self.cards)

    @property
    def coverage(self) -> Value:
        """Share of the layers' units that are in the atlas."""
        return share(self.units / self.total if self.total else float("nan"))

    @property
    def failures(self) -> Value:
        """Units that failed: as the run counted them, or as the pictures tell."""
        return whole(int(self.attributes.get("failures", len(self.failed))))

    @property
    def mosaic(self) -> list[Thumb]:
        """A dozen units from input to output: pictures that did not fail, or photographs if there are none."""
        thumbs = [t for card in self.cards for t in card.strip if not t.failed]
        pictures = [t for t in thumbs if t.image.cell is None]
        return spaced(pictures or thumbs, 12)

    @property
    def versions(self) -> list[tuple[str, str]]:
        """(program, version), by name."""
        return sorted((str(k), str(v)) for k, v in self.attributes["versions"].items())


def spaced(units: Sequence[T], count: int) -> list[T]:
    """`count` of `units` at even distances: a fair sample, for a choice of the finest would deceive."""
    if len(units) <= count:
        return list(units)
    return [units[i * len(units) // count] for i in range(count)]


def _range(values: set[int]) -> str:
    if not values:
        return "—"
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,}–{most:,}"
