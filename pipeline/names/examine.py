"""Examine all units of an atlas with a CLIP model: embed their crops, name and score them."""

import logging
from pathlib import Path

import numpy as np

from pipeline.core.config_files import decode_text
from pipeline.core.errors import AtlasError
from pipeline.core.units import Unit
from pipeline.names import scores
from pipeline.names.clip_model import ClipModel
from pipeline.names.clip_names import FILE, UNIT_ARRAYS, ClipNames, layer_digest, write_clip_names
from pipeline.names.dissect import name_by_words
from pipeline.names.embeddings import CropEmbeddings
from pipeline.names.people import LIMITS
from pipeline.store.reader import Atlas

log = logging.getLogger(__name__)

# Most words of a list, and how many of them the search of the site knows, with so many units each.
MAX_WORDS, SEARCH_WORDS, SEARCH_UNITS = 100_000, 5_000, 24


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
    write_clip_names(crops.path / FILE, names)
    return names, made


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
