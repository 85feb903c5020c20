"""A CLIP model of the user's: a local folder in the layout of Hugging Face, or an installed package with such a folder.

Nothing is downloaded and nothing of the folder is executed: weights are read from safetensors files only, and the
classes are those of the installed package `transformers`.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.core.errors import AtlasError, first_line
from pipeline.core.hashing import digest_of

# Files of the folder that decide what an embedding is.
_DECISIVE = ("*.safetensors", "*.json", "*.txt", "*.model")

# Mean and standard deviation of the pixels of CLIP's training images, for folders that do not state any.
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an image becomes the input of the model.

    Attributes:
        shorter: Pixels that the shorter side is scaled to; 0 to scale both sides to `size`.
        size: (height, width) of the input; the center is cut out.
        mean: Mean of each color.
        deviation: Standard deviation of each color.
    """

    shorter: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Return the input for an image, (3, height, width) float32."""
        image, (height, width) = image.convert("RGB"), self.size
        if self.shorter:
            factor = self.shorter / min(image.size)
            scaled = tuple(max(self.shorter, round(side * factor)) for side in image.size)
            image = image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        else:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        array = np.asarray(image, np.float32) / np.float32(255)
        mean, deviation = np.array(self.mean, np.float32), np.array(self.deviation, np.float32)
        return ((array - mean) / deviation).transpose(2, 0, 1)


class ClipModel:
    """A CLIP model that maps images and texts to unit vectors.

    Attributes:
        name: Name of its folder or package.
        digest: sha256 of the files that decide what an embedding is.
    """

    def __init__(self, place: str) -> None:
        """Load the model.

        Args:
            place: Folder of the model, or name of an installed package with one.

        Raises:
            AtlasError: If the package `transformers` is missing, or there is no such model.
        """
        folder = find_folder(place)
        self.name = Path(place).name if Path(place).expanduser().is_dir() else place
        self.digest = _digest(folder)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._module, self._tokenizer = _load(folder)
        self._module.eval().requires_grad_(False).to(self._device)
        self._recipe = read_recipe(folder, self._module.config)

    @property
    def key(self) -> str:
        """Name of the folder that its embeddings are kept in."""
        return f"clip-{self.digest[:12]}"

    def images(self, images: Iterable[Image.Image]) -> np.ndarray:
        """Return the embeddings of images, (n, d) float32 of length 1."""
        pixels = [self._recipe.pixels(image) for image in images]
        parts = []
        with torch.inference_mode():
            for start in range(0, len(pixels), _BATCH):
                batch = torch.from_numpy(np.stack(pixels[start : start + _BATCH])).to(self._device)
                parts.append(_vectors(self._module.get_image_features(pixel_values=batch)))
        return _unit_length(parts)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings of texts, (n, d) float32 of length 1; texts that are too long are cut."""
        config: Any = self._module.config
        limit = getattr(getattr(config, "text_config", config), "max_position_embeddings", 77)
        # SigLIP was trained on texts of full length, and reads the last position.
        padding = "max_length" if str(config.model_type).startswith("siglip") else True
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), _BATCH):
                tokens = self._tokenizer(
                    list(texts[start : start + _BATCH]),
                    padding=padding,
                    truncation=True,
                    max_length=limit,
                    return_tensors="pt",
                )
                parts.append(_vectors(self._module.get_text_features(**tokens.to(self._device))))
        return _unit_length(parts)


