"""What a CLIP model says about all units: words, scores and neighbours, kept as `names/clip-KEY/units.npz`.

The processes that write a site read it, so that nothing here imports the model, and with it torch.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.atomic_io import atomic_path
from pipeline.core.errors import AtlasError, first_line
from pipeline.core.units import Unit
from pipeline.names import scores
from pipeline.names.embeddings import FOLDER, read_arrays
from pipeline.store.layer_view import LayerView
from pipeline.store.reader import Atlas

FILE = "units.npz"

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


def layer_digest(atlas: Atlas, layer: LayerView) -> str:
    """Return a digest of what the crops of a layer show."""
    digest = hashlib.blake2b(str(atlas.attributes.get("dataset_fingerprint", "")).encode(), digest_size=16)
    examples = layer.examples("max")
    arrays = () if examples is None else (examples.index, examples.y, examples.x)
    for array in (layer.channels, *arrays):
        digest.update(np.ascontiguousarray(array, np.int64).tobytes())
    return digest.hexdigest()


def write_clip_names(path: Path, names: ClipNames) -> None:
    """Write the results of `examine.examine` to a file."""
    fields = {field.name: getattr(names, field.name) for field in dataclasses.fields(names)}
    texts = {name: value for name, value in fields.items() if isinstance(value, str | tuple)}
    arrays: dict[str, Any] = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    arrays["texts"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_clip_names(path: Path) -> ClipNames:
    """Read what `write_clip_names` wrote.

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
