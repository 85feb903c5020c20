"""Embeddings of the example crops of units by a CLIP model, computed once and kept beside the atlas.

`names/clip-KEY/` in the folder of the atlas has one file a layer, `LAYER.npz`: `digest` (n, 16) uint8 says what each
crop shows, `embedding` (n, d) float16 is its embedding. Interrupted work continues; crops that are in a file are not
embedded again, and an example that changes is another crop. KEY is the start of the digest of the model.
"""

import functools
import hashlib
import io
import logging
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipeline.core.atomic_io import atomic_path
from pipeline.core.errors import AtlasError, first_line
from pipeline.store.layer_view import Examples, LayerView
from pipeline.store.reader import Atlas
from pipeline.store.shards import safe_name

if TYPE_CHECKING:  # with the model comes torch, which the processes that write a site do not need
    from pipeline.names.clip_model import ClipModel

log = logging.getLogger(__name__)

FOLDER = "names"

# Crops that are embedded at a time, and between two writes of a layer's file.
_AT_ONCE, _BETWEEN_WRITES = 64, 2_048

# Decoded images that are kept, because units share them.
_KEPT_IMAGES = 128

_DIGEST_BYTES = 16

# Seconds between two lines of progress.
_PROGRESS = 10.0


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name; pickled objects are never loaded.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it is damaged.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, AttributeError, NotImplementedError) as error:
        raise ValueError(first_line(error)) from error


