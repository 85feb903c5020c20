"""Records of the connections of a unit, for the pages and the API."""

import base64
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline.site.data.js_shards import rounded_decimals, shortest_decimals
from pipeline.store.layer_view import LayerView
from pipeline.store.wiring import LISTS, SIDES, Wiring

# Places in the sheets of tiny images, by layer name and channel. The record of a unit that is not in the atlas has −1.
Places = Mapping[str, Mapping[int, int]]


def wiring_of(layer: LayerView, places: Places) -> Callable[[int], dict[str, Any]] | None:
    """Return a function from a row to the strongest connections of its unit, or None if the atlas has none."""
    wirings = {side: wiring for side in SIDES if (wiring := layer.connectivity(side)) is not None}
    if not wirings:
        return None
    records = {side: _side_of(wiring, places.get(wiring.layer, {})) for side, wiring in wirings.items()}
    return lambda row: {side: record_of(row) for side, record_of in records.items()}


def _side_of(wiring: Wiring, places: Mapping[int, int]) -> Callable[[int], dict[str, Any]]:
    """Return a function from a row to the connections of its unit on one side."""
    weights = tuple(shortest_decimals(array) for array in (wiring.norm, wiring.sum, wiring.strength))
    columns = {
        name: rounded_decimals(values)
        for name, values in (("residual", wiring.residual), ("attribution", wiring.attribution))
        if values is not None
    }

    def record_of(row: int) -> dict[str, Any]:
        connections = zip(wiring.channel[row].tolist(), *(values[row] for values in weights), strict=True)
        there = np.flatnonzero(wiring.channel[row] >= 0).tolist()
        units = [
            [channel, norm, total, places.get(channel, -1), strength]
            for channel, norm, total, strength in connections
            if channel >= 0
        ]
        record: dict[str, Any] = {"layer": wiring.layer, "scale": wiring.scale, "units": units}
        record |= {name: list(getattr(wiring, name)) for name in LISTS if getattr(wiring, name)}
        record |= {name: [values[row][k] for k in there] for name, values in columns.items()}
        if wiring.linearized:
            record["linearized"] = True
        if wiring.kernel is not None:
            kernels = wiring.kernel[row][there]
            record["kernels"] = {"size": list(kernels.shape[1:]), "values": [_coded(kernel) for kernel in kernels]}
        return record

    return record_of


def _coded(kernel: np.ndarray) -> str:
    """Return a kernel (h, w) as base64 of bytes: 128 is zero, 1 and 255 are ± its largest absolute value."""
    values = kernel.astype(np.float32)
    scale = float(np.abs(values).max(initial=0)) or 1.0
    return base64.b64encode((128 + np.rint(127 * values / scale)).astype(np.uint8).tobytes()).decode()


def attributed_of(layer: LayerView, places: Places) -> Callable[[int], dict[str, Any]] | None:
    """Return a function from a row to the unit's connections with the largest attributions, or None without any."""
    sides = {side: found for side in SIDES if (found := layer.attributed_connections(side)) is not None}
    if not sides:
        return None
    values = {side: rounded_decimals(found.value) for side, found in sides.items()}

    def record_of(row: int) -> dict[str, Any]:
        record = {}
        for side, found in sides.items():
            known = places.get(found.layer, {})
            pairs = zip(found.channel[row].tolist(), values[side][row], strict=True)
            units = [[channel, known.get(channel, -1), value] for channel, value in pairs if channel >= 0]
            record[side] = {"layer": found.layer, "images": found.images, "units": units}
        return record

    return record_of
