"""From image files to network inputs: decode, rotate upright, resize, crop.

Broken files are reported, not raised. Errors of the storage are raised, after some pauses and attempts.
"""

import contextlib
import dataclasses
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from pipeline.core.errors import AtlasError
from pipeline.data import image_formats, multiband
from pipeline.data.config import MAX_PIXELS
from pipeline.data.datasets import Dataset
from pipeline.data.readers.base import MISSING, DatasetImage
from pipeline.data.storage_errors import StorageError, is_storage_error, names_storage_error
from pipeline.models.config import INTERPOLATIONS, Preprocessing

RESAMPLE = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}

# The ValueErrors of the readers begin with one of these reasons, by which failures can be counted.
REASONS = (
    "too large",
    "too long and thin",
    "an empty cell",
    "unsupported values",
    "no decoder",
    "outside the dataset",
    MISSING,
)

# This reason is recorded, but tried again by the next run if the file is readable then.
NO_PERMISSION = "no permission"

# Seconds before a second and a third attempt to read an image after an error of the storage.
RETRY_PAUSES = (1.0, 5.0)

# Resized sides beyond this are refused (`input_box`).
MAX_SIDE = 65_000

# Tags of TIFF files.
BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR_CONFIGURATION, SAMPLE_FORMAT = 258, 262, 284, 339


@dataclasses.dataclass(frozen=True)
class Loaded:
    """One dataset image after loading.

    Attributes:
        index: Number of the image in the dataset.
        array: Network input (C, H, W), levels from 0 to 255: uint8, or float32 if the file has more than 8 bits per
            channel. None if the image could not be read.
        reason: Why the image could not be read; "" if it could.
        extra: Return value of the `extra` function of `load`.
    """

    index: int
    array: np.ndarray | None
    reason: str = ""
    extra: Any = None


