"""One sentence about each unit, for links that are shared and for preview images."""

import dataclasses
from urllib.parse import quote

from pipeline.core.metric_specs import is_minimized
from pipeline.site.context.layer_summary import Catalogue, LayerSummary
from pipeline.site.data.unit_records import labels_of, worst
from pipeline.site.number_format import NONE, number
from pipeline.store import LayerView

SEPARATOR = " · "
# What a ratio compares, by the name of the metric; the first that is known is used.
RATIOS = {"peak_ratio": "{} activation {} times the dataset’s", "mean_ratio": "mean activation {1} times the dataset’s"}


@dataclasses.dataclass(frozen=True)
class UnitText:
    """A unit in words.

    Attributes:
        name: The unit, as layer:channel.
        href: Address of its full page from the root of the site.
        page: Address of its page for sharing, from the root of the site.
        card: Address of its own preview image, from the root of the site; the image need not exist.
        word: Its class, or the label that names it; "" if there is none.
        model: Name of the network.
        finding: What its visualization shows in numbers; "" if nothing is known.
        kind: What there is to see: visualizations, dataset examples, or both.
    """

    name: str
    href: str
    page: str
    card: str
    word: str
    model: str
    finding: str
    kind: str

    @property
    def title(self) -> str:
        """Title of its page: the unit, its class or label, and the network."""
        return SEPARATOR.join(filter(None, (f"{self.name}{f' ({self.word})' if self.word else ''}", self.model)))

    @property
    def sentence(self) -> str:
        """The unit, the network, and what its visualization shows in numbers."""
        return SEPARATOR.join(filter(None, (self.name, self.model, self.finding)))

    @property
    def description(self) -> str:
        """One or two sentences for previews and search engines."""
        finding = f" {self.finding[:1].upper()}{self.finding[1:]}." if self.finding else ""
        label = f", {self.word}" if self.word else ""
        return f"Unit {self.name}{label} of {self.model}: {self.kind} and measurements.{finding}"


def unit_texts(layer: LayerView, facts: LayerSummary, catalogue: Catalogue, model: str) -> list[UnitText]:
    """Return the text of each unit of a layer, in the order of its channels; `model` is the name of the network."""
    places, words = labels_of(layer, facts, catalogue)
    findings = _findings(layer, facts)
    has_examples = layer.examples("max") is not None
    kinds = [*(["feature visualizations"] if facts.rendered else []), *(["dataset examples"] if has_examples else [])]
    return [
        UnitText(
            name=f"{facts.name}:{channel}",
            href=unit_link(facts.name, channel),
            page=unit_page(facts.slug, channel),
            card=unit_card(facts.slug, channel),
            word=words[place] if place >= 0 else "",
            model=model,
            finding=finding,
            kind=", ".join(kinds) or "statistics",
        )
        for channel, place, finding in zip(facts.channels, places, findings, strict=True)
    ]


def unit_link(layer: str, channel: int) -> str:
    """Return the address of a unit's full page, from the site's root: `unit.html#layer:channel`."""
    return f"unit.html#{quote(layer, safe='/.:')}:{channel}"


def unit_page(slug: str, channel: int) -> str:
    """Return the address of a unit's page for sharing, from the site's root: `u/LAYER/CHANNEL.html`."""
    return f"u/{slug}/{channel}.html"


def unit_card(slug: str, channel: int) -> str:
    """Return the address of a unit's preview image, from the site's root."""
    return f"cards/{slug}/{channel}.jpg"


def layer_card(slug: str) -> str:
    """Return the address of a layer's preview image, from the site's root."""
    return f"cards/{slug}/layer.jpg"


def _findings(layer: LayerView, facts: LayerSummary) -> list[str]:
    """Return what the first visualization of each unit shows in numbers."""
    if not facts.rendered:
        return [""] * len(facts.channels)
    rendered = facts.rendered[0]
    numbers = layer.measurements(rendered.key)
    metric = next((name for name in RATIOS if name in numbers), "")
    extreme = "minimum" if is_minimized(rendered.natural) else "maximum"
    findings = []
    for row, status in enumerate(worst(numbers["status"][:, :1])):
        text = number(numbers[metric][row, 0]).text if metric else NONE
        if status in ("failed", "missing"):
            findings.append("the visualization failed" if status == "failed" else "")
        else:
            findings.append("" if text == NONE else RATIOS[metric].format(extreme, text))
    return findings
