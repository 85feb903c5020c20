"""From a file to the network's input: decode, turn upright, resize, crop. One bad file ends nothing."""

import dataclasses
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from pipeline import bands
from pipeline.datasets import Dataset
from pipeline.recipes import INTERPOLATIONS, Recipe

# A picture of more pixels than this is refused before it is decoded: a small file can unpack to gigabytes.
MAX_PIXELS = 64_000_000

# Pictures of more pixels than this are decoded one at a time, however many threads there are.
LARGE = 8_000_000
_one_large = threading.Lock()

RESAMPLE = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A photograph as the network's input, (C, H, W) uint8, or None and the reason; `extra` as `load` was asked."""

    index: int
    array: np.ndarray | None
    reason: str = ""
    extra: Any = None


def read(file: Path | io.BytesIO, channels: int) -> Image.Image | bands.Bands:
    """One whole picture, upright, in RGB (grey for a network of one channel, bands for one of neither one nor three).

    Raises OSError or ValueError with the reason where it can't be read whole.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    if channels not in (1, 3):
        if not isinstance(file, Path):
            raise ValueError("bands are read from files only")
        return bands.read(file, channels)
    with Image.open(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"too large: {image.width} × {image.height} pixels")
        if image.width * image.height > LARGE:
            with _one_large:
                return _upright(image, channels)
        return _upright(image, channels)


def _upright(image: Image.Image, channels: int) -> Image.Image:
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
    return upright.convert("L" if channels == 1 else "RGB")


def input_box(
    size: tuple[int, int], box: tuple[int, int, int, int] | None, recipe: Recipe
) -> tuple[tuple[int, int], tuple[int, int], tuple[float, float, float, float]]:
    """How a picture of `size` (width, height), or its part `box`, becomes the input.

    Returns the size it is resized to, the left and top of the crop there, and the crop's (left, top, right, bottom)
    in pixels of the whole picture, beyond whose edges it may reach. Raises ValueError where it is too long and thin.
    """
    left, top, right, bottom = box or (0, 0, *size)
    own = (right - left, bottom - top)
    scale = recipe.resize / min(own)
    if scale * max(own) > 65_000:
        raise ValueError(f"too long and thin: {own[0]} × {own[1]} pixels")
    width, height = (recipe.resize if s == min(own) else int(recipe.resize * s / min(own)) for s in own)
    x, y = round((width - recipe.size[1]) / 2), round((height - recipe.size[0]) / 2)
    across, down = own[0] / width, own[1] / height
    whole = (left + x * across, top + y * down, left + (x + recipe.size[1]) * across, top + (y + recipe.size[0]) * down)
    return (width, height), (x, y), whole


def prepared(
    image: Image.Image | bands.Bands, recipe: Recipe, box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """(C, H, W) uint8: the shorter side resized, the centre cropped, as torchvision's own evaluation does."""
    height, width = recipe.size
    sides, (left, top), _ = input_box(image.size, box, recipe)
    part = image if box is None else image.crop(box)
    resized = part.resize(sides, RESAMPLE[recipe.interpolation])
    array = np.asarray(resized.crop((left, top, left + width, top + height)))
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def why(error: Exception) -> str:
    """The reason why a picture was not read: a kind that can be counted, then a detail."""
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return "missing, or a broken link"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"too large: {text}"
    if any(word in text.lower() for word in ("truncated", "broken data stream", "unexpected end", "eof")):
        return f"cut off: {text}"
    if isinstance(error, ValueError) and text.partition(":")[0] in ("too large", "too long and thin", "an empty cell"):
        return text
    return f"unreadable: {type(error).__name__}: {text}"


def load(
    dataset: Dataset,
    indices: Iterable[int],
    recipe: Recipe,
    threads: int = 2,
    also: Callable[[int, Image.Image | bands.Bands], Any] | None = None,
) -> Iterator[Loaded]:
    """Each photograph as the network's input, in the order asked for; the unreadable ones with the reason.

    Pictures are decoded a few ahead, in threads (Pillow lets go of the interpreter while it decodes). `also` is
    called in the thread with the index and the whole picture, and gives `extra`.
    """

    def one(index: int) -> Loaded:
        photo = dataset.photos[index]
        try:
            file = dataset.open(photo)
            if (file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())) == 0:
                return Loaded(index, None, "empty file")
            image = read(file, recipe.channels)
            return Loaded(index, prepared(image, recipe, photo.box), extra=also and also(index, image))
        except Exception as error:
            # Decoders raise almost anything on broken files; one of them must not end the pass.
            return Loaded(index, None, why(error))

    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Future[Loaded]] = []
        for index in indices:
            ahead.append(pool.submit(one, index))
            if len(ahead) > 4 * threads:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


def batches(
    loaded: Iterable[Loaded], size: int, failed: list[tuple[int, str]]
) -> Iterator[tuple[Sequence[Loaded], np.ndarray]]:
    """Batches of at most `size` readable photographs, with their (B, C, H, W) uint8; the others go to `failed`."""
    batch: list[Loaded] = []
    for item in loaded:
        if item.array is None:
            failed.append((item.index, item.reason))
            continue
        batch.append(item)
        if len(batch) == size:
            yield batch, np.stack([i.array for i in batch if i.array is not None])
            batch = []
    if batch:
        yield batch, np.stack([i.array for i in batch if i.array is not None])
