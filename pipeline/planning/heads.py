"""Heads of a run: the stages of a schedule that need them, the fit on dataset images, and their files in the folder."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.acceleration.precision import ieee
from pipeline.config.schema import Config
from pipeline.core import hashing
from pipeline.core.atomic_io import write_atomic
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.layers import selection
from pipeline.layers.finding import Layer, capture
from pipeline.layers.heads import PREFIX, HeadLayer, HeadScores, fit_head
from pipeline.models.loading import Model
from pipeline.visualization.preset import Preset
from pipeline.visualization.schedules import Stage

log = logging.getLogger(__name__)

# Names of the files in a run folder: the heads, and a table of their scores.
FILE, TABLE = "heads.safetensors", "heads.csv"

# Raised when the same images and settings give other heads than before.
VERSION = 1

# Most dataset images that heads are fitted to, the least, and the number below which a warning is given.
MAX_IMAGES, MIN_IMAGES, FEW_IMAGES = 1000, 20, 300
FOLDS = 5
BATCH = 8

# A head that predicts a smaller share of the variance of held-out images is no better than chance.
MIN_R2 = 0.01


@dataclasses.dataclass(frozen=True)
class HeadSource:
    """What heads are fitted to.

    Attributes:
        model: The network.
        run: The network that images are passed through; a folded one is faster.
        dataset: The dataset.
        fingerprint: Digest of the dataset and the preprocessing.
        logits: The layer of logits.
    """

    model: Model
    run: Model
    dataset: Dataset
    fingerprint: str
    logits: Layer

    def identity(self, head: HeadLayer) -> str:
        """Return the digest of everything that determines a head."""
        images = [MAX_IMAGES, FOLDS]
        taps = [dataclasses.replace(head, identity="").tap, self.logits.tap]
        return hashing.digest_of(["head", VERSION, self.model.digest, self.fingerprint, images, taps])


def with_heads(
    config: Config, model: Model, candidates: Sequence[Layer], logits: Sequence[Layer]
) -> tuple[Config, list[HeadLayer]]:
    """Return a configuration whose stages name the heads that they use, and the heads that have to be fitted.

    A stage with `head` whose `layer` the network does not have gets a head at that depth.

    Args:
        config: The configuration.
        model: The network.
        candidates: All layers of the network.
        logits: Layers of logits.

    Raises:
        AtlasError: If a head is needed and the network has no classifier, or the layer that it reads does not exist.
    """
    heads: dict[str, HeadLayer] = {}
    presets = [_resolved(preset, model, candidates, logits, heads) for preset in config.presets]
    if all(new is old for new, old in zip(presets, config.presets, strict=True)):
        return config, []
    return dataclasses.replace(config, render=presets[0], also=tuple(presets[1:])), list(heads.values())


def _resolved(
    preset: Preset,
    model: Model,
    candidates: Sequence[Layer],
    logits: Sequence[Layer],
    heads: dict[str, HeadLayer],
) -> Preset:
    """Return a preset with the names of heads in its stages; heads that it needs are added to `heads`."""
    if not any(_names_head(stage) for stage in preset.schedule):
        return preset
    names = {layer.name for layer in candidates}
    stages = []
    for stage in preset.schedule:
        if stage.layer not in names and _names_head(stage):
            if not logits:
                raise AtlasError(
                    f"render={preset.name} uses heads that are fitted to the logits of the network, and {model.name} "
                    "has no classifier. Use render/schedule=blur, which needs none, or another preset."
                )
            read = _layer_to_read(stage, model, candidates, logits[-1])
            heads[PREFIX + read.name] = HeadLayer.on(read, logits[-1].channels)
            stage = dataclasses.replace(stage, layer=PREFIX + read.name)
        stages.append(dataclasses.replace(stage, head=None))
    return dataclasses.replace(preset, schedule=tuple(stages))


def _names_head(stage: Stage) -> bool:
    """Return whether a stage names a fitted head, by its depth or by the layer that it reads."""
    return stage.head is not None or (stage.layer or "").startswith(PREFIX)


def _layer_to_read(stage: Stage, model: Model, candidates: Sequence[Layer], logits: Layer) -> Layer:
    """Return the layer that the head of a stage reads: by its name, or the block at its depth."""
    if (stage.layer or "").startswith(PREFIX):
        name = (stage.layer or "").removeprefix(PREFIX)
        found = next((layer for layer in candidates if layer.name == name), None)
        if found is None:
            names = [layer.name for layer in candidates]
            raise AtlasError(f"render.schedule: {stage.layer}: no layer {name!r}. {nearest_names(name, names)}")
        return found
    assert stage.head is not None
    blocks = [layer for layer in selection.blocks_before(model, candidates, logits) if layer.spatial]
    if not blocks:
        raise AtlasError(
            f"render.schedule: {model.name} has no layer with maps before its classifier that a head could read. Use "
            "render/schedule=blur."
        )
    return blocks[min(max(round(stage.head * len(blocks)) - 1, 0), len(blocks) - 1)]


def fitted(heads: Sequence[HeadLayer], source: HeadSource, folders: Sequence[Path]) -> dict[str, HeadLayer]:
    """Return heads that are fitted, by name: from a file of a run, or by a fit to dataset images.

    Args:
        heads: The heads.
        source: What they are fitted to.
        folders: Run folders whose files are searched.

    Raises:
        AtlasError: If too few images can be read, or a head is no better than chance.
    """
    known: dict[str, HeadLayer] = {}
    for folder in folders:
        known |= {head.identity: head for head in read(folder, heads)}
    wanted = {source.identity(head): head for head in heads}
    missing = [head for identity, head in wanted.items() if identity not in known]
    known |= {head.identity: head for head in _fit(missing, source)} if missing else {}
    found = {known[identity].name: known[identity] for identity in wanted}
    for head in found.values():
        _check(head, source)
    return found


def _check(head: HeadLayer, source: HeadSource) -> None:
    """Log the scores of a head.

    Raises:
        AtlasError: If it is no better than chance.
    """
    scores = head.scores
    assert scores is not None
    log.info(
        "%s: fitted to %d images (ridge %.2g by cross-validation); held-out R² %.2f, agreement with the network's own "
        "class %.0f %% (top 1), %.0f %% (top 5)",
        head.name,
        scores.images,
        scores.ridge,
        scores.r2,
        100 * scores.top1,
        100 * scores.top5,
    )
    if scores.images < FEW_IMAGES:
        log.warning("%s is fitted to %d images only: expect more from %d", head.name, scores.images, FEW_IMAGES)
    if not scores.r2 >= MIN_R2:
        raise AtlasError(
            f"{head.name} predicts the logits of held-out images no better than their mean does (R² {scores.r2:.3f}, "
            f"{scores.images} images). Use more or more varied dataset images, a head on a deeper layer "
            f"(render.schedule.*.layer={PREFIX}LAYER), or render/schedule=blur, which needs none."
        )


@ieee()
def _fit(heads: Sequence[HeadLayer], source: HeadSource) -> list[HeadLayer]:
    """Fit heads to the logits of dataset images, in one pass over at most `MAX_IMAGES` of them."""
    images = source.dataset.images
    drawn = source.dataset.draw(MAX_IMAGES).tolist()
    log.info("%d dataset images for %s", len(drawn), ", ".join(head.name for head in heads))
    columns: dict[str, list[torch.Tensor]] = {}
    layers = [*(head.source for head in heads), source.logits]

    def note(layer: Layer, maps: torch.Tensor) -> None:
        columns.setdefault(layer.name, []).append(maps.float().mean(dim=(2, 3)))

    loaded, used = image_loading.load_images(source.dataset, drawn, source.run.preprocessing), []
    with capture(source.run, layers, each=note) as forward, torch.no_grad():
        for items, levels in image_loading.batches(loaded, BATCH, []):
            forward(torch.from_numpy(levels).float() / 255)
            used += [item.index for item in items]
    # Crops of one source image are in one fold.
    folds = np.array([hashing.hash64(images[i].source_path, "heads") % FOLDS for i in used])
    if len(used) < MIN_IMAGES or len(np.unique(folds)) < 2:
        raise AtlasError(
            f"Heads need at least {MIN_IMAGES} dataset images of several sources, and {len(used)} can be read. "
            "Set data=folder data.root=FOLDER, or use render/schedule=blur."
        )
    joined = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    result = []
    for head in heads:
        weight, bias, scores = fit_head(joined[head.name], joined[source.logits.name], folds)
        identity = source.identity(head)
        result.append(dataclasses.replace(head, identity=identity, weight=weight, bias=bias, scores=scores))
    return result


def files(heads: Sequence[HeadLayer]) -> dict[str, bytes]:
    """Return the files that keep heads in a run folder, by name: the arrays, and a table of the scores."""
    arrays: dict[str, np.ndarray] = {}
    records = {}
    lines = ["head,images,ridge,r2,top1,top5"]
    for head in heads:
        assert head.scores is not None
        arrays[f"{head.name}.weight"] = np.ascontiguousarray(head.weight)
        arrays[f"{head.name}.bias"] = np.ascontiguousarray(head.bias)
        records[head.name] = {"identity": head.identity, "scores": dataclasses.asdict(head.scores)}
        scores = head.scores
        lines.append(
            f"{head.name},{scores.images},{scores.ridge:.4g},{scores.r2:.4f},{scores.top1:.4f},{scores.top5:.4f}"
        )
    return {
        FILE: save(arrays, metadata={"heads": json.dumps(records, sort_keys=True)}),
        TABLE: ("\n".join(lines) + "\n").encode(),
    }


def write(folder: Path, heads: Sequence[HeadLayer]) -> None:
    """Write the files of heads into a run folder; nothing without heads."""
    for name, content in (files(heads) if heads else {}).items():
        write_atomic(folder / name, content)


def read(folder: Path, heads: Sequence[HeadLayer]) -> list[HeadLayer]:
    """Return those of `heads` that the file of a run folder holds, fitted; none if it cannot be read."""
    path, found = folder / FILE, []
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="numpy") as archive:
            records: Mapping[str, dict[str, object]] = json.loads((archive.metadata() or {})["heads"])
            for head in heads:
                if head.name in records:
                    weight, bias = (archive.get_tensor(f"{head.name}.{part}") for part in ("weight", "bias"))
                    record = records[head.name]
                    scores = HeadScores(**record["scores"])  # type: ignore[arg-type]
                    changes = {"identity": record["identity"], "weight": weight, "bias": bias, "scores": scores}
                    found.append(dataclasses.replace(head, **changes))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        log.warning("%s cannot be read (%s); the heads are fitted again", path, error)
        return []
    return found
