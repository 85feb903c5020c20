"""Fit a dictionary to a layer of a network and write it to a file."""

import dataclasses
import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pipeline.acceleration.batchnorm_folding import foldable_pairs
from pipeline.acceleration.precision import ieee
from pipeline.acceleration.variants import verified_fold
from pipeline.core import hashing
from pipeline.core.atomic_io import write_atomic
from pipeline.core.errors import AtlasError, first_line
from pipeline.data import datasets, image_loading
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset
from pipeline.dictionaries import autoencoder, decompositions
from pipeline.dictionaries.activations import BATCH, Activations, sample_activations
from pipeline.dictionaries.autoencoder import TrainingState
from pipeline.dictionaries.concepts import fit_concept
from pipeline.dictionaries.config import DictionaryConfig
from pipeline.dictionaries.evaluation import evaluate
from pipeline.layers.dictionary_files import Arrays, dictionary_bytes, dictionary_of
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

# With "topk" and no number of latents, so many for each channel.
EXPANSION = 8
# Seconds between two stored states of training, and between two messages.
STORE_SECONDS, TELL_SECONDS = 30.0, 10.0
# With fewer rows for each latent, the dictionary mostly describes these images.
FEW_ROWS = 100

Facts = dict[str, str | float]


def fit(model: Model, layer: Layer, dataset: Dataset, config: DictionaryConfig) -> Facts:
    """Fit a dictionary, write its file and return what is known of it.

    Args:
        model: The network.
        layer: The layer.
        dataset: The images; not used for concepts.
        config: What is fitted.

    Raises:
        AtlasError: If a setting does not fit the layer or the images.
    """
    out = Path(config.out).expanduser()
    if out.suffix.lower() != ".safetensors":
        raise AtlasError(f"out={config.out} must be a .safetensors file.")
    network = verified_fold(model, foldable_pairs(model), [layer])
    if config.method == "concept":
        arrays, settings, facts = _concept(network, layer, config)
    else:
        arrays, settings, facts = _of_dataset(network, layer, dataset, config)
    facts = {"method": config.method, "layer": layer.name, "model": model.name, **facts}
    write_atomic(out, dictionary_bytes(arrays, {**settings, "facts": facts}))
    _partial(out).unlink(missing_ok=True)
    return facts


def _of_dataset(
    network: Model, layer: Layer, dataset: Dataset, config: DictionaryConfig
) -> tuple[Arrays, dict[str, Any], Facts]:
    """Return arrays, settings and facts of a dictionary that is fitted to dataset images."""
    vectors = _vectors(config, layer) if config.method == "directions" else None
    rows = None
    if vectors is None or config.whiten:
        rows = sample_activations(network, layer, dataset, (config.images, config.positions), config.seed)
        log.info("%s: %d positions of each of %d images", layer.name, rows.positions, rows.images)
    settings: dict[str, Any] = {"gate": "none"}
    if vectors is not None:
        arrays = decompositions.directions(vectors, rows.train if rows else None)
    elif config.method == "topk":
        assert rows is not None
        arrays, settings = _autoencoder(rows, layer, config), {"gate": "topk", "k": config.k}
    else:
        assert rows is not None
        arrays, gate = decompositions.decompose(rows.train, config)
        settings = {"gate": gate}
    facts: Facts = {"latents": len(arrays["W_dec"]), **{key: value for key, value in settings.items()}}
    if rows is not None:
        facts |= {"images": rows.images, "rows": len(rows.train), "held-out rows": len(rows.held_out)}
    if rows is not None and vectors is None:
        dictionary = dictionary_of(arrays, settings, config.out)
        facts |= {
            key.replace("_", " "): value
            for key, value in dataclasses.asdict(evaluate(dictionary, rows.train, rows.held_out)).items()
        }
    return arrays, settings, facts


