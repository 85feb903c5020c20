"""A network as ONNX with the maps of an atlas's layers as outputs, and what the page must know of it."""

import dataclasses

from pipeline.models.config import Preprocessing


@dataclasses.dataclass(frozen=True)
class Tap:
    """One output of an exported network: the maps of the atlas's units of a layer, in their order.

    Attributes:
        layer: Name of the layer.
        output: Name of the output, (1, C', H, W) float32.
        spatial: Whether positions of the map correspond to positions in the image.
    """

    layer: str
    output: str
    spatial: bool


@dataclasses.dataclass(frozen=True)
class OnnxNetwork:
    """A network as ONNX. Its input `image` is (1, C, height, width) float32 in [0, 1], resized and cropped.

    Attributes:
        content: The ONNX file.
        taps: Its outputs.
        skipped: Layers of the atlas that it has no output for.
        preprocessing: How an image becomes its input; the normalization is a part of the ONNX file.
        labels: Class names in the order of the output `classes`; empty if it has no such output.
        error: Largest difference from PyTorch as a part of the range of a layer; None if not compared.
    """

    content: bytes
    taps: tuple[Tap, ...]
    skipped: tuple[str, ...]
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    error: float | None
