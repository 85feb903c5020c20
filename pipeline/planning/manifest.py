"""inputs.json: provenance of a run, written beside its plan so that later plans can reuse it.

It holds digests of the weights and the dataset, the preprocessing, and the layers and channels of the plan with their
taps and receptive fields, which take the longest to determine.
"""

import dataclasses
import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core import hashing
from pipeline.core.registry import canonical
from pipeline.layers.finding import Layer, ReceptiveField
from pipeline.models.config import LOCATION_FIELDS, ModelConfig, Preprocessing
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

NAME = "inputs.json"

# Libraries that may build another network from the same settings in another version.
BUILDERS = ("torch", "torchvision", "timm")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Provenance of a plan.

    Attributes:
        weights: Digest of the weights, as in an atlas.
        dataset: Digest of the dataset and its preprocessing, as in an atlas.
        network: Digest of everything that determines receptive fields; see `network_digest`.
        recipe: Preprocessing.
        layers: Layers of the plan in its order, with the channels of the plan.
        depths: Names of the fixed depths of the network at which the paths of images are measured.
    """

    weights: str
    dataset: str
    network: str
    recipe: Preprocessing
    layers: tuple[tuple[Layer, tuple[int, ...]], ...]
    depths: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the content of inputs.json."""
        layers = [{**layer.plain, "units": list(channels)} for layer, channels in self.layers]
        others = dataclasses.asdict(dataclasses.replace(self, layers=()))
        return json.dumps({**others, "layers": layers}, indent=1) + "\n"

    def receptive_fields(self, network: str, layers: Sequence[Layer]) -> dict[str, ReceptiveField | None]:
        """Return the stored receptive fields of `layers`, by layer name.

        Args:
            network: Digest of the network; none is returned for another network.
            layers: Layers to look up; only those with the same tap and shapes are returned.
        """
        if network != self.network:
            return {}
        stored = {layer.name: layer for layer, _ in self.layers}

        def without_field(layer: Layer) -> dict[str, Any]:
            # These change no receptive field, and manifests of former versions lack them.
            unrelated = {"field": None, "alias": "", "rectified": True, "linear_in_pixels": False, "depthwise": False}
            return layer.plain | unrelated

        fields = {}
        for layer in layers:
            if layer.name in stored and without_field(stored[layer.name]) == without_field(layer):
                fields[layer.name] = stored[layer.name].field
        return fields


def network_digest(model: Model, config: ModelConfig) -> str:
    """Return the digest of everything that determines receptive fields: weights, architecture and preprocessing."""
    architecture = canonical(config)
    for key in LOCATION_FIELDS:
        if key not in ("target", "arguments"):
            architecture.pop(key)
    versions = {}
    for name in BUILDERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return hashing.digest_of([model.digest, architecture, dataclasses.asdict(model.preprocessing), versions])


def read(folder: Path) -> Manifest | None:
    """Read the manifest of a run folder; None if there is none or it can't be read."""
    try:
        tree: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
        recipe: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in tree["recipe"].items()}
        layers = tuple(_layer(entry) for entry in tree["layers"])
        depths = tuple(map(str, tree.get("depths", ())))
        weights, dataset, network = (str(tree[key]) for key in ("weights", "dataset", "network"))
        return Manifest(weights, dataset, network, Preprocessing(**recipe), layers, depths)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # A manifest only saves time.
        log.debug("%s can't be read: %s", folder / NAME, error)
        return None


def _layer(entry: Mapping[str, Any]) -> tuple[Layer, tuple[int, ...]]:
    """Parse one layer of inputs.json and its channels."""
    values = dict(entry)
    channels = tuple(int(channel) for channel in values.pop("units"))
    field, grid = values.pop("field"), values.pop("grid")
    receptive_field = None
    if field is not None:
        receptive_field = ReceptiveField(**{key: (int(rows), int(columns)) for key, (rows, columns) in field.items()})
    grid = None if grid is None else (int(grid[0]), int(grid[1]))
    return Layer(**values, field=receptive_field, grid=grid), channels