class CropEmbeddings:
    """Embeddings of the crops of an atlas, layer by layer.

    Args:
        atlas: The atlas; it must remain open.
        key: Name of the folder of the model's embeddings, `ClipModel.key`.
        folder: Folder of the atlas; that of its file by default.
    """

    def __init__(self, atlas: Atlas, key: str, folder: Path | None = None) -> None:
        self._atlas = atlas
        self.path = (folder or atlas.path.parent) / FOLDER / key
        self._fingerprint = str(atlas.attributes.get("dataset_fingerprint", ""))
        self._paths = atlas.dataset()["path"].tolist()
        # Crops that are the whole input are the same in all layers.
        self._whole: dict[bytes, np.ndarray] = {}
        self._open = functools.lru_cache(maxsize=_KEPT_IMAGES)(self._source)

    def file(self, layer: LayerView) -> Path:
        """Return the file with the embeddings of a layer."""
        return self.path / f"{safe_name(layer.name)}.npz"

    def digests(self, layer: LayerView) -> list[list[bytes | None]]:
        """Return what the crop of each example of each unit shows, as a digest; None for no example.

        Two crops have one digest if they are the same part of the same image of the same dataset.
        """
        examples = layer.examples("max")
        if examples is None:
            return [[] for _ in layer.channels]
        rows = zip(*(array.tolist() for array in (examples.index, examples.y, examples.x)), strict=True)
        box = functools.lru_cache(maxsize=1 << 16)(layer.crop_box)
        return [
            [self._digest(image, box(y, x)) if image >= 0 else None for image, y, x in zip(*unit, strict=True)]
            for unit in rows
        ]

    def _digest(self, image: int, box: tuple[int, int, int, int] | None) -> bytes:
        text = f"{self._fingerprint}\0{self._paths[image]}\0{box}"
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=_DIGEST_BYTES).digest()

    def kept(self, layer: LayerView) -> dict[bytes, np.ndarray]:
        """Return the embeddings in the file of a layer by digest, float16; empty without a readable file."""
        path = self.file(layer)
        if not path.is_file():
            return {}
        try:
            arrays = read_arrays(path)
            digests, embeddings = arrays["digest"], arrays["embedding"]
            if digests.shape != (len(embeddings), _DIGEST_BYTES) or embeddings.ndim != 2:
                raise ValueError("its arrays do not belong together")
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s can't be read and is made again: %s", path, first_line(error))
            return {}
        return {digest.tobytes(): row for digest, row in zip(digests, embeddings, strict=True)}

    def of(self, layer: LayerView) -> np.ndarray:
        """Return the embeddings of the examples of each unit, (C', k, d) float32; zeros where there is none."""
        kept = self.kept(layer)
        digests = self.digests(layer)
        size = len(next(iter(kept.values()))) if kept else 0
        result = np.zeros((len(digests), max(map(len, digests), default=0), size), np.float32)
        for row, unit in enumerate(digests):
            for place, digest in enumerate(unit):
                if digest in kept:
                    result[row, place] = kept[digest]
        # Half precision is kept; the length is 1 again.
        return result / np.maximum(np.linalg.norm(result, axis=2, keepdims=True), 1e-12)

    def embed(self, model: "ClipModel") -> int:
        """Embed all crops that are not kept yet; return their number.

        Raises:
            AtlasError: If the atlas has no images of its examples.
        """
        if self._atlas.examples_store == "ids":
            raise AtlasError(
                f"{self._atlas.path} has no images of its examples (examples.store=ids), so that there is nothing to "
                "embed. Make a run with examples.store=crops."
            )
        made, layers = 0, list(self._atlas)
        for number, layer in enumerate(layers, 1):
            made += self._embed_layer(layer, model, f"layer {number} of {len(layers)}, {layer.name}")
        return made

    def _embed_layer(self, layer: LayerView, model: "ClipModel", what: str) -> int:
        examples = layer.examples("max")
        if examples is None:
            return 0
        digests, kept = self.digests(layer), self.kept(layer)
        wanted: dict[bytes, tuple[int, int]] = {}
        for row, unit in enumerate(digests):
            for place, digest in enumerate(unit):
                if digest is not None:
                    wanted.setdefault(digest, (row, place))
        found = {digest: kept[digest] for digest in wanted if digest in kept}
        shared = {digest: self._whole[digest] for digest in wanted if digest not in found and digest in self._whole}
        missing = [digest for digest in wanted if digest not in found and digest not in shared]
        found |= shared
        made = self._fill(layer, examples, {digest: wanted[digest] for digest in missing}, found, model, what)
        if made or shared or len(found) != len(kept):
            self._write(layer, found)
        if layer.receptive_field is None:
            self._whole |= found
        return made

    def _fill(
        self,
        layer: LayerView,
        examples: Examples,
        missing: Mapping[bytes, tuple[int, int]],
        found: dict[bytes, np.ndarray],
        model: "ClipModel",
        what: str,
    ) -> int:
        """Embed the `missing` crops of a layer into `found`, and write it from time to time; return their number."""
        began = logged = time.monotonic()
        done, entries = 0, list(missing.items())
        for start in range(0, len(entries), _AT_ONCE):
            part = [
                (digest, crop)
                for digest, (row, place) in entries[start : start + _AT_ONCE]
                if (crop := self._crop(layer, examples, row, place)) is not None
            ]
            if part:
                vectors = model.images([crop for _, crop in part]).astype(np.float16)
                found |= {digest: vector for (digest, _), vector in zip(part, vectors, strict=True)}
            before, done = done, done + len(part)
            if before // _BETWEEN_WRITES != done // _BETWEEN_WRITES:
                self._write(layer, found)
            if time.monotonic() - logged > _PROGRESS:
                logged = time.monotonic()
                log.info("%s: %d of %d crops, %.1f/s", what, done, len(entries), done / (logged - began))
        return done

    def _crop(self, layer: LayerView, examples: Examples, row: int, place: int) -> Image.Image | None:
        """Return what the network sees of an example, or None if the atlas does not have it."""
        index, y, x = (int(array[row, place]) for array in (examples.index, examples.y, examples.x))
        crop = layer.crop(int(examples.crop[row, place]))
        if crop is not None:
            return crop
        photo = self._atlas.image_geometry(index)
        if photo is None:
            return None
        source = self._open(index)
        if source is None:
            return None
        box = layer.source_box(photo, y, x) or photo.box
        across, down = source.width / photo.size[0], source.height / photo.size[1]
        left, top, right, bottom = (round(v * s) for v, s in zip(box, (across, down) * 2, strict=True))
        left, top = min(max(left, 0), source.width - 1), min(max(top, 0), source.height - 1)
        return source.crop(
            (left, top, max(min(right, source.width), left + 1), max(min(bottom, source.height), top + 1))
        )

    def _source(self, index: int) -> Image.Image | None:
        image = self._atlas.source_image(index)
        return None if image is None else image.convert("RGB")

    def _write(self, layer: LayerView, found: Mapping[bytes, np.ndarray]) -> None:
        digests = np.frombuffer(b"".join(found), np.uint8).reshape(len(found), _DIGEST_BYTES)
        with atomic_path(self.file(layer)) as temporary, temporary.open("wb") as file:
            np.savez(file, digest=digests, embedding=np.stack(list(found.values())) if found else np.zeros((0, 0)))
