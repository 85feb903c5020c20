"""A recorder of what a computation would launch on a GPU, which needs no GPU: tensors on "meta" stand for those on it.

Autograd runs meta tensors on the CPU, so that forward and backward passes are recorded alike. What is counted is one
operation of ATen on device tensors: about one kernel.
"""

import collections
import contextlib
import copy
import dataclasses
import itertools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.images.parameterizations import FromImage
from pipeline.layers.finding import Layer, enumerate_layers
from pipeline.layers.heads import HeadLayer
from pipeline.models.loading import Model
from pipeline.visualization.loop import render
from pipeline.visualization.network_penalties import normalizations_before
from pipeline.visualization.preset import Preset
from pipeline.visualization.render_job import RenderJob


class Launches:
    """What was recorded.

    Attributes:
        kernels: Number of operations on device tensors that are no views, by name.
        transfers: (kind, place in the code) of what makes the host wait for the device.
        uploads: Number of copies to the device that the host does not wait for.
        mixed: (operation, place in the code) of operations that take tensors of both, which a GPU refuses.
    """

    def __init__(self) -> None:
        self.kernels: collections.Counter[str] = collections.Counter()
        self.transfers: list[tuple[str, str]] = []
        self.mixed: list[tuple[str, str]] = []
        self.uploads = 0

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self.kernels.clear()
        self.transfers.clear()
        self.mixed.clear()
        self.uploads = 0


def _place() -> str:
    """Return file and line of the innermost frame of the package."""
    frames = (f for f in reversed(traceback.extract_stack()[:-2]) if "/pipeline/" in f.filename)
    return next((f"{f.filename.rpartition('/pipeline/')[2]}:{f.lineno}" for f in frames), "autograd")


class _Dispatched(TorchDispatchMode):
    def __init__(self, launches: Launches, answer: Callable[[str], Any]) -> None:
        super().__init__()
        self.launches, self.answer = launches, answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if x.is_meta]
        on_host = [x for x in tensors if not x.is_meta and x.dim()]  # scalars may mix
        if on_device and name == "_local_scalar_dense":
            self.launches.transfers.append(("scalar read", _place()))
            return self.answer(_place())
        if on_device and name == "lift_fresh":  # torch.tensor, Tensor.new_tensor
            self.launches.transfers.append(("numbers to device", _place()))
        elif name == "_to_copy":
            to_device = torch.device(kwargs.get("device") or tensors[0].device).type == "meta"
            if on_device and not to_device:
                self.launches.transfers.append(("device to host", _place()))
                return torch.zeros(on_device[0].shape, dtype=kwargs.get("dtype") or on_device[0].dtype)
            if not on_device and to_device and kwargs.get("non_blocking"):
                self.launches.uploads += 1
            elif not on_device and to_device:
                self.launches.transfers.append(("host to device", _place()))
        elif on_device and name.startswith("index"):
            masks = [x for x in tensors if x.dtype == torch.bool]
            if on_host or (masks and isinstance(args[1], (list, tuple))):
                self.launches.transfers.append(("index", _place()))
            if isinstance(args[1], (list, tuple)):
                args = (args[0], [_as_indices(x) for x in args[1]], *args[2:])
        elif on_device and on_host and name == "copy_":
            self.launches.transfers.append(("copy", _place()))
        elif on_device and on_host:
            self.launches.mixed.append((name, _place()))
        self.launches.kernels[name] += bool(on_device) and not func.is_view
        return func(*args, **kwargs)


def _as_indices(index: Tensor | None) -> Tensor | None:
    """Return a mask as as many indices as it can select."""
    if index is None or index.dtype != torch.bool:
        return index
    return torch.zeros(len(index), dtype=torch.long, device=index.device)


@contextlib.contextmanager
def recorded(answer: Callable[[str], Any] = lambda place: False) -> Iterator[Launches]:
    """Record operations on meta tensors in this context.

    Args:
        answer: Value of a scalar that is read from the device at a place in the code: meta tensors have no values.
    """
    launches = Launches()
    with _Dispatched(launches, answer):
        yield launches


class Complete(Exception):
    """Raised to leave a rendering whose step has been counted."""


def on_meta(model: Model) -> Model:
    """Return a copy of a network on "meta", which stands for a GPU."""
    return dataclasses.replace(model, module=copy.deepcopy(model.module).to("meta"))


def rendering_job(model: Model, preset: Preset, layer: str, size: int = 32, device: str = "cpu") -> RenderJob:
    """Return a job for a layer of a network, with random stand-ins for all else that a preset may need.

    Args:
        model: The network, on the CPU.
        preset: The preset.
        layer: Name of the layer.
        size: Side of the images in pixels.
        device: Device of the job; "meta" stands for a GPU.
    """
    layers = {found.name: found for found in enumerate_layers(model)}
    preset, side = preset.for_layer(layers[layer]), size + 2 * preset.margin
    first = next(found for found in layers.values() if found.kind == "conv")
    norms = normalizations_before(model, layers[layer]) if preset.network_penalties else []
    images = {(c, v): torch.rand(3, side, side) for c in range(2) for v in range(preset.variants)}
    return RenderJob(
        on_meta(model) if device == "meta" else model.to(device),
        layers[layer],
        preset,
        seed=0,
        size=(size, size),
        layers={name: layers.get(name) or _head(first, name, layers[layer].channels) for name in preset.others},
        initial_images=images if isinstance(preset.canvas, FromImage) else {},
        target_image=torch.rand(3, side, side),
        layer_mean=torch.rand(layers[layer].channels).to(device),
        normalizations=[norm.to(device, 1.0) for norm in norms],
    )


def _head(layer: Layer, name: str, classes: int) -> HeadLayer:
    """Return a head for the classes of a network, on the output of one of its layers."""
    weight, bias = torch.randn(layer.channels, classes).numpy(), torch.zeros(classes).numpy()
    return dataclasses.replace(HeadLayer.on(layer, classes), name=name, weight=weight, bias=bias)


def step_launches(job: RenderJob, step: int, answer: Callable[[str], Any] = lambda place: False) -> Launches:
    """Return what one step of two units launches; `answer` as for `recorded`."""
    steps = itertools.count()
    with recorded(answer) as launches:

        def on_step() -> None:
            at = next(steps)
            if at == step:
                launches.clear()
            if at == step + 1:
                raise Complete

        units = [(c, v) for c in range(2) for v in range(job.preset.variants)]
        with contextlib.suppress(Complete):
            render(dataclasses.replace(job, on_step=on_step), units)
    return launches
