"""Check and time the effects of units on the outputs: exact ablation, attribution, their agreement.

scripts/bench effects [--model NAME] [--root ../shared/photos] [--images 16] [--units 40] [--layers 5] [--checked 4]

On the default network with the means of some photographs: the largest difference of ablations from a loop that runs
the complete network with a hook, on `--checked` images; the time of both; Spearman's rank correlation of attribution
and ablation to the mean, by layer; and images per second of the attribution of all channels against the bare forward
and backward pass, which alternate batch by batch.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pipeline.acceleration.batchnorm_folding import foldable_pairs
from pipeline.acceleration.variants import verified_fold
from pipeline.data import image_loading
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset, list_dataset
from pipeline.effects.measurement import EffectsContext, attribute, measure
from pipeline.effects.request import spread
from pipeline.effects.results import EffectsPart
from pipeline.layers.finding import Layer, capture
from pipeline.layers.selection import LayersConfig, list_layers, logit_layers, select_layers
from pipeline.models.config import ModelConfig
from pipeline.models.loading import Model, load_model
from pipeline.store.effects import rank_correlation

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> Model:
    settings = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())
    return load_model(ModelConfig(**{key: value for key, value in settings.items() if key != "defaults"})).to("cpu")


def parser_of(description: str | None, images: int, units: int) -> argparse.ArgumentParser:
    """Return a parser of the arguments that `prepared` reads, and of --units."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--root", default=str(ROOT.parent / "shared" / "photos"))
    parser.add_argument("--images", type=int, default=images)
    parser.add_argument("--units", type=int, default=units)
    parser.add_argument("--layers", type=int, default=5)
    return parser


def prepared(options: argparse.Namespace) -> tuple[Model, list[Layer], Layer, Dataset, list[np.ndarray]]:
    """Return the folded network, layers of its tour, the layer of logits, the photographs and their pixels."""
    model = load(options.model)
    candidates = list_layers(model, LayersConfig(), None)
    outputs = logit_layers(model, candidates)[-1]
    chosen = select_layers(model, candidates, LayersConfig(policy="tour", count=options.layers + 1))
    layers = [layer for layer in chosen if layer.name != outputs.name][: options.layers]
    network = verified_fold(model, foldable_pairs(model), layers)
    dataset = list_dataset(DataConfig("folder", options.root, options.images))
    loaded = image_loading.load_images(dataset, range(options.images), model.preprocessing)
    arrays = [item.array for item in loaded if item.array is not None]
    return network, layers, outputs, dataset, arrays


def mean_activations(model: Model, layers: list[Layer], images: Tensor) -> list[np.ndarray]:
    """Return the mean of every channel over images and positions, by layer."""
    with torch.no_grad(), capture(model, layers) as forward:
        maps = forward(images)
    return [maps[layer.name].float().mean((0, 2, 3)).numpy() for layer in layers]


def removed(module: torch.nn.Module, layer: Layer, channel: int, value: float) -> RemovableHandle:
    """Set a channel of a layer of maps (B, C, H, W) to a value until the hook is removed."""

    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[:, channel] = value
        return tensor

    if layer.side == "in":
        return module.register_forward_pre_hook(lambda _module, args: (changed(args[0]), *args[1:]))
    return module.register_forward_hook(lambda _module, _args, output: changed(output))


def by_loop(context: EffectsContext, images: Tensor, tops: np.ndarray) -> np.ndarray:
    """Return the effects of ablations to the mean, (images, units of all layers), by complete passes with a hook."""
    with torch.no_grad():
        batches = [
            images[i : i + context.batch].contiguous(memory_format=context.model.memory_format)
            for i in range(0, len(images), context.batch)
        ]
        full = _largest(context, batches, tops)
        columns = []
        for layer, mean, own in zip(context.layers, context.means, context.ablated, strict=True):
            assert layer.call == 1, "the loop changes the first call of a module"
            module = context.model.module.get_submodule(layer.module)
            for channel in own:
                handle = removed(module, layer, channel, float(mean[channel]))
                columns.append(full - _largest(context, batches, tops))
                handle.remove()
    return np.stack(columns, 1)