def find_folder(place: str) -> Path:
    """Return the folder of a model: a path, or a folder inside an installed package, which is not imported.

    Raises:
        AtlasError: If there is none.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir() and place.isidentifier():
        spec = importlib.util.find_spec(place)
        for location in (spec.submodule_search_locations if spec else None) or ():
            found = sorted(Path(location).rglob("config.json"), key=lambda path: (len(path.parts), path))
            folder = found[0].parent if found else folder
    if not folder.is_dir():
        raise AtlasError(
            f"clip={place!r} is neither a folder nor an installed package with a model. Nothing is downloaded: save a "
            "model with transformers' save_pretrained, or copy its folder here."
        )
    if not (folder / "config.json").is_file():
        raise AtlasError(f"clip={place!r}: {folder} has no config.json, so that it is no model of transformers.")
    if not any(folder.glob("*.safetensors")):
        raise AtlasError(
            f"clip={place!r}: {folder} has no *.safetensors. Weights in other files can execute code when they are "
            "read, and are refused; transformers' save_pretrained writes safetensors."
        )
    return folder


def _digest(folder: Path) -> str:
    digests = {}
    for pattern in _DECISIVE:
        for path in folder.glob(pattern):
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digest_of(digests)


def _load(folder: Path) -> tuple[Any, Any]:
    """Return the module and the tokenizer."""
    try:
        import transformers
    except ImportError:
        raise AtlasError(
            "clip=… needs the package transformers: scripts/setup clip, or pip install 'neuron-atlas[clip]'."
        ) from None
    asked: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            module = transformers.AutoModel.from_pretrained(folder, use_safetensors=True, **asked)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **asked)
    except Exception as error:  # the library raises errors of many kinds for a folder that it can't read
        raise AtlasError(f"clip={str(folder)!r} can't be loaded: {first_line(error)}") from error
    if not all(hasattr(module, name) for name in ("get_image_features", "get_text_features")):
        raise AtlasError(
            f"clip={str(folder)!r} is a {type(module).__name__}, which has no embeddings of both images and texts."
        )
    return module, tokenizer


class _quiet:
    """Show no progress bars and no notes of transformers, only its errors."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("transformers").level
        logging.getLogger("transformers").setLevel(logging.ERROR)
        from transformers.utils import logging as their_logging

        their_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        logging.getLogger("transformers").setLevel(self._level)


def read_recipe(folder: Path, config: Any) -> Recipe:
    """Return how images are prepared, from the files of the folder, or as for CLIP of the model's image size.

    Raises:
        AtlasError: If the files state what is no size or color.
    """
    stated: Mapping[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if path.is_file():
            try:
                tree = json.loads(path.read_text(encoding="utf-8"))
                stated = tree.get("image_processor", tree if name.startswith("pre") else stated)
            except (ValueError, AttributeError) as error:
                raise AtlasError(f"{path} is not valid: {first_line(error)}") from None
    side = int(getattr(getattr(config, "vision_config", config), "image_size", 224))
    try:
        recipe = _stated_recipe(stated, side)
    except (TypeError, ValueError, AttributeError, KeyError):
        recipe = None
    if recipe is None or not 0 < min(recipe.size) <= max(recipe.size) <= 4096 or min(recipe.deviation) <= 0:
        raise AtlasError(f"{folder}: the size, mean or deviation of images in preprocessor_config.json is not valid.")
    return recipe


def _stated_recipe(stated: Mapping[str, Any], side: int) -> Recipe | None:
    """Return the recipe in the settings of an image processor; None if its colors are not three."""
    size = _size(stated.get("crop_size") if stated.get("do_center_crop", True) else None, side)
    shorter = _shorter(stated.get("size"), size)
    if shorter == 0 and stated.get("size"):
        size = _size(stated["size"], side)
    mean, deviation = _floats(stated.get("image_mean", _MEAN)), _floats(stated.get("image_std", _DEVIATION))
    return Recipe(shorter, size, mean, deviation) if len(mean) == len(deviation) == 3 else None


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _size(stated: Any, side: int) -> tuple[int, int]:
    if isinstance(stated, Mapping):
        return int(stated.get("height", side)), int(stated.get("width", side))
    return (int(stated), int(stated)) if stated else (side, side)


def _shorter(stated: Any, size: tuple[int, int]) -> int:
    """Return what the shorter side is scaled to; 0 if both sides are given."""
    if isinstance(stated, Mapping):
        return max(int(stated["shortest_edge"]), *size) if "shortest_edge" in stated else 0
    return max(int(stated or 0), *size)


def _vectors(output: Any) -> torch.Tensor:
    """Return the embeddings of a batch: a tensor, or since transformers 5 a field of an output."""
    return (output if isinstance(output, torch.Tensor) else output.pooler_output).float().cpu()


def _unit_length(parts: Sequence[torch.Tensor]) -> np.ndarray:
    if not parts:
        return np.zeros((0, 0), np.float32)
    vectors = torch.cat(list(parts))
    return (vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)).numpy()


@functools.lru_cache(maxsize=1)
def load_clip(place: str) -> ClipModel:
    """Load a CLIP model, once in a row; see `ClipModel`."""
    return ClipModel(place)
