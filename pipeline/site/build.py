"""Build a site: plan it, reuse unchanged layers of the previous build, and write all files."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.activation_atlas.projection import principal_components
from pipeline.core.hashing import digest_of
from pipeline.core.source import package_digest
from pipeline.site import output, workers
from pipeline.site.config import SiteConfig
from pipeline.site.context import families
from pipeline.site.context.home import Home
from pipeline.site.context.layer_summary import Catalogue, LayerSummary, shown_lists, summarize
from pipeline.site.context.wall import choose as choose_wall
from pipeline.site.data import activation_atlas, api, search_index, similar_units
from pipeline.site.data.class_index import PER_SHARD
from pipeline.site.data.js_shards import to_json
from pipeline.site.hosting import hosts
from pipeline.site.layout import embedding
from pipeline.site.media import map_tiles
from pipeline.site.media.cards import TILES
from pipeline.site.media.chunks import STRIP_PX, SUFFIX, Chunk, ChunkResult, choose_showing, chunks_of, image_table
from pipeline.site.media.facet_sheets import FACET_BYTES, FacetFiles
from pipeline.site.media.facet_sheets import files_for as facet_files
from pipeline.site.media.size_budget import Inventory, Sizes, choose, encode
from pipeline.site.media.sprites import sheet, side
from pipeline.site.output import BUILT, write
from pipeline.site.own_image.files import Export, OwnImage, prepare
from pipeline.site.pages import Pages
from pipeline.site.sharing import Extent, Sharing, copied_bytes
from pipeline.store.reader import Atlas

# Folders of a layer that are reused unchanged if the layer has not changed.
REUSED_FOLDERS = ("media/{slug}", "data/{slug}")
CARD_FOLDER = "cards/{slug}"
# Settings that affect no layer's files.
SETTINGS_OUTSIDE_LAYERS = (
    "title", "author", "url", "atlas_url", "copy_atlas", "families", "aliases", "workers", "own_image", "onnxruntime",
    "similar",
)  # fmt: skip
# Bytes of a display image for each pixel, about; larger images compress better than those of units' sheets.
DISPLAY_BYTES = 0.4
# The smallest images and the strip are encoded at this much lower quality.
QUALITY_STEP = 8


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """Result of a build.

    Attributes:
        host: Sizes and numbers of files, as web hosts limit them.
        layers: Number of layers shown.
        units: Number of units shown.
        pictures: Number of feature visualizations shown.
        rebuilt_units: Number of units whose files were written; the files of all other units were reused.
        level: Size level that was chosen; 0 is the best.
        own_image: The page on which the network runs, without its files.
    """

    host: hosts.Report
    layers: int
    units: int
    pictures: int
    rebuilt_units: int
    level: int
    own_image: OwnImage

    @property
    def files(self) -> int:
        """Number of files."""
        return self.host.files

    @property
    def bytes(self) -> int:
        """Total size of the files in bytes."""
        return self.host.bytes


@dataclasses.dataclass(frozen=True)
class AtlasSummary:
    """Contents of an atlas, read before any image; lists have one entry per layer.

    Attributes:
        dataset_digest: Digest of everything that all layers show of the dataset images.
        layers: Summaries of the layers.
        catalogue: Paths and labels of the dataset images.
        example_counts: Number of dataset examples per unit, by list.
        used_images: Sorted indices of all dataset images shown, (n,) integers.
        families: Families of units.
        wired_layers: Names of the layers that each layer is connected to.
    """

    dataset_digest: str
    layers: list[LayerSummary]
    catalogue: Catalogue
    example_counts: list[dict[str, int]]
    used_images: np.ndarray
    families: tuple[families.Family, ...]
    wired_layers: list[tuple[str, ...]]

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(len(facts.channels) for facts in self.layers)


@dataclasses.dataclass(frozen=True)
class LayerDigests:
    """Digests of what an atlas has of each layer, in the order of the layers.

    Attributes:
        contents: Digests of all that is shown of a layer.
        responses: Fingerprints of the activations that the map and the order of similarity are computed from.
    """

    contents: list[str]
    responses: list[str]

    @staticmethod
    def of(
        atlas: Atlas, summary: AtlasSummary, fingerprints: Callable[[], list[workers.Fingerprints]]
    ) -> "LayerDigests":
        """Return the digests of the layers of an atlas; `fingerprints` waits for their fingerprints."""
        names = [summary.catalogue.book.digest(layer) for layer in atlas]
        stored = fingerprints()
        contents = [
            digest_of([summary.dataset_digest, repr(facts), fingerprint, *([name] if name else [])])
            for facts, (fingerprint, _), name in zip(summary.layers, stored, names, strict=True)
        ]
        return LayerDigests(contents, [responses for _, responses in stored])


@dataclasses.dataclass(frozen=True)
class BuildInputs:
    """Inputs and decisions that whole dataset images are written from, before all others are known.

    Attributes:
        atlas: The atlas to show.
        config: Configuration of the site.
        summary: Contents of the atlas.
        sizes: Sizes of images and numbers of units per file.
        target: Folder of the site.
        root: Folder that the new site is written to; it replaces `target` at the end.
        previous: State written by the previous build of `target`; empty if there is none.
        shared_digest: Digest of everything that affects the files of all layers: sizes, settings, code, class names.
        own_image: The page on which the network runs.
    """

    atlas: Atlas
    config: SiteConfig
    summary: AtlasSummary
    sizes: Sizes
    target: Path
    root: Path
    previous: Mapping[str, Any]
    shared_digest: str
    own_image: OwnImage

    @property
    def images_digest(self) -> str:
        """Digest of the files of whole dataset images."""
        fingerprint = self.atlas.attributes.get("dataset_fingerprint", "")
        summary = self.summary
        return digest_of([self.shared_digest, fingerprint, summary.dataset_digest, summary.used_images.tolist()])


@dataclasses.dataclass(frozen=True)
class BuildContext(BuildInputs):
    """Inputs and decisions that all other steps of one build share.

    Attributes:
        ranks: Positions of each layer's units in its sheets of small images, (units,) integers per layer.
        map: Map of all units, or None without stored activations.
        digests: Digests of the layers' files, by layer name.
        reused: Names of layers whose files are reused from `target`.
        sharing: Writer of what makes the site shareable.
        similar: What the files of similar units are made from.
    """

    ranks: list[np.ndarray]
    map: search_index.UnitMap | None
    digests: Mapping[str, str]
    reused: frozenset[str]
    sharing: Sharing
    similar: similar_units.SimilarUnits

    @property
    def reused_units(self) -> int:
        """Number of units whose files are reused."""
        return sum(len(facts.channels) for facts in self.summary.layers if facts.name in self.reused)


def build_site(
    atlas: Atlas,
    target: Path,
    config: SiteConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    export: Export | None = None,
) -> SiteReport:
    """Write the site of `atlas` to `target`, replacing an existing site.

    The new site is written to a folder beside `target`, which replaces `target` at the end; after an error, the old
    site is unchanged. Files of unchanged layers are reused. The same atlas and configuration give the same bytes.

    Args:
        atlas: The atlas to show.
        target: Folder of the site.
        config: Configuration of the site.
        progress: Function that is called with (units done, units in all) as the site is built.
        export: Function that exports the network of the atlas, for `config.own_image`; the page is left out if it
            raises `AtlasError`.

    Raises:
        AtlasError: If `target` contains files that are not a site of this program, or the families file is invalid.
    """
    with atlas.caching():  # pages, indices and tables show the same numbers
        return _build(atlas, target.absolute(), config, progress, export)


def _build(
    atlas: Atlas,
    target: Path,
    config: SiteConfig,
    progress: Callable[[int, int], None],
    export: Export | None,
) -> SiteReport:
    previous = output.built(target)
    units = sum(len(layer.channels) for layer in atlas)
    with contextlib.closing(workers.AtlasReader(atlas.path, units)) as reader:
        summary = _summarize(atlas, config)
        own_image = prepare(atlas, config, export, target, previous)
        inventory = _inventory(atlas, summary, config, own_image)
        sizes = _sizes(atlas, inventory, config, previous)
        shared_digest = digest_of(
            [
                dataclasses.asdict(sizes),
                _settings(config),
                package_digest(),
                summary.catalogue.classes,
                dataclasses.asdict(Extent.of(config, summary.units)),
            ]
        )
        with output.replacing(target) as root:
            inputs = BuildInputs(atlas, config, summary, sizes, target, root, previous, shared_digest, own_image)
            context = _write(inputs, reader, progress)
            _write_state(context, inventory, _write_map_tiles(context))
            report = hosts.weighed(root)
    rebuilt_units = summary.units - context.reused_units
    pictures = sum(facts.pictures for facts in summary.layers)
    told = dataclasses.replace(own_image, files={})
    return SiteReport(report, len(summary.layers), summary.units, pictures, rebuilt_units, sizes.level, told)


def _write(inputs: BuildInputs, reader: workers.AtlasReader, progress: Callable[[int, int], None]) -> BuildContext:
    """Write all files but the tiles of the map and the state."""
    atlas, config, summary = inputs.atlas, inputs.config, inputs.summary
    with contextlib.closing(
        workers.EncoderPool(atlas.path, inputs.root, config, inputs.sizes, summary.catalogue)
    ) as pool:
        # Whole dataset images need nothing of what follows, so they are written meanwhile.
        pool.write_images(_image_groups(inputs), summary.units)
        reader.write_table(inputs.root)
        context = _context(inputs, reader.fingerprints)
        progress(context.reused_units, summary.units)
        pool.write_chunks(_chunks(context))
        # Pages and indices need no image, so they are written while the pool encodes images.
        _write_pages(context)
        _collect_layers(context, pool, progress)
    reader.finish()
    return context


def _context(inputs: BuildInputs, fingerprints: Callable[[], list[workers.Fingerprints]]) -> BuildContext:
    """Arrange the units, and take over the files of unchanged layers."""
    atlas, config, summary, previous = inputs.atlas, inputs.config, inputs.summary, inputs.previous
    layers = LayerDigests.of(atlas, summary, fingerprints)
    ranks, unit_map = _layout(inputs, layers.responses)
    digests = _digests(summary, layers.contents, inputs.shared_digest, ranks)
    similar = similar_units.SimilarUnits.of(atlas, summary.layers, ranks, layers.responses, config.similar)
    reused = _reuse_layers(summary, digests, previous, _Folders(inputs.target, inputs.root, config.cards != "none"))
    return BuildContext(
        **vars(inputs),
        ranks=ranks,
        map=unit_map,
        digests=digests,
        reused=reused,
        sharing=Sharing(atlas, inputs.root, config, summary.layers),
        similar=similar,
    )


def _summarize(atlas: Atlas, config: SiteConfig) -> AtlasSummary:
    catalogue = Catalogue.of(atlas)
    dataset_digest = _dataset_digest(atlas, catalogue)
    layers, wired_layers, example_counts = [], [], []
    used = [np.zeros(0, np.int64)]
    for order, layer in enumerate(atlas):
        facts = summarize(layer, order, catalogue.classes)
        lists = shown_lists(layer, config)
        layers.append(facts)
        used += [np.unique(examples.index) for examples in lists]
        example_counts.append({examples.name: examples.count for examples in lists})
        wired_layers.append(layer.connected_layers)
    units = {facts.name: frozenset(facts.channels) for facts in layers}
    groups = families.read_families(families.find_families(config.families, atlas.path.parent), units)
    used_images = np.unique(np.concatenate(used))
    used_images = used_images[used_images >= 0]
    return AtlasSummary(dataset_digest, layers, catalogue, example_counts, used_images, groups, wired_layers)


def _digests(
    summary: AtlasSummary, contents: Sequence[str], shared_digest: str, ranks: Sequence[np.ndarray]
) -> dict[str, str]:
    """Return a digest of each layer's files: its contents, how they are shown, and the ranks of connected layers."""
    ranks_by_name = {facts.name: ranks[facts.order].tolist() for facts in summary.layers}
    return {
        facts.name: digest_of([shared_digest, digest, [[name, ranks_by_name.get(name)] for name in wired]])
        for facts, digest, wired in zip(summary.layers, contents, summary.wired_layers, strict=True)
    }


