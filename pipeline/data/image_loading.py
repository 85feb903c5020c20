"""From a file to the network's input: decode, turn upright, resize, crop. One bad file ends nothing."""

import contextlib
import dataclasses
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from pipeline.data import image_formats, multiband
from pipeline.data.datasets import MAX_PIXELS, Dataset
from pipeline.models.config import INTERPOLATIONS, Preprocessing

RESAMPLE = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}

# What reasons for not reading a picture begin with, so that they can be counted.
KINDS = (
    "too large", "too long and thin", "an empty cell", "unsupported values", "no decoder", "outside the dataset",
)  # fmt: skip

# Tags of TIFF files.
BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR_CONFIGURATION, SAMPLE_FORMAT = 258, 262, 284, 339


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A photograph as the network's input, (C, H, W), or None and the reason; `extra` as `load` was asked.

    Values are levels from 0 to 255: uint8, or float32 where the file has more than 8 bits.
    """

    index: int
    array: np.ndarray | None
    reason: str = ""
    extra: Any = None


class _PillowSettings:
    """Pillow's settings while pictures are read: they belong to the process, and other code may have set them.

    A truncated file is always an error: it must not enter the statistics as a whole one. Pillow's own limit of pixels
    is off, since `read` checks `data.max_pixels` before it decodes. The last thread to leave restores both.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._before: tuple[bool, int | None] = (False, None)

    def __enter__(self) -> None:
        with self._lock:
            if not self._readers:
                self._before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
            self._readers += 1
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = self._before


_settings = _PillowSettings()


def read(file: Path | io.BytesIO, channels: int, limit: int | None = MAX_PIXELS) -> Image.Image | multiband.Bands:
    """One whole picture, upright, in RGB (grey for a network of one channel, bands for one of neither one nor three).

    Pictures of more than 8 bits are bands as well, one or three. Raises OSError or ValueError with the reason where
    it can't be read whole, or has more pixels than `limit`.
    """
    if channels not in (1, 3):
        if not isinstance(file, Path):
            raise ValueError("bands are read from files only")
        return multiband.read(file, channels, limit)
    opened: contextlib.AbstractContextManager[IO[bytes]] = (
        file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file)
    )
    with _settings, opened as handle:
        found = image_formats.check(handle.read(image_formats.HEAD))
        handle.seek(0)
        try:
            image = Image.open(handle)
        except UnidentifiedImageError:
            if found is not image_formats.TIFF:
                raise
            handle.seek(0)
            return multiband.from_tiff(handle, channels, limit)
        if _is_misread(image):
            handle.seek(0)
            return multiband.from_tiff(handle, channels, limit)
        with image, multiband.decoding(image.width, image.height, limit):
            return _upright(image, channels)


def _is_misread(image: Image.Image) -> bool:
    """Whether Pillow takes the two bytes of a value for two values: it does in TIFFs of one plane for each channel."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    return tags.get(PLANAR_CONFIGURATION) == 2 and max(tags.get(BITS_PER_SAMPLE, (8,))) > 8


def _upright(image: Image.Image, channels: int) -> Image.Image | multiband.Bands:
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    # Pillow gives signed bytes as unsigned ones.
    if deep or (image.mode == "L" and tags.get(SAMPLE_FORMAT, (1,))[0] == 2):
        return multiband.Bands.of(_levels(image, tags)[..., None], channels)
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("La", "RGBa"):
        upright = upright.convert("LA" if upright.mode == "La" else "RGBA")
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        # Transparent pixels have no colour of their own: show them on white, as a page would.
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return upright.convert("L" if channels == 1 else "RGB")


def _levels(image: Image.Image, tags: Any) -> np.ndarray:
    """A grey picture of integers or floats as levels, upright; `tags` are those of a TIFF.

    The type is the file's. Pillow's mode does not tell it: "I" (int32) holds unsigned integers of 16 bits, signed ones
    of 16 and 32 bits and, wrapped to negative ones, unsigned integers of 32 bits.
    """
    values = np.asarray(ImageOps.exif_transpose(image))
    top = None
    if image.mode != "F":
        bits, signed = (32, True) if image.mode == "I" else (16, False)
        if image.format in ("PNG", "PPM"):
            bits, signed = 16, False
        if tags:
            bits, signed = int(tags.get(BITS_PER_SAMPLE, (bits,))[0]), tags.get(SAMPLE_FORMAT, (1,))[0] == 2
        if bits == 32 and not signed:
            values = values.view(np.uint32)
        if bits == 8 and signed:
            values = values.view(np.int8)
        top = 2 ** (bits - signed) - 1
    found = multiband.levels(values, top)
    # Pillow turns 8-bit pictures round where 0 is white, and no others.
    return 255 - found if tags.get(PHOTOMETRIC) == 0 else found


def input_box(
    size: tuple[int, int], box: tuple[int, int, int, int] | None, recipe: Preprocessing
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
    image: Image.Image | multiband.Bands, recipe: Preprocessing, box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """(C, H, W) levels: the shorter side resized, the centre cropped, as torchvision's own evaluation does."""
    height, width = recipe.size
    sides, (left, top), _ = input_box(image.size, box, recipe)
    part = image if box is None else image.crop(box)
    resized = part.resize(sides, RESAMPLE[recipe.interpolation])
    array = np.asarray(resized.crop((left, top, left + width, top + height)))
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def why(error: Exception) -> str:
    """The reason why a picture was not read: a kind that can be counted, then a detail."""
    text = str(error)
    if isinstance(error, ValueError) and text.partition(":")[0] in KINDS:
        return text
    if isinstance(error, FileNotFoundError):
        return "missing, or a broken link"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if any(word in text.lower() for word in ("truncated", "broken data stream", "unexpected end", "eof")):
        return f"cut off: {text}"
    return f"unreadable: {type(error).__name__}: {text}"


def load(
    dataset: Dataset,
    indices: Iterable[int],
    recipe: Preprocessing,
    threads: int = 2,
    also: Callable[[int, Image.Image | multiband.Bands], Any] | None = None,
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
            with _settings:
                image = read(file, recipe.channels, dataset.max_pixels)
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
    """Batches of at most `size` readable photographs, with their (B, C, H, W) levels; the others go to `failed`."""
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
