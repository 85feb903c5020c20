"""Receptive field, stride and offset of layers, found by probing with NaN.

Set the input's first x columns to NaN: exactly those units become NaN whose receptive field begins before
column x. NaN passes through convolution, normalisation, activation, pooling, addition, concatenation and
attention alike, so the answer is exact for any network, functional operations included. Sliding x over two
strides of the layer shows where its units' fields begin, and their distance; the same from the right where
they end. A layer whose last unit already sees the first column sees the whole image.
"""

from collections.abc import Sequence

import torch

from pipeline.layers import Field, Layer, capture
from pipeline.models import Model

BATCH = 16


def receptive_fields(model: Model, layers: Sequence[Layer]) -> dict[str, Field | None]:
    """Receptive field of each layer by name; None where a unit sees the whole image (or no map is left).

    Runs on the model's device, which must be the CPU: GPU kernels may smear NaN over a tile. A field larger
    than about twice the network's input cannot be told from the whole image and is reported as such.
    """
    mapped = [layer for layer in layers if layer.layout in ("maps", "maps_last") and min(layer.height, layer.width) > 1]
    found: dict[str, Field | None] = dict.fromkeys((layer.name for layer in layers), None)
    if not mapped:
        return found
    axes = []
    for axis in (0, 1) if not _isotropic(model) else (0,):
        first = _edges(model, mapped, axis, mirror=False)
        last = _edges(model, mapped, axis, mirror=True)
        axes.append({name: _join(first[name], last[name]) for name in first})
    for layer in mapped:
        rows, columns = axes[0][layer.name], axes[-1][layer.name]
        if rows is not None and columns is not None:
            found[layer.name] = Field((rows[0], columns[0]), (rows[1], columns[1]), (rows[2], columns[2]))
    return found


def _isotropic(model: Model) -> bool:
    """Whether rows and columns are treated alike by a square input and every kernel, so that one probe serves both."""
    for module in model.module.modules():
        for key in ("kernel_size", "stride", "padding", "dilation", "output_size"):
            value = getattr(module, key, None)
            if isinstance(value, tuple) and len(set(value)) > 1:
                return False
    return model.recipe.size[0] == model.recipe.size[1]


def _join(first: tuple[int, int, int] | None, last: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    """(size, stride, offset) along one axis from where one unit's field begins and another's ends."""
    if first is None or last is None or first[1] != last[1]:
        return None
    unit, stride, begin = first
    begin_of_zero = begin - stride * unit
    other, _, end = last
    return end - stride * other - begin_of_zero + 1, stride, begin_of_zero


def _edges(model: Model, layers: Sequence[Layer], axis: int, mirror: bool) -> dict[str, tuple[int, int, int] | None]:
    """For each layer (unit, stride, pixel): one unit along `axis` and where its field begins (ends, mirrored)."""
    length = model.recipe.size[axis]
    stride_bound = max(-(-length // (la.height, la.width)[axis]) for la in layers)
    probes = list(range(1, min(2 * stride_bound + 2, length)))
    touched: dict[str, list[int]] = {layer.name: [] for layer in layers}

    def count(layer: Layer, maps: torch.Tensor) -> None:
        # NaN of any channel counts; units along the axis, all others reduced.
        nan = maps.isnan().amax(dim=(1, 2 + (1 - axis)))
        touched[layer.name] += nan.sum(dim=1).tolist()

    with capture(model, layers, each=count) as forward, torch.no_grad():
        for start in range(0, len(probes), BATCH):
            chunk = probes[start : start + BATCH]
            images = torch.full((len(chunk), model.recipe.channels, *model.recipe.size), 0.5)
            for image, x in zip(images, chunk, strict=True):
                stripe = slice(length - x, length) if mirror else slice(0, x)
                image[(slice(None), stripe) if axis == 0 else (slice(None), slice(None), stripe)] = torch.nan
            forward(images)
    edges: dict[str, tuple[int, int, int] | None] = {}
    for layer in layers:
        counts = touched[layer.name]
        units = (layer.height, layer.width)[axis]
        # Probe x adds unit n - 1 to the touched ones: its field begins at column x - 1.
        steps = [(n, x - 1) for n, before, x in zip(counts[1:], counts[:-1], probes[1:], strict=True) if n > before]
        if len(steps) < 2 or counts[0] >= units:
            edges[layer.name] = None
            continue
        (n1, p1), (n2, p2) = steps[0], steps[1]
        stride, remainder = divmod(p2 - p1, n2 - n1)
        if remainder:
            edges[layer.name] = None
        elif mirror:
            edges[layer.name] = (units - n1, stride, length - 1 - p1)
        else:
            edges[layer.name] = (n1 - 1, stride, p1)
    return edges
