"""A worker in this process for the units of one layer, without a run folder: for notebooks and single pictures."""

import dataclasses
from collections.abc import Callable, Sequence

from pipeline.acceleration.batchnorm_folding import fold, foldable_pairs
from pipeline.config.schema import Config
from pipeline.data.datasets import Dataset, list_dataset
from pipeline.engine.devices import check_device, prepare_device
from pipeline.engine.resources import WorkerPool, local_resources, size_pool
from pipeline.engine.tasks import Setup
from pipeline.engine.worker import Worker
from pipeline.layers import selection
from pipeline.layers.finding import Layer
from pipeline.models.loading import Model
from pipeline.planning import execution, natural_deviations
from pipeline.planning.preset_inputs import with_penalty_layers
from pipeline.planning.validation import choose_canvas_sizes, validate_request
from pipeline.visualization.network_penalties import NaturalDeviations
from pipeline.visualization.preset import Size

NO_IMAGES = Dataset((), {})


def worker_pool(config: Config) -> WorkerPool:
    """Return the resources of a worker in this process."""
    return size_pool(dataclasses.replace(config.engine, name="inline"), [local_resources()])


def layer_worker(
    model: Model, config: Config, candidates: Sequence[Layer], layer: Layer, place: Callable[[str], Model]
) -> tuple[Size, Worker]:
    """Return the canvas size of a layer for the main preset, and a worker that visualizes its units.

    Args:
        model: The network, on the CPU.
        config: The configuration; its preset in `Worker.setup` has the layers of its regularizers.
        candidates: All layers of the network.
        layer: The layer.
        place: Returns the network on a device.

    Raises:
        AtlasError: If the preset does not apply to the layer.
    """
    config = with_penalty_layers(config, candidates)
    heads = selection.logit_layers(model, candidates)
    others = validate_request(config, model, candidates, [layer], heads)
    canvas = choose_canvas_sizes(model, [layer], config.render)[layer.name]
    engine = dataclasses.replace(config.engine, name="inline")
    check_device(engine)
    pool = worker_pool(config)
    natural = _natural_deviations(model, config, layer)
    setup = Setup(config, model.digest, (layer,), NO_IMAGES, pool.threads, pool.device, others, natural=natural)
    worker = Worker(execution.on_device(setup, pool.device))
    prepare_device(pool.device, engine)
    worker.__dict__["model"] = place(pool.device)  # in place of loading it
    return canvas, worker


def _natural_deviations(model: Model, config: Config, layer: Layer) -> NaturalDeviations | None:
    """Return the statistics of the dataset's images before a layer, or of the packaged ones; None if not compared."""
    natural_deviations.check_normalizations(model, [layer], [config.render])
    packaged = config.data.source == "samples" or not config.render.for_layer(layer).network_penalties
    dataset = NO_IMAGES if packaged else list_dataset(config.data, model.preprocessing.channels)
    if not natural_deviations.compared_layers(model, [layer], [config.render], dataset):
        return None
    return natural_deviations.measure(model, fold(model, foldable_pairs(model)), dataset, [layer])
