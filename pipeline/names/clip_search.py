"""Search for units by text or image, and comparison of the units of two networks, in the space of one CLIP model."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.core.errors import AtlasError, first_line
from pipeline.core.units import Unit
from pipeline.names import scores
from pipeline.names.clip_model import ClipModel
from pipeline.names.examine import unit_embeddings
from pipeline.store.reader import Atlas

# Heading of the table of two networks.
COMPARED = ("unit", "nearest", "similarity", "mutual")


@dataclasses.dataclass(frozen=True)
class Compared:
    """The units of one network beside the nearest ones of another.

    Attributes:
        rows: unit, nearest unit of the other network, cosine, and "yes" if each is the nearest of the other.
        there: Mean cosine of a unit of the first network with its nearest unit of the second.
        back: The same from the second to the first.
    """

    rows: list[list[str]]
    there: float
    back: float


def search(
    atlas: Atlas, model: ClipModel, text: str = "", image: str | None = None, count: int = 20
) -> list[tuple[Unit, float]]:
    """Return the units whose examples are most similar to a text or an image, with the cosine, best first.

    Raises:
        AtlasError: If the image can't be read, or no embeddings by the model are kept.
    """
    if image is not None:
        try:
            with Image.open(Path(image).expanduser()) as opened:
                query = model.images([opened.convert("RGB")])
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise AtlasError(f"image={image!r} can't be read: {first_line(error)}") from None
    elif text.strip():
        query = model.texts([text.strip()])
    else:
        raise AtlasError("text=… is empty: write what to search for, as in text='striped fur'.")
    units, vectors = unit_embeddings(atlas, model.key)
    numbers, cosines = scores.ranked(query, vectors, min(count, len(units)))
    pairs = zip(numbers[0].tolist(), cosines[0].tolist(), strict=True)
    return [(units[number], cosine) for number, cosine in pairs if number >= 0]


def compare(first: Atlas, second: Atlas, key: str) -> Compared:
    """Compare the units of two atlases by the embeddings of one model.

    Args:
        first: An atlas with embeddings.
        second: Another one.
        key: Name of the folder of the model's embeddings, `ClipModel.key`.

    Raises:
        AtlasError: If one of them has no embeddings by the model.
    """
    (units, vectors), (others, other_vectors) = unit_embeddings(first, key), unit_embeddings(second, key)
    there, back = scores.nearest(vectors, other_vectors), scores.nearest(other_vectors, vectors)
    rows = []
    for number, nearest, cosine in zip(range(len(units)), there.unit.tolist(), there.similarity.tolist(), strict=True):
        if nearest >= 0:
            mutual = "yes" if back.unit[nearest] == number else "no"
            rows.append([str(units[number]), str(others[nearest]), f"{cosine:.4f}", mutual])
    order = np.argsort([-float(row[2]) for row in rows], kind="stable")
    return Compared([rows[i] for i in order.tolist()], there.mean, back.mean)
