"""The order in which a site is built, and what of the former one still holds."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.site import output, workers
from pipeline.site.config import SiteConfig
from pipeline.site.context import families
from pipeline.site.context.home import Home
from pipeline.site.context.layer_summary import Catalogue, Facts, facts_of, lists_of
from pipeline.site.data import api, search_index
from pipeline.site.data.js_shards import text
from pipeline.site.hosting import hosts
from pipeline.site.layout import embedding
from pipeline.site.media.chunks import STRIP_PX, SUFFIX, Made, Piece, pieces_of, showing_of, table_of
from pipeline.site.media.size_budget import Inventory, Sizes, choose, encode
from pipeline.site.media.sprites import sheet, side
from pipeline.site.output import BUILT, write
from pipeline.site.pages import Pages
from pipeline.store.reader import Atlas
from pipeline.store.shards import digest_of

# Parts of a layer that a later build takes over as they are.
KEPT = ("media/{slug}", "data/{slug}")
# Fields of the configuration that change no layer's files.
ELSEWHERE = ("title", "families", "aliases", "workers")


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """What was written, and how many layers, units and pictures it shows; `made` units were not taken over."""

    host: hosts.Report
    layers: int
    units: int
    pictures: int
    made: int
    level: int

    @property
    def files(self) -> int:
        """Number of files."""
        return self.host.files

    @property
    def bytes(self) -> int:
        """Their size."""
        return self.host.bytes


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is known of an atlas before anything is drawn, each by layer in order.

    `common` is a digest of what all layers show of the photographs, `counts` are the examples of a unit by list,
    `answers` fingerprints of the responses that likeness is made from.
    """

    common: str
    layers: list[Facts]
    catalogue: Catalogue
    counts: list[dict[str, int]]
    answers: list[str]
    used: np.ndarray
    digests: list[str]
    groups: tuple[families.Family, ...]
    wired: list[tuple[str, ...]]


def build_site(
    atlas: Atlas,
    target: Path,
    config: SiteConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SiteReport:
    """Write the site of `atlas` to `target`, in place of the site that may be there.

    The new site is written beside `target` and takes its place when it is finished; until then, and after any
    error, the old one stands. Layers that have not changed are taken over from it. `progress` hears (units done,
    units in all). The same atlas and configuration give the same bytes.

    Raises `AtlasError` if `target` holds something that is no site of ours, or a file of families is none.
    """
    target = target.absolute()
    before = output.built(target)
    seen = _survey(atlas, config)
    total = sum(len(facts.channels) for facts in seen.layers)
    inventory = _inventory(atlas, seen, config)
    sizes = _sizes(atlas, inventory, config, before)
    look = digest_of([dataclasses.asdict(sizes), _settings(config), _code(), seen.catalogue.classes])
    ranks, plan = _plane(atlas, seen, sizes, before)
    digests = _digests(seen, look, ranks)
    with output.replacing(target) as new:
        old = before.get("layers", {})
        kept = {f.name for f in seen.layers if old.get(f.name) == digests[f.name] and _adopt(target, new, f)}
        progress(sum(len(f.channels) for f in seen.layers if f.name in kept), total)
        made = total - sum(len(f.channels) for f in seen.layers if f.name in kept)
        with workers.opened(atlas.path, new, config, sizes, made) as crew:
            groups = _photographs(atlas, seen, sizes, config, new, target, before.get("photos"), look)
            crew.begin(_pieces(seen, kept, config, ranks), groups)
            # All that needs no picture, while others make these.
            search_index.write_all(
                new, atlas, seen.layers, seen.catalogue, seen.groups, sizes, config, ranks, plan, digests, kept
            )
            home = Home.of(atlas, target, config, seen.layers, seen.catalogue)
            pages = Pages(new, config, seen.groups, digest_of([sorted(digests.items()), look])[:8])
            pages.write_static()
            for i, facts in enumerate(seen.layers):
                around = [seen.layers[j] if 0 <= j < len(seen.layers) else None for j in (i - 1, i + 1)]
                pages.write_layer(home, facts, around[0], around[1], sizes)
            pages.write_others(home, plan is not None)
            api.write_index(new, atlas, seen.layers, seen.catalogue, config.title)
            _layers(crew, new, seen, kept, sizes, config, digests, progress)
        state = {
            "layers": digests,
            "photos": _photos_digest(atlas, seen, look),
            "fits": [_fitting(inventory, config), dataclasses.asdict(sizes)],
            "map": plan and plan.state(),
        }
        write(new, BUILT, text(state))
        report = hosts.weighed(new)
    return SiteReport(report, len(seen.layers), total, sum(f.pictures for f in seen.layers), made, sizes.level)


def _survey(atlas: Atlas, config: SiteConfig) -> Survey:
    catalogue = Catalogue.of(atlas)
    layers, used, digests, wired, counts, answers = [], [np.zeros(0, np.int64)], [], [], [], []
    common = _common(atlas, catalogue)
    for order, layer in enumerate(atlas):
        layers.append(facts_of(layer, order, catalogue.classes))
        lists = lists_of(layer, config)
        used += [np.unique(shown.index) for shown in lists]
        counts.append({shown.name: shown.count for shown in lists})
        answers.append(layer.fingerprint("responses"))
        wired.append(tuple(w.layer for side in ("inputs", "outputs") if (w := layer.wiring(side)) is not None))
        digests.append(digest_of([common, repr(layers[-1]), layer.fingerprint()]))
    units = {f.name: frozenset(f.channels) for f in layers}
    groups = families.read(_families(atlas, config), units)
    shown = np.unique(np.concatenate(used))
    return Survey(common, layers, catalogue, counts, answers, shown[shown >= 0], digests, groups, wired)


def _digests(seen: Survey, look: str, ranks: Sequence[np.ndarray]) -> dict[str, str]:
    """Digest of each layer's files: its own content, how it is shown, and the places of what it is wired to."""
    places = {facts.name: ranks[facts.order].tolist() for facts in seen.layers}
    return {
        facts.name: digest_of([look, digest, [[name, places.get(name)] for name in wired]])
        for facts, digest, wired in zip(seen.layers, seen.digests, seen.wired, strict=True)
    }


def _families(atlas: Atlas, config: SiteConfig) -> Path | None:
    if config.families is not None:
        return Path(config.families)
    beside = atlas.path.parent / families.BESIDE
    return beside if beside.is_file() else None


def _common(atlas: Atlas, catalogue: Catalogue) -> str:
    """Digest of what all layers show of the photographs."""
    shown = atlas.shown_photographs()
    return digest_of(
        [
            catalogue.paths,
            catalogue.labels,
            shown.to_numpy(np.float64).tolist(),
            atlas.examples_store,
            atlas.dataset_labels,
        ]
    )


def _settings(config: SiteConfig) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ELSEWHERE}