class _PillowSettings:
    """Context manager for Pillow's global settings while images are decoded, in any number of threads.

    Truncated files are always errors: they must not enter the statistics as if they were complete. Pillow's own pixel
    limit is off, because `data.max_pixels` is checked before decoding. The settings are global and other code may have
    changed them, so that the last thread to leave restores the values that the first one found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._saved: tuple[bool, int | None] = (False, None)

    def __enter__(self) -> None:
        with self._lock:
            if not self._readers:
                self._saved = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
            self._readers += 1
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = self._saved


_pillow_settings = _PillowSettings()


def read_image(
    file: Path | io.BytesIO, channels: int, max_pixels: int | None = MAX_PIXELS
) -> Image.Image | multiband.Bands:
    """Decode a whole image, upright.

    Args:
        file: Path or content of an image file.
        channels: Input channels of the network: 1 reads in gray, 3 in RGB, any other number reads as many bands.
        max_pixels: Images with more pixels are not decoded; None sets no limit.

    Returns:
        A Pillow image in mode "L" or "RGB"; `Bands` for other numbers of channels and for more than 8 bits.

    Raises:
        OSError: If the file can't be decoded completely.
        ValueError: If the image is too large, or its values are not supported.
    """
    if channels not in (1, 3):
        if not isinstance(file, Path):
            raise ValueError("bands are read from files only")
        return multiband.read_bands(file, channels, max_pixels)
    opened: contextlib.AbstractContextManager[IO[bytes]] = (
        file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file)
    )
    with _pillow_settings, opened as handle:
        image_format = image_formats.identify_decodable(handle.read(image_formats.HEAD))
        handle.seek(0)
        try:
            image = Image.open(handle)
        except UnidentifiedImageError:
            if image_format is not image_formats.TIFF:
                raise
            handle.seek(0)
            return multiband.read_tiff(handle, channels, max_pixels)
        if _is_misread(image):
            handle.seek(0)
            return multiband.read_tiff(handle, channels, max_pixels)
        with image, multiband.decoding(image.width, image.height, max_pixels):
            return _decode(image, channels)


def _tiff_tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _is_misread(image: Image.Image) -> bool:
    """Return whether Pillow misreads a TIFF: with planar channels of 16 bits it takes each byte for a value."""
    tags = _tiff_tags(image)
    return tags.get(PLANAR_CONFIGURATION) == 2 and max(tags.get(BITS_PER_SAMPLE, (8,))) > 8


def _decode(image: Image.Image, channels: int) -> Image.Image | multiband.Bands:
    """Decode an opened image of 1 or 3 channels, upright."""
    tags = _tiff_tags(image)
    more_than_8_bits = image.mode in ("I", "F") or image.mode.startswith("I;16")
    # Pillow returns signed bytes as unsigned ones.
    if more_than_8_bits or (image.mode == "L" and tags.get(SAMPLE_FORMAT, (1,))[0] == 2):
        return multiband.Bands.of(_gray_levels(image, tags)[..., None], channels)
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("La", "RGBa"):
        upright = upright.convert("LA" if upright.mode == "La" else "RGBA")
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        # The color of transparent pixels is undefined: composite on white, as a web page would.
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return upright.convert("L" if channels == 1 else "RGB")


def _gray_levels(image: Image.Image, tags: Any) -> np.ndarray:
    """Return a gray image of integers or floats as levels, upright; `tags` are the tags of a TIFF.

    Values are scaled by the type in the file, which Pillow's mode does not determine: "I" (int32) holds unsigned
    integers of 16 bits, signed integers of 16 and 32 bits, and unsigned integers of 32 bits wrapped to negative values.
    """
    values = np.asarray(ImageOps.exif_transpose(image))
    max_value = None
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
        max_value = 2 ** (bits - signed) - 1
    levels = multiband.to_levels(values, max_value)
    # Pillow inverts 8-bit images in which 0 is white, but no others.
    return 255 - levels if tags.get(PHOTOMETRIC) == 0 else levels


def input_box(
    size: tuple[int, int], box: tuple[int, int, int, int] | None, recipe: Preprocessing
) -> tuple[tuple[int, int], tuple[int, int], tuple[float, float, float, float]]:
    """Return the geometry of resizing and center crop.

    Args:
        size: (width, height) of the image.
        box: Region to use, (left, top, right, bottom); None for the whole image.
        recipe: Preprocessing of the network.

    Returns:
        The (width, height) to resize the region to, the (left, top) of the crop in the resized region, and the crop as
        (left, top, right, bottom) in pixels of the whole image, which may extend beyond its edges.

    Raises:
        ValueError: If the resized image would be longer than `MAX_SIDE`.
    """
    left, top, right, bottom = box or (0, 0, *size)
    region = (right - left, bottom - top)
    shorter = min(region)
    if recipe.resize / shorter * max(region) > MAX_SIDE:
        raise ValueError(f"too long and thin: {region[0]} × {region[1]} pixels")
    width, height = (recipe.resize if side == shorter else int(recipe.resize * side / shorter) for side in region)
    x, y = round((width - recipe.size[1]) / 2), round((height - recipe.size[0]) / 2)
    scale_x, scale_y = region[0] / width, region[1] / height
    crop = (
        left + x * scale_x,
        top + y * scale_y,
        left + (x + recipe.size[1]) * scale_x,
        top + (y + recipe.size[0]) * scale_y,
    )
    return (width, height), (x, y), crop


def preprocess(
    image: Image.Image | multiband.Bands, recipe: Preprocessing, box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Resize the shorter side and crop the center, as torchvision's `Resize` and `CenterCrop`.

    Args:
        image: Decoded image.
        recipe: Preprocessing of the network.
        box: Region to use, (left, top, right, bottom); None for the whole image.

    Returns:
        Levels from 0 to 255, (C, H, W).
    """
    height, width = recipe.size
    resized_size, (left, top), _ = input_box(image.size, box, recipe)
    region = image if box is None else image.crop(box)
    resized = region.resize(resized_size, RESAMPLE[recipe.interpolation])
    array = np.asarray(resized.crop((left, top, left + width, top + height)))
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def failure_reason(error: Exception) -> str:
    """Return why an image could not be read: a reason by which failures can be counted, then details."""
    text = str(error)
    if isinstance(error, ValueError) and text.partition(":")[0] in REASONS:
        return text
    if isinstance(error, PermissionError):
        return f"{NO_PERMISSION}: {error.strerror}"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if any(word in text.lower() for word in ("truncated", "broken data stream", "unexpected end", "eof")):
        return f"cut off: {text}"
    return f"unreadable: {type(error).__name__}: {text}"


