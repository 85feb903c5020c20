"""The networks that are measured, their layers, and workers that render as in a run.

ResNet-50 has random weights: its trained ones do not fit into what is carried. The statistics of its batch
normalizations are *calibrated*, by one forward pass in training mode on seeded noise, so that activations have natural
sizes and shares of zeros. EfficientNet-Lite0 has its trained weights.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.acceleration.batchnorm_folding import fold, foldable_pairs
from pipeline.config.schema import Config, EngineConfig, from_tree
from pipeline.core.machine import available_cores
from pipeline.data.datasets import Dataset
from pipeline.engine import devices
from pipeline.engine.tasks import Setup
from pipeline.engine.worker import Worker
from pipeline.kernels.allocator import retain_freed_memory
from pipeline.layers.finding import Layer, ReceptiveField, capture
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.layers.selection import LayersConfig, list_layers, select_layers
from pipeline.models.loading import Model, load_model, weights_digest
from pipeline.planning import execution
from pipeline.planning.validation import choose_canvas_sizes
from pipeline.visualization.batch import Batch
from pipeline.visualization.preset import Preset, Size
from pipeline.visualization.render_job import RenderJob, draw_start

RESNET, LITE = "resnet50", "efficientnet_lite0"
OVERRIDES = {RESNET: ("model.weights=null",), LITE: ()}

# Layers of ResNet-50 that are timed: from the first to the last, with each kind of convolution.
LAYERS = (
    "conv1", "layer1.0.conv2", "layer1.2.conv3", "layer2.1.conv3", "layer2.3.conv3", "layer3.0.conv2", "layer3.2.conv2",
    "layer3.5.conv3", "layer4.2.conv3",
)  # fmt: skip
BATCH = 64
# File in the carried folder with what `described` returns, by network.
FILE = "networks.json"


@dataclasses.dataclass(frozen=True)
class Network:
    """A network on the device, with its convolutions.

    Attributes:
        config: Configuration with the default preset.
        model: The network.
        layers: Its convolutions by name, with receptive fields, in their order.
        sizes: Canvas sizes of the default preset by layer.
    """

    config: Config
    model: Model
    layers: dict[str, Layer]
    sizes: dict[str, Size]

    def preset(self, name: str) -> Preset:
        """Return the default preset with the objective that it has for a layer."""
        return self.config.render.for_layer(self.layers[name])

    def gigaflops(self, name: str, size: Size) -> float:
        """Return the GFLOP of an image-step: forward and input gradient of the network up to a layer."""
        height, width = self.model.preprocessing.size
        return 4 * self.layers[name].cost * size[0] * size[1] / (height * width) / 1e9


def described(name: str) -> dict[str, Any]:
    """Return configuration and convolutions of a network as plain data; takes some time, and needs Hydra."""
    from pipeline.cli.compose import compose

    request = compose([f"model={name}", *OVERRIDES[name], "run.name=bench", "engine=inline"])
    model, policy = load_model(request.config.model), LayersConfig("convs")
    candidates = list_layers(model, policy, request.config.model.aliases)
    chosen = [layer for layer in select_layers(model, candidates, policy) if layer.kind == "conv"]
    fields = receptive_fields(fold(model), chosen)
    layers = [dataclasses.asdict(dataclasses.replace(layer, field=fields[layer.name])) for layer in chosen]
    return json.loads(json.dumps({"tree": request.tree, "layers": layers}))


def layer_from(plain: dict[str, Any]) -> Layer:
    """Return a layer from the plain data of `described`."""
    field = plain["field"] and ReceptiveField(*(tuple(plain["field"][key]) for key in ("size", "stride", "offset")))
    grid = plain["grid"] and tuple(plain["grid"])
    return Layer(**{**plain, "field": field, "grid": grid})


@functools.cache
def network(name: str, device: str, carried: Path | None) -> Network:
    """Return a network on a device; `carried` is the folder of `gpu.py prepare`, without which it is described anew."""
    file = carried / FILE if carried else None
    plain = json.loads(file.read_text())[name] if file and file.is_file() else described(name)
    config = from_tree(plain["tree"])
    model = load_model(config.model)
    if config.model.weights is None:
        model = calibrated(model)
    prepare_device(config, device)
    layers = {layer["name"]: layer_from(layer) for layer in plain["layers"]}
    sizes = choose_canvas_sizes(model, list(layers.values()), config.render)
    return Network(config, model.to(device), layers, sizes)


def prepare_device(config: Config, device: str) -> None:
    """Do what a worker does before its network is on the device."""
    retain_freed_memory()
    devices.prepare_device(device, config.engine)


def first_batch(job: RenderJob, channels: Sequence[int]) -> tuple[Batch, Tensor]:
    """Return the batch of the first attempt before its first step, and the (B, R) random numbers of that step."""
    units = [(channel, 0) for channel in channels]
    batch = Batch(job, draw_start(job, units, 0))
    batch.start_stage(job, job.preset.stages[0])
    return batch, batch.draws(0).random


def calibrated(model: Model) -> Model:
    """Return a network of random weights with batch-norm statistics of one forward pass on seeded noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, model.preprocessing.channels, 28, 28, generator=generator)
    images = nn.functional.interpolate(images, model.preprocessing.size, mode="bilinear", align_corners=False)
    images = (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    norms = [module for module in model.module.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model.module(model.normalize(images))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return dataclasses.replace(model, digest=weights_digest(model.module))


def precisions(device: str) -> tuple[str, ...]:
    """Return the values of `engine.precision` other than auto; only GPUs have TF32."""
    hint = typing.get_type_hints(EngineConfig, include_extras=True)["precision"]
    found: list[str] = []

    def collect(annotation: Any) -> None:
        for part in typing.get_args(annotation):
            if isinstance(part, str):
                found.append(part)
            else:
                collect(part)

    collect(hint)
    left_out = ("auto",) if device == "cuda" else ("auto", "tf32")
    return tuple(dict.fromkeys(name for name in found if name not in left_out))


def fast_precisions(device: str) -> tuple[str, str]:
    """Return the two values of `engine.precision` that are timed: bfloat16, and TF32 or what there is in its place.

    Without a name of its own, TF32 is what cuDNN uses for float32 unless told otherwise.
    """
    return "bfloat16", "tf32" if "tf32" in precisions(device) else "float32"


_pairs: dict[int, Any] = {}


def worker(
    net: Network, device: str, layers: Sequence[Layer] | None = None, config: Config | None = None, **engine: Any
) -> Worker:
    """Return a worker with the network loaded, as in a run, with other settings of the engine."""
    config = config or net.config
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, device=device, **engine))
    chosen = tuple(layers or net.layers.values())
    setup = Setup(config, net.model.digest, chosen, Dataset((), {}), max(1, int(available_cores())), device)
    made = Worker(execution.on_device(setup, device))
    made.__dict__["model"] = net.model  # in place of loading it
    if hasattr(type(made), "_foldable"):
        if id(net.model) not in _pairs:
            _pairs[id(net.model)] = foldable_pairs(net.model)
        made.__dict__["_foldable"] = _pairs[id(net.model)]
    return made


