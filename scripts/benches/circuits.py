"""Check effective weights: against the response of the target to a finite change of the source, on photographs.

scripts/bench circuits [--model NAME] [--root ../shared/photos] [--images 16] [--pairs 60] [--seed 0]

For random pairs of the stored connections of a network, the source channel is raised by one standard deviation at all
positions, the rest of the network is run, and the mean change of the target (before its own activation function) over
positions and photographs is compared with the effective weight: the sum of the kernel times the deviation. By group:

- *linear*: no activation function lies between the two points at which the layers are read;
- *own activation*: only the one that reads the source;
- *further activations*: others too, as between most layers of a tour of the network.

Then the share of connections whose sign differs from the former wiring (unfolded weights, and norms of depthwise
kernels), of those that both list.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from effects import ROOT, load
from former_measures import connectivity as former_connectivity
from former_measures import is_depthwise
from torch import Tensor

from pipeline.data import image_loading
from pipeline.data.config import DataConfig
from pipeline.data.datasets import list_dataset
from pipeline.effects.rest_of_network import RestOfNetwork
from pipeline.layers.circuits import linearized
from pipeline.layers.circuits.paths import LinearPath
from pipeline.layers.circuits.search import find_circuits
from pipeline.layers.connections import Connectivity
from pipeline.layers.connectivity import find_connectivity
from pipeline.layers.finding import Layer, capture
from pipeline.layers.selection import LayersConfig, list_layers, select_layers
from pipeline.models.loading import Model

# Copies of an image in one pass.
COPIES = 16


@dataclasses.dataclass(frozen=True)
class Pair:
    """A stored connection: layers and channels, the effective sum, and the deviation of the source."""

    source: Layer
    target: Layer
    channels: tuple[int, int]
    sum: float
    deviation: float


def deviations_of(model: Model, layers: Sequence[Layer], images: Tensor) -> dict[str, np.ndarray]:
    """Return the standard deviation of every channel over images and positions, by layer."""
    with torch.no_grad(), capture(model, layers) as forward:
        maps = forward(images)
    return {name: values.float().std((0, 2, 3)).numpy() for name, values in maps.items() if values is not None}


def grouped(
    inputs: Mapping[str, Connectivity], layers: Mapping[str, Layer], scales: Mapping[str, np.ndarray]
) -> dict[str, list[Pair]]:
    """Return all stored connections to what layers read, by group."""
    groups: dict[str, list[Pair]] = {"linear": [], "own activation": [], "further activations": []}
    for name, found in inputs.items():
        source = layers[found.layer]
        own = 1 if source.rectified else 0
        gates = len(found.gated) if found.linearized else own
        group = "linear" if not gates else "own activation" if gates == own else "further activations"
        for row, column in np.argwhere(found.channel >= 0).tolist():
            channel = int(found.channel[row, column])
            deviation = float(scales[found.layer][channel])
            groups[group].append(Pair(source, layers[name], (channel, row), float(found.sum[row, column]), deviation))
    return groups


def chosen(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """Return some random pairs."""
    order = np.random.default_rng(seed).permutation(len(pairs))[:count]
    return [pairs[i] for i in order.tolist()]


def along_paths(model: Model, pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs with the sums of the linear path, which have the mean gates of all activation functions."""
    found: list[Pair] = []
    paths: dict[tuple[str, str], LinearPath] = {}
    for pair in pairs:
        link = (pair.source.name, pair.target.name)
        paths[link] = paths.get(link) or LinearPath(model, pair.source, pair.target)
        _, weights = next(paths[link].weights([pair.channels[1]]))
        found.append(dataclasses.replace(pair, sum=float(weights.sum[0, pair.channels[0]])))
    return found


def responses(model: Model, pairs: Sequence[Pair], images: Tensor) -> np.ndarray:
    """Return the mean change of each target over photographs and positions, if the source rises by a deviation."""
    found = np.zeros(len(pairs))
    for link in dict.fromkeys((pair.source.name, pair.target.name) for pair in pairs):
        own = [n for n, pair in enumerate(pairs) if (pair.source.name, pair.target.name) == link]
        rest = RestOfNetwork(model, [pairs[own[0]].source], pairs[own[0]].target)
        with torch.no_grad():
            for image in images:
                before = rest.record(image[None])
                for start in range(0, len(own), COPIES):
                    part = own[start : start + COPIES]

                    def raised(tensor: Tensor, part: Sequence[int] = part) -> Tensor:
                        changed = tensor.clone().contiguous()
                        maps = pairs[part[0]].source.maps(changed, len(part))
                        for copy, number in enumerate(part):
                            maps[copy, pairs[number].channels[0]] += pairs[number].deviation
                        return changed

                    after = rest.outputs_with(0, raised, len(part))
                    for copy, number in enumerate(part):
                        channel = pairs[number].channels[1]
                        found[number] += float(after[copy, channel] - before[0, channel]) / len(images)
    return found


