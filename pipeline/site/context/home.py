"""What the first page tells: the network, what the atlas covers and what failed, and where it came from."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.site.config import SiteConfig
from pipeline.site.context import method
from pipeline.site.context.layer_summary import Catalogue, Facts
from pipeline.site.layout.diagram import Diagram, draw
from pipeline.site.number_format import Value, share, whole
from pipeline.store.reader import Atlas


@dataclasses.dataclass(frozen=True)
class Making:
    """How the pictures under one key and preset were made, counted over all layers."""

    title: str
    objective: str
    preset: str
    natural: str
    pictures: int
    counts: tuple[tuple[str, int], ...]
    digests: int
    seconds: float
    steps: tuple[int, int]
    sides: tuple[int, int]
    precisions: list[str]
    levels: list[tuple[str, int]]
    fallbacks: list[tuple[str, list[str]]]

    @property
    def time(self) -> str:
        """Time of computation, in the unit that a person would choose."""
        for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
            if self.seconds >= 2 * size:
                return f"{self.seconds / size:.1f} {unit}"
        return f"{self.seconds:.1f} seconds"

    @property
    def step_range(self) -> str:
        """Steps of one picture: a number, or the least and the most."""
        return _range(self.steps)

    @property
    def side_range(self) -> str:
        """Width of a picture in pixels: a number, or the least and the most."""
        return _range(self.sides)


@dataclasses.dataclass(frozen=True)
class Home:
    """The first page. `download` links to the atlas file, if the site is beside it."""

    attributes: dict[str, Any]
    config: str
    file: str
    download: str | None
    photographs: int
    layers: list[Facts]
    makings: list[Making]
    presets: tuple[method.Preset, ...]
    diagram: Diagram
    examples: bool
    licence: str

    @staticmethod
    def of(atlas: Atlas, folder: Path, config: SiteConfig, layers: list[Facts], catalogue: Catalogue) -> "Home":
        """The first page of a site in `folder`."""
        beside = atlas.path.resolve().parent == folder.resolve().parent
        return Home(
            attributes=atlas.attributes,
            config=atlas.config,
            file=atlas.path.name,
            download=f"../{atlas.path.name}" if beside else None,
            photographs=len(catalogue.paths),
            layers=layers,
            makings=_makings(layers),
            presets=method.tell(atlas.config),
            diagram=draw(layers),
            examples=any(layer.examples("max") is not None for layer in atlas),
            licence=config.licence,
        )

    @property
    def pictures(self) -> int:
        """Pictures in the atlas."""
        return sum(facts.pictures for facts in self.layers)

    @property
    def units(self) -> int:
        """Units in the atlas."""
        return sum(len(facts.channels) for facts in self.layers)

    @property
    def total(self) -> int:
        """Units that its layers have in the network."""
        return sum(facts.total for facts in self.layers)

    @property
    def coverage(self) -> Value:
        """Share of the layers' units that are in the atlas."""
        return share(self.units / self.total if self.total else float("nan"))

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(unit, address of its page) of each unit with a failed picture."""
        return [(f"{facts.name}:{channel}", facts.name) for facts in self.layers for channel in facts.failed]

    @property
    def failures(self) -> Value:
        """Units that failed: as the run counted them, or as the pictures tell."""
        return whole(int(self.attributes.get("failures", len(self.failed))))

    @property
    def versions(self) -> list[tuple[str, str]]:
        """(program, version), by name."""
        return sorted((str(k), str(v)) for k, v in self.attributes["versions"].items())


def _makings(layers: list[Facts]) -> list[Making]:
    found: dict[tuple[str, str], list[Any]] = {}
    for facts in layers:
        for r in facts.rendered:
            found.setdefault((r.key, r.preset), []).append(r)
    makings = []
    for rendered in found.values():
        first = rendered[0]
        counts: dict[str, int] = {}
        for r in rendered:
            for status, count in r.counts:
                counts[status] = counts.get(status, 0) + count
        steps = [n for r in rendered for n in r.steps if n]
        makings.append(
            Making(
                first.title, first.objective, first.preset, first.natural, sum(r.pictures for r in rendered),
                tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
                len({r.digest for r in rendered}), sum(r.seconds for r in rendered),
                (min(steps, default=0), max(steps, default=0)),
                (min(r.width for r in rendered), max(r.width for r in rendered)),
                sorted({name for r in rendered for name in r.precisions}),
                sorted(Counter(level for r in rendered for level in r.levels).items(), key=lambda item: -item[1]),
                _fallbacks(layers, first.key),
            )
        )  # fmt: skip
    return makings


def _fallbacks(layers: Sequence[Facts], key: str) -> list[tuple[str, list[str]]]:
    """Why steps ran on a plainer network than was asked for, and the layers that this is true of."""
    causes: dict[str, list[str]] = {}
    for layer in layers:
        for rendered in layer.rendered:
            for cause in rendered.fallbacks if rendered.key == key else ():
                causes.setdefault(cause, []).append(layer.name)
    return list(causes.items())


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,} to {ends[1]:,}"
