"""The machine-readable twin of the pages: `api/v1/`, a table of all units, CITATION.cff."""

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.core.metric_specs import MEASURES, RELATIONS
from pipeline.site.context.layer_summary import Catalogue, Facts
from pipeline.site.data.js_shards import text
from pipeline.site.hosting.hosts import yaml_text
from pipeline.site.output import write
from pipeline.store.reader import Atlas

API = "api/v1"
NUMBER = {"type": ["number", "null"]}
NUMBERS = {"type": "array", "items": NUMBER}


def write_units(root: Path, facts: Facts, records: Sequence[str], build: str) -> None:
    """All units of a layer as one JSON file, from their records."""
    head = text({"layer": facts.name, "kind": facts.kind, "of": facts.total, "digest": build})[:-1]
    write(root, f"{API}/units/{facts.slug}.json", f'{head},"units":[{",".join(records)}]}}\n')


def write_index(root: Path, atlas: Atlas, layers: Sequence[Facts], catalogue: Catalogue, title: str) -> None:
    """What there is, the photographs, the schema, the table of units and the citation."""
    attributes = atlas.attributes
    found = {
        "title": title,
        "generator": f"neuron-atlas {__version__}",
        **{k: attributes.get(k) for k in ("model", "run", "created", "weights_sha256", "dataset_fingerprint")},
        "versions": attributes["versions"],
        "schema": f"{API}/schema.json",
        "photographs": f"{API}/photographs.json",
        "table": table_name(),
        "layers": [
            {
                "name": f.name,
                "kind": f.kind,
                "channels": len(f.channels),
                "of": f.total,
                "map": f.map_size,
                "receptive_field": f.seen,
                "input": f.input_size,
                "presets": [
                    {"key": r.key, "preset": r.preset, "digest": r.digest, "precision": r.precisions}
                    for r in f.rendered
                ],
                "units": f"{API}/units/{f.slug}.json",
                "page": f.href,
            }
            for f in layers
        ],
    }
    write(root, f"{API}/index.json", text(found) + "\n")
    photographs = [{"path": p, "label": label} for p, label in zip(catalogue.paths, catalogue.labels, strict=True)]
    write(root, f"{API}/photographs.json", text(photographs) + "\n")
    write(root, f"{API}/schema.json", json.dumps(schema(), indent=1) + "\n")
    write(root, "CITATION.cff", citation(atlas, title))
    table = atlas.units()
    if "trace" in table:
        table = table.drop(columns="trace")
    if table_name().endswith("parquet"):
        table.to_parquet(root / table_name(), index=False)
    else:
        table.to_csv(root / table_name(), index=False)


def table_name() -> str:
    """Parquet where it can be written, else CSV."""
    return "units.parquet" if importlib.util.find_spec("pyarrow") is not None else "units.csv"


def citation(atlas: Atlas, title: str) -> str:
    """How to cite the atlas, for GitHub and reference managers."""
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
    """JSON Schema of `api/v1/units/<layer>.json`."""
    entry = {
        "description": "value, row of photographs.json, y and x on the map, heat-map, crop, and what the unit saw: "
        "left, top, right, bottom in pixels of the network's input, left out where that is all of it; null where a "
        "bin of the spectrum has no further example",
        "type": ["array", "null"],
        "prefixItems": [NUMBER, *([{"type": "integer"}] * 9)],
        "minItems": 6,
        "maxItems": 10,
    }
    picture = {
        "type": "object",
        "description": "one picture: what the saved 8-bit image reaches without transforms (activation), the mean over "
        "16 shaken copies (robust), before the first step (start), and the best photograph's (natural); gain and "
        "robust_gain are activation and robust ÷ natural; method.html says what the other measures are, and an atlas "
        "of before them has none",
        "properties": {
            **{k: NUMBER for k in ("activation", "robust", "start", "natural", "seconds", "gain", "robust_gain")},
            **{
                k: NUMBER | {f"{side}imum": end for side, end in (("min", low), ("max", high)) if end < math.inf}
                for k, (low, high) in (MEASURES | RELATIONS).items()
            },
            "seed": {"type": "string"},
            "steps": {"type": "integer"},
            "status": {"type": "string"},
            "reason": {"type": "string"},
            "trace": NUMBERS,
        },
        "required": ["activation", "natural", "gain", "status"],
    }
    labels = {
        "type": "object",
        "properties": {
            "over": {
                "description": "label, how often among the top 1 % of photographs, share there ÷ share of all",
                "type": "array",
                "items": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}, NUMBER]},
            },
            "best": {"type": "string"},
            "selectivity": NUMBER,
            "auroc": NUMBER,
        },
    }
    histogram = {
        "type": "object",
        "description": "per-image maxima: even bins of `step` from `from`, how many lie under and over, the ends, and "
        "the quantiles at the edges of the spectrum",
        "properties": {
            "counts": {"type": "array", "items": {"type": "integer"}},
            "from": NUMBER,
            "step": NUMBER,
            "under": {"type": "integer"},
            "over": {"type": "integer"},
            "ends": NUMBERS,
            "quantiles": NUMBERS,
        },
    }
    unit = {
        "type": "object",
        "properties": {
            "channel": {"type": "integer"},
            "tiny": {"type": "integer", "description": "place in the site's sheets of small pictures"},
            "class": {"type": "string"},
            "pictures": {"type": "object", "additionalProperties": {"type": "array", "items": picture}},
            "stats": {"type": "object", "additionalProperties": {"type": ["number", "boolean", "null"]}},
            "histogram": histogram,
            "examples": {"type": "object", "additionalProperties": {"type": "array", "items": entry}},
            "labels": labels,
            "similar": {
                "description": "channel of the same layer, correlation of responses, place in small sheets",
                "type": "array",
                "items": {"type": "array", "minItems": 3, "maxItems": 3},
            },
            "wiring": {"type": "object"},
        },
        "required": ["channel"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Units of a layer of a neuron atlas",
        "type": "object",
        "properties": {
            "layer": {"type": "string"},
            "kind": {"type": "string"},
            "of": {"type": "integer", "description": "channels that the layer has in the network"},
            "digest": {"type": "string"},
            "units": {"type": "array", "items": unit},
        },
        "required": ["layer", "units"],
    }
