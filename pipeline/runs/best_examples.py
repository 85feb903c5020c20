"""The best dataset examples of units, as images that visualizations begin with (`render.canvas.source=best`)."""

import io
from collections.abc import Sequence

from PIL import Image

from pipeline.core.errors import AtlasError
from pipeline.store.reader import Atlas
from pipeline.visualization.initial_images import InitialImage


def best(atlas: Atlas, layer: str, channels: Sequence[int]) -> tuple[InitialImage, ...]:
    """What each channel's picture begins with: the photograph that it answers to most, around that place.

    Raises `AtlasError` where the atlas keeps no photographs.
    """
    view = atlas[layer]
    tops = view.examples("max")
    found = []
    for channel in channels:
        row = view.row(channel)
        image = None if tops is None else atlas.photo(int(tops.index[row, 0]))
        if tops is None or image is None:
            raise AtlasError(
                f"{layer}:{channel} has no photograph to begin with: render.canvas.source=best needs a dataset pass "
                "that keeps its pictures, and a unit that answers to one."
            )
        # A feature has a size in pixels of the network's input, so the photograph is brought to that scale.
        image = image.resize((view.input_size[1], view.input_size[0]), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        place = (float(tops.y[row, 0]) + 0.5) / view.map_size[0], (float(tops.x[row, 0]) + 0.5) / view.map_size[1]
        found.append(InitialImage(buffer.getvalue(), place))
    return tuple(found)
