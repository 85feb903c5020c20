"""Dataset examples in a comparison: the images with the highest activations of each unit, as the atlases have them."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.compare.alignment import Part
from pipeline.compare.runs import RunComparison
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Catalogue
from pipeline.site.data.js_shards import shortest_decimals
from pipeline.site.media.chunks import SUFFIX
from pipeline.site.media.photo_crops import DatasetImages, ExamplePlace
from pipeline.site.media.size_budget import Sizes, encode
from pipeline.site.media.sprites import sheet, side
from pipeline.site.output import write
from pipeline.store.layer_view import Examples
from pipeline.store.reader import Atlas

# Examples per unit at most, and bytes of a pixel of their crops, about.
SHOWN = 6
BYTES_PER_PIXEL = 0.3


@dataclasses.dataclass(frozen=True)
class ExampleGroup:
    """Runs that have the same dataset examples in a layer.

    Attributes:
        atlas: The atlas of the first of them.
        runs: Their names.
        count: Number of examples per unit.
    """

    atlas: Atlas
    runs: tuple[str, ...]
    count: int


def groups_of(inputs: RunComparison, layer: str, config: SiteConfig) -> list[ExampleGroup]:
    """Return the runs that have dataset examples of a layer; those with the same ones are one group."""
    runs = {id(atlas): contender.run for atlas, contender in zip(inputs.atlases, inputs.contenders, strict=True)}
    atlases = {id(atlas): atlas for atlas in inputs.atlases if layer in atlas.layers}.values()
    groups: list[ExampleGroup] = []
    tables: list[dict[int, bytes]] = []
    # Those with the most channels first, because a run with fewer ones can have the same examples of them.
    for atlas in sorted(atlases, key=lambda atlas: -len(atlas[layer].channels)):
        found = atlas[layer].examples("max")
        count = 0 if found is None else min(SHOWN, config.examples, found.index.shape[1])
        if found is None or not count:
            continue
        arrays = [array[:, :count] for array in (found.index, found.y, found.x, found.value)]
        rows = enumerate(atlas[layer].channels.tolist())
        table = {channel: b"".join(array[row].tobytes() for array in arrays) for row, channel in rows}
        same = next((i for i, other in enumerate(tables) if table.items() <= other.items()), None)
        if same is None:
            groups.append(ExampleGroup(atlas, (runs[id(atlas)],), count))
            tables.append(table)
        else:
            groups[same] = dataclasses.replace(groups[same], runs=(*groups[same].runs, runs[id(atlas)]))
    return groups


@dataclasses.dataclass(frozen=True)
class LayerExamples:
    """What the pages of a layer's units show of the dataset.

    Attributes:
        groups: For each group its runs, and its sheets: (units per sheet, examples per unit, columns, side in pixels),
            None if no image may be shown.
        records: For each group the examples of each unit, by channel: activation, and label or path.
        digest: Digest of the files.
    """

    groups: list[dict[str, Any]]
    records: list[Mapping[int, list[list[Any]]]]
    digest: str


def write_examples(
    root: Path, inputs: RunComparison, part: Part, slug: str, sizes: Sizes, config: SiteConfig
) -> LayerExamples:
    """Write the sheets of crops `x<group>-<row>` of a layer to `media/<slug>` below `root`."""
    groups: list[dict[str, Any]] = []
    records: list[Mapping[int, list[list[Any]]]] = []
    digest = hashlib.sha256()
    for number, group in enumerate(groups_of(inputs, part.name, config)):
        view, catalogue = group.atlas[part.name], Catalogue.of(group.atlas)
        found = view.examples("max")
        assert found is not None
        is_shown = config.licence != "ids" and group.atlas.examples_store != "ids"
        per_sheet, px = sizes.per_crops(group.count), sizes.example_px
        shape = [per_sheet, group.count, side(per_sheet * group.count), px] if is_shown else None
        groups.append({"runs": list(group.runs), "sheet": shape})
        values = shortest_decimals(found.value[:, : group.count])
        names = [label or path for label, path in zip(catalogue.labels, catalogue.paths, strict=True)]
        by_channel: dict[int, list[list[Any]]] = {}
        for row, channel in enumerate(view.channels.tolist()):
            indices = found.index[row, : group.count].tolist()
            by_channel[channel] = [[values[row][k], names[i]] for k, i in enumerate(indices) if i >= 0]
        records.append(by_channel)
        if not is_shown:
            continue
        images = DatasetImages(group.atlas, px, config.licence == "blur")
        rows = {int(channel): row for row, channel in enumerate(view.channels)}
        for start in range(0, len(part.channels), per_sheet):
            cells: list[Image.Image | None] = []
            for channel in part.channels[start : start + per_sheet].tolist():
                crops: list[Image.Image | None] = []
                for place in _places(found, rows.get(channel), group.count):
                    crop = images.crop(view, place)
                    crops.append(crop and images.blurred(crop))
                cells += [*crops, *[None] * (group.count - len(crops))]
            image = sheet(cells, side(per_sheet * group.count), (px, px))
            content = encode(image, config.photo_format, sizes.quality)
            digest.update(content)
            write(root, f"media/{slug}/x{number}-{start}.{SUFFIX[config.photo_format]}", content)
    return LayerExamples(groups, records, digest.hexdigest())


def _places(found: Examples, row: int | None, count: int) -> Sequence[ExamplePlace]:
    """Return the examples of a unit; none if the atlas lacks it."""
    if row is None:
        return ()
    arrays = (found.index, found.y, found.x, found.map, found.crop)
    places = [ExamplePlace(*place) for place in zip(*(array[row, :count].tolist() for array in arrays), strict=True)]
    return [place for place in places if place.index >= 0]