def _dataset_digest(atlas: Atlas, catalogue: Catalogue) -> str:
    """Return a digest of everything that all layers show of the dataset images."""
    shown = atlas.image_geometries()
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
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in SETTINGS_OUTSIDE_LAYERS}


def _inventory(atlas: Atlas, summary: AtlasSummary, config: SiteConfig, own_image: OwnImage) -> Inventory:
    store, boxes = atlas.examples_store, bool(image_table(atlas))
    crops = []
    heat_maps = []
    any_whole = False
    # Whether each whole image can have a file of its own. Sheets of whole images are slow to view one by one, so if
    # images share files, every unit gets crops as well. Sizes are chosen for this number of crops.
    separate_files = len(summary.used_images) <= config.max_files // 3
    for layer, facts, counts in zip(atlas, summary.layers, summary.example_counts, strict=True):
        provisional = Sizes(0, 1, 1, 1, 1, 1, per_photo=1 if separate_files else 2)
        showing = choose_showing(store, boxes, max(facts.aperture), config, provisional)
        any_whole = any_whole or showing.whole_images
        crops.append(sum(counts.get(name, 0) for name in showing.celled))
        heat_maps.append(layer.heat_maps() is not None and config.licence != "ids")
    extent, layers = Extent.of(config, summary.units), len(summary.layers)
    other_files = 44 + 5 * layers + len(summary.families) + extent.files(layers, summary.units)
    displays = [r.display for facts in summary.layers for r in facts.rendered if r.display is not None]
    other_files += sum(len(display.channels) for display in displays) + map_tiles.files_for(summary.units)
    cells = [facts.atlas.cells for facts in summary.layers if facts.atlas is not None]
    other_files += sum(map(activation_atlas.files_for, cells))
    facets = [facts.facets.facets for facts in summary.layers if facts.facets is not None]
    other_files += sum(map(facet_files, facets))
    other_files += math.ceil((len(summary.catalogue.classes) + len(summary.catalogue.names)) / PER_SHARD)
    other_files += similar_units.files_for(summary.units)
    pixels = sum(len(display.channels) * display.height * display.width for display in displays)
    other_bytes = extent.bytes(layers, summary.units) + copied_bytes(atlas, config) + int(DISPLAY_BYTES * pixels)
    other_bytes += activation_atlas.CELL_BYTES * sum(cells) + FACET_BYTES * sum(facets)
    other_bytes += similar_units.BYTES * config.similar * summary.units
    other_files, other_bytes = other_files + own_image.count, other_bytes + own_image.bytes
    images = len(summary.used_images) if any_whole else 0
    return Inventory(summary.layers, crops, heat_maps, images, other_files, other_bytes)


