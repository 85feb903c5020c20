"""Which images and units the effects of a run are measured for."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pipeline.data.datasets import Dataset
from pipeline.effects.config import EffectsConfig
from pipeline.effects.relevance import STEPS
from pipeline.effects.results import REPLACEMENTS
from pipeline.layers.dictionaries import channel_layers
from pipeline.layers.finding import Layer


@dataclasses.dataclass(frozen=True)
class EffectsRequest:
    """What is measured.

    Attributes:
        outputs: Layer of the outputs.
        images: Dataset images, ascending.
        layers: Layers whose units are measured.
        ablated: Channels of each layer that are ablated.
        batch: Images in one forward pass.
        channels: Channels of each layer that are in the atlas.
        examples: Number of images per unit that are listed by relevance.
        connected: Dataset images over which connections are measured, ascending.
    """

    outputs: Layer
    images: tuple[int, ...]
    layers: tuple[Layer, ...]
    ablated: tuple[tuple[int, ...], ...]
    batch: int
    channels: tuple[tuple[int, ...], ...] = ()
    examples: int = 0
    connected: tuple[int, ...] = ()

    @property
    def passes(self) -> float:
        """Estimated work for one image, in forward passes through the whole network.

        A backward pass counts as two. With ablated units one pass is recorded, and there is one from the layer on for
        each unit and replacement.
        """
        total = self._total_cost
        pairs = zip(self.layers, self.ablated, strict=True)
        removed = sum(len(own) * len(REPLACEMENTS) * (1 - layer.cost / total) for layer, own in pairs)
        return 3 + any(self.ablated) + removed

    @property
    def relevance_passes(self) -> float:
        """Estimated work for one image of the lists by relevance, in forward passes through the whole network.

        An image is read for each pair at the worst, with a forward and a backward pass, and `STEPS` + 1 forward passes;
        a pair has a backward pass over `STEPS` images as far as the layer.
        """
        total = self._total_cost
        costs = [len(own) * layer.cost / total for layer, own in zip(self.layers, self.channels, strict=True)]
        return 3 + 1 + STEPS + self.examples * sum(costs) * 2 * STEPS / max(1, self.relevant_images)

    @property
    def connection_passes(self) -> float:
        """Estimated work for the connections of one image, in forward passes through the whole network.

        Each unit of the atlas has a backward pass to the layer before; a backward pass counts as two.
        """
        costs = [layer.cost / self._total_cost for layer in self.layers]
        backward = sum(
            2 * len(own) * max(0.0, cost - before)
            for own, cost, before in zip(self.channels[1:], costs[1:], costs, strict=False)
        )
        return 3 + backward

    @property
    def relevant_images(self) -> int:
        """The largest possible number of images in the lists by relevance."""
        return min(len(self.images), self.examples * sum(map(len, self.channels)))

    @property
    def _total_cost(self) -> float:
        return max(self.outputs.cost, *(layer.cost for layer in self.layers), 1.0)


def request_effects(
    config: EffectsConfig,
    dataset: Dataset,
    layers: Sequence[tuple[Layer, Sequence[int]]],
    candidates: Sequence[Layer],
    logits: Sequence[Layer],
) -> EffectsRequest | None:
    """Return what a run measures; None without images, or if all its layers are outputs or have no effects.

    Args:
        config: The settings.
        dataset: The dataset, of whose images those with the lowest hashes of their paths are chosen, at most one of a
            source.
        layers: Layers of the run, with the channels of the atlas.
        candidates: All layers of the network, in its order.
        logits: Layers of logits; without, the outputs are the last of `candidates`.
    """
    outputs = (logits or channel_layers(candidates))[-1]
    ends = [layer.place for layer in (*logits, outputs)]
    measured = [(layer, channels) for layer, channels in layers if layer.place not in ends and layer.has_effects]
    if not config.images or not measured:
        return None
    return EffectsRequest(
        outputs,
        choose_images(dataset, config.images),
        tuple(layer for layer, _ in measured),
        tuple(spread(channels, config.ablated) for _, channels in measured),
        config.batch,
        tuple(tuple(channels) for _, channels in measured),
        config.examples,
        choose_images(dataset, min(config.connections, config.images)) if config.connections else (),
    )


def choose_images(dataset: Dataset, count: int) -> tuple[int, ...]:
    """Return at most `count` images, ascending: those with the lowest hashes of their paths, one of each source."""
    total, drawn = len(dataset.images), 4 * count
    while True:
        order = dataset.draw(min(drawn, total))
        sources = order if dataset.sources is None else dataset.sources[order]
        first = np.sort(np.unique(sources, return_index=True)[1])[:count]
        if len(first) == count or drawn >= total:
            return tuple(sorted(order[first].tolist()))
        drawn *= 4


def spread(channels: Sequence[int], count: int) -> tuple[int, ...]:
    """Return at most `count` of the channels, evenly spaced."""
    places = np.unique(np.linspace(0, len(channels) - 1, min(count, len(channels))).round().astype(int))
    return tuple(channels[place] for place in places)
