"""A tiny CLIP that knows six colors, trained in a second, and atlases whose units each respond to one of them."""

import io
import json
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from pipeline.store.hdf5 import create_file, write_array

COLORS = {
    "red": (220, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 220),
    "yellow": (220, 220, 20),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
}
WORDS = ["green", "red", "blue", "yellow", "black", "white"]
SIDE, EACH, K = 32, 12, 8


def colored(name: str, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 18, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.array(COLORS[name]) + noise, 0, 255).astype(np.uint8))


def make_clip(folder: Path) -> Path:
    """Save a model in the layout of Hugging Face: one layer each for images and texts, whose letters are its tokens."""
    import transformers

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    end, small = len(tokens) - 1, {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config=small
            | {
                "num_hidden_layers": 1,
                "vocab_size": len(tokens),
                "max_position_embeddings": 16,
                "bos_token_id": end - 1,
                "eos_token_id": end,
                "pad_token_id": end,
            },
            vision_config=small | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
            projection_dim=16,
        )
        model = transformers.CLIPModel(config)
        _train(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    preprocessor |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def _train(model, tokenizer) -> None:
    words = list(COLORS)
    tokens = tokenizer(words, padding=True, return_tensors="pt")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(80):
        images = [colored(word, 1000 + step).resize((16, 16)) for word in words]
        pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])
        logits = model(pixel_values=(pixels - 0.5) / 0.25, **tokens).logits_per_image
        target = torch.arange(len(words))
        loss = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def write_color_atlas(path: Path, order: tuple[str, ...] = tuple(COLORS), mixed: int = 2) -> Path:
    """An atlas of one layer: a unit for each color, and `mixed` units of random images."""
    names = list(COLORS)
    images = [(name, colored(name, 50 * i + n)) for i, name in enumerate(names) for n in range(EACH)]
    rng = np.random.default_rng(4)
    rows = [rng.permutation(np.arange(EACH) + EACH * names.index(name))[:K] for name in order]
    rows += [rng.permutation(len(images))[:K] for _ in range(mixed)]
    index = np.array(rows, np.int32)
    with create_file(path) as file:
        file.attrs.update(
            schema="neuron-atlas", schema_version=5, model="tiny", weights_sha256="ab" * 32,
            dataset_fingerprint="cd" * 32, versions="{}", created="2026-01-02T03:04:05+00:00", run="colors",
            failures=0, identity="ef" * 32,
        )  # fmt: skip
        file.create_dataset("provenance/config", data="model: tiny\n", dtype=h5py.string_dtype())
        group = file.create_group("layers/late")
        group.attrs.update(
            name="late", order=0, kind="conv", channels=len(index), map_height=4, map_width=4,
            receptive_field=[0, 0], receptive_field_stride=[8, 8], receptive_field_offset=[0, 0],
            input_size=[SIDE, SIDE],
        )  # fmt: skip
        write_array(group, "channels", np.arange(len(index), dtype=np.int32))
        write_array(group, "examples/max/value", np.tile(np.arange(K, 0, -1, dtype=np.float32), (len(index), 1)))
        write_array(group, "examples/max/index", index)
        for key in ("y", "x"):
            write_array(group, f"examples/max/{key}", np.zeros(index.shape, np.int32))
        write_array(file, "dataset/path", np.array([f"{i:03d}.png" for i in range(len(images))], object))
        write_array(file, "dataset/label", np.array([""] * len(images), object))
        write_array(file, "dataset/source", np.arange(len(images)))
        write_array(file, "dataset/shown/index", np.arange(len(images), dtype=np.int32))
        write_array(file, "dataset/shown/size", np.full((len(images), 2), SIDE, np.float64))
        write_array(file, "dataset/shown/box", np.tile(np.array([0, 0, SIDE, SIDE], np.float64), (len(images), 1)))
        blobs = []
        for _, image in images:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=95)
            blobs.append(buffer.getvalue())
        write_array(file, "dataset/shown/offset", np.cumsum([0, *map(len, blobs)]))
        write_array(file, "dataset/shown/jpeg", np.frombuffer(b"".join(blobs), np.uint8))
        file["dataset/shown"].attrs["store"] = "images"
    return path