def _inventory_digest(inventory: Inventory, config: SiteConfig) -> str:
    """Return a digest of the counts that sizes were chosen for; new contents of the same images change no size."""
    layers = [
        [f.name, len(f.channels), [[r.key, r.variants, r.height, r.width] for r in f.rendered]]
        for f in inventory.layers
    ]
    counts = [inventory.crops, inventory.heat_maps, inventory.images, inventory.other_files, inventory.other_bytes]
    return digest_of([layers, counts, _settings(config), package_digest()])


def _sizes(atlas: Atlas, inventory: Inventory, config: SiteConfig, previous: Mapping[str, Any]) -> Sizes:
    """Return the sizes of the previous build if they were chosen for the same counts, else choose new ones."""
    digest, sizes = previous.get("fits", (None, None))
    if digest == _inventory_digest(inventory, config):
        return Sizes(**sizes)
    return choose(atlas, inventory, config)


@dataclasses.dataclass(frozen=True)
class _Folders:
    """The previous site, the new one, and whether layers have cards."""

    target: Path
    root: Path
    has_cards: bool


def _reuse_layers(
    summary: AtlasSummary, digests: Mapping[str, str], previous: Mapping[str, Any], folders: _Folders
) -> frozenset[str]:
    """Take over the files of unchanged layers from the previous site; return the names of these layers."""
    previous_digests = previous.get("layers", {})
    return frozenset(
        facts.name
        for facts in summary.layers
        if previous_digests.get(facts.name) == digests[facts.name] and _reuse_layer(folders, facts)
    )


