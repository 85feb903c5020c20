"""Neuron Atlas: feature visualizations and dataset examples of every channel of every layer of a vision network.

    import pipeline

    image = pipeline.visualize(model, "layer4.1.conv2:17", preset="distill")  # a torch.nn.Module, or a name
    grid = pipeline.activation_grid(model, "layer3", "photo.jpg")              # what the layer sees at each position
    examples = pipeline.dataset_examples(model, "layer4.1.conv2", "images/")  # those with the largest activations
    with pipeline.open_atlas("runs/efficientnet_lite0-distill") as atlas:     # what `atlas run` has made
        print(atlas.units())
    table = pipeline.unit_names("runs/efficientnet_lite0-distill")              # by people, labels and CLIP models

Importing the package loads neither torch nor the site builder; the functions load what they need.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Examples as Examples
    from pipeline.api import Network as Network
    from pipeline.api import UnitImage as UnitImage
    from pipeline.api import activation_grid as activation_grid
    from pipeline.api import dataset_examples as dataset_examples
    from pipeline.api import visualize as visualize
    from pipeline.names.book import unit_names as unit_names
    from pipeline.store.reader import Atlas as Atlas
    from pipeline.store.reader import open_atlas as open_atlas

__version__ = "0.1.0"

# Where each public name is defined; it is imported when it is used first.
_EXPORTS = {
    "Atlas": "pipeline.store.reader",
    "open_atlas": "pipeline.store.reader",
    "Examples": "pipeline.api",
    "Network": "pipeline.api",
    "UnitImage": "pipeline.api",
    "activation_grid": "pipeline.api",
    "dataset_examples": "pipeline.api",
    "unit_names": "pipeline.names.book",
    "visualize": "pipeline.api",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
