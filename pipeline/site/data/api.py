"""The machine-readable form of a site: the JSON API in `api/v1/`, a table of all units, CITATION.cff."""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.core.metric_specs import METRICS, Metric
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Catalogue, LayerSummary
from pipeline.site.context.unit_text import layer_card, unit_card, unit_link, unit_page
from pipeline.site.data import similar_units
from pipeline.site.data.js_shards import to_json
from pipeline.site.data.links import citation
from pipeline.site.media.size_budget import Sizes
from pipeline.site.media.sprites import side
from pipeline.site.output import write
from pipeline.store import Atlas

API = "api/v1"
SCHEMA_FILE = Path(__file__).with_name("api_schema.json")


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Which files the records of units refer to.

    Attributes:
        sizes: Sizes of images and numbers of units per file.
        suffix: Suffix of the sheets of feature visualizations.
        pages: Whether each unit has a page for sharing.
        cards: Whether each unit has a card.
    """

    sizes: Sizes
    suffix: str
    pages: bool
    cards: bool

    def of(self, facts: LayerSummary, row: int) -> dict[str, Any]:
        """Return the addresses of a unit's page, card and visualizations, from the root of the site.

        The visualizations of a preset are in one file: (left, top, width, height) in pixels is the place of each.
        """
        channel = facts.channels[row]
        images = {r.key: self._images(facts, number, row) for number, r in enumerate(facts.rendered)}
        return {
            "page": unit_page(facts.slug, channel) if self.pages else unit_link(facts.name, channel),
            **({"card": unit_card(facts.slug, channel)} if self.cards else {}),
            **({"images": images} if images else {}),
        }

    def _images(self, facts: LayerSummary, number: int, row: int) -> dict[str, Any]:
        rendered = facts.rendered[number]
        height, width = self.sizes.picture(rendered.height, rendered.width)
        per_sheet = self.sizes.per_picture(height, width, rendered.variants)
        columns = side(per_sheet * rendered.variants)
        start = row - row % per_sheet
        cells = ((row - start) * rendered.variants + variant for variant in range(rendered.variants))
        boxes = [[cell % columns * width, cell // columns * height, width, height] for cell in cells]
        media, channel, display = f"media/{facts.slug}", facts.channels[row], rendered.display
        larger = {}
        if display is not None and channel in display.channels:
            larger["display"] = f"{media}/d{number}-{channel}.{self.suffix}"
        return {"file": f"{media}/p{number}-{start}.{self.suffix}", "boxes": boxes, **larger}


def write_units(root: Path, facts: LayerSummary, records: Sequence[str], build: str, addresses: Addresses) -> None:
    """Write all units of a layer to `api/v1/units/<layer>.json`.

    Args:
        root: Folder of the site.
        facts: The layer.
        records: Records of its units, as JSON.
        build: Digest of the layer's files.
        addresses: Files that the records refer to.
    """
    complete = [f"{to_json(addresses.of(facts, row))[:-1]},{record[1:]}" for row, record in enumerate(records)]
    head = to_json(
        {
            "layer": facts.name,
            "kind": facts.kind,
            "reference": facts.reference,
            "of": facts.total,
            "digest": build,
        }
    )[:-1]
    write(root, f"{API}/units/{facts.slug}.json", f'{head},"units":[{",".join(complete)}]}}\n')


def write_index(
    root: Path, atlas: Atlas, layers: Sequence[LayerSummary], catalogue: Catalogue, config: SiteConfig, similar: bool
) -> None:
    """Write the index of the API, the list of dataset images, the JSON Schema and the citation."""
    attributes = atlas.attributes
    index = {
        "title": config.title,
        "generator": f"neuron-atlas {__version__}",
        **{k: attributes.get(k) for k in ("model", "run", "created", "weights_sha256", "dataset_fingerprint")},
        "versions": attributes["versions"],
        "schema": f"{API}/schema.json",
        "photographs": f"{API}/photographs.json",
        "table": table_name(),
        **({"similar": similar_units.API_FILE} if similar else {}),
        "layers": [_layer_entry(facts, config) for facts in layers],
        **({"url": config.url} if config.url else {}),
        **({"atlas": config.atlas_url} if config.atlas_url else {}),
    }
    write(root, f"{API}/index.json", to_json(index) + "\n")
    photographs = [{"path": p, "label": label} for p, label in zip(catalogue.paths, catalogue.labels, strict=True)]
    write(root, f"{API}/photographs.json", to_json(photographs) + "\n")
    write(root, f"{API}/schema.json", json.dumps(schema(), indent=1) + "\n")
    write(root, "CITATION.cff", citation(attributes, config))


def write_table(root: Path, atlas: Atlas) -> None:
    """Write the table of all visualizations."""
    (root / API).mkdir(parents=True, exist_ok=True)
    table = atlas.units()
    if "trace" in table:
        table = table.drop(columns="trace")
    if table_name().endswith("parquet"):
        table.to_parquet(root / table_name(), index=False)
    else:
        table.to_csv(root / table_name(), index=False)


def _layer_entry(facts: LayerSummary, config: SiteConfig) -> dict[str, Any]:
    return {
        "name": facts.name,
        "kind": facts.kind,
        "reference": facts.reference,
        "channels": len(facts.channels),
        "of": facts.total,
        "map": facts.map_size,
        "receptive_field": facts.receptive_field,
        "input": facts.input_size,
        "presets": [
            {
                "key": r.key,
                "preset": r.preset,
                "digest": r.digest,
                "precision": r.precisions,
                "path": list(r.path_layers),
            }
            for r in facts.rendered
        ],
        "units": f"{API}/units/{facts.slug}.json",
        "page": facts.href,
        **({"card": layer_card(facts.slug)} if config.cards != "none" else {}),
    }


def table_name() -> str:
    """Return the file name of the table of units: Parquet if pyarrow is installed, else CSV."""
    return "units.parquet" if importlib.util.find_spec("pyarrow") is not None else "units.csv"


def schema() -> dict[str, Any]:
    """Return the JSON Schema of `api/v1/units/<layer>.json`: the packaged file, completed with the metric tables."""
    tree = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    unit = tree["properties"]["units"]["items"]
    visualization = unit["properties"]["pictures"]["additionalProperties"]["items"]
    properties: dict[str, Any] = {}
    for name, subschema in visualization["properties"].items():
        if name == "REAL NUMBERS":
            properties |= {metric.name: _metric_schema(metric) for metric in METRICS if metric.is_real}
        elif name == "INTEGERS":
            properties |= {metric.name: _metric_schema(metric) for metric in METRICS if not metric.is_real}
        else:
            properties[name] = subschema
    visualization["properties"] = properties
    return tree


def _metric_schema(metric: Metric) -> dict[str, Any]:
    if not metric.is_real:
        return {"type": "string" if metric.is_json_text else "integer"}
    bounds = (("minimum", metric.low), ("maximum", metric.high))
    return {"type": ["number", "null"], **{keyword: bound for keyword, bound in bounds if math.isfinite(bound)}}