def _reuse_layer(paths: _Folders, facts: LayerSummary) -> bool:
    target, root = paths.target, paths.root
    units = f"{api.API}/units/{facts.slug}.json"
    patterns = [*REUSED_FOLDERS, *([CARD_FOLDER] if paths.has_cards else [])]
    folders = [folder.format(slug=facts.slug) for folder in patterns]
    if not (target / units).is_file() or not all((target / folder).is_dir() for folder in folders):
        return False
    write(root, units, (target / units).read_bytes())
    return all(output.adopt(target, root, folder) for folder in folders)


def _layout(inputs: BuildInputs, responses: Sequence[str]) -> tuple[list[np.ndarray], search_index.UnitMap | None]:
    """Return the positions of each layer's units in its sheets of small images, and the map of all units."""
    atlas, sizes = inputs.atlas, inputs.sizes
    counts = [len(facts.channels) for facts in inputs.summary.layers]
    key = digest_of([responses, counts, sizes.per_tiny])
    state = inputs.previous.get("map")
    if state and state.get("key") == key:
        unit_map = search_index.UnitMap.from_state(state)
        return np.split(unit_map.ranks, np.cumsum(counts)[:-1]), unit_map
    vectors = embedding.unit_vectors([layer.dataset_activations() for layer in atlas])
    if vectors is None or len(vectors) < 3:
        return [np.arange(count) for count in counts], None
    ranks = []
    for part in np.split(vectors, np.cumsum(counts)[:-1]):
        ranks.append(
            embedding.sheet_order(embedding.layer_components(part), sizes.per_tiny) if len(part) else np.arange(0)
        )
    method, places = embedding.project(principal_components(vectors))
    return ranks, search_index.UnitMap(key, method, places, np.concatenate(ranks))