def _largest(context: EffectsContext, batches: list[Tensor], tops: np.ndarray) -> np.ndarray:
    """Return one output of each image, (images,), by complete passes."""
    outputs = torch.cat([context.model.module(context.model.normalize(batch)) for batch in batches])
    return outputs[torch.arange(len(outputs)), torch.from_numpy(tops).long()].numpy()


def bare(model: Model, images: Tensor) -> None:
    """Forward and backward pass of the largest output, without anything else."""
    inputs = images.contiguous(memory_format=model.memory_format).requires_grad_()
    torch.autograd.grad(model.module(model.normalize(inputs)).amax(1).sum(), inputs)


def alternate(work: Callable[[], object], other: Callable[[], object], rounds: int = 8) -> tuple[float, float]:
    """Return the median seconds of both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            began = time.perf_counter()
            (work, other)[which]()
            seconds[which].append(time.perf_counter() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = parser_of(__doc__, images=16, units=40)
    parser.add_argument("--checked", type=int, default=4)
    options = parser.parse_args()
    network, layers, outputs, dataset, arrays = prepared(options)
    images = torch.from_numpy(np.stack(arrays[:64])).float() / 255
    means = mean_activations(network, layers, images)
    ablated = [spread(range(layer.channels), options.units) for layer in layers]
    context = EffectsContext(network, layers, outputs, means, ablated, dataset, 16)
    parts, differences, seconds, of_loop = [], [], 0.0, 0.0
    for start in range(0, options.images, 16):
        began = time.perf_counter()
        parts.append(measure(context, range(start, min(start + 16, options.images))))
        seconds += time.perf_counter() - began
        checked = min(start + 16, options.checked) - start
        if checked > 0:
            began = time.perf_counter()
            compared = torch.from_numpy(np.stack(arrays[start : start + checked])).float() / 255
            loop = by_loop(context, compared, parts[-1].top[:checked])
            of_loop += time.perf_counter() - began
            differences.append(np.abs(loop - parts[-1].ablations["mean"][0][:checked]).max())
    part = EffectsPart.joined(parts)
    units, scale = sum(map(len, ablated)), float(np.abs(part.ablations["mean"][0]).max())
    print(f"{units} units in {len(layers)} layers, {options.images} photographs: {seconds / options.images:.2f} s an")
    print(f"image, with both replacements and attributions. {options.checked} of them by a loop of complete passes for")
    print(f"one replacement: {of_loop / options.checked:.2f} s an image, largest difference {max(differences):.1e}")
    print(f"logits; largest effect {scale:.2f} logits")
    agreement(context, part)
    batch, channels = images[:16], sum(layer.channels for layer in layers)
    ours, plain = alternate(lambda: attribute(context, batch), lambda: bare(network, batch))
    rate = f"{len(batch) / ours:.1f} against {len(batch) / plain:.1f} images per second"
    print(f"attribution of {channels:,} channels: {plain / ours:.2f} of the bare forward and backward pass, {rate}")


def agreement(context: EffectsContext, part: EffectsPart) -> None:
    """Print a table of the agreement of attribution and ablation to the mean."""
    print("\n| layer | units | rank correlation, unit × image | of the units' means | mean absolute effect |")
    print("|---|---|---|---|---|")
    exact, first, unit = part.ablations["mean"][0], 0, 0
    for layer, own in zip(context.layers, context.ablated, strict=True):
        attribution = part.attribution[:, first : first + layer.channels][:, list(own)]
        effects = exact[:, unit : unit + len(own)]
        pairs = rank_correlation(attribution, effects)
        means = rank_correlation(attribution.mean(0), effects.mean(0))
        print(f"| {layer.name} | {len(own)} | {pairs:.2f} | {means:.2f} | {np.abs(effects).mean():.3f} |")
        first, unit = first + layer.channels, unit + len(own)


if __name__ == "__main__":
    main()