@functools.cache
def _code() -> str:
    """Digest of this package's own code: what another version would make otherwise is made again."""
    here = Path(__file__).parent
    return digest_of([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(here.rglob("*.py"))])


def _inventory(atlas: Atlas, seen: Survey, config: SiteConfig) -> Inventory:
    store, boxes = atlas.examples_store, bool(table_of(atlas))
    # As if whole pictures had a file each; where they do not, there are more crops, and sizes are chosen with these.
    cells = []
    heat = []
    whole = False
    # Photographs that share a file are heavy to look at one by one, so every unit then has crops of its own.
    alone = len(seen.used) <= config.max_files // 3
    for layer, facts, counts in zip(atlas, seen.layers, seen.counts, strict=True):
        lone = Sizes(0, 1, 1, 1, 1, 1, per_photo=1 if alone else 2)
        showing = showing_of(store, boxes, max(facts.aperture), config, lone)
        whole = whole or showing.whole
        cells.append(sum(counts.get(name, 0) for name in showing.celled))
        heat.append(layer.heat_maps() is not None and config.licence != "ids")
    other = 40 + 5 * len(seen.layers) + len(seen.groups)
    return Inventory(seen.layers, cells, heat, len(seen.used) if whole else 0, other)


def _fitting(inventory: Inventory, config: SiteConfig) -> str:
    """Digest of what sizes were chosen for: counts, not content, so that a picture made anew changes no size."""
    layers = [
        [f.name, len(f.channels), [[r.key, r.variants, r.height, r.width] for r in f.rendered]]
        for f in inventory.layers
    ]
    counts = [inventory.cells, inventory.heat, inventory.photographs, inventory.pages]
    return digest_of([layers, counts, _settings(config), _code()])


def _sizes(atlas: Atlas, inventory: Inventory, config: SiteConfig, before: Mapping[str, Any]) -> Sizes:
    fitting, kept = before.get("fits", (None, None))
    return Sizes(**kept) if fitting == _fitting(inventory, config) else choose(atlas, inventory, config)


def _adopt(target: Path, new: Path, facts: Facts) -> bool:
    unit = f"{api.API}/units/{facts.slug}.json"
    if not (target / unit).is_file() or not all((target / p.format(slug=facts.slug)).is_dir() for p in KEPT):
        return False
    write(new, unit, (target / unit).read_bytes())
    return all(output.adopt(target, new, part.format(slug=facts.slug)) for part in KEPT)


