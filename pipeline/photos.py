"""Where photographs come from, and how each becomes the network's input.

A source lists its photographs once, in a fixed order: a photograph's number in that list is its identity in
the whole run. Reading happens later, in workers, from plain records.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from pipeline import bands
from pipeline.errors import AtlasError, nearest
from pipeline.recipes import INTERPOLATIONS, Recipe

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})

# A picture of more pixels than this is refused before it is decoded: a small file can unpack to gigabytes.
MAX_PIXELS = 100_000_000

RESAMPLE = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}

# Photographs in the wheels of scikit-image and scikit-learn (all free to use; see the packages' own notes).
# Left out: drawings, test charts, thumbnails, and the right half of the motorcycle stereo pair.
SAMPLES = {
    "skimage/data": (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
        "coins.png", "grass.png", "gravel.png", "horse.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
        "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}  # fmt: skip

# Crops of a sample: (share of the shorter side, rows, columns). One whole view, then closer and closer.
GRID = ((1.0, 1, 2), (0.6, 2, 3), (0.35, 3, 4))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which photographs: `samples` (in the installed packages) or `folder` (all images below `root`)."""

    source: str = "samples"
    root: str | None = None
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Photo:
    """One photograph: where to read it, which part, its label, and the picture it comes from.

    `path` is its stable identity and does not depend on where the dataset lies; `box` is (left, top, right,
    bottom) in pixels of the file. Photographs of one `source` never share a top list.
    """

    path: str
    label: str
    source: int
    box: tuple[int, int, int, int] | None = None

    @property
    def file(self) -> str:
        """The part of `path` that names a file."""
        return self.path if self.box is None else self.path.rpartition("#")[0]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A listed dataset: its photographs in order, and where they lie on this machine."""

    photos: tuple[Photo, ...]
    roots: dict[str, str]

    def locate(self, photo: Photo) -> Path:
        """The file of a photograph."""
        first, _, rest = photo.file.partition("/")
        return Path(self.roots[first], rest) if first in self.roots else Path(self.roots[""], photo.file)


def listing(config: DataConfig, channels: int = 3) -> Dataset:
    """The photographs of a source, in an order that is the same on every machine, for a network of `channels`.

    Raises `AtlasError` where there is no folder or no image in it.
    """
    if config.source not in LISTINGS:
        raise AtlasError(f"data.source={config.source!r} is unknown. {nearest(config.source, LISTINGS)}")
    if channels in (1, 3):
        dataset = LISTINGS[config.source](config)
    elif config.source == "folder":
        dataset = _folder(config, bands.SUFFIXES)
    else:
        raise AtlasError(
            f"The network takes {channels} channels, and photographs have 1 or 3. Give data=folder data.root=DIR with "
            f"files of {channels} bands ({', '.join(sorted(bands.SUFFIXES))})."
        )
    if config.limit is not None:
        dataset = dataclasses.replace(dataset, photos=dataset.photos[: config.limit])
    if not dataset.photos:
        raise AtlasError(
            f"data={config.source}: no image at all. Suffixes read: "
            f"{', '.join(sorted(SUFFIXES if channels in (1, 3) else bands.SUFFIXES))}."
        )
    return dataset


def _samples(config: DataConfig) -> Dataset:
    photos, roots = [], {}
    for source, (folder, name) in enumerate((f, n) for f, names in SAMPLES.items() for n in names):
        package, _, inside = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise AtlasError(f"data=samples needs the package {package}; install the project with scripts/atlas.")
        roots[package] = str(Path(spec.submodule_search_locations[0], inside))
        with Image.open(Path(roots[package], name)) as image:
            width, height = image.size
        for box in grid_boxes(width, height):
            path = f"{package}/{name}#{','.join(map(str, box))}"
            photos.append(Photo(path, Path(name).stem, source, box))
    return Dataset(tuple(photos), roots)


def grid_boxes(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Square crops of a picture in a fixed grid at several scales, (left, top, right, bottom)."""
    seen = set()
    for share, rows, columns in GRID:
        side = round(share * min(width, height))
        if height > width:
            rows, columns = columns, rows
        for row in range(rows):
            for column in range(columns):
                top = round((height - side) * (row / (rows - 1) if rows > 1 else 0.5))
                left = round((width - side) * (column / (columns - 1) if columns > 1 else 0.5))
                box = (left, top, left + side, top + side)
                if box not in seen:
                    seen.add(box)
                    yield box


