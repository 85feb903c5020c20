"""Read dictionaries from files: this project's own, those of SAELens and saev, and plain matrices of directions.

| file | what is read |
|---|---|
| `.safetensors` | `W_enc` (C, N), `W_dec` (N, C), `b_enc` (N,), `b_dec` (C,), `threshold` (N,); or `directions` |
| folder | SAELens: `sae_weights.safetensors` and `cfg.json` |
| `.pt` | saev: a line of JSON and a state dict, which is read without executing anything |
| `.npy` | directions, (N, C) or (C,) |

Values of directions are their dot products with the activations of a position.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from pipeline.core.errors import AtlasError, first_line, nearest_names
from pipeline.layers.dictionaries import SEPARATOR, Dictionary, DictionaryLayer, Gate
from pipeline.layers.finding import Layer

# Names of the arrays, as in SAELens and saev.
ENCODER, DECODER, BIAS, CENTER, THRESHOLD, DIRECTIONS = "W_enc", "W_dec", "b_enc", "b_dec", "threshold", "directions"
ARRAYS = (ENCODER, DECODER, BIAS, CENTER, THRESHOLD, DIRECTIONS)
# Entry of the metadata of a .safetensors file with the settings, as JSON.
METADATA = "dictionary"
SAELENS_WEIGHTS, SAELENS_CONFIG = "sae_weights.safetensors", "cfg.json"

# Settings of SAELens under which a latent is not W x + b of the activations as they are.
UNSUPPORTED = ("constant_norm_rescale", "layer_norm", "expected_average_only_in")
# Numbers of the sparse autoencoder that replaces each architecture or activation function of other tools.
GATES: Mapping[str, Gate] = {
    "none": "none",
    "identity": "none",
    "standard": "relu",
    "relu": "relu",
    "topk": "topk",
    "batchtopk": "topk",
    "batch_topk": "topk",
    "jumprelu": "jumprelu",
}
# Letters, digits and these may be part of the name of a dictionary.
NAME_SIGNS = "-_."

Arrays = dict[str, np.ndarray]

# Errors of files that are something else.
UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    EOFError,
)


def with_dictionaries(layers: Sequence[Layer], specifications: Sequence[str]) -> list[Layer]:
    """Return layers with those of dictionaries, each after the layer that it belongs to.

    Args:
        layers: All layers of a network.
        specifications: FILE@LAYER of each dictionary. The new layer is LAYER@NAME, where NAME is that of the file
            without its suffix.

    Raises:
        AtlasError: If a file cannot be read, a layer does not exist or has other channels, or two have one name.
    """
    added: dict[str, list[Layer]] = {}
    for specification in specifications:
        path, separator, name = specification.rpartition(SEPARATOR)
        where = f"layers.dictionary={specification}"
        if not separator or not path:
            raise AtlasError(f"{where}: write FILE@LAYER, as in sae.safetensors@blocks.5.3.")
        base = next((layer for layer in layers if name in (layer.name, layer.alias)), None)
        if base is None:
            names = [layer.name for layer in layers]
            raise AtlasError(f"{where}: there is no layer {name!r}. {nearest_names(name, names)}")
        dictionary = read_dictionary(Path(path).expanduser(), where)
        if dictionary.channels != base.channels:
            raise AtlasError(
                f"{where}: its latents are of {dictionary.channels} channels, and {base.name} has {base.channels}."
            )
        layer = DictionaryLayer.on(base, _name_of(Path(path)), dictionary)
        if any(layer.name == other.name for others in added.values() for other in others):
            raise AtlasError(f"{where}: there are two dictionaries {layer.name}. Rename one of the files.")
        added.setdefault(base.name, []).append(layer)
    return [one for layer in layers for one in (layer, *added.get(layer.name, ()))]


def _name_of(path: Path) -> str:
    """Return the name of a dictionary: that of its file without the suffix, with signs that names of layers allow."""
    stem = path.name if path.is_dir() else path.stem
    return "".join(sign if sign.isalnum() or sign in NAME_SIGNS else "_" for sign in stem) or "dictionary"


def read_dictionary(path: Path, where: str) -> Dictionary:
    """Read a dictionary; see the table of the module.

    Args:
        path: File or folder.
        where: The setting, for error messages.

    Raises:
        AtlasError: If it cannot be read, or its latents are not a gate of a linear function of the activations.
    """
    suffix = "folder" if path.is_dir() else path.suffix.lower()
    if suffix not in READERS:
        raise AtlasError(f"{where}: {path.name} must be a .safetensors, .npy or .pt file, or a folder of SAELens.")
    try:
        arrays, settings = READERS[suffix](path)
    except OSError as error:
        raise AtlasError(f"{where}: {path} can't be read: {error.strerror or first_line(error)}.") from None
    except UNREADABLE as error:
        raise AtlasError(f"{where}: {path} is not a dictionary: {first_line(error)}") from None
    return dictionary_of(arrays, settings, where)


def dictionary_bytes(arrays: Arrays, settings: Mapping[str, Any]) -> bytes:
    """Return a .safetensors file of a dictionary.

    Args:
        arrays: Its arrays by name, as in the table of the module.
        settings: `gate`, `k`, and `facts`, what is known of its making, by name.
    """
    plain = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    return save(plain, metadata={METADATA: json.dumps(settings)})


def dictionary_of(arrays: Arrays, settings: Mapping[str, Any], where: str) -> Dictionary:
    """Return the dictionary of some arrays and settings, as in the table of the module.

    Args:
        arrays: Arrays by name.
        settings: `gate`, `k` and `subtracts_center`: whether the encoder reads x − c.
        where: The setting, for error messages.

    Raises:
        AtlasError: If an array is missing or has another shape, or a value is not finite.
    """
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items() if name in ARRAYS}
    if DIRECTIONS in arrays:
        rows = np.atleast_2d(arrays[DIRECTIONS])
        arrays = {ENCODER: np.ascontiguousarray(rows.T), DECODER: rows}
    if ENCODER not in arrays or DECODER not in arrays:
        raise AtlasError(f"{where}: it has no {ENCODER} and {DECODER}, and no {DIRECTIONS}.")
    decoder = arrays[DECODER]
    if decoder.ndim != 2 or not decoder.size or arrays[ENCODER].shape != decoder.shape[::-1]:
        shapes = f"{ENCODER} {arrays[ENCODER].shape} and {DECODER} {decoder.shape}"
        raise AtlasError(f"{where}: {shapes} must be of the shapes (channels, latents) and (latents, channels).")
    latents, channels = decoder.shape
    gate = settings.get("gate", "jumprelu" if THRESHOLD in arrays else "none")
    if THRESHOLD in arrays and gate == "topk":
        gate = "jumprelu"  # the threshold of a batch top-k autoencoder, found while it was trained
    bias, center = arrays.get(BIAS, np.zeros(latents, np.float32)), arrays.get(CENTER, np.zeros(channels, np.float32))
    threshold = arrays.get(THRESHOLD) if gate == "jumprelu" else None
    if gate == "jumprelu":
        if threshold is None:
            raise AtlasError(f"{where}: a JumpReLU dictionary needs the array {THRESHOLD}.")
        threshold = np.array(np.broadcast_to(threshold.reshape(-1), latents))
    for name, array, shape in ((BIAS, bias, (latents,)), (CENTER, center, (channels,))):
        if array.shape != shape:
            raise AtlasError(f"{where}: {name} {array.shape} must be of the shape {shape}.")
    encoder = np.ascontiguousarray(arrays[ENCODER].T)
    if settings.get("subtracts_center"):
        bias = bias - encoder @ center
    parts = (encoder, bias, decoder, center, *([] if threshold is None else [threshold]))
    if not all(np.isfinite(part).all() for part in parts):
        raise AtlasError(f"{where}: it holds values that are not finite.")
    k = int(settings.get("k", 0)) if gate == "topk" else 0
    if gate == "topk" and not 0 < k <= latents:
        raise AtlasError(f"{where}: k={k} must be from 1 to the number of latents, {latents:,}.")
    digest = hashlib.sha256(json.dumps([gate, k, *(part.shape for part in parts)]).encode())
    for part in parts:
        digest.update(np.ascontiguousarray(part).data)
    facts = settings.get("facts")
    known = [(str(name), _fact(value)) for name, value in (facts.items() if isinstance(facts, Mapping) else ())]
    return Dictionary(encoder, bias, decoder, center, gate, k, threshold, digest.hexdigest(), tuple(known))


def _fact(value: Any) -> str | float:
    return float(value) if isinstance(value, int | float) else str(value)[:200]


def _gate(name: Any) -> Gate:
    """Return the gate that another tool names.

    Raises:
        ValueError: If there is none.
    """
    key = str(name).lower().rpartition(".")[2]
    if key not in GATES:
        raise ValueError(f"{name!r} is not supported: one of {', '.join(GATES)} is")
    return GATES[key]


def _safetensors(path: Path) -> tuple[Arrays, Mapping[str, Any]]:
    with safe_open(path, framework="pt") as archive:
        names = [name for name in archive.keys() if name in ARRAYS]  # noqa: SIM118
        arrays = {name: archive.get_tensor(name).float().numpy() for name in names}
        settings = json.loads((archive.metadata() or {}).get(METADATA, "{}"))
    if "gate" in settings:
        settings["gate"] = _gate(settings["gate"])
    elif THRESHOLD not in arrays and DIRECTIONS not in arrays:
        settings["gate"] = "relu"  # an autoencoder without a word about it
    return arrays, settings


def _saelens(path: Path) -> tuple[Arrays, Mapping[str, Any]]:
    settings = json.loads((path / SAELENS_CONFIG).read_text(encoding="utf-8"))
    normalization = settings.get("normalize_activations", "none")
    if normalization in UNSUPPORTED:
        raise ValueError(f"normalize_activations={normalization} is not supported: fold it into the weights")
    arguments = settings.get("activation_fn_kwargs") or {}
    name = settings.get("activation_fn") or settings.get("activation_fn_str") or "relu"
    architecture = settings.get("architecture", "standard")
    gate = _gate(architecture if architecture != "standard" else name)
    arrays, _ = _safetensors(path / SAELENS_WEIGHTS)
    if settings.get("rescale_acts_by_decoder_norm"):
        raise ValueError("rescale_acts_by_decoder_norm is not supported: fold the norms into the weights")
    chosen = {"gate": gate, "k": settings.get("k", arguments.get("k", 0))}
    return arrays, chosen | {"subtracts_center": bool(settings.get("apply_b_dec_to_input", True))}


def _saev(path: Path) -> tuple[Arrays, Mapping[str, Any]]:
    with path.open("rb") as file:
        line = file.readline(1_000_000)
        header = json.loads(line)
        content = io.BytesIO(file.read())
    settings = header.get("cfg", header)
    activation = settings.get("activation") or {"cls": header.get("cls", "Relu"), "params": settings}
    name = str(activation.get("cls", "Relu"))
    gate = _gate("relu" if name.endswith("Config") else name)
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # those of the unpickler derive from nothing closer
        raise ValueError(first_line(error)) from error
    arrays = {name: value.float().numpy() for name, value in state.items() if isinstance(value, Tensor)}
    return arrays, {"gate": gate, "k": (activation.get("params") or {}).get("top_k", 0)}


def _npy(path: Path) -> tuple[Arrays, Mapping[str, Any]]:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
        raise ValueError("it must hold numbers of shape (N, C) or (C,)")
    return {DIRECTIONS: array}, {"gate": "none"}


READERS: Mapping[str, Callable[[Path], tuple[Arrays, Mapping[str, Any]]]] = {
    ".safetensors": _safetensors,
    "folder": _saelens,
    ".pt": _saev,
    ".npy": _npy,
}