def timing_preset(preset: Preset, steps: int) -> Preset:
    """Return a preset with so many steps and a single attempt."""
    return dataclasses.replace(preset, steps=steps, attempts=1)


@contextlib.contextmanager
def bare_loop(model: Model, layer: Layer, batch: int, size: Size, dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
    """Provide one step of the *bare loop*: the network up to a layer, forward and backward to its input, nothing else.

    `model` is the folded network, of which a copy in `dtype` runs. The gradient of the mean of a channel of each image
    is given, so that neither the objective nor the choice of the channel costs anything.
    """
    device = next(model.module.parameters()).device
    twin = model if dtype == torch.float32 else in_dtype(model, dtype)
    pixels = torch.rand(batch, model.preprocessing.channels, *size, device=device).requires_grad_(True)
    with capture(twin, [layer]) as run:
        maps = run(pixels)[layer.name].detach()
        given = torch.zeros_like(maps)
        for i in range(batch):
            given[i, i % maps.shape[1]] = 1 / (maps.shape[2] * maps.shape[3])
        yield lambda: torch.autograd.grad(run(pixels)[layer.name], pixels, given)[0]


def in_dtype(model: Model, dtype: torch.dtype) -> Model:
    """Return a copy of a network in a data type, which converts its input."""
    module = copy.deepcopy(model.module).to(dtype)
    module.register_forward_pre_hook(lambda _, args: tuple(x.to(dtype) for x in args))
    return dataclasses.replace(model, module=module)
