"""Pictures of contenders as sheets of one file, and how unlike they are; each picture is read once."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.compare import image_distance
from pipeline.compare.alignment import Part, views
from pipeline.compare.runs import RunComparison
from pipeline.data.multiband import visible
from pipeline.site.config import SiteConfig
from pipeline.site.media.chunks import SUFFIX
from pipeline.site.media.size_budget import CHUNK, MARGIN, Sizes, divisor, encode, levels
from pipeline.site.media.sprites import sheet, shrunk, side, square
from pipeline.site.output import write

_SAMPLE = 12


@dataclasses.dataclass(frozen=True)
class Shape:
    """Pictures of one contender in one layer: `variants` of a unit, (height, width) in pixels as stored."""

    variants: int
    height: int
    width: int

    def sheet(self, sizes: Sizes) -> tuple[int, int, int, int, int]:
        """(units a sheet, variants, columns, width, height) of its sheets."""
        height, width = sizes.picture(self.height, self.width)
        per = sizes.per_picture(height, width, self.variants)
        return per, self.variants, side(per * self.variants), width, height


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What came of a layer beside its files: how unlike each unit's pictures are, (C,), and a digest of the files."""

    difference: np.ndarray
    digest: str


def shapes(contest: RunComparison, layer: str) -> list[Shape | None]:
    """The shape of each contender's pictures of a layer, None where it has none."""
    found: list[Shape | None] = []
    for view, contender in zip(views(contest, layer), contest.contenders, strict=True):
        if view is None:
            found.append(None)
        else:
            _, variants, height, width, _ = view.pictures(contender.preset).shape
            found.append(Shape(variants, height, width))
    return found


def per_thumb(sizes: Sizes, contenders: int) -> int:
    """Units in a sheet of small pictures, which has all contenders' of a unit beside each other."""
    return divisor(2 * sizes.per_thumb // contenders)


def choose(contest: RunComparison, parts: Sequence[Part], config: SiteConfig) -> Sizes:
    """The best sizes with which the pictures fit into `max_files` and `max_bytes`; the smallest if none does."""
    known = [(len(part.channels), shapes(contest, part.name)) for part in parts]
    sample = _sample(contest, parts)
    sizes = levels(config)[0]
    for level in levels(config):
        for spread in (1, 2, 3, 4, 6, 8, 12, 24):
            sizes = dataclasses.replace(level, spread=spread)
            if _files(sizes, known, len(contest.contenders)) <= config.max_files:
                break
        if _bytes(sizes, known, sample, config) <= MARGIN * config.max_bytes:
            break
    return sizes


def draw(root: Path, contest: RunComparison, part: Part, slug: str, sizes: Sizes, config: SiteConfig) -> Drawn:
    """Write the sheets of one layer below `root`: `p<contender>-<row>` of pictures, `a<row>` of small ones of all
    contenders, `b<row>` of the smallest ones of the first that has one.
    """  # fmt: skip
    found, forms = views(contest, part.name), shapes(contest, part.name)
    digest = hashlib.sha256()
    count, units = len(found), len(part.channels)
    features = np.full((count, units, image_distance.FEATURES), np.nan)

    def save(cells: Sequence[Image.Image | None], columns: int, size: tuple[int, int], name: str) -> None:
        content = encode(sheet(cells, columns, size), config.format, sizes.quality)
        digest.update(content)
        write(root, f"media/{slug}/{name}.{SUFFIX[config.format]}", content)

    for first in range(0, units, CHUNK):
        last = min(first + CHUNK, units)
        thumbs: list[list[Image.Image | None]] = [[None] * count for _ in range(first, last)]
        for at, (view, form, contender) in enumerate(zip(found, forms, contest.contenders, strict=True)):
            if view is None or form is None:
                continue
            per, variants, columns, width, height = form.sheet(sizes)
            images, status = view.pictures(contender.preset), view.numbers(contender.preset)["status"]
            rows = {int(c): i for i, c in enumerate(view.channels)}
            for start in range(first, last, per):
                stop = min(start + per, last)
                cells: list[Image.Image | None] = []
                for place in range(start, stop):
                    row = rows.get(int(part.channels[place]))
                    shown = [] if row is None else [v for v in range(variants) if status[row, v] != "missing"]
                    own = {v: shrunk(images[row, v], height, width) for v in shown}
                    cells += [own.get(v) for v in range(variants)]
                    if own:
                        thumbs[place - first][at] = square(own[shown[0]], sizes.thumb_px)
                        features[at, place] = np.mean([image_distance.features(image) for image in own.values()], 0)
                save(cells, columns, (width, height), f"p{at}-{start}")
        per, px = per_thumb(sizes, count), sizes.thumb_px
        for start in range(first, last, per):
            cells = [cell for row in thumbs[start - first : start - first + per] for cell in row]
            save(cells, side(per * count), (px, px), f"a{start}")
        per, px = sizes.per_tiny, sizes.tiny_px
        for start in range(first, last, per):
            some = [next(filter(None, row), None) for row in thumbs[start - first : start - first + per]]
            save([one and square(one, px) for one in some], side(per), (px, px), f"b{start}")
    return Drawn(image_distance.difference(features), digest.hexdigest())


def _files(sizes: Sizes, known: Sequence[tuple[int, Sequence[Shape | None]]], contenders: int) -> int:
    """Files of the whole site."""
    total = 40 + 2 * len(known)
    for units, forms in known:
        groups = [per_thumb(sizes, contenders), sizes.per_tiny, sizes.per_shard]
        groups += [form.sheet(sizes)[0] for form in forms if form is not None]
        total += sum(math.ceil(units / per) for per in groups)
    return total


def _sample(contest: RunComparison, parts: Sequence[Part]) -> list[Image.Image]:
    """A few pictures, spread over layers and contenders."""
    found = []
    places = [(part, at) for part in parts for at in range(len(contest.contenders)) if part.there[at].any()]
    for i in range(_SAMPLE if places else 0):
        part, at = places[i * len(places) // _SAMPLE]
        view = views(contest, part.name)[at]
        if view is not None and len(view.channels):
            row = (i * 7) % len(view.channels)
            found.append(visible(view.pictures(contest.contenders[at].preset)[row, 0]).convert("RGB"))
    return found


def _bytes(
    sizes: Sizes, known: Sequence[tuple[int, Sequence[Shape | None]]], sample: Sequence[Image.Image], config: SiteConfig
) -> float:
    """What the site will weigh, by what a few pictures weigh."""
    content, pixels = 0, 0
    for image in sample:
        height, width = sizes.picture(image.height, image.width)
        content += len(encode(image.resize((width, height)), config.format, sizes.quality))
        pixels += height * width
    density = content / pixels if pixels else 0.0
    total = 1e6
    for units, forms in known:
        for form in filter(None, forms):
            height, width = sizes.picture(form.height, form.width)
            total += units * (density * (form.variants * height * width + 2 * sizes.thumb_px**2) + 600)
    return total
