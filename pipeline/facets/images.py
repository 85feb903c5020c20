"""The images of facets: what each starts from, and what is stored of it.

Nguyen, Yosinski & Clune 2016 ("Multifaceted Feature Visualization") start from the mean of the images of a facet. Here
the start is noise with their mean amplitude spectrum: it has the colors and the share of each scale and orientation of
these images, and none of the contours that a mean of few images takes from single ones.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pipeline.acceleration.precision import ieee
from pipeline.core.seeds import seed_of
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.layers.finding import capture
from pipeline.models.config import Preprocessing
from pipeline.visualization.evaluation import Visualization
from pipeline.visualization.objectives import Facet
from pipeline.visualization.preset import ChannelVariant, Size
from pipeline.visualization.render_job import RenderJob

# Contrast of the start as a part of that of the images: the optimization must be able to move away from it.
CONTRAST = 0.1

# Pixels of the start lie this far from black and white, where parameterizations have no inverse.
EDGE = 0.02


def load(dataset: Dataset, indices: Iterable[int], recipe: Preprocessing, threads: int) -> dict[int, np.ndarray]:
    """Return dataset images as network inputs, (C, H, W) levels 0 … 255, by number; unreadable ones are left out."""
    loaded = image_loading.load_images(dataset, indices, recipe, threads)
    return {item.index: item.array for item in loaded if item.array is not None}


def mean_spectrum_image(images: Sequence[np.ndarray], size: Size, generator: Generator) -> Tensor:
    """Return an image with the mean amplitude spectrum and the mean color of images, and random phases.

    Args:
        images: (C, H, W) levels from 0 to 255 each, at least one.
        size: (height, width) of the result in pixels.
        generator: Source of the phases, which all channels share, so that colors stay those of the images.

    Returns:
        (C, height, width) in [`EDGE`, 1 − `EDGE`].
    """
    pixels = torch.stack([torch.from_numpy(np.asarray(image, np.float32)) for image in images]) / 255
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    color = pixels.mean((0, 2, 3))[:, None, None]
    amplitude = torch.fft.rfft2(pixels - pixels.mean((2, 3), keepdim=True), norm="ortho").abs().mean(0)
    noise = torch.fft.rfft2(torch.randn(size, generator=generator), norm="ortho")
    pattern = torch.fft.irfft2(amplitude * noise / noise.abs().clamp(min=1e-12), s=size, norm="ortho")
    return (color + CONTRAST * pattern).clamp(EDGE, 1 - EDGE)


def starts(
    job: RenderJob, units: Sequence[ChannelVariant], nearest: np.ndarray, images: Mapping[int, np.ndarray]
) -> dict[ChannelVariant, Tensor]:
    """Return what the image of each facet starts from, (C, H, W) in [0, 1] with margins.

    The phases depend on the unit alone: those of its facets, and any division of the work, give the same.

    Args:
        job: The job of the layer, without initial images.
        units: (channel, number of the variant) of each facet.
        nearest: Nearest examples of each, (F, n); −1 for none.
        images: Dataset images by number.
    """
    size, found = job.canvas(job.preset.stages[0]), {}
    for (channel, variant), own in zip(units, nearest.tolist(), strict=True):
        examples = [images[index] for index in own if index in images]
        seed = seed_of("facets", job.seed, job.model.name, job.layer.name, channel)
        if examples:
            generator = torch.Generator().manual_seed(seed)
            found[channel, variant] = mean_spectrum_image(examples, size, generator)
    return found


def thumbnails(nearest: np.ndarray, images: Mapping[int, np.ndarray], side: int) -> np.ndarray | None:
    """Return copies of the nearest examples, (F, n, side, side, C) uint8; black for none. None if side is 0.

    The longer edge of an image that is not square is cut off at both ends.
    """
    if not side or not images:
        return None
    small = {index: _thumbnail(image, side) for index, image in images.items()}
    black = np.zeros_like(next(iter(small.values())))
    return np.stack([np.stack([small.get(index, black) for index in own]) for own in nearest.tolist()])


def _thumbnail(image: np.ndarray, side: int) -> np.ndarray:
    pixels = torch.from_numpy(np.asarray(image, np.float32))
    edge = min(pixels.shape[1:])
    top, left = (pixels.shape[1] - edge) // 2, (pixels.shape[2] - edge) // 2
    square = pixels[None, :, top : top + edge, left : left + edge]
    small = F.interpolate(square, (side, side), mode="bilinear", antialias=True)[0]
    return small.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def arrays(job: RenderJob, pictures: Sequence[Visualization], examples: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return what a shard stores of the images of some facets; see `FacetsResult`."""
    images = np.stack([picture.image for picture in pictures])
    activation, cosine = _measured(job, images, [picture.unit for picture in pictures])
    found = {
        "images": images[:, None],
        "activation": activation,
        "cosine": cosine,
        "failed": np.array([picture.status == "failed" for picture in pictures], bool),
    }
    return found if examples is None else {**found, "examples": examples}


@torch.no_grad()
@ieee()
def _measured(job: RenderJob, images: np.ndarray, units: Sequence[ChannelVariant]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean activation of the unit for each image, and the cosine with the center of its facet, (F,) each.

    One image at a time: kernels that are chosen by batch size round differently.
    """
    objective, model = job.preset.objective, job.evaluation_model
    assert isinstance(objective, Facet)
    layers = [job.layer, job.layers[objective.embedding]]
    activation, cosine = [], []
    with capture(model, layers) as run:
        for image, (channel, variant) in zip(images, units, strict=True):
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(model.device).float() / 255
            maps = run(pixels)
            activation.append(float(maps[job.layer.name][0, channel].float().mean()))
            row = torch.tensor([variant], device=model.device)
            cosine.append(float(objective.cosine(maps[objective.embedding].float(), row)[0]))
    return np.array(activation, np.float32), np.array(cosine, np.float32)
