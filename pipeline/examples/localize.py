"""The second look: which photographs stand for each unit, and what exactly the unit did on them.

The pass keeps numbers only. When it is complete, the winners are known, and one more forward pass over them alone
gives places, heat-maps and the pictures to show.
"""

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pipeline.data import crops, image_loading, multiband
from pipeline.data.datasets import Dataset
from pipeline.examples import quantile_examples, topk
from pipeline.examples.sweep import LISTS, ExamplesConfig, PassResult
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model
from pipeline.visualization import metrics

# So many of a unit's strongest and weakest photographs have the answers of the whole layer kept: their mean is what a
# picture is held against. Of k each, that would be more than everything else that the pass keeps.
TOP = 4

# Side of the copy that crops are cut from, when only crops are kept.
CUT_FROM = 1024


@dataclasses.dataclass(frozen=True)
class TopExamples:
    """Examples of one layer's C' channels, by list: (value float32, index int32), (C', k); NaN and −1 for none.

    The list `spectrum` has its quantile bins one after the other, each with the same number of places.
    """

    channels: np.ndarray
    lists: Mapping[str, tuple[np.ndarray, np.ndarray]]

    def pairs(self) -> np.ndarray:
        """(P, 3) int32: every image and row that stand in any list, once, by image, then row; 1 if only in `min`."""
        found = []
        for name, (_, index) in self.lists.items():
            row = np.broadcast_to(np.arange(len(index))[:, None], index.shape)[index >= 0]
            found.append(np.stack([index[index >= 0], row, np.full(len(row), int(name == "min"))], 1))
        everyone = np.unique(np.concatenate(found), axis=0).astype(np.int32)
        # Of (image, row, 0) and (image, row, 1) the first stays.
        return everyone[np.r_[True, (everyone[1:, :2] != everyone[:-1, :2]).any(1)]] if len(everyone) else everyone

    def top(self, negative: bool = False) -> np.ndarray:
        """(C', at most TOP) photographs that a unit answers most strongly, or most weakly; −1 for none."""
        return self.lists["min" if negative else "max"][1][:, :TOP]


def choose(
    swept: PassResult, layers: Sequence[tuple[Layer, Sequence[int]]], dataset: Dataset, config: ExamplesConfig
) -> list[TopExamples]:
    """What an atlas shows of each layer's channels.

    A channel that never rose above zero gets no example but of its lowest responses, and a response of exactly zero,
    which is what a rectifier leaves of nothing, is never an example in a list of extremes: such entries would be
    arbitrary.
    """
    sources = np.arange(len(dataset.photos)) if dataset.sources is None else dataset.sources
    found, start = [], 0
    for layer, channels in layers:
        own = np.asarray(channels)
        at = start + own
        silent = ~(swept.tally.max[at] > 0)[:, None]
        lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in LISTS:
            value, index = topk.decode(swept.tops[name][at])
            value = -value if name == "min" else value
            arbitrary = (value == 0) | (silent & (name != "min"))
            lists[name] = np.where(arbitrary, np.float32(np.nan), value), np.where(arbitrary, -1, index)
        value, index = quantile_examples.spectrum(
            swept.responses[:, at],
            swept.responses_index,
            sources[swept.responses_index],
            own,
            config.spectrum,
            config.per_bin,
        )
        value, index = value.reshape(len(own), -1), index.reshape(len(own), -1)
        lists["spectrum"] = np.where(silent, np.float32(np.nan), value), np.where(silent, -1, index)
        found.append(TopExamples(own.astype(np.int32), lists))
        start += layer.channels
    return found


