"""What other networks see in finished images, whoever made them: for `scripts/bench peer`.

Classes: rank and probability in the other network. Hidden units: the direction of the other network that matches the
unit best on dataset images, and the share of these images with a lower prediction (docs/judges.md). Contrast and
chroma, with the share of dataset images that have less.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from pipeline.core.hashing import hash64
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.images.metrics import appearance
from pipeline.judges.judge import Judge
from pipeline.judges.recognition import recognize
from pipeline.judges.ridge import FOLDS, FeatureSpace
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model

BATCH = 16


@dataclasses.dataclass(frozen=True)
class Made:
    """Images of units, one for each maker.

    Attributes:
        layer: Layer of the unit.
        channel: Channel of the unit.
        images: (H, W, 3) uint8 by maker; sizes may differ.
    """

    layer: Layer
    channel: int
    images: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DatasetValues:
    """What is known of n dataset images.

    Attributes:
        responses: Largest activation of every channel over the positions, (n, channels), by layer.
        appearance: Contrast and chroma, (n,), by name.
        spaces: Features of each judge, by its name.
    """

    responses: dict[str, np.ndarray]
    appearance: dict[str, np.ndarray]
    spaces: dict[str, FeatureSpace]


def dataset_values(
    model: Model, layers: Sequence[Layer], judges: Sequence[Judge], dataset: Dataset, count: int
) -> DatasetValues:
    """Run the network and the judges on the first `count` dataset images."""
    responses: dict[str, list[np.ndarray]] = {layer.name: [] for layer in layers}
    looks: dict[str, list[np.ndarray]] = {"contrast": [], "chroma": []}
    features: dict[str, list[np.ndarray]] = {judge.name: [] for judge in judges}
    folds = []
    recipe = model.preprocessing
    loaded = image_loading.load_images(dataset, range(min(count, len(dataset.images))), recipe)
    for items, levels in image_loading.batches(loaded, BATCH, []):
        images = torch.from_numpy(levels).float() / 255
        with torch.no_grad(), capture(model, layers) as forward:
            for name, maps in forward(images).items():
                responses[name].append(maps.float().amax((2, 3)).numpy())
        for name, values in appearance(images).items():
            looks[name].append(values.numpy())
        for judge in judges:
            features[judge.name].append(judge.features(images, recipe.size))
        folds += [hash64(dataset.images[item.index].source_path, "judges") % FOLDS for item in items]
    spaces = {
        judge.name: FeatureSpace(np.concatenate(features[judge.name]), np.array(folds), judge.feature_sizes)
        for judge in judges
    }
    return DatasetValues(
        {name: np.concatenate(parts) for name, parts in responses.items()},
        {name: np.concatenate(parts) for name, parts in looks.items()},
        spaces,
    )


def seen(
    made: Sequence[Made], classes: str, judges: Sequence[Judge], known: DatasetValues, network_size: tuple[int, int]
) -> Iterable[dict[str, object]]:
    """Yield one row for each image: its looks, and what each judge sees.

    Args:
        made: The images.
        classes: Name of the layer of the class logits.
        judges: The other networks.
        known: Values of the dataset images.
        network_size: (height, width) of the input of the network that the images were made for.
    """
    matches = {
        (judge.name, name): known.spaces[judge.name].match(known.responses[name])
        for judge in judges
        for name in {unit.layer.name for unit in made}
        if name != classes
    }
    for unit in made:
        for maker, image in unit.images.items():
            pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
            row: dict[str, object] = {"layer": unit.layer.name, "channel": unit.channel, "maker": maker}
            for name, value in appearance(pixels).items():
                row |= {name: value.item(), f"{name}_quantile": (known.appearance[name] < value.item()).mean()}
            for judge in judges:
                if unit.layer.name == classes:
                    rank, probability = recognize(judge.class_logits(pixels), np.array([unit.channel]))
                    row |= {f"{judge.name}_rank": rank[0], f"{judge.name}_probability": probability[0]}
                else:
                    match = matches[judge.name, unit.layer.name]
                    place = match.place(judge.features(pixels, network_size), np.array([unit.channel]))
                    row |= {
                        f"{judge.name}_quantile": place.quantile[0],
                        f"{judge.name}_deviations": place.deviations[0],
                    }
            yield row
