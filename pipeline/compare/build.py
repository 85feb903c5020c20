"""The compare site: tables as files, shards, sheets and pages, in one folder that opens from disk."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.compare.alignment import Comparison, Part, align
from pipeline.compare.contact_sheets import choose, draw, per_thumb, shapes
from pipeline.compare.pages import Pages, code
from pipeline.compare.runs import RunComparison
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Catalogue, Facts, facts_of
from pipeline.site.data.js_shards import exact, put, rounded, text
from pipeline.site.data.search_index import runs
from pipeline.site.data.unit_records import labels_of
from pipeline.site.hosting import hosts
from pipeline.site.media.chunks import SUFFIX
from pipeline.site.media.size_budget import Sizes
from pipeline.site.media.sprites import side
from pipeline.site.output import replacing, write
from pipeline.store.shards import digest_of, safe


@dataclasses.dataclass(frozen=True)
class Compared:
    """What was compared, and what the folder of it weighs."""

    comparison: Comparison
    host: hosts.Report


def build(
    contest: RunComparison,
    out: Path,
    config: SiteConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compared:
    """Compare, and write everything to `out`: compare.parquet, compare.csv, summary.csv and the site.

    What stood there before is replaced when all of it is written. The same atlases give the same bytes. `progress`
    hears (units done, units in all). Raises `AtlasError` if `out` holds something that is no site of ours.
    """
    found = align(contest)
    sizes = choose(contest, found.layers, config)
    facts = [_facts(contest, part, order) for order, part in enumerate(found.layers)]
    total, done = sum(len(part.channels) for part in found.layers), 0
    with replacing(out) as new:
        parts, digests, words = [], [], []
        for part, known in zip(found.layers, facts, strict=True):
            drawn = draw(new, contest, part, known.slug, sizes, config)
            parts.append(dataclasses.replace(part, difference=drawn.difference))
            words.append(_words(contest, part))
            digests.append(_layer(new, contest, found, parts[-1], known, words[-1], sizes, drawn.digest))
            done += len(part.channels)
            progress(done, total)
        found = dataclasses.replace(found, layers=tuple(parts))
        identity = digest_of([digests, [c.label for c in found.contenders], code()])[:12]
        _indices(new, contest, found, facts, words, digests, identity, sizes, config)
        _tables(new, found)
        pages = Pages(new, contest, found, facts, config, identity)
        pages.write_static()
        pages.write()
        return Compared(found, hosts.weighed(new))


def _tables(root: Path, found: Comparison) -> None:
    units = found.units()
    units.to_parquet(root / "compare.parquet", index=False)
    units.to_csv(root / "compare.csv", index=False)
    found.summary().to_csv(root / "summary.csv", index=False)


def _facts(contest: RunComparison, part: Part, order: int) -> Facts:
    """What all runs know of a layer, with the units that any of them has."""
    atlas = next(atlas for atlas in contest.atlases if part.name in atlas.layers)
    facts = facts_of(atlas[part.name], order, atlas.labels)
    return dataclasses.replace(facts, channels=tuple(part.channels.tolist()), rendered=())


def _words(contest: RunComparison, part: Part) -> list[str]:
    """A label for each unit, from the first run that knows one; empty where none does."""
    found: dict[int, str] = {}
    for atlas in dict.fromkeys(contest.atlases):
        if part.name in atlas.layers:
            layer, catalogue = atlas[part.name], Catalogue.of(atlas)
            places, words = labels_of(layer, facts_of(layer, 0, catalogue.classes), catalogue)
            for channel, place in zip(layer.channels.tolist(), places, strict=True):
                if place >= 0:
                    found.setdefault(channel, words[place])
    return [found.get(channel, "") for channel in part.channels.tolist()]


def _layer(
    root: Path,
    contest: RunComparison,
    found: Comparison,
    part: Part,
    facts: Facts,
    words: Sequence[str],
    sizes: Sizes,
    drawn: str,
) -> str:
    """Write the shards of one layer and of its units; returns a digest of them and of the sheets."""
    digest = hashlib.sha256(drawn.encode())

    def shard(name: str, value: Any) -> None:
        content = text(value)
        digest.update(content.encode())
        write(root, f"data/{facts.slug}/{name}.js", put(f"{facts.slug}/{name}", content))

    sheets = [form and form.sheet(sizes) for form in shapes(contest, part.name)]
    shard("layer", {"name": part.name, "tiny": list(range(len(part.channels))), "sheets": sheets})
    told = _told(contest, part)
    values = {measure.name: [exact(row) for row in part.of(measure.name)] for measure in found.measures}
    natural, difference = [exact(row) for row in part.natural], exact(part.difference)
    for start in range(0, len(part.channels), sizes.per_shard):
        units = []
        for row in range(start, min(start + sizes.per_shard, len(part.channels))):
            channel = int(part.channels[row])
            unit: dict[str, Any] = {
                "channel": channel,
                "values": {name: [of[row] for of in rows] for name, rows in values.items()},
                "natural": [of[row] for of in natural],
                "difference": difference[row],
                "pictures": [known.get(channel) for known in told],
            }
            if words[row]:
                unit["label"] = words[row]
            units.append(unit)
        shard(f"u{start}", {"units": units})
    return digest.hexdigest()


def _told(contest: RunComparison, part: Part) -> list[Mapping[int, list[dict[str, Any]]]]:
    """For each contender, by channel, what each picture of it was made with: status, seed and the plain activation."""
    found = []
    for atlas, contender in zip(contest.atlases, contest.contenders, strict=True):
        own: dict[int, list[dict[str, Any]]] = {}
        if part.name in atlas.layers and contender.preset in atlas[part.name].presets:
            layer = atlas[part.name]
            numbers = layer.numbers(contender.preset)
            for row, channel in enumerate(layer.channels.tolist()):
                reached = exact(numbers["activation"][row])
                seeds = numbers.get("seed", np.full(numbers["status"].shape, "", object))[row]
                own[channel] = [
                    {"status": str(status), "seed": str(seed), "activation": value}
                    for status, seed, value in zip(numbers["status"][row], seeds, reached, strict=True)
                ]
        found.append(own)
    return found


def _indices(
    root: Path,
    contest: RunComparison,
    found: Comparison,
    facts: Sequence[Facts],
    words: Sequence[Sequence[str]],
    digests: Sequence[str],
    identity: str,
    sizes: Sizes,
    config: SiteConfig,
) -> None:
    """What the pages' scripts know of the whole: layers, contenders, measures, words, and a shard for each measure."""
    count = len(found.contenders)
    thumb = per_thumb(sizes, count)
    index = {
        "title": config.title,
        "model": str(contest.first.attributes.get("model", "")),
        "identity": identity,
        "suffix": SUFFIX[config.format],
        "layers": [
            [f.name, f.slug, f.kind, runs(f.channels), digest[:8], f.total]
            for f, digest in zip(facts, digests, strict=True)
        ],
        "families": [],
        "aliases": {},
        "contenders": [{"label": c.label, "run": c.run, "preset": c.preset} for c in found.contenders],
        "measures": [
            {"name": m.name, "title": m.title, "better": m.better, "says": m.says,
             "signs": [found.better(m, at) for at in range(count)],
             "alike": [[found.comparable(m, a, b) for b in range(count)] for a in range(count)]}
            for m in found.measures
        ],
        "main": found.main.name,
        "sizes": {
            "shard": sizes.per_shard,
            "thumb": [thumb, side(thumb * count), sizes.thumb_px],
            "tiny": [sizes.per_tiny, side(sizes.per_tiny), sizes.tiny_px],
        },
    }  # fmt: skip
    shards: dict[str, Any] = {"index": index}
    vocabulary: dict[str, int] = {}
    numbered = [[vocabulary.setdefault(word, len(vocabulary)) if word else -1 for word in of] for of in words]
    shards["search"] = {"words": list(vocabulary), "units": [of if any(n >= 0 for n in of) else [] for of in numbered]}
    for measure in found.measures:
        shards[f"measures/{safe(measure.name)}"] = [[rounded(row) for row in p.of(measure.name)] for p in found.layers]
    shards["difference"] = [rounded(part.difference) for part in found.layers]
    for name, value in shards.items():
        write(root, f"data/{name}.js", put(name, text(value)))
