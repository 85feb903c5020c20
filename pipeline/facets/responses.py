"""One forward pass over dataset images: the examples of units, and the responses of other layers to them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.acceleration.precision import ieee
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.effects.measurement import full_batch, grouped
from pipeline.examples import topk
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model


@dataclasses.dataclass(frozen=True)
class ResponsesPart:
    """What one part of the dataset contributes to the examples of units.

    Attributes:
        index: Images whose responses are kept, ascending, (n,) int32: those in a list of this part, and the reference.
        responses: For each layer that is read, responses of these images, (n, D) float32.
        keys: For each layer with facets, the images of this part with the highest mean activation of each of its U
            units, as keys of `topk`, (U, k) int64.
        failed: Images that could not be read, with the reason.
    """

    index: np.ndarray
    responses: tuple[np.ndarray, ...]
    keys: tuple[np.ndarray, ...]
    failed: tuple[tuple[int, str], ...] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as a shard stores them."""
        arrays = {"index": self.index}
        arrays |= {f"responses/{i}": array for i, array in enumerate(self.responses)}
        arrays |= {f"keys/{i}": array for i, array in enumerate(self.keys)}
        arrays["failed/index"] = np.array([i for i, _ in self.failed], np.int32)
        arrays["failed/reason"] = np.array([reason for _, reason in self.failed], object)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ResponsesPart":
        """Create from the result of `arrays`."""
        failed = zip(arrays["failed/index"].tolist(), map(str, arrays["failed/reason"].tolist()), strict=True)
        numbered = [
            tuple(arrays[f"{kind}/{i}"] for i in range(sum(name.startswith(f"{kind}/") for name in arrays)))
            for kind in ("responses", "keys")
        ]
        return cls(arrays["index"], numbered[0], numbered[1], tuple(failed))

    @classmethod
    def merged(cls, parts: Sequence["ResponsesPart"], k: int, sources: np.ndarray | None) -> "ResponsesPart":
        """Return disjoint parts as one, with lists of length k and at most one image of each source."""
        order = np.argsort(np.concatenate([part.index for part in parts]), kind="stable")
        return cls(
            np.concatenate([part.index for part in parts])[order],
            tuple(np.concatenate(own)[order] for own in zip(*(part.responses for part in parts), strict=True)),
            tuple(topk.merge(own, k, sources) for own in zip(*(part.keys for part in parts), strict=True)),
            tuple(one for part in parts for one in part.failed),
        )


@dataclasses.dataclass(frozen=True)
class ResponsesContext:
    """What the pass needs besides the images.

    Attributes:
        model: The network.
        layers: Layers with facets.
        channels: Channels of their units.
        embeddings: Layers whose responses are kept.
        reference: Images whose responses are kept in any case.
        count: Number of examples of a unit.
        dataset: The dataset.
        batch: Images in one forward pass.
        stop: Called before every batch; raises an exception to interrupt the work.
        threads: Number of threads that decode images.
    """

    model: Model
    layers: Sequence[Layer]
    channels: Sequence[Sequence[int]]
    embeddings: Sequence[Layer]
    reference: Sequence[int]
    count: int
    dataset: Dataset
    batch: int
    stop: Callable[[], None] = lambda: None
    threads: int = 2


def pooled(maps: Tensor, rectified: bool) -> Tensor:
    """Return the responses of a layer to images: spatial means (B, D) float32 of maps (B, D, H, W).

    They are those behind the rectifier, where one reads or made the layer: what the next layer gets.
    """
    maps = maps.float()
    return (maps.clamp(min=0) if rectified else maps).mean((2, 3))


@ieee(deterministic=True)
def measure_responses(context: ResponsesContext, indices: Sequence[int]) -> ResponsesPart:
    """Return the images of a part of the dataset with the highest mean activations of each unit, and their responses.

    Responses of images that have left all lists are dropped after each batch, so that memory does not grow with the
    number of images. Batches are cut at multiples of `context.batch` from the first image on, and are full: parts that
    begin at such multiples give the same values as one part.
    """
    failed: list[tuple[int, str]] = []
    lists = [topk.empty(len(own), context.count) for own in context.channels]
    kept = _Kept([layer.channels for layer in context.embeddings], context.reference)
    captured = list({layer.name: layer for layer in (*context.layers, *context.embeddings)}.values())
    loaded = image_loading.load_images(context.dataset, indices, context.model.preprocessing, context.threads)
    with torch.no_grad(), capture(context.model, captured) as run:
        for items in grouped(loaded, context.batch):
            read = [(item.index, item.array) for item in items if item.array is not None]
            failed += [(item.index, item.reason) for item in items if item.array is None]
            if not read:
                continue
            context.stop()
            numbers = np.array([index for index, _ in read], np.int32)
            maps = run(full_batch([array for _, array in read], context.batch, context.model.device))
            for i, (layer, own) in enumerate(zip(context.layers, context.channels, strict=True)):
                means = maps[layer.name][: len(read), list(own)].float().mean((2, 3))
                values = torch.nan_to_num(means, nan=-torch.inf).cpu().numpy()
                lists[i] = topk.update(lists[i], values, numbers, context.dataset.sources)
            answers = [pooled(maps[e.name][: len(read)], e.rectified).cpu().numpy() for e in context.embeddings]
            kept.add(numbers, answers)
            kept.keep_only(lists)
    return ResponsesPart(kept.index, tuple(kept.responses), tuple(lists), tuple(failed))


class _Kept:
    """Responses of the images that are in a list, or are reference images.

    Args:
        widths: Number of channels of each layer whose responses are kept.
        reference: Images that are kept in any case.
    """

    def __init__(self, widths: Sequence[int], reference: Sequence[int]) -> None:
        self.index = np.zeros(0, np.int32)
        self.responses = [np.zeros((0, width), np.float32) for width in widths]
        self._reference = np.asarray(reference, np.int32)

    def add(self, index: np.ndarray, responses: Sequence[np.ndarray]) -> None:
        """Add the responses of further images, whose numbers are higher than those before."""
        self.index = np.concatenate([self.index, index])
        self.responses = [np.concatenate(pair) for pair in zip(self.responses, responses, strict=True)]

    def keep_only(self, lists: Sequence[np.ndarray]) -> None:
        """Drop the responses of images that are in none of the lists of keys."""
        listed = np.unique(np.concatenate([topk.decode(keys)[1].ravel() for keys in lists]))
        chosen = np.isin(self.index, listed) | np.isin(self.index, self._reference)
        if not chosen.all():
            self.index = self.index[chosen]
            self.responses = [array[chosen] for array in self.responses]