def _image_groups(inputs: BuildInputs) -> list[workers.Group]:
    """Return the whole dataset images to write, by file; empty if they are not shown or could be reused."""
    table = image_table(inputs.atlas)
    showing = choose_showing(inputs.atlas.examples_store, bool(table), 0.0, inputs.config, inputs.sizes)
    if not showing.whole_images:
        return []
    unchanged = inputs.previous.get("photos") == inputs.images_digest
    if unchanged and output.adopt(inputs.target, inputs.root, "photos"):
        return []
    per_file = inputs.sizes.per_photo
    if per_file == 1:
        return [(int(i), [int(i)]) for i in inputs.summary.used_images]
    indices = list(table)
    return [(start, indices[start : start + per_file]) for start in range(0, len(indices), per_file)]


def _chunks(context: BuildContext) -> list[Chunk]:
    """Return the chunks of all layers that are not reused."""
    layers, ranks = context.summary.layers, context.ranks
    orders = {facts.name: facts.order for facts in layers}
    chunks: list[Chunk] = []
    for facts in layers:
        if facts.name in context.reused:
            continue
        strip = tuple(spaced(list(range(len(facts.channels))), context.config.strip))
        wired_ranks = {
            name: dict(zip(layers[orders[name]].channels, ranks[orders[name]].tolist(), strict=True))
            for name in context.summary.wired_layers[facts.order]
            if name in orders
        }
        chunks += chunks_of(facts, ranks[facts.order], strip, wired_ranks)
    return chunks


def _write_pages(context: BuildContext) -> None:
    """Write the search index, all pages, static files and the index of the API."""
    root, atlas, config, summary = context.root, context.atlas, context.config, context.summary
    layers, digests = summary.layers, context.digests
    inputs = search_index.IndexInputs(
        atlas=atlas,
        layers=layers,
        catalogue=summary.catalogue,
        families=summary.families,
        sizes=context.sizes,
        config=config,
        ranks=context.ranks,
        unit_map=context.map,
        digests=digests,
        reused=context.reused,
        similar=context.similar.index(),
    )
    context.similar.write(root, context.target, context.previous.get("similar", ""))
    classes = search_index.write_all(root, inputs)
    wall = choose_wall(atlas, layers, SUFFIX[config.format])
    context.sharing.write_wall(wall, context.sizes.quality)
    home = Home.of(atlas, config, layers, summary.catalogue, wall)
    if config.copy_atlas:
        output.link(atlas.path, root / home.file)
    own_image = context.own_image
    own_image.write(root)
    version = digest_of([sorted(digests.items()), context.shared_digest, own_image.key])[:8]
    pages = Pages(root, config, summary.families, version, own_image.key)
    pages.write_static()
    for i, facts in enumerate(layers):
        before = layers[i - 1] if i > 0 else None
        after = layers[i + 1] if i + 1 < len(layers) else None
        pages.write_layer(home, facts, before, after, context.sizes)
    atlases = activation_atlas.ActivationAtlasFiles(root, atlas, summary.catalogue, config, context.sizes.quality)
    facets = FacetFiles(root, atlas, config, context.sizes.quality)
    for facts in layers:
        facets.write(facts)
        if facts.atlas is not None:
            atlases.write(facts)
            pages.write_activation_atlas(home, facts)
    pages.write_others(home, context.map is not None, classes, any(context.summary.wired_layers))
    if context.sharing.extent.pages:
        for facts in layers:
            for text in context.sharing.texts(facts, summary.catalogue):
                pages.write_unit(text, context.sharing.card_of(facts, text), facts, home)
    context.sharing.write_sitemap(pages.addresses)
    api.write_index(root, atlas, layers, summary.catalogue, config, bool(context.similar.key))


