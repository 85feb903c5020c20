"""The files of the page `own-image.html`: the network, the runtime and the histograms, as scripts.

Pages from disk can fetch no files, so binary data are base64 in scripts, compressed, and cut into parts that every host
takes.
"""

import base64
import dataclasses
import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import AtlasError
from pipeline.core.hashing import digest_of
from pipeline.core.source import package_digest
from pipeline.site import output
from pipeline.site.config import SiteConfig
from pipeline.site.data.js_shards import shard_script, shortest_decimals, to_json
from pipeline.site.own_image import runtime
from pipeline.site.own_image.network import OnnxNetwork
from pipeline.store.layer_view import Histogram
from pipeline.store.reader import Atlas
from pipeline.store.shards import safe_name

FOLDER = "data/own-image"
# Characters of base64 in one file; a multiple of 4, so that each part can be decoded alone.
PART = 4_000_000

Export = Callable[[Atlas], OnnxNetwork]


@dataclasses.dataclass(frozen=True)
class OwnImage:
    """The files of the page.

    Attributes:
        key: Digest of what they are made from; "" without the page.
        files: Contents by path from the root of the site; empty if those of the previous build are taken over.
        previous: Root of the previous site if its files are taken over.
        missing: Why the page is left out although it was asked for; "" if it is not.
        notes: What is to be said about the page.
    """

    key: str = ""
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    previous: Path | None = None
    missing: str = ""
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self._kept()) or len(self.files)

    @property
    def bytes(self) -> int:
        """Size of the files in bytes."""
        return sum(path.stat().st_size for path in self._kept()) or sum(map(len, self.files.values()))

    def write(self, root: Path) -> None:
        """Write the files below `root`."""
        if self.previous is not None:
            output.adopt(self.previous, root, FOLDER)
        for to, content in self.files.items():
            output.write(root, to, content)

    def _kept(self) -> list[Path]:
        return [path for path in (self.previous / FOLDER).iterdir() if path.is_file()] if self.previous else []


def prepare(
    atlas: Atlas, config: SiteConfig, export: Export | None, target: Path, state: Mapping[str, Any]
) -> OwnImage:
    """Return the files of the page; without the page if it is not asked for or cannot be made.

    Args:
        atlas: The atlas.
        config: Configuration of the site.
        export: Function that exports the network of the atlas.
        target: Root of the previous site.
        state: State that the previous build recorded.
    """
    if not config.own_image:
        return OwnImage()
    histograms = [[view.name, view.channels.tolist(), view.fingerprint("histogram")] for view in atlas]
    weights = atlas.attributes.get("weights_sha256", "")
    key = digest_of([weights, histograms, list(atlas.labels), package_digest(), runtime.VERSION])
    if state.get("own_image") == key and (target / FOLDER).is_dir():
        return OwnImage(key, previous=target)
    try:
        if export is None:
            raise AtlasError("the network is needed to make it, and was not given")
        library = runtime.find_files(config.onnxruntime)
        network = export(atlas)
        return OwnImage(key, scripts(atlas, network, library), notes=_notes(network))
    except AtlasError as error:
        return OwnImage(missing=str(error))


def _notes(network: OnnxNetwork) -> tuple[str, ...]:
    compared = (
        "not compared with PyTorch, because the package onnxruntime is not installed"
        if network.error is None
        else f"differs from PyTorch by at most {network.error:.2g} of the range of a layer"
    )
    notes = [f"the exported network {compared}"]
    if network.skipped:
        notes.append(f"not on the page: {', '.join(network.skipped)}, which the loaded network does not have")
    return tuple(notes)


def scripts(atlas: Atlas, network: OnnxNetwork, library: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return all files of the page by path from the root of the site."""
    files = {
        f"{FOLDER}/LICENSE.txt": runtime.LICENSE.encode(),
        f"{FOLDER}/runtime.js": runtime.classic_script(library[runtime.MODULE].decode()).encode(),
    }
    counts = {}
    for name, content in (("wasm", library[runtime.BINARY]), ("network", network.content)):
        parts = _parts(content)
        counts[name] = len(parts)
        for i, part in enumerate(parts):
            files[f"{FOLDER}/{name}-{i}.js"] = shard_script(f"own-image/{name}-{i}", f'"{part}"').encode()
    for tap in network.taps:
        histogram = atlas[tap.layer].histogram()
        assert histogram is not None, f"{tap.layer} has no histogram"
        name = f"h-{safe_name(tap.layer)}"
        files[f"{FOLDER}/{name}.js"] = shard_script(f"own-image/{name}", to_json(_distribution(histogram))).encode()
    recipe = network.preprocessing
    index = {
        "parts": counts,
        "bytes": sum(map(len, files.values())),
        "size": recipe.size,
        "resize": recipe.resize,
        "interpolation": recipe.interpolation,
        "channels": recipe.channels,
        "layers": [[tap.layer, tap.output, tap.spatial] for tap in network.taps],
        "labels": network.labels,
    }
    files[f"{FOLDER}/index.js"] = shard_script("own-image/index", to_json(index)).encode()
    return files


def _parts(content: bytes) -> list[str]:
    # Without a time in its header, so that the same network gives the same bytes.
    coded = base64.b64encode(gzip.compress(content, 9, mtime=0)).decode("ascii")
    return [coded[i : i + PART] for i in range(0, len(coded), PART)]


def _distribution(histogram: Histogram) -> dict[str, Any]:
    """Return the histograms of per-image maxima as plain data; cumulative shares are 16-bit integers in base64."""
    found = [cumulative_shares(histogram, row) for row in range(len(histogram.counts))]
    images = histogram.under + histogram.counts.sum(1) + histogram.over
    values = np.concatenate([shares for _, shares in found]) if found else np.zeros(0)
    return {
        "ends": shortest_decimals(histogram.ends),
        "range": shortest_decimals(histogram.edges[:, [0, -1]]),
        "bins": histogram.counts.shape[1],
        "images": int(images.max(initial=0)),
        "first": [first for first, _ in found],
        "count": [len(shares) for _, shares in found],
        "shares": base64.b64encode(np.rint(values * 65535).astype("<u2").tobytes()).decode("ascii"),
    }


def cumulative_shares(histogram: Histogram, row: int) -> tuple[int, np.ndarray]:
    """Return the shares of images below the borders of the bins of a unit, without borders before or after all images.

    The borders are the smallest activation, the edges of the histogram, and the largest activation.

    Returns:
        The number of the first border, and the shares, (n,) in [0, 1] from 0 to 1; a single 0 without images.
    """
    counts = [0, histogram.under[row], *histogram.counts[row], histogram.over[row]]
    cumulative = np.cumsum(np.asarray(counts, np.int64))
    if not cumulative[-1]:
        return 0, np.zeros(1)
    first = int(np.searchsorted(cumulative, 0, side="right")) - 1
    last = int(np.searchsorted(cumulative, cumulative[-1]))
    return first, cumulative[first : last + 1] / cumulative[-1]
