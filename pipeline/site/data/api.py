"""The machine-readable form of a site: the JSON API in `api/v1/`, a table of all units, CITATION.cff."""

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.core.metric_specs import METRICS, Metric
from pipeline.site.context.layer_summary import Catalogue, LayerSummary
from pipeline.site.data.js_shards import to_json
from pipeline.site.hosting.hosts import yaml_text
from pipeline.site.output import write
from pipeline.store import Atlas

API = "api/v1"
SCHEMA_FILE = Path(__file__).with_name("api_schema.json")


def write_units(root: Path, facts: LayerSummary, records: Sequence[str], build: str) -> None:
    """Write all units of a layer to `api/v1/units/<layer>.json`.

    Args:
        root: Folder of the site.
        facts: The layer.
        records: Records of its units, as JSON.
        build: Digest of the layer's files.
    """
    head = to_json(
        {
            "layer": facts.name,
            "kind": facts.kind,
            "reference": facts.reference,
            "of": facts.total,
            "digest": build,
        }
    )[:-1]
    write(root, f"{API}/units/{facts.slug}.json", f'{head},"units":[{",".join(records)}]}}\n')


def write_index(root: Path, atlas: Atlas, layers: Sequence[LayerSummary], catalogue: Catalogue, title: str) -> None:
    """Write the index of the API, the list of dataset images, the JSON Schema, the table of units and the citation."""
    attributes = atlas.attributes
    index = {
        "title": title,
        "generator": f"neuron-atlas {__version__}",
        **{k: attributes.get(k) for k in ("model", "run", "created", "weights_sha256", "dataset_fingerprint")},
        "versions": attributes["versions"],
        "schema": f"{API}/schema.json",
        "photographs": f"{API}/photographs.json",
        "table": table_name(),
        "layers": [_layer_entry(facts) for facts in layers],
    }
    write(root, f"{API}/index.json", to_json(index) + "\n")
    photographs = [{"path": p, "label": label} for p, label in zip(catalogue.paths, catalogue.labels, strict=True)]
    write(root, f"{API}/photographs.json", to_json(photographs) + "\n")
    write(root, f"{API}/schema.json", json.dumps(schema(), indent=1) + "\n")
    write(root, "CITATION.cff", citation(atlas, title))
    table = atlas.units()
    if "trace" in table:
        table = table.drop(columns="trace")
    if table_name().endswith("parquet"):
        table.to_parquet(root / table_name(), index=False)
    else:
        table.to_csv(root / table_name(), index=False)


def _layer_entry(facts: LayerSummary) -> dict[str, Any]:
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
    }


def table_name() -> str:
    """Return the file name of the table of units: Parquet if pyarrow is installed, else CSV."""
    return "units.parquet" if importlib.util.find_spec("pyarrow") is not None else "units.csv"


def citation(atlas: Atlas, title: str) -> str:
    """Return the content of CITATION.cff, which GitHub and reference managers read."""
    attributes = atlas.attributes
    model = str(attributes.get("model", "a vision network"))
    lines = [
        "cff-version: 1.2.0",
        "message: To cite a unit, name it layer:channel and give the digest of its preset.",
        "type: dataset",
        f"title: {yaml_text(f'{title}: {model}')}",
        "authors:",
        f"  - name: {yaml_text(title)}",
        f"version: {yaml_text(str(attributes.get('identity', ''))[:12] or '1')}",
    ]
    if attributes.get("created"):
        lines.append(f"date-released: {str(attributes['created'])[:10]}")
    lines += [
        "references:",
        "  - type: article",
        "    title: Feature Visualization",
        "    doi: 10.23915/distill.00007",
        "    year: 2017",
        "    journal: Distill",
        "    authors:",
        "      - {family-names: Olah, given-names: Chris}",
        "      - {family-names: Mordvintsev, given-names: Alexander}",
        "      - {family-names: Schubert, given-names: Ludwig}",
    ]
    return "\n".join(lines) + "\n"


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
