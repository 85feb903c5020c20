"""What a CLIP model says about all units: words, scores and neighbours, kept as `names/clip-KEY/units.npz`."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.atomic_io import atomic_path
from pipeline.core.config_files import decode_text
from pipeline.core.errors import AtlasError, first_line
from pipeline.core.units import Unit
from pipeline.names import scores
from pipeline.names.clip_model import ClipModel
from pipeline.names.dissect import name_by_words
from pipeline.names.embeddings import FOLDER, CropEmbeddings, read_arrays
from pipeline.names.people import LIMITS
from pipeline.store.layer_view import LayerView
from pipeline.store.reader import Atlas

log = logging.getLogger(__name__)

FILE = "units.npz"

# Most words of a list, and how many of them the search of the site knows, with so many units each.
MAX_WORDS, SEARCH_WORDS, SEARCH_UNITS = 100_000, 5_000, 24

# Per-unit arrays of the file.
UNIT_ARRAYS = (
    "channel", "word", "score", "p", "q", "clarity", "polysemanticity", "similar", "similarity",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClipNames:
    """Results for all units of an atlas, in the order of its layers and channels: n units.

    Attributes:
        model: Name of the model.
        key: Name of the folder of its embeddings.
        layers: Names of the layers.
        layer_digests: Digest of the crops of each layer, which tells whether the results are still those of the atlas.
        layer: Number of the layer of each unit, (n,) int32.
        channel: Channel of each unit, (n,) int32.
        words: The words that name some unit.
        word: Number of the word of each unit, (n,) int32; −1 for none.
        score: soft-WPMI of the word, (n,) float32.
        p: p value of the word, (n,) float64; see `names.dissect.WordNames`.
        q: Rate of false discoveries at which the word is accepted, (n,) float64.
        clarity: Clarity of the unit, (n,) float64; NaN if it has too few examples.
        polysemanticity: Polysemanticity of the unit, (n,) float64; NaN if it has too few examples.
        similar: Number of the most similar other unit, (n,) int64; −1 for none.
        similarity: Its similarity: how redundant the unit is, (n,) float32.
        search_words: Words that the search of the site knows.
        search_units: Numbers of the units nearest to each of these words, of those that stand out
            (`scores.outstanding`), (words, m) int32; −1 for none.
        search_cosines: Their cosines with the word, (words, m) float32.
    """

    model: str
    key: str
    layers: tuple[str, ...]
    layer_digests: tuple[str, ...]
    layer: np.ndarray
    channel: np.ndarray
    words: tuple[str, ...]
    word: np.ndarray
    score: np.ndarray
    p: np.ndarray
    q: np.ndarray
    clarity: np.ndarray
    polysemanticity: np.ndarray
    similar: np.ndarray
    similarity: np.ndarray
    search_words: tuple[str, ...]
    search_units: np.ndarray
    search_cosines: np.ndarray

    def unit(self, number: int) -> Unit:
        """Return a unit by its number."""
        return Unit(self.layers[self.layer[number]], int(self.channel[number]))

    @property
    def redundancy(self) -> float:
        """Mean similarity of a unit with the most similar other one; NaN without any."""
        return scores.Nearest(self.similar, self.similarity).mean


def read_words(path: Path) -> list[str]:
    """Read a list of words, one a line; empty lines and repeated words are left out.

    Raises:
        AtlasError: If it cannot be read, is empty or too long; with the line, if a word is too long.
    """
    try:
        lines = decode_text(path.read_bytes(), f"words={str(path)!r}").splitlines()
    except OSError as error:
        raise AtlasError(f"words={str(path)!r} can't be read: {error.strerror or error}.") from None
    for number, line in enumerate(lines, 1):
        word = " ".join(line.split())
        if len(word) > LIMITS["name"] or not word.isprintable():
            raise AtlasError(
                f"{path}, line {number} is no word or short phrase of at most {LIMITS['name']} printable characters. "
                "Write one a line."
            )
    words = list(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
    if len(words) < 2:
        raise AtlasError(f"{path} needs at least two words, one a line: a score compares a word with the others.")
    if len(words) > MAX_WORDS:
        raise AtlasError(f"{path} has {len(words):,} words, {MAX_WORDS:,} at most.")
    return words


def examine(atlas: Atlas, model: ClipModel, words: list[str], folder: Path | None = None) -> tuple[ClipNames, int]:
    """Embed the crops of an atlas, name and score its units, and write the results.

    Args:
        atlas: The atlas.
        model: The model.
        words: The words to choose from.
        folder: Folder of the atlas; that of its file by default.

    Returns:
        The results, and the number of crops that were embedded.
    """
    crops = CropEmbeddings(atlas, model.key, folder)
    made = crops.embed(model)
    vectors = model.texts(words)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("layer", *UNIT_ARRAYS[:-2])}
    semantic, digests = [], []
    for number, layer in enumerate(atlas):
        images = crops.of(layer)
        if not images.shape[2]:
            images = np.zeros((*images.shape[:2], vectors.shape[1]), np.float32)
        found = name_by_words(images, vectors, layer.name)
        columns = {
            "layer": np.full(len(layer.channels), number, np.int32),
            "channel": layer.channels,
            "word": found.word,
            "score": found.score,
            "p": found.p,
            "q": found.q,
            "clarity": scores.clarity(images),
            "polysemanticity": scores.polysemanticity(images),
        }
        for name, values in columns.items():
            parts[name].append(values)
        semantic.append(scores.semantic_embeddings(images))
        digests.append(layer_digest(atlas, layer))
        log.info("%s: %d units", layer.name, len(layer.channels))
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    units = np.concatenate(semantic)
    near = scores.nearest(units)
    searched = list(words[:SEARCH_WORDS])
    numbers, cosines = scores.outstanding(vectors[: len(searched)], units, min(SEARCH_UNITS, len(units)))
    used = np.unique(arrays["word"][arrays["word"] >= 0])
    arrays["word"] = np.where(arrays["word"] >= 0, np.searchsorted(used, arrays["word"]), -1).astype(np.int32)
    names = ClipNames(
        model=model.name,
        key=model.key,
        layers=atlas.layers,
        layer_digests=tuple(digests),
        words=tuple(words[i] for i in used.tolist()),
        **arrays,
        similar=near.unit,
        similarity=near.similarity,
        search_words=tuple(searched),
        search_units=numbers.astype(np.int32),
        search_cosines=cosines,
    )
    _write(crops.path / FILE, names)
    return names, made


def layer_digest(atlas: Atlas, layer: LayerView) -> str:
    """Return a digest of what the crops of a layer show."""
    digest = hashlib.blake2b(str(atlas.attributes.get("dataset_fingerprint", "")).encode(), digest_size=16)
    examples = layer.examples("max")
    arrays = () if examples is None else (examples.index, examples.y, examples.x)
    for array in (layer.channels, *arrays):
        digest.update(np.ascontiguousarray(array, np.int64).tobytes())
    return digest.hexdigest()


def unit_embeddings(atlas: Atlas, key: str, folder: Path | None = None) -> tuple[list[Unit], np.ndarray]:
    """Return all units of an atlas and their semantic embeddings, (n, d) float32; zeros where none is kept.

    Raises:
        AtlasError: If no embeddings by the model are kept.
    """
    crops = CropEmbeddings(atlas, key, folder)
    units, parts = [], []
    for layer in atlas:
        units += [Unit(layer.name, channel) for channel in layer.channels.tolist()]
        parts.append(scores.semantic_embeddings(crops.of(layer)))
    size = max((part.shape[1] for part in parts), default=0)
    if not size:
        raise AtlasError(
            f"{crops.path.parent.parent} has no embeddings by this model yet. Make them: atlas names RUN clip=FOLDER "
            "words=FILE."
        )
    return units, np.concatenate([part if part.shape[1] else np.zeros((len(part), size), np.float32) for part in parts])


def _write(path: Path, names: ClipNames) -> None:
    fields = {field.name: getattr(names, field.name) for field in dataclasses.fields(names)}
    texts = {name: value for name, value in fields.items() if isinstance(value, str | tuple)}
    arrays: dict[str, Any] = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    arrays["texts"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_clip_names(path: Path) -> ClipNames:
    """Read the results of `examine`.

    Raises:
        AtlasError: If the file is damaged.
    """
    try:
        arrays = read_arrays(path)
        texts = json.loads(arrays.pop("texts").tobytes())
        fields: dict[str, Any] = arrays | {k: v if isinstance(v, str) else tuple(map(str, v)) for k, v in texts.items()}
        names = ClipNames(**fields)
        count = len(names.layer)
        if any(len(getattr(names, name)) != count for name in UNIT_ARRAYS):
            raise ValueError("its arrays do not belong together")
        if count and (names.layer.max() >= len(names.layers) or names.word.max() >= len(names.words)):
            raise ValueError("its numbers do not belong together")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AtlasError(
            f"{path} is damaged: {first_line(error)}. Remove it, and `atlas names` with clip=… words=… makes it again "
            "from the embeddings."
        ) from None
    return names


def find_clip_names(folder: Path) -> list[Path]:
    """Return the files with results in the folder of an atlas, by key of the model."""
    return sorted((folder / FOLDER).glob(f"clip-*/{FILE}"))
