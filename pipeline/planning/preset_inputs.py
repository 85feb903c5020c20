"""What presets leave to the network and the dataset: layers of regularizers, and images named by `dataset:PATH`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.config.schema import Config
from pipeline.core.config_files import ConfigFile, load_config_files
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.layers.finding import Layer
from pipeline.models.config import Preprocessing
from pipeline.visualization.initial_images import DATASET_PREFIX, dataset_image_file, is_dataset_image
from pipeline.visualization.layer_regularizers import DEFAULT_DEPTH
from pipeline.visualization.preset import Preset


def with_files(config: Config, dataset: Dataset, recipe: Preprocessing) -> Config:
    """Return the configuration with the files and dataset images of all presets read.

    Raises:
        AtlasError: If one cannot be read.
    """

    def read(preset: Preset, where: str) -> Preset:
        return load_config_files(_with_dataset_images(preset, where, dataset, recipe), where)

    return _with_presets(config, lambda preset: read(preset, _place(config, preset)))


def with_penalty_layers(config: Config, candidates: Sequence[Layer]) -> Config:
    """Return the configuration with the layers of all regularizers in the space of a layer.

    Args:
        config: The configuration.
        candidates: All layers of the network, in the order of computation.
    """

    def resolved(preset: Preset) -> Preset:
        terms = tuple(
            term if term.layer else dataclasses.replace(term, layer=default_layer(candidates).name)
            for term in preset.layer_penalties
        )
        return dataclasses.replace(preset, layer_penalties=terms) if preset.layer_penalties else preset

    return _with_presets(config, resolved)


def default_layer(candidates: Sequence[Layer]) -> Layer:
    """Return the layer with maps up to which the network does the share `DEFAULT_DEPTH` of its computation, nearly.

    Raises:
        AtlasError: If no layer has maps of more than one position.
    """
    maps = [layer for layer in candidates if layer.height * layer.width > 1]
    if not maps:
        raise AtlasError("render.layer_penalties need a layer with maps: name one as layer.")
    depth = DEFAULT_DEPTH * max(layer.cost for layer in candidates)
    # The last of several at the same depth: the output of a block, not that of a module in it.
    return min(reversed(maps), key=lambda layer: abs(layer.cost - depth))


def refuse_dataset_images(preset: Preset) -> None:
    """Raise `AtlasError` if a preset names an image of the dataset, where there is no dataset."""
    for file in (getattr(preset.canvas, "source", None), preset.objective.target_image):
        if file is not None and is_dataset_image(file):
            raise AtlasError(f"{file.path!r} is an image of a run's dataset: name a file, or use `atlas run`.")


def _place(config: Config, preset: Preset) -> str:
    return "render" if preset is config.render else f"also.{preset.name}"


def _with_presets(config: Config, change: Callable[[Preset], Preset]) -> Config:
    return dataclasses.replace(
        config, render=change(config.render), also=tuple(change(preset) for preset in config.also)
    )


def _with_dataset_images(preset: Preset, where: str, dataset: Dataset, recipe: Preprocessing) -> Preset:
    canvas = _with_dataset_image(preset.canvas, "source", f"{where}.canvas", dataset, recipe)
    objective = _with_dataset_image(preset.objective, "target", f"{where}.objective", dataset, recipe)
    return dataclasses.replace(preset, canvas=canvas, objective=objective)


def _with_dataset_image(member: Any, field: str, where: str, dataset: Dataset, recipe: Preprocessing) -> Any:
    """Return a member whose `field` has the content of the dataset image that it names, if it names one."""
    file = getattr(member, field, None)
    if not isinstance(file, ConfigFile) or not is_dataset_image(file) or file.content is not None:
        return member
    path = file.path.removeprefix(DATASET_PREFIX)
    paths = list(dataset.table.paths())
    if path not in paths:
        raise AtlasError(f"{where}.{field}: the dataset has no image {path!r}. {nearest_names(path, paths)}")
    (loaded,) = image_loading.load_images(dataset, [paths.index(path)], recipe, threads=1)
    if loaded.array is None:
        raise AtlasError(f"{where}.{field}: {path!r} cannot be read: {loaded.reason}.")
    return dataclasses.replace(member, **{field: dataset_image_file(path, loaded.array)})
