"""inputs.json: what a run's results come from, written beside its plan so that a later plan need not find it again.

It says which weights, photographs and recipe the run was planned with, and which layers and channels; and, of each
layer, where its tap is and how large its receptive field is, which takes the longest to find.
"""

import dataclasses
import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.registry import canonical
from pipeline.layers.finding import Layer, ReceptiveField
from pipeline.models.config import NAMES_ONLY, ModelConfig, Preprocessing
from pipeline.models.loading import Model
from pipeline.store import shards

log = logging.getLogger(__name__)

NAME = "inputs.json"

# Libraries whose next version may build a network otherwise from the same words.
BUILDERS = ("torch", "torchvision", "timm")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What one plan was made from.

    `weights` and `dataset` are digests as in an atlas; `network` is that of all that a receptive field follows from.
    `layers` are those of the plan in its order, with the channels that get pictures.
    """

    weights: str
    dataset: str
    network: str
    recipe: Preprocessing
    layers: tuple[tuple[Layer, tuple[int, ...]], ...]

    def text(self) -> str:
        """As it goes into the file."""
        layers = [{**dataclasses.asdict(layer), "units": list(channels)} for layer, channels in self.layers]
        return json.dumps({**dataclasses.asdict(self), "layers": layers}, indent=1) + "\n"

    def fields(self, network: str, layers: Sequence[Layer]) -> dict[str, ReceptiveField | None]:
        """Receptive fields of those of `layers` that were probed for this very `network`, by name."""
        if network != self.network:
            return {}
        known = {layer.name: layer for layer, _ in self.layers}

        def bare(layer: Layer) -> Layer:
            return dataclasses.replace(layer, field=None, alias="")

        alike = [la for la in layers if la.name in known and bare(known[la.name]) == bare(la)]
        return {layer.name: known[layer.name].field for layer in alike}


def network_digest(model: Model, config: ModelConfig) -> str:
    """Digest of all that a receptive field follows from: weights, what else builds the network, and its input."""
    built = canonical(config)
    for key in NAMES_ONLY:
        if key not in ("target", "arguments"):
            built.pop(key)
    versions = {}
    for name in BUILDERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return shards.digest_of([model.digest, built, dataclasses.asdict(model.recipe), versions])


def read(folder: Path) -> Manifest | None:
    """What a run's folder says it was planned with; None where it says nothing that can be read."""
    try:
        found: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
        recipe: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found["recipe"].items()}
        layers = tuple(_layer(entry) for entry in found["layers"])
        return Manifest(
            str(found["weights"]), str(found["dataset"]), str(found["network"]), Preprocessing(**recipe), layers
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Nothing depends on it but time.
        log.debug("%s can't be read: %s", folder / NAME, error)
        return None


def _layer(entry: Mapping[str, Any]) -> tuple[Layer, tuple[int, ...]]:
    values = dict(entry)
    channels = tuple(int(c) for c in values.pop("units"))
    field, grid = values.pop("field"), values.pop("grid")
    seen = None if field is None else ReceptiveField(**{key: (int(a), int(b)) for key, (a, b) in field.items()})
    return Layer(**values, field=seen, grid=None if grid is None else (int(grid[0]), int(grid[1]))), channels