@dataclasses.dataclass(frozen=True)
class SecondPassIndex:
    """Who is looked at again: for each layer its channels (C',), pairs (P, 3), by image, and `top` (m,) int32.

    `top` are the images, rising, to which the answers of the whole layer are kept.
    """

    channels: tuple[np.ndarray, ...]
    pairs: tuple[np.ndarray, ...]
    top: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, chosen: Sequence[TopExamples]) -> "SecondPassIndex":
        """Of what was chosen of each layer."""
        tops = [np.unique(np.concatenate([c.top().ravel(), c.top(True).ravel()])) for c in chosen]
        return cls(
            tuple(c.channels for c in chosen),
            tuple(c.pairs() for c in chosen),
            tuple(top[top >= 0].astype(np.int32) for top in tops),
        )

    def part(self, first: int, last: int) -> "SecondPassIndex":
        """The same for the images `first` to `last` alone, both included."""

        def inside(images: np.ndarray) -> slice:
            return slice(*np.searchsorted(images, [first, last + 1]))

        return SecondPassIndex(
            self.channels,
            tuple(p[inside(p[:, 0])] for p in self.pairs),
            tuple(t[inside(t)] for t in self.top),
        )

    @property
    def images(self) -> np.ndarray:
        """All images in any pair, rising."""
        return np.unique(np.concatenate([np.zeros(0, np.int32), *(p[:, 0] for p in self.pairs)]))

    def arrays(self) -> dict[str, np.ndarray]:
        """As they go into a shard."""
        parts = {"channels": self.channels, "pairs": self.pairs, "top": self.top}
        return {f"{i}/{name}": array for name, arrays in parts.items() for i, array in enumerate(arrays)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "SecondPassIndex":
        """The inverse of `arrays`."""
        count = sum(name.endswith("/pairs") for name in arrays)
        return cls(*(tuple(arrays[f"{i}/{what}"] for i in range(count)) for what in ("channels", "pairs", "top")))


def localize(
    model: Model,
    layers: Sequence[Layer],
    winners: SecondPassIndex,
    images: Sequence[int],
    dataset: Dataset,
    config: ExamplesConfig,
    stop: Callable[[], None] = lambda: None,
    threads: int = 2,
) -> dict[str, np.ndarray]:
    """Places, heat-maps and pictures of the pairs of `images`, as they go into a shard.

    For layer i: `i/pairs` (p, 3), `i/place` (p, 4) int16 (y and x of the maximum, y and x of the minimum), `i/range`
    (p, 2) float32 and `i/map` (p, h, w) uint8, 0 and 255 standing for the range's ends; `i/top` (m,) int32, those of
    `winners.top`, and `i/answer` (m, C) float16, the largest answers of all the layer's channels to them. For the
    pictures:
    `shown/index`, `shown/size` (width, height), `shown/box` (the part that became the input) and the JPEG bytes with
    their offsets, one an image (`shown/offset`) or, for crops, one a pair (`i/offset`); none for ids.
    """
    device = next(model.module.parameters()).device
    place = {layer.name: i for i, layer in enumerate(layers)}
    found: dict[int, list[dict[str, np.ndarray]]] = {i: [] for i in range(len(layers))}
    rows_of = [{image: pairs[a:b, 1:] for image, a, b in _runs(pairs[:, 0], images)} for pairs in winners.pairs]
    tops = [set(top.tolist()) for top in winners.top]
    answers: dict[int, list[tuple[int, np.ndarray]]] = {i: [] for i in range(len(layers))}
    current: Sequence[image_loading.Loaded] = ()

    def reduce(layer: Layer, maps: Tensor) -> None:
        i = place[layer.name]
        which = [(b, item.index, rows_of[i][item.index]) for b, item in enumerate(current) if item.index in rows_of[i]]
        if not which:
            return
        batch = torch.tensor(np.concatenate([np.full(len(rows), b) for b, _, rows in which]))
        rows, lowest = np.concatenate([rows for _, _, rows in which]).T
        channel = torch.tensor(winners.channels[i][rows], dtype=torch.int64)
        own = maps[batch.to(device), channel.to(device)].float()  # (p, H, W)
        pairs = np.stack([np.concatenate([np.full(len(r), image) for _, image, r in which]), rows, lowest], 1)
        found[i].append({"pairs": pairs.astype(np.int32), **_measured(own, config.maps)})
        top = [b for b, item in enumerate(current) if item.index in tops[i]]
        if top:
            peaks = maps[top].float().flatten(2).amax(2)
            answers[i] += zip((current[b].index for b in top), metrics.kept(peaks), strict=True)

    def whole(index: int, image: Image.Image | multiband.Bands) -> dict[str, Any]:
        box = image_loading.input_box(image.size, dataset.photos[index].box, model.recipe)[2]
        side = {"images": config.side, "crops": CUT_FROM}.get(config.store, 1)
        shown = image.copy() if isinstance(image, Image.Image) else image.visible()
        shown.thumbnail((side, side), Image.Resampling.LANCZOS)
        return {"size": image.size, "box": box, "image": shown}

    indices: list[int] = []
    sizes: list[tuple[int, int]] = []
    boxes: list[tuple[float, float, float, float]] = []
    blobs: list[bytes] = []
    cuts: dict[int, dict[tuple[int, int], bytes]] = {i: {} for i in range(len(layers))}
    failed: list[tuple[int, str]] = []
    loaded = image_loading.load(dataset, images, model.recipe, threads, whole)
    with capture(model, layers, each=reduce) as forward, torch.no_grad():
        for items, batch in image_loading.batches(loaded, config.batch, failed):
            stop()
            current = items
            full = np.concatenate([batch, np.repeat(batch[-1:], config.batch - len(batch), 0)])
            forward(torch.from_numpy(full).to(device).float() / 255)
            for item in items:
                indices.append(item.index)
                sizes.append(item.extra["size"])
                boxes.append(item.extra["box"])
                if config.store == "images":
                    blobs.append(jpeg(item.extra["image"], config.jpeg_quality))
            if config.store == "crops":
                extras = {item.index: item.extra for item in items}
                for i, layer in enumerate(layers):
                    for part in found[i][-1:]:
                        for pair, at in zip(part["pairs"].tolist(), part["place"].tolist(), strict=True):
                            if pair[0] in extras:
                                cuts[i][pair[0], pair[1]] = _cut(
                                    layer, at[2:] if pair[2] else at[:2], extras[pair[0]], model, config
                                )
    arrays: dict[str, np.ndarray] = {
        "shown/index": np.array(indices, np.int32),
        "shown/size": np.array(sizes, np.int32).reshape(-1, 2),
        "shown/box": np.array(boxes, np.float32).reshape(-1, 4),
        "shown/lost": np.array([i for i, _ in failed], np.int32),
    }
    if config.store == "images":
        arrays |= blob("shown/", blobs)
    for i, layer in enumerate(layers):
        small = (min(layer.height, config.maps), min(layer.width, config.maps))
        nothing = {
            "pairs": np.zeros((0, 3), np.int32),
            "place": np.zeros((0, 4), np.int16),
            "range": np.zeros((0, 2), np.float32),
            "map": np.zeros((0, *small), np.uint8),
        }
        parts = [nothing, *found[i]]
        arrays |= {f"{i}/{name}": np.concatenate([p[name] for p in parts]) for name in nothing}
        arrays[f"{i}/top"] = np.array([image for image, _ in answers[i]], np.int32)
        arrays[f"{i}/answer"] = np.array([a for _, a in answers[i]], np.float16).reshape(-1, layer.channels)
        if config.store == "crops":
            arrays |= blob(f"{i}/", [cuts[i][int(a), int(b)] for a, b, _ in arrays[f"{i}/pairs"]])
    return arrays


def _runs(sorted_images: np.ndarray, images: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    """(image, first row, row after the last) of each of `images` in a rising column."""
    starts = np.searchsorted(sorted_images, images, "left").tolist()
    ends = np.searchsorted(sorted_images, images, "right").tolist()
    return ((int(i), a, b) for i, a, b in zip(images, starts, ends, strict=True) if b > a)


def _measured(maps: Tensor, side: int) -> dict[str, np.ndarray]:
    """Places, ranges and small copies of (p, H, W) maps."""
    height, width = maps.shape[1:]
    flat = maps.flatten(1)
    peak, low = flat.argmax(1), flat.argmin(1)
    places = torch.stack([peak // width, peak % width, low // width, low % width], 1)
    small = functional.adaptive_avg_pool2d(maps[:, None], (min(height, side), min(width, side)))[:, 0]
    ends = torch.stack([small.amin((1, 2)), small.amax((1, 2))], 1)
    span = (ends[:, 1] - ends[:, 0]).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = ((small - ends[:, :1, None]) / span[:, None, None] * 255).round().clamp(0, 255)
    return {
        "place": places.cpu().numpy().astype(np.int16),
        "range": ends.cpu().numpy(),
        "map": scaled.to(torch.uint8).cpu().numpy(),
    }


def _cut(layer: Layer, place: Sequence[int], extra: Mapping[str, Any], model: Model, config: ExamplesConfig) -> bytes:
    """What one unit saw of a picture, and no more of it; small and whole where it saw everything."""
    limits = model.recipe.size
    box = (0, 0, limits[1], limits[0])
    if layer.field is not None:
        box = crops.seen(place[0], place[1], layer.field.size, layer.field.stride, layer.field.offset, limits)
    image = extra["image"]
    part = image.crop(crops.in_picture(box, limits, extra["box"], extra["size"], image.size))
    part.thumbnail((config.crop_side, config.crop_side), Image.Resampling.LANCZOS)
    return jpeg(part, config.jpeg_quality)


def jpeg(image: Image.Image, quality: int) -> bytes:
    """A picture as JPEG bytes, without metadata."""
    with io.BytesIO() as buffer:
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        return buffer.getvalue()


def blob(prefix: str, pieces: Sequence[bytes]) -> dict[str, np.ndarray]:
    """`<prefix>jpeg`, all bytes in a row, and `<prefix>offset`, where each begins and the last ends."""
    offset = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return {f"{prefix}jpeg": np.frombuffer(b"".join(pieces), np.uint8), f"{prefix}offset": offset}
