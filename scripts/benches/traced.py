"""Check units of a built site against atlas.h5: all numbers of their pages, and the visualizations by their digests.

scripts/bench traced runs/NAME [--units 20] [--seed 0]

Numbers are those of the data shards that pages read; each has to be the stored float32. Visualizations are traced in
two steps: the pixels in atlas.h5 have the stored sha256, and the part of the site's sheet differs from them by the loss
of the encoder only. It ends with exit status 1 if anything differs.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.site.media.sprites import shrunk
from pipeline.store.hdf5 import image_digests
from pipeline.store.layer_view import LayerView
from pipeline.store.reader import open_atlas
from pipeline.store.shards import safe_name

# Largest mean difference of a visualization in the site from the stored one, in levels of 255, and how much smaller it
# has to be than the difference from that of any other unit of the sheet.
LOSS, MARGIN = 20.0, 0.8


def shard(site: Path, name: str) -> Any:
    """Return the content of a data shard."""
    found = re.fullmatch(r"ATLAS\.put\(\"[^\"]*\",(.*)\);\n", (site / "data" / f"{name}.js").read_text(), re.DOTALL)
    assert found, name
    return json.loads(found[1])


class Check:
    """Counts what was compared, and keeps what differs."""

    def __init__(self) -> None:
        self.compared = {"numbers": 0, "visualizations": 0, "dataset examples": 0}
        self.faults: list[str] = []

    def number(self, where: str, shown: Any, stored: Any) -> None:
        """Compare a shown number with the stored one."""
        self.compared["numbers"] += 1
        value = np.asarray(stored)
        if shown is None:
            same = not np.isfinite(value)
        elif value.dtype.kind == "f":
            same = np.float32(shown) == np.float32(value)
        else:
            same = str(shown) == str(value)
        if not same:
            self.faults.append(f"{where}: {shown} on the page, {value} in atlas.h5")

    def unit(self, site: Path, layer: LayerView, row: int, sizes: dict[str, Any], suffix: str) -> None:
        """Check one unit."""
        slug, name = safe_name(layer.name), f"{layer.name}:{layer.channels[row]}"
        start = row - row % sizes["shard"]
        record = shard(site, f"{slug}/u{start}")["units"][row - start]
        facts = shard(site, f"{slug}/layer")
        for key, values in layer.stats().items():
            self.number(f"{name} {key}", record["stats"][key], values[row])
        for list_name, entries in record.get("examples", {}).items():
            held = layer.examples(list_name)
            assert held is not None
            stored = {(int(i), float(v)) for i, v in zip(held.index[row], held.value[row], strict=True)}
            for entry in filter(None, entries):
                self.compared["dataset examples"] += 1
                if (entry[1], float(np.float32(entry[0]))) not in stored:
                    self.faults.append(f"{name} {list_name}: {entry[:2]} is no stored example")
        for number, rendered in enumerate(facts["rendered"]):
            self._numbers_of(layer, rendered["key"], row, record, name)
            self._visualization(site / "media" / slug, layer, (number, row), rendered, (name, suffix))

    def _numbers_of(self, layer: LayerView, key: str, row: int, record: dict[str, Any], name: str) -> None:
        numbers = layer.measurements(key)
        if str(layer.render_attributes(key).get("digest", "")) == "":
            self.faults.append(f"{name} {key}: no digest")
        for variant, shown in enumerate(record["pictures"][key]):
            for metric in shown.keys() & numbers.keys() - {"trace", "reason"}:
                self.number(f"{name} {key} {metric}", shown[metric], numbers[metric][row, variant])

    def _visualization(
        self, media: Path, layer: LayerView, at: tuple[int, int], rendered: dict[str, Any], named: tuple[str, str]
    ) -> None:
        (number, row), (name, suffix) = at, named
        per, variants, columns, width, height = rendered["sheet"]
        group = layer.images(rendered["key"])
        start = row - row % per
        with Image.open(media / f"p{number}-{start}.{suffix}") as opened:
            sheet = np.asarray(opened.convert("RGB"), float)
        status = layer.measurements(rendered["key"], ("status",))["status"]
        for variant in range(variants):
            if status[row, variant] == "missing":
                continue
            self.compared["visualizations"] += 1
            stored = group[row : row + 1, variant : variant + 1]
            expected = layer.image_digests(rendered["key"])
            if expected is None or not np.array_equal(image_digests(stored)[0, 0], expected[row, variant]):
                self.faults.append(f"{name}: the stored image does not have its sha256")
            own = np.asarray(shrunk(stored[0, 0], height, width), float)
            differences = {}
            for cell in range(min(per, len(layer.channels) - start) * variants):
                x, y = cell % columns * width, cell // columns * height
                differences[cell] = float(np.abs(sheet[y : y + height, x : x + width] - own).mean())
            here = (row - start) * variants + variant
            others = [d for cell, d in differences.items() if cell != here]
            if differences[here] > LOSS or (others and differences[here] > MARGIN * min(others)):
                self.faults.append(f"{name}: the site shows another image, {differences[here]:.1f} levels from its own")


def main() -> int:
    """Check units of a site; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--units", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    site, check = options.run / "site", Check()
    index = shard(site, "index")
    with open_atlas(options.run) as atlas:
        units = [(layer.name, row) for layer in atlas for row in range(len(layer.channels))]
        drawn = np.random.default_rng(options.seed).permutation(len(units))[: options.units]
        for i in sorted(drawn.tolist()):
            name, row = units[i]
            check.unit(site, atlas[name], row, index["sizes"], index["suffix"])
    counts = ", ".join(f"{count:,} {what}" for what, count in check.compared.items())
    sys.stdout.write(f"{len(drawn)} units: {counts} compared, {len(check.faults)} differences\n")
    sys.stdout.write("".join(f"{fault}\n" for fault in check.faults))
    return 1 if check.faults else 0


if __name__ == "__main__":
    sys.exit(main())