def load_images(
    dataset: Dataset,
    indices: Iterable[int],
    recipe: Preprocessing,
    threads: int = 2,
    extra: Callable[[int, Image.Image | multiband.Bands], Any] | None = None,
) -> Iterator[Loaded]:
    """Load dataset images as network inputs, in the given order.

    Images are decoded ahead in a thread pool; Pillow releases the GIL while it decodes.

    Args:
        dataset: Dataset that contains the images.
        indices: Numbers of the images.
        recipe: Preprocessing of the network.
        threads: Number of decoding threads.
        extra: Called in the decoding thread with the number and the whole image; its result becomes `Loaded.extra`.

    Yields:
        One `Loaded` per index. Images that can't be read have a reason and no array.

    Raises:
        StorageError: If an image can't be read because of its storage, in several attempts.
    """
    closed = threading.Event()

    def load_one(index: int) -> Loaded:
        photo = dataset.images[index]
        known = dataset.unreadable.get(photo.source_path)
        if known is not None:
            return Loaded(index, None, known)
        # A file that the driver should have sent does not appear later.
        pauses = () if dataset.copied else RETRY_PAUSES
        for pause in (*pauses, None):
            try:
                return _loaded(dataset, index, recipe, extra)
            except OSError as error:
                if pause is None or closed.wait(pause):
                    raise StorageError(f"{photo.path!r} could not be read because of its storage: {error}") from error
        raise AssertionError("not reached")

    with ThreadPoolExecutor(threads) as pool:
        pending: list[Future[Loaded]] = []
        try:
            for index in indices:
                pending.append(pool.submit(load_one, index))
                if len(pending) > 4 * threads:
                    yield pending.pop(0).result()
            for future in pending:
                yield future.result()
        finally:
            closed.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _loaded(
    dataset: Dataset,
    index: int,
    recipe: Preprocessing,
    extra: Callable[[int, Image.Image | multiband.Bands], Any] | None,
) -> Loaded:
    """Load one image; the arguments are those of `load_images`.

    Raises:
        OSError: If the storage fails. Other errors are returned as the reason.
    """
    photo = dataset.images[index]
    try:
        file = dataset.open(photo)
        size = file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())
        if size == 0:
            return Loaded(index, None, "empty file")
        _check_unchanged(dataset, photo, size)
        dataset.check_size(size)
        with _pillow_settings:
            image = read_image(file, recipe.channels, dataset.max_pixels)
            return Loaded(index, preprocess(image, recipe, photo.box), extra=extra and extra(index, image))
    except AtlasError:
        raise
    except Exception as error:
        # A file that was listed has vanished: broken links are known from the listing.
        if is_storage_error(error) or isinstance(error, FileNotFoundError):
            raise
        # Decoders raise almost any exception on broken files; one such file must not end the pass.
        return Loaded(index, None, failure_reason(error))


def _check_unchanged(dataset: Dataset, photo: DatasetImage, size: int) -> None:
    """Check that a file still has the size with which it was listed: results belong to the listed dataset.

    Raises:
        AtlasError: If it has another size.
    """
    is_listed = photo.position is None and not dataset.copied and photo.size is not None and photo.size >= 0
    if is_listed and size != photo.size:
        raise AtlasError(
            f"{dataset.locate(photo)} has {size:,} bytes, and had {photo.size:,} when the dataset was listed. If it "
            "was changed on purpose, give the same command with data.relist=true; the dataset pass then begins anew."
        )


def encoded_images(dataset: Dataset, indices: Iterable[int]) -> dict[str, bytes | str]:
    """Return the encoded images to send to workers that can't read the dataset, by source path.

    An image that can't be read has the reason as text instead. One whose storage fails is left out: the worker then
    fails the task, which is repeated.
    """
    files: dict[str, bytes | str] = {}
    for photo in (dataset.images[i] for i in indices):
        if photo.source_path in files or photo.source_path in dataset.unreadable:
            continue
        try:
            files[photo.source_path] = dataset.content(photo)
        except (OSError, ValueError) as error:
            if not (is_storage_error(error) or isinstance(error, FileNotFoundError)):
                files[photo.source_path] = failure_reason(error)
    return files


def may_be_readable(dataset: Dataset, index: int, reason: str) -> bool:
    """Return whether an image that was recorded as unreadable should be tried again.

    That is so for errors of the storage, which earlier versions recorded, and if the permission to read it was missing
    and is there now.
    """
    if names_storage_error(reason):
        return True
    if dataset.is_remote:
        return False
    return reason.startswith((NO_PERMISSION, "unreadable: PermissionError")) and os.access(
        dataset.locate(dataset.images[index]), os.R_OK
    )


def batches(
    loaded: Iterable[Loaded], size: int, failed: list[tuple[int, str]]
) -> Iterator[tuple[Sequence[Loaded], np.ndarray]]:
    """Group loaded images into batches.

    Args:
        loaded: Images in any number.
        size: Maximum number of images per batch.
        failed: The (number, reason) of every image that could not be read is appended to this list.

    Yields:
        The images of a batch, and their levels (B, C, H, W).
    """
    batch: list[Loaded] = []
    for item in loaded:
        if item.array is None:
            failed.append((item.index, item.reason))
            continue
        batch.append(item)
        if len(batch) == size:
            yield batch, _stack(batch)
            batch = []
    if batch:
        yield batch, _stack(batch)


def _stack(batch: Sequence[Loaded]) -> np.ndarray:
    return np.stack([item.array for item in batch if item.array is not None])
