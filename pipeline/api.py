"""Functions for notebooks and scripts: visualize units of a network, and find their dataset examples.

They run in this process, without a run folder. `atlas run` makes the same visualizations: the same seeds give the same
images for a network by name.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from pipeline.acceleration.batchnorm_folding import fold, foldable_pairs
from pipeline.cli.compose import compose
from pipeline.core.config_files import ConfigFile, load_config_files
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.core.units import Unit
from pipeline.data import image_loading, multiband
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset, list_dataset
from pipeline.examples import localize, sweep
from pipeline.images.parameterizations import FromImage
from pipeline.layers import selection
from pipeline.layers.finding import Layer, ReceptiveField
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.models.config import ModelConfig, Preprocessing
from pipeline.models.loading import Model, load_model, prepare_module, weights_digest
from pipeline.planning.preset_inputs import refuse_dataset_images
from pipeline.runs.activation_grid import MAX_CELLS, ActivationGrid, GridRequest
from pipeline.runs.activation_grid import activation_grid as make_activation_grid
from pipeline.runs.layer_worker import layer_worker, worker_pool
from pipeline.visualization.evaluation import Visualization
from pipeline.visualization.objectives import Caricature
from pipeline.visualization.preset import Preset

# Mean and standard deviation of ImageNet, the preprocessing of most published networks.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# An image of the user: a file, a Pillow image, or an array (H, W, C) uint8.
Photograph = str | Path | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that is ready for feature visualization.

    Making one takes seconds, because its layers are found and measured: keep it for several calls.

    Attributes:
        model: The prepared copy of the network, with its preprocessing.
        config: Configuration that it was loaded by.
    """

    model: Model
    config: ModelConfig

    @staticmethod
    def of(
        model: "nn.Module | str | Network",
        input_size: int | tuple[int, int] = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> "Network":
        """Return a network for a module, or for a name of the command line (`model=NAME`).

        Args:
            model: A module, which is copied; or a name, with its own preprocessing; or a network.
            input_size: Side of the input in pixels, or (height, width); only for modules.
            mean: Mean of each input channel, for values from 0 to 1; only for modules.
            std: Standard deviation of each input channel; only for modules.
        """
        if isinstance(model, Network):
            return model
        if isinstance(model, str):
            config = compose([f"model={model}"]).config.model
            return Network(load_model(config), config)
        size = (input_size, input_size) if isinstance(input_size, int) else input_size
        module = prepare_module(copy.deepcopy(model).cpu())
        name = type(model).__name__
        preprocessing = Preprocessing(size, min(size), tuple(mean), tuple(std))
        config = ModelConfig("custom", name, target="notebook:module", folder=str(Path.cwd()))
        return Network(Model(module, name, preprocessing, weights_digest(module), ()).to("cpu"), config)

    @functools.cached_property
    def layers(self) -> dict[str, Layer]:
        """All layers of the network by name, in the order of computation."""
        config = compose(["layers=all"]).config.layers
        return {layer.name: layer for layer in selection.list_layers(self.model, config)}

    def layer(self, name: str) -> Layer:
        """Return a layer with its receptive field.

        Raises:
            AtlasError: If there is no such layer.
        """
        if name not in self.layers:
            raise AtlasError(f"{self.model.name} has no layer {name!r}. {nearest_names(name, self.layers)}")
        layer = self.layers[name]
        if name not in self._fields:
            self._fields.update(receptive_fields(self.folded, [layer]))
        return dataclasses.replace(layer, field=self._fields[name])

    def on(self, device: str) -> Model:
        """Return the network on a device; a copy where it is not the CPU, on which the layers are measured."""
        return self.model if device == "cpu" else self._copy.to(device)

    @functools.cached_property
    def _copy(self) -> Model:
        return dataclasses.replace(self.model, module=copy.deepcopy(self.model.module))

    @functools.cached_property
    def folded(self) -> Model:
        """The network with folded batch normalizations."""
        return fold(self.model, foldable_pairs(self.model))

    @functools.cached_property
    def _fields(self) -> dict[str, ReceptiveField | None]:
        return {}  # receptive fields that were measured, by layer


@dataclasses.dataclass(frozen=True)
class UnitImage:
    """The feature visualization of one unit; notebooks display it as an image.

    Attributes:
        unit: "layer:channel".
        image: (H, W, C) uint8.
        activation: Value of the objective for exactly this image.
        robust: Its mean over randomly transformed copies (transformation robustness).
        details: Everything else that was measured; see `pipeline.visualization.evaluation.Visualization`.
    """

    unit: str
    image: np.ndarray
    activation: float
    robust: float
    details: Visualization

    def _repr_png_(self) -> bytes:
        return multiband.to_png(multiband.to_display_image(self.image))


@dataclasses.dataclass(frozen=True)
class Examples:
    """Dataset examples of the channels of one layer.

    Attributes:
        layer: Name of the layer.
        channels: Number of channels C.
        paths: Path of each dataset image.
        index: (C, k) int32 numbers of the images with the largest maximum activations, the largest first; −1 for none.
        activation: (C, k) float32 maximum activations.
        dataset: The dataset.
        preprocessing: Preprocessing of the network.
    """

    layer: str
    channels: int
    paths: tuple[str, ...]
    index: np.ndarray
    activation: np.ndarray
    dataset: Dataset
    preprocessing: Preprocessing

    def image(self, channel: int, rank: int = 0) -> np.ndarray:
        """Return the dataset example number `rank` of a channel as the network sees it, (H, W, C) uint8."""
        index = int(self.index[channel, rank])
        (loaded,) = image_loading.load_images(self.dataset, [index], self.preprocessing, threads=1)
        assert loaded.array is not None  # an image that cannot be read is no example
        return np.ascontiguousarray(loaded.array.transpose(1, 2, 0))


def visualize(
    model: nn.Module | str | Network,
    unit: str | Sequence[str],
    preset: str = "distill",
    settings: Sequence[str] = (),
    progress: bool = True,
    image: Photograph | None = None,
) -> Any:
    """Make the feature visualization of a unit, or of several units of one layer.

    Args:
        model: A `torch.nn.Module`, the name of a network (`model=NAME` of the command line), or a `Network`.
        unit: "layer:channel", or several of the same layer.
        preset: Name of a preset, as in `render=NAME`.
        settings: More settings as on the command line, e.g. "render.steps=64" or "render/penalties=[tv]". Images of
            classes are compared with the statistics of photographs: with "data=folder" and "data.root=FOLDER" of yours,
            otherwise of the packaged sample images, which are few and partly textures.
        progress: Whether to show a progress bar.
        image: For presets that start from an image (`accentuate`) or compare with one (`caricature`): that image, as a
            file, a Pillow image or an array (H, W, C) uint8.

    Returns:
        A `UnitImage`, or a list of them for several units.

    Raises:
        AtlasError: If a setting is wrong, or the network has no such unit.
    """
    units = [Unit.parse(text) for text in ([unit] if isinstance(unit, str) else unit)]
    if len({parsed.layer for parsed in units}) != 1:
        raise AtlasError("All units of one call must be of one layer.")
    name, channels = units[0].layer, [parsed.channel for parsed in units]
    network = Network.of(model)
    layer = network.layer(name)
    wrong = [channel for channel in channels if not 0 <= channel < layer.channels]
    if wrong:
        raise AtlasError(f"{name} has the channels 0 to {layer.channels - 1}, not {wrong[0]}.")
    config = compose([f"render={preset}", *settings]).config
    if image is not None:
        config = dataclasses.replace(config, render=_with_image(config.render, image))
    refuse_dataset_images(config.render)
    config = dataclasses.replace(config, render=load_config_files(config.render, "render"))
    if config.render.needs_dataset_pass:
        raise AtlasError(
            f"render={preset} starts from dataset examples or compares with a mean over the dataset, which needs a "
            f'run: `atlas run render={preset}`. Or give an image: visualize(…, image="photo.jpg").'
        )
    config = dataclasses.replace(config, model=network.config)
    canvas, worker = layer_worker(network.model, config, list(network.layers.values()), layer, network.on)
    per_batch = config.channels_per_batch(config.render, layer.channels, worker.setup.device)
    batches = math.ceil(len(channels) / per_batch)
    with _progress_bar(progress, config.render.steps * batches, name) as advance:
        worker.stop = advance
        results = worker.pictures(name, channels, canvas, worker.setup.config.render.for_layer(layer))
    images = [UnitImage(str(Unit(name, r.channel)), r.image, r.activation, r.robust, r) for r in results]
    return images[0] if isinstance(unit, str) and len(images) == 1 else images


def activation_grid(
    model: nn.Module | str | Network,
    layer: str,
    image: Photograph,
    cells: int = MAX_CELLS,
    settings: Sequence[str] = (),
    progress: bool = True,
) -> ActivationGrid:
    """Visualize what a layer sees at each position of a photograph (Olah et al. 2018).

    Args:
        model: As for `visualize`.
        layer: Name of the layer.
        image: The photograph: a file, a Pillow image or an array (H, W, C) uint8. It is resized and cropped as the
            network's preprocessing does.
        cells: Largest number of cells on a side; longer maps are averaged over blocks of positions.
        settings: More settings as on the command line, e.g. "render=fast" or "render.size=96".
        progress: Whether to show a progress bar.

    Raises:
        AtlasError: If there is no such layer, it has no positions, or the image or a setting is wrong.
    """
    network = Network.of(model)
    found = network.layer(layer)
    config = compose(list(settings)).config
    refuse_dataset_images(config.render)
    render = load_config_files(config.render, "render")
    config = dataclasses.replace(config, render=render, model=network.config)
    file = photograph_file(image)
    request = GridRequest(found, file if file.content is not None else file.read("image"), cells)
    batch = config.engine.images_per_batch(found.channels, worker_pool(config).device)
    with _progress_bar(progress, request.batches(batch) * render.steps, layer) as advance:
        return make_activation_grid(network.model, config, list(network.layers.values()), request, network.on, advance)


def dataset_examples(
    model: nn.Module | str | Network,
    layer: str,
    images: str | Path,
    k: int = 8,
    progress: bool = True,
) -> Examples:
    """Find the images with the largest maximum activations of each channel of a layer.

    Args:
        model: As for `visualize`.
        layer: Name of the layer.
        images: Folder of images; subfolders are read too.
        k: Number of examples of each channel.
        progress: Whether to show a progress bar.

    Raises:
        AtlasError: If there is no such layer, or no image can be read.
    """
    network = Network.of(model)
    found = network.layer(layer)
    settings = dataclasses.replace(compose([]).config.examples, k=k)
    dataset = list_dataset(DataConfig(source="folder", root=str(images)), network.model.preprocessing.channels)
    subsets = sweep.ImageSubsets.of(dataset, settings, found.channels)
    count = len(dataset.images)
    with _progress_bar(progress, math.ceil(count / settings.batch), layer) as advance:
        context = sweep.PassContext(network.model, [found], dataset, settings, advance)
        ranges = sweep.measure_ranges(context, subsets.sample.tolist())
        result = sweep.sweep(context, range(count), ranges, subsets)
    if len(result.failed) == count:
        raise AtlasError(f"None of the {count} images in {images} could be read: {result.failed[0][1]}.")
    channels = tuple(range(found.channels))
    (chosen,) = localize.select_examples(result, [(found, channels)], dataset, settings)
    activation, index = chosen.lists["max"]
    paths = tuple(dataset.table.paths())
    return Examples(layer, found.channels, paths, index, activation, dataset, network.model.preprocessing)


def _with_image(preset: Preset, image: Photograph) -> Preset:
    """Return a preset that starts from an image or compares with it.

    Raises:
        AtlasError: If the preset does neither.
    """
    file = photograph_file(image)
    if isinstance(preset.canvas, FromImage):
        return dataclasses.replace(preset, canvas=dataclasses.replace(preset.canvas, source=file))
    if isinstance(preset.objective, Caricature):
        return dataclasses.replace(preset, objective=dataclasses.replace(preset.objective, target=file))
    raise AtlasError(f"render={preset.name} uses no image; accentuate and caricature do.")


def photograph_file(image: Photograph) -> ConfigFile:
    """Return an image as a file that was read."""
    if isinstance(image, str | Path):
        return ConfigFile(str(image))
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    return ConfigFile("image", multiband.to_png(picture))


@contextlib.contextmanager
def _progress_bar(shown: bool, total: int, title: str) -> Iterator[Callable[[], None]]:
    """Yield a function that advances a progress bar by one; it suits terminals and notebooks."""
    if not shown:
        yield lambda: None
        return
    with _bar_class()(total=total, desc=title, leave=False, file=sys.stderr) as bar:
        yield lambda: bar.update(1) and None


def _bar_class() -> Any:
    """Return the widget of notebooks where ipywidgets is installed, and plain text otherwise."""
    if "ipykernel" in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module("ipywidgets")
            from tqdm.notebook import tqdm as widget

            return widget
    from tqdm import tqdm

    return tqdm