def _vectors(config: DictionaryConfig, layer: Layer) -> np.ndarray:
    """Return the directions of a file, (N, C)."""
    if config.vectors is None:
        raise AtlasError("method=directions needs vectors=FILE.npy.")
    try:
        vectors = np.atleast_2d(np.load(Path(config.vectors).expanduser(), allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise AtlasError(f"vectors={config.vectors} can't be read: {first_line(error)}") from None
    numeric = vectors.dtype.kind in "fiu" and np.isfinite(vectors).all()
    if not numeric or vectors.ndim != 2 or vectors.shape[1] != layer.channels:
        raise AtlasError(f"vectors={config.vectors} must hold finite numbers of shape (N, {layer.channels}).")
    return vectors


@ieee(deterministic=True)
def _autoencoder(rows: Activations, layer: Layer, config: DictionaryConfig) -> Arrays:
    """Train a sparse autoencoder, or go on with the training that a file beside the result has."""
    latents = config.latents or EXPANSION * layer.channels
    if config.k > latents:
        raise AtlasError(f"k={config.k} is more than the number of latents, {latents:,}.")
    if len(rows.train) < FEW_ROWS * latents:
        log.warning(
            "%d rows for %d latents are few: expect latents of single images, and dead ones. Use more images, or fewer "
            "latents.",
            len(rows.train),
            latents,
        )
    settings = dataclasses.replace(config, out="")
    content = hashlib.sha256(np.ascontiguousarray(rows.train).data).hexdigest()
    identity = hashing.digest_of(["autoencoder", dataclasses.asdict(settings), latents, content])
    partial = _partial(Path(config.out).expanduser())
    state = _stored(partial, identity)
    if state is None:
        state = autoencoder.initial_state(layer.channels, latents, config.seed)
    else:
        log.info("training goes on from step %d of %d", state.step, config.steps)
    stored = told = time.monotonic()

    def after_step(now: TrainingState, error: float) -> None:
        nonlocal stored, told
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            log.info("step %d of %d, explained variance %.3f", now.step, config.steps, 1 - error)
        if time.monotonic() - stored > STORE_SECONDS and now.step < config.steps:
            stored = time.monotonic()
            _store(partial, identity, now)

    return autoencoder.train(rows.train, config, state, after_step)


def _partial(out: Path) -> Path:
    """Return the file that keeps the state of unfinished training."""
    return out.with_name(f"{out.name}.partial")


def _store(path: Path, identity: str, state: TrainingState) -> None:
    write_atomic(path, save(state.tensors(), metadata={"identity": identity, "step": str(state.step)}))


def _stored(path: Path, identity: str) -> TrainingState | None:
    """Return the state that a file keeps of the same training; None without."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            known = file.metadata() or {}
            if known.get("identity") == identity:
                # Copies: sums over memory that is aligned in another way differ in the last bit on some processors.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                return TrainingState.of(int(known["step"]), tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        log.warning("%s cannot be read (%s); training begins anew", path, first_line(error))
        return None
    log.warning("%s is of another training; training begins anew", path)
    return None


def _concept(network: Model, layer: Layer, config: DictionaryConfig) -> tuple[Arrays, dict[str, Any], Facts]:
    """Return arrays, settings and facts of a concept vector."""
    if config.positive is None or config.negative is None:
        raise AtlasError("method=concept needs two folders of images: positive=FOLDER negative=FOLDER.")
    folders = (config.positive, config.negative)
    means = [_means(network, layer, _listed(folder, network), config.images) for folder in folders]
    concept = fit_concept(means[0], means[1], config.seed)
    name = config.name or Path(config.positive).name
    facts: Facts = {
        "latents": 1,
        "concept": name,
        "images": len(means[0]),
        "other images": len(means[1]),
        "accuracy": concept.accuracy,
        "accuracy of random splits": float(concept.null.mean()),
        "p": concept.p_value,
    }
    return concept.arrays, {"gate": "none"}, facts


def _listed(folder: str, network: Model) -> Dataset:
    return datasets.list_dataset(DataConfig("folder", folder), network.preprocessing.channels)


@ieee(deterministic=True)
def _means(network: Model, layer: Layer, dataset: Dataset, most: int) -> np.ndarray:
    """Return the spatial means of activations on images, (n, C)."""
    found: list[np.ndarray] = []
    loaded = image_loading.load_images(dataset, dataset.draw(most).tolist(), network.preprocessing)
    with capture(network, [layer]) as forward, torch.no_grad():
        for _, levels in image_loading.batches(loaded, BATCH, []):
            maps = forward(torch.from_numpy(levels).to(network.device).float().div_(255))[layer.name]
            found.append(maps.float().mean((2, 3)).cpu().numpy())
    return np.concatenate([np.zeros((0, layer.channels), np.float32), *found])


def described(facts: Facts) -> list[tuple[str, str]]:
    """Return facts as pairs of texts."""
    return [(name, f"{value:,.4g}" if isinstance(value, float) else str(value)) for name, value in facts.items()]