def _plane(
    atlas: Atlas, seen: Survey, sizes: Sizes, before: Mapping[str, Any]
) -> tuple[list[np.ndarray], search_index.Map | None]:
    """Places of each layer's units in its sheets of small pictures, and the map."""
    counts = [len(f.channels) for f in seen.layers]
    key = digest_of([seen.answers, counts, sizes.per_tiny])
    held = before.get("map")
    if held and held.get("key") == key:
        found = search_index.Map.again(held)
        return np.split(found.ranks, np.cumsum(counts)[:-1]), found
    vectors = embedding.spectra([layer.responses() for layer in atlas])
    if vectors is None or len(vectors) < 3:
        return [np.arange(count) for count in counts], None
    each = np.split(vectors, np.cumsum(counts)[:-1])
    ranks = [embedding.blocks(embedding.own_axes(part), sizes.per_tiny) if len(part) else np.arange(0) for part in each]
    method, places = embedding.layout(vectors, embedding.axes(vectors))
    return ranks, search_index.Map(key, method, places, np.concatenate(ranks))


def _photos_digest(atlas: Atlas, seen: Survey, look: str) -> str:
    fingerprint = atlas.attributes.get("dataset_fingerprint", "")
    return digest_of([look, fingerprint, seen.common, seen.used.tolist()])


def _photographs(
    atlas: Atlas,
    seen: Survey,
    sizes: Sizes,
    config: SiteConfig,
    new: Path,
    target: Path,
    held: str | None,
    look: str,
) -> list[workers.Group]:
    """Whole pictures to make, a file each or many to a sheet; none where they are there or not to be shown."""
    table = table_of(atlas)
    if not showing_of(atlas.examples_store, bool(table), 0.0, config, sizes).whole:
        return []
    if held == _photos_digest(atlas, seen, look) and output.adopt(target, new, "photos"):
        return []
    per = sizes.per_photo
    if per == 1:
        return [(int(i), [int(i)]) for i in seen.used]
    every = list(table)
    return [(start, every[start : start + per]) for start in range(0, len(every), per)]


def _pieces(seen: Survey, kept: set[str], config: SiteConfig, ranks: Sequence[np.ndarray]) -> list[Piece]:
    """The pieces of all layers that were not kept."""
    places = {facts.name: facts.order for facts in seen.layers}
    found: list[Piece] = []
    for facts in seen.layers:
        if facts.name in kept:
            continue
        strip = tuple(spaced(list(range(len(facts.channels))), config.strip))
        others = {
            name: dict(zip(seen.layers[places[name]].channels, ranks[places[name]].tolist(), strict=True))
            for name in seen.wired[facts.order]
            if name in places
        }
        found += pieces_of(facts, ranks[facts.order], strip, others)
    return found


def _layers(
    crew: workers.Workshop,
    new: Path,
    seen: Survey,
    kept: set[str],
    sizes: Sizes,
    config: SiteConfig,
    digests: Mapping[str, str],
    progress: Callable[[int, int], None],
) -> None:
    """Finish every layer that was not kept, when all its pieces are there: what needs a whole layer."""
    total = sum(len(f.channels) for f in seen.layers)
    done = sum(len(f.channels) for f in seen.layers if f.name in kept)
    for facts in seen.layers:
        if facts.name not in kept and not facts.channels:
            _finish(new, facts, [], sizes, config, digests[facts.name])
    parts: dict[str, list[Made]] = {}
    for made in crew.made():
        facts = seen.layers[made.piece.order]
        held = parts.setdefault(facts.name, [])
        held.append(made)
        if sum(part.piece.stop - part.piece.start for part in held) == len(facts.channels):
            ordered = sorted(parts.pop(facts.name), key=lambda m: m.piece.start)
            _finish(new, facts, ordered, sizes, config, digests[facts.name])
        done += made.piece.stop - made.piece.start
        progress(done, total)


def _finish(new: Path, facts: Facts, parts: Sequence[Made], sizes: Sizes, config: SiteConfig, digest: str) -> None:
    """A layer's smallest pictures, in the order of likeness; its strip; its part of the API."""
    api.write_units(new, facts, [record for part in parts for record in part.records], digest[:12])
    media, suffix = f"media/{facts.slug}", SUFFIX[config.format]
    (new / media).mkdir(parents=True, exist_ok=True)
    (new / f"data/{facts.slug}").mkdir(parents=True, exist_ok=True)
    if not parts:
        return
    tiny = np.concatenate([part.tiny for part in parts])
    order = np.argsort(parts[0].piece.ranks)
    per, px = sizes.per_tiny, sizes.tiny_px
    for start in range(0, len(order), per):
        cells = [Image.fromarray(tiny[row]) for row in order[start : start + per]]
        image = sheet(cells, side(per), (px, px))
        write(new, f"{media}/b{start}.{suffix}", encode(image, config.format, max(1, sizes.quality - 8)))
    strip = {row: image for part in parts for row, image in part.strip.items()}
    rows = parts[0].piece.strip
    cells = [Image.fromarray(strip[row]) if row in strip else None for row in rows]
    image = sheet(cells, max(1, len(rows)), (STRIP_PX, STRIP_PX))
    write(new, f"{media}/strip.{suffix}", encode(image, config.format, max(1, sizes.quality - 8)))


def spaced(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of `items`, evenly spread, the first and last among them."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