def _folder(config: DataConfig, suffixes: frozenset[str] = SUFFIXES) -> Dataset:
    if not config.root:
        raise AtlasError("data=folder needs data.root=<folder with images>.")
    root = Path(config.root).expanduser().absolute()
    if not root.is_dir():
        raise AtlasError(f"data.root={config.root}: there is no such folder.")
    files = []
    walked: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        # A link may lead back up: every real folder is walked once.
        real = os.path.realpath(folder)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        folders.sort()
        files += [Path(folder, name) for name in names if Path(name).suffix.lower() in suffixes]
    # Sorted by the relative path as posix text, so that the order is the same on every file system.
    relative = sorted(path.relative_to(root).as_posix() for path in files)
    photos = [Photo(path, path.partition("/")[0] if "/" in path else "", i) for i, path in enumerate(relative)]
    return Dataset(tuple(photos), {"": str(root)})


LISTINGS: dict[str, Callable[[DataConfig], Dataset]] = {"samples": _samples, "folder": _folder}


def fingerprint(dataset: Dataset, recipe: Recipe) -> list[object]:
    """What identifies the pixels that a network sees: paths, labels, crops, file sizes and the input recipe."""
    sizes = {}
    for photo in dataset.photos:
        path = dataset.locate(photo)
        sizes[photo.file] = path.stat().st_size if path.exists() else -1
    photos = [[p.path, p.label, p.source, p.box, sizes[p.file]] for p in dataset.photos]
    return [photos, dataclasses.asdict(recipe)]


def read(path: Path, box: tuple[int, int, int, int] | None, channels: int) -> Image.Image | bands.Bands:
    """One picture, upright, in RGB (grey for a network of one channel, bands for one of neither one nor three).

    Raises OSError or ValueError with the reason where it can't be read whole.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    if channels not in (1, 3):
        stack = bands.read(path, channels)
        return stack if box is None else stack.crop(box)
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels are too many")
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
            # Pillow clips 16-bit grey when it converts; scale it instead.
            values = np.asarray(upright, np.float32)
            top = 65535.0 if values.max() > 255 else 255.0
            upright = Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            # Transparent pixels have no colour of their own: show them on white, as a page would.
            rgba = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        converted = upright.convert("L" if channels == 1 else "RGB")
    return converted if box is None else converted.crop(box)


def prepared(image: Image.Image | bands.Bands, recipe: Recipe) -> np.ndarray:
    """(C, H, W) uint8: the shorter side resized, the centre cropped, as torchvision's own evaluation does."""
    height, width = recipe.size
    scale = recipe.resize / min(image.size)
    if scale * max(image.size) > 65_000:
        raise ValueError(f"{image.width} × {image.height} is too long and thin")
    sides = [recipe.resize if s == min(image.size) else int(recipe.resize * s / min(image.size)) for s in image.size]
    resized = image.resize((sides[0], sides[1]), RESAMPLE[recipe.interpolation])
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    array = np.asarray(resized.crop((left, top, left + width, top + height)))
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def load(dataset: Dataset, indices: Iterable[int], recipe: Recipe, threads: int = 2) -> Iterator[
    tuple[int, np.ndarray | None, str]
]:  # fmt: skip
    """(index, (C, H, W) uint8 or None, reason) of each photograph, in the order asked for.

    Pictures are decoded a few ahead, in threads (Pillow lets go of the interpreter while it decodes).
    """

    def one(index: int) -> tuple[int, np.ndarray | None, str]:
        photo = dataset.photos[index]
        try:
            image = read(dataset.locate(photo), photo.box, recipe.channels)
            return index, prepared(image, recipe), ""
        except Exception as error:
            # Decoders raise almost anything on broken files; one of them must not end the pass.
            return index, None, f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(threads) as pool:
        ahead: list = []
        for index in indices:
            ahead.append(pool.submit(one, index))
            if len(ahead) > 4 * threads:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


def batches(
    loaded: Iterable[tuple[int, np.ndarray | None, str]], size: int, failed: list[tuple[int, str]]
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """Batches of at most `size` readable photographs, (indices, (B, C, H, W) uint8); the others go to `failed`."""
    indices: list[int] = []
    arrays: list[np.ndarray] = []
    for index, array, reason in loaded:
        if array is None:
            failed.append((index, reason))
            continue
        indices.append(index)
        arrays.append(array)
        if len(indices) == size:
            yield indices, np.stack(arrays)
            indices, arrays = [], []
    if indices:
        yield indices, np.stack(arrays)
