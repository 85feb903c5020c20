"""The dataset pass: one sweep over a range of photographs, all layers at once, nothing dumped.

Every layer's response is reduced inside the hook that sees it, so that no activation of a batch outlives its
layer. The result of a range can be merged with any other.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline import bands, photos, statistics, toplists
from pipeline.layers import Layer, capture
from pipeline.models import Model, Recipe
from pipeline.photos import Dataset
from pipeline.statistics import Tally
from pipeline.toplists import TopList


@dataclasses.dataclass(frozen=True)
class ExamplesConfig:
    """How many examples a channel keeps, and in what portions the dataset is read."""

    k: int = 8
    batch: int = 16
    per_task: int = 256
    jpeg_quality: int = 90


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a range of photographs gave: lists and tallies by layer name, and what could not be read."""

    tops: dict[str, TopList]
    tallies: dict[str, Tally]
    failed: tuple[tuple[int, str], ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by `<position of the layer>/<name>`, as they go into a shard."""
        found: dict[str, np.ndarray] = {}
        for i, name in enumerate(self.tops):
            found.update({f"{i}/max/{k}": v for k, v in self.tops[name].arrays().items()})
            found.update({f"{i}/tally/{k}": v for k, v in self.tallies[name].arrays().items()})
        found["failed/index"] = np.array([i for i, _ in self.failed], np.int32)
        found["failed/reason"] = np.array([reason for _, reason in self.failed], object)
        return found

    @classmethod
    def from_arrays(cls, layers: Sequence[str], arrays: dict[str, np.ndarray]) -> "Sweep":
        """The inverse of `arrays`, for the same layers in the same order."""
        tops, tallies = {}, {}
        for i, name in enumerate(layers):
            tops[name] = TopList(**{k: arrays[f"{i}/max/{k}"] for k in ("value", "index", "source", "y", "x")})
            keys = ("images", "total", "positive", "maximum", "best_mean")
            tallies[name] = Tally.from_arrays({k: arrays[f"{i}/tally/{k}"] for k in keys})
        failed = zip(arrays["failed/index"].tolist(), arrays["failed/reason"].tolist(), strict=True)
        return cls(tops, tallies, tuple(failed))


def sweep(
    model: Model,
    layers: Sequence[Layer],
    dataset: Dataset,
    start: int,
    end: int,
    config: ExamplesConfig,
    stop: Callable[[], None] = lambda: None,
) -> Sweep:
    """Examples and statistics of all channels of `layers` over photographs start … end - 1."""
    tops = {layer.name: TopList.empty(layer.channels, config.k) for layer in layers}
    tallies = {layer.name: Tally.empty(layer.channels) for layer in layers}
    failed: list[tuple[int, str]] = []
    device = next(model.module.parameters()).device
    rows = sources = np.zeros(0, np.int64)

    def reduce(layer: Layer, maps: Tensor) -> None:
        # The last batch was filled up to full size: its repeats are not photographs.
        real = maps[: len(rows)]
        new = toplists.candidates(real, rows, sources)
        tops[layer.name] = toplists.keep_top(tops[layer.name], new, config.k)
        tallies[layer.name] = tallies[layer.name] + statistics.tally(real)

    loaded = photos.load(dataset, range(start, end), model.recipe)
    with capture(model, layers, each=reduce) as forward, torch.no_grad():
        for indices, batch in photos.batches(loaded, config.batch, failed):
            stop()
            rows = np.asarray(indices)
            sources = np.array([dataset.photos[i].source for i in indices])
            # Always the same batch size: kernels chosen by size would round differently.
            full = np.concatenate([batch, np.repeat(batch[-1:], config.batch - len(batch), 0)])
            forward(torch.from_numpy(full).to(device).float() / 255)
    return Sweep(tops, tallies, tuple(failed))


def merge(sweeps: Sequence[Sweep], k: int) -> Sweep:
    """One result from several over disjoint ranges, given in the order of their photographs."""
    first = sweeps[0]
    tops = {name: toplists.merge([s.tops[name] for s in sweeps], k) for name in first.tops}
    tallies = {}
    for name in first.tallies:
        total = first.tallies[name]
        for other in sweeps[1:]:
            total = total + other.tallies[name]
        tallies[name] = total
    return Sweep(tops, tallies, tuple(f for s in sweeps for f in s.failed))


def shown(dataset: Dataset, indices: Sequence[int], recipe: Recipe, config: ExamplesConfig) -> dict[str, np.ndarray]:
    """The photographs that an atlas shows, as the network saw them: index, offset and one blob of JPEG bytes."""
    blobs, kept = [], []
    for index, array, _ in photos.load(dataset, sorted(indices), recipe):
        if array is None:  # pragma: no cover - a file that vanished since the pass
            continue
        image = bands.visible(array.transpose(1, 2, 0))
        with io.BytesIO() as buffer:
            image.save(buffer, "JPEG", quality=config.jpeg_quality, subsampling=0)
            blobs.append(buffer.getvalue())
        kept.append(index)
    return {
        "index": np.array(kept, np.int32),
        "offset": np.cumsum([0, *map(len, blobs)], dtype=np.int64),
        "jpeg": np.frombuffer(b"".join(blobs), np.uint8),
    }
