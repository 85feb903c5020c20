"""What visualizations need of the dataset pass: best examples as initial images, and means of layers.

Presets with `render.canvas.source=best` and silent units need the first, `render.objective.target=mean` needs the
second.
"""

from collections.abc import Sequence

from PIL import Image

from pipeline.core.errors import AtlasError
from pipeline.data.multiband import to_png
from pipeline.store.reader import Atlas
from pipeline.visualization.initial_images import InitialImage
from pipeline.visualization.preset import Preset


def best_example_images(atlas: Atlas, layer: str, channels: Sequence[int]) -> tuple[InitialImage, ...]:
    """Return each channel's dataset image with the largest activation, and the position of that activation.

    A channel that no dataset image activates gets a gray image, `InitialImage.missing`.

    Raises:
        AtlasError: If the atlas holds no images.
    """
    return tuple(_best_or_missing(atlas, layer, channel) for channel in channels)


def _best_or_missing(atlas: Atlas, layer: str, channel: int) -> InitialImage:
    view = atlas[layer]
    image = best_example_image(atlas, layer, channel)
    if image is not None:
        return image
    examples = view.examples("max")
    if examples is None or examples.index[view.row(channel), 0] >= 0:
        raise AtlasError(
            f"{atlas.path} has no image of the best dataset example of {layer}:{channel}: render.canvas.source=best "
            "needs a dataset pass that stores images (examples.store=images)."
        )
    gray = Image.new("RGB", (view.input_size[1], view.input_size[0]), (128, 128, 128))
    return InitialImage(to_png(gray), (0.5, 0.5), missing=True)


def best_example_image(atlas: Atlas, layer: str, channel: int) -> InitialImage | None:
    """Return the dataset image with the largest activation of a channel, or None if the atlas holds none."""
    view = atlas[layer]
    examples, row = view.examples("max"), view.row(channel)
    if examples is None or examples.index[row, 0] < 0:
        return None
    image = atlas.input_image(int(examples.index[row, 0]))
    if image is None:
        return None
    # Features have a size in pixels of the network's input, so the image is resized to that scale.
    image = image.resize((view.input_size[1], view.input_size[0]), Image.Resampling.BICUBIC)
    height, width = view.map_size
    centre = (float(examples.y[row, 0]) + 0.5) / height, (float(examples.x[row, 0]) + 0.5) / width
    return InitialImage(to_png(image), centre)


def initial_images_of(atlas: Atlas, preset: Preset, layer: str, channels: Sequence[int]) -> tuple[InitialImage, ...]:
    """Return the initial image of each channel; empty if the preset does not start from dataset examples."""
    return best_example_images(atlas, layer, channels) if preset.needs_examples else ()


def layer_mean_of(atlas: Atlas, preset: Preset, layer: str) -> tuple[float, ...]:
    """Return the mean of every channel of a layer over the dataset; empty if the preset does not compare with it.

    Raises:
        AtlasError: If the atlas holds no means.
    """
    if preset.objective.compares_with != "mean":
        return ()
    mean = atlas[layer].layer_mean()
    if mean is None:
        raise AtlasError(
            f"{atlas.path} has no mean of {layer}, which render.objective.target=mean needs: it was made by an earlier "
            "version, or without a dataset pass. `atlas examples` in a new folder makes it."
        )
    return tuple(mean.tolist())
