"""Export a network to ONNX with the maps of an atlas's layers as outputs, and compare it with PyTorch."""

import contextlib
import importlib
import importlib.util
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.errors import AtlasError, first_line
from pipeline.layers.finding import Layer, capture
from pipeline.layers.tracing import tensor_of
from pipeline.models.loading import Model
from pipeline.site.own_image.network import OnnxNetwork, Tap
from pipeline.store.reader import Atlas

# Largest difference from PyTorch as a part of the range of a layer.
TOLERANCE = 0.01
# The version of the operators; ONNX Runtime has had all of its operators since 2023.
OPSET = 18
INSTALL = "pip install 'neuron-atlas[onnx]'"


class _Tapped(nn.Module):
    """A network as a function from images (1, C, H, W) in [0, 1] to the maps of layers, and its own output.

    Args:
        model: The network.
        forward: The function of `capture`.
        rows: Channels of each layer by name; None for all.
        with_output: Whether the output of the network is the last output.
    """

    def __init__(
        self, model: Model, forward: Callable[[Tensor], Any], rows: dict[str, Tensor | None], with_output: bool
    ) -> None:
        super().__init__()
        self.network = model.module
        self._forward_maps = forward
        self._rows = rows
        self._with_output = with_output

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the maps (1, C', H, W) of each layer, then the output of the network if it is asked for."""
        results: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            results.append(_tensor(output))

        handle = self.network.register_forward_hook(keep)
        try:
            maps = self._forward_maps(image)
        finally:
            handle.remove()
        tapped = [maps[name] if rows is None else maps[name].index_select(1, rows) for name, rows in self._rows.items()]
        return (*tapped, results[0]) if self._with_output else tuple(tapped)


def export_network(model: Model, layers: Sequence[Layer], atlas: Atlas) -> OnnxNetwork:
    """Export a network with the layers of an atlas, and compare the result with PyTorch if `onnxruntime` is installed.

    Args:
        model: The network of the atlas.
        layers: All layers of the network.
        atlas: The atlas. Of each layer, only its channels become outputs.

    Raises:
        AtlasError: If it is another network, if it cannot be exported, or if the result differs by more than 1 %.
    """
    if importlib.util.find_spec("onnx") is None:
        raise AtlasError(f"The export of the network needs the package onnx: {INSTALL}")
    if model.digest != atlas.attributes.get("weights_sha256"):
        raise AtlasError(
            f"The network of the settings ({model.name}) is not that of the atlas "
            f"({atlas.attributes.get('model', 'unknown')}). Give the settings of the run, such as model=resnet18, or "
            "run.trust=true if you trust the run folder: then they are taken from its config.yaml."
        )
    if model.preprocessing.channels not in (1, 3):
        raise AtlasError(f"{model.name} reads {model.preprocessing.channels} channels; images in browsers have 3.")
    model = model.to("cpu")
    tapped, skipped = _layers_of(atlas, layers)
    if not tapped:
        raise AtlasError(f"{model.name} has no layer of the atlas with a histogram of activations over the dataset.")
    taps = tuple(Tap(layer.name, f"layer_{i}", layer.spatial) for i, (layer, _) in enumerate(tapped))
    with _tapped(model, tapped) as (module, labels):
        names = [tap.output for tap in taps] + (["classes"] if labels else [])
        content = _exported(model, module, names)
        error = _compare(model, module, content)
    return OnnxNetwork(content, taps, tuple(skipped), model.preprocessing, labels, error)


def _layers_of(atlas: Atlas, layers: Sequence[Layer]) -> tuple[list[tuple[Layer, np.ndarray]], list[str]]:
    """Return the layers of the network that the atlas has, with its channels, and the names of all others."""
    by_name = {layer.name: layer for layer in layers}
    found, skipped = [], []
    for view in atlas:
        layer = by_name.get(view.name)
        same = layer is not None and (layer.channels, layer.height, layer.width) == (
            view.total_channels,
            *view.map_size,
        )
        if layer is None or not same or view.histogram() is None or not len(view.channels):
            skipped.append(view.name)
        else:
            found.append((layer, np.asarray(view.channels, np.int64)))
    return found, skipped


@contextlib.contextmanager
def _tapped(model: Model, layers: Sequence[tuple[Layer, np.ndarray]]) -> Iterator[tuple[_Tapped, tuple[str, ...]]]:
    """Yield the network with its layers as outputs, and the names of its classes if its output has one number each."""
    rows = {
        layer.name: None if len(channels) == layer.channels else torch.from_numpy(channels)
        for layer, channels in layers
    }
    with capture(model, [layer for layer, _ in layers], stop=False) as forward, torch.no_grad():
        module = _Tapped(model, forward, rows, with_output=True).eval()
        output = module(_smooth_image(model))[-1]
        labels = model.labels if tuple(output.shape) == (1, len(model.labels)) else ()
        if not labels:
            module = _Tapped(model, forward, rows, with_output=False).eval()
        yield module, labels


def _exported(model: Model, module: nn.Module, names: Sequence[str]) -> bytes:
    """Return the network as ONNX.

    Raises:
        AtlasError: If it has operations that ONNX has not, or the file would be too large.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fast path of torch's attention is one operation, which ONNX has not.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            warnings.simplefilter("ignore")
            # The exporter by tracing records what hooks see, and needs no package but onnx.
            torch.onnx.export(
                module,
                (_smooth_image(model),),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=list(names),
            )
            return path.read_bytes()
    except Exception as error:
        # The exporter raises almost anything, and so can the user's code.
        raise AtlasError(f"{model.name} can't be exported as ONNX: {first_line(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _compare(model: Model, module: nn.Module, content: bytes) -> float | None:
    """Return the largest difference of ONNX Runtime from PyTorch on two inputs; None if it is not installed.

    Raises:
        AtlasError: If it is above `TOLERANCE`.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise AtlasError(f"{model.name}: ONNX Runtime can't read the exported network: {first_line(error)}") from error
    worst = 0.0
    for image in (_noise_image(model), _smooth_image(model)):
        expected = [maps.numpy() for maps in module(image)]
        for mine, other in zip(expected, session.run(None, {"image": image.numpy()}), strict=True):
            worst = max(worst, relative_error(mine, other))
    if not worst <= TOLERANCE:
        raise AtlasError(f"{model.name}: the exported network differs by {worst:.1%} of the range of a layer.")
    return worst


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference of two arrays as a part of the range of the first; infinite for other shapes."""
    if expected.shape != found.shape:
        return math.inf
    scale = max(float(np.ptp(expected)), 1e-6 * max(1.0, float(np.abs(expected).max())))
    error = float(np.abs(expected - found).max()) / scale
    return error if math.isfinite(error) else math.inf


def _noise_image(model: Model) -> Tensor:
    """Return uniform noise, (1, C, H, W) in [0, 1], always the same."""
    shape = (1, model.preprocessing.channels, *model.preprocessing.size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _smooth_image(model: Model) -> Tensor:
    """Return waves of a few pixels to the whole image in length, (1, C, H, W) in [0, 1]."""
    height, width = model.preprocessing.size
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None, :]
    waves = [torch.sin(2 * math.pi * (1 + 3 * c) * (x + (c + 1) * y * y)) for c in range(model.preprocessing.channels)]
    return (0.5 + 0.5 * torch.stack(waves))[None].contiguous()


def _tensor(output: Any) -> Tensor:
    tensor = tensor_of(output)
    return torch.zeros(0) if tensor is None else tensor