def _collect_layers(context: BuildContext, pool: workers.EncoderPool, progress: Callable[[int, int], None]) -> None:
    """Write the files that need a whole layer, as soon as all chunks of the layer are done."""
    layers = context.summary.layers
    done = context.reused_units
    for facts in layers:
        if facts.name not in context.reused and not facts.channels:
            _finish_layer(context, facts, [])
    results: dict[str, list[ChunkResult]] = {}
    for result in pool.results():
        chunk = result.chunk
        facts = layers[chunk.order]
        results.setdefault(facts.name, []).append(result)
        if sum(r.chunk.stop - r.chunk.start for r in results[facts.name]) == len(facts.channels):
            _finish_layer(context, facts, sorted(results.pop(facts.name), key=lambda r: r.chunk.start))
        done += chunk.stop - chunk.start
        progress(done, context.summary.units)


def _finish_layer(context: BuildContext, facts: LayerSummary, results: Sequence[ChunkResult]) -> None:
    """Write a layer's API file, its sheets of the smallest images in order of similarity, and its strip."""
    root, sizes, config = context.root, context.sizes, context.config
    records = [record for result in results for record in result.records]
    extent = context.sharing.extent
    addresses = api.Addresses(sizes, SUFFIX[config.format], extent.pages, extent.unit_cards)
    api.write_units(root, facts, records, context.digests[facts.name][:12], addresses)
    context.sharing.write_layer_card(facts, spaced(list(range(len(facts.channels))), TILES))
    media, suffix = f"media/{facts.slug}", SUFFIX[config.format]
    (root / media).mkdir(parents=True, exist_ok=True)
    (root / f"data/{facts.slug}").mkdir(parents=True, exist_ok=True)
    if not results:
        return
    quality = max(1, sizes.quality - QUALITY_STEP)
    tiny = np.concatenate([result.tiny for result in results])
    order = np.argsort(results[0].chunk.ranks)
    per_sheet, px = sizes.per_tiny, sizes.tiny_px
    for start in range(0, len(order), per_sheet):
        cells = [Image.fromarray(tiny[row]) for row in order[start : start + per_sheet]]
        image = sheet(cells, side(per_sheet), (px, px))
        write(root, f"{media}/b{start}.{suffix}", encode(image, config.format, quality))
    strip = {row: image for result in results for row, image in result.strip.items()}
    rows = results[0].chunk.strip
    cells = [Image.fromarray(strip[row]) if row in strip else None for row in rows]
    image = sheet(cells, max(1, len(rows)), (STRIP_PX, STRIP_PX))
    write(root, f"{media}/strip.{suffix}", encode(image, config.format, quality))


def _write_map_tiles(context: BuildContext) -> dict[str, str]:
    """Write the tiles of the map, when the small images of all layers are there; return their digests by file."""
    if context.map is None or not map_tiles.levels_for(len(context.map.places)):
        return {}
    sizes, config, suffix = context.sizes, context.config, SUFFIX[context.config.format]
    sources, cells, digests = [], [], []
    for facts, ranks in zip(context.summary.layers, context.ranks, strict=True):
        for rank in ranks.tolist():
            cell = rank % sizes.per_tiny
            sources.append(f"media/{facts.slug}/b{rank - cell}.{suffix}")
            cells.append(cell)
        digests += [context.digests[facts.name]] * len(ranks)
    images = map_tiles.MapImages(context.root, sources, cells, sizes.per_tiny, sizes.tiny_px, digests)
    before = context.target, context.previous.get("tiles", {})
    quality = max(1, sizes.quality - QUALITY_STEP)
    return map_tiles.write_tiles(images, context.map.places, before, config.format, quality)


def _write_state(context: BuildContext, inventory: Inventory, tiles: Mapping[str, str]) -> None:
    """Write what the next build compares itself with."""
    state = {
        "layers": context.digests,
        "photos": context.images_digest,
        "fits": [_inventory_digest(inventory, context.config), dataclasses.asdict(context.sizes)],
        "map": context.map and context.map.state(),
        "tiles": tiles,
        "own_image": context.own_image.key,
        "similar": context.similar.key,
    }
    write(context.root, BUILT, to_json(state))


def spaced(items: Sequence[int], count: int) -> list[int]:
    """Return at most `count` evenly spaced items, including the first and the last."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