def row(name: str, pairs: Sequence[Pair], measured: np.ndarray) -> str:
    """Return a row of the table."""
    expected = np.array([pair.sum * pair.deviation for pair in pairs])
    correlation = float(np.corrcoef(expected, measured)[0, 1])
    signs = float((np.sign(expected) == np.sign(measured)).mean())
    slope = float((expected * measured).sum() / (expected**2).sum())
    return f"| {name} | {len(pairs)} | {correlation:.3f} | {signs:.0%} | {slope:.2f} |"


def former_signs(model: Model, layers: Sequence[Layer], scales: Mapping[str, np.ndarray]) -> str:
    """Return how many connections of direct neighbours have another sign than in the former wiring."""
    # Depthwise convolutions lie between, as in an atlas whose layers they are not.
    listed = [layer for layer in layers if not is_depthwise(model.module.get_submodule(layer.name))]
    before, now = former_connectivity(model, listed)[0], find_connectivity(model, listed, scales)[0]
    differ = both = 0
    for name in now:
        signs = [
            {
                (r, int(found.channel[r, k])): np.sign(found.sum[r, k])
                for r, k in np.argwhere(found.channel >= 0).tolist()
            }
            for found in (before[name], now[name])
        ]
        common = signs[0].keys() & signs[1].keys()
        both += len(common)
        differ += sum(signs[0][pair] != signs[1][pair] for pair in common)
    return f"{differ:,} of {both:,} connections that both list have another sign than in the former wiring"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--root", default=str(ROOT.parent / "shared" / "photos"))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--units", type=int, default=24, help="target channels of each layer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = load(options.model)
    dataset = list_dataset(DataConfig("folder", options.root))
    numbers = dataset.draw(options.images).tolist()
    loaded = image_loading.load_images(dataset, sorted(numbers), model.preprocessing)
    images = torch.from_numpy(np.stack([one.array for one in loaded if one.array is not None])).float() / 255
    every = [layer for layer in list_layers(model, LayersConfig(), None) if layer.kind in ("conv", "linear")]
    tour = select_layers(model, every, LayersConfig(policy="tour"))
    print("| path | pairs | correlation | same sign | response ÷ weight |\n|---|---|---|---|---|")
    print(f"({len(images)} photographs)")
    for title, layers in {"convolutions": every, "tour": tour}.items():
        measure(title, model, layers, images, options)
    print(former_signs(model, every, deviations_of(model, every, images)))


def ungated(_function: Callable[[Tensor], Tensor], mean: Tensor, _deviation: Tensor) -> Tensor:
    """Return gates of activation functions that are left out, in place of `linearized.mean_gate`."""
    return torch.ones_like(mean)


def measure(title: str, model: Model, layers: Sequence[Layer], images: Tensor, options: argparse.Namespace) -> None:
    """Print the rows of some layers."""
    scales, began = deviations_of(model, layers, images), time.perf_counter()
    channels = [(layer, range(0, layer.channels, max(1, layer.channels // options.units))) for layer in layers]
    inputs, _ = find_circuits(model, channels, scales)
    seconds = time.perf_counter() - began
    for group, pairs in grouped(inputs, {layer.name: layer for layer in layers}, scales).items():
        some = chosen(pairs, options.pairs, options.seed)
        if len(some) < 3:
            continue
        measured = responses(model, some, images)
        print(row(f"{title}: {group}", some, measured), flush=True)
        if group == "own activation":
            print(row(f"{title}: {group}, with its mean gate", along_paths(model, some), measured), flush=True)
        if group == "further activations":
            usual, linearized.mean_gate = linearized.mean_gate, ungated
            print(row(f"{title}: {group}, left out", along_paths(model, some), measured), flush=True)
            linearized.mean_gate = usual
    print(f"({title}: weights in {seconds:.1f} s)")


if __name__ == "__main__":
    main()
