"""Small real things that many tests share: a tiny network, a folder of photographs, a composed request."""

import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import nn

from pipeline.cli.compose import request_of
from pipeline.cli.main import main
from pipeline.cli.overrides import composed
from pipeline.layers.finding import Layer, enumerate_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, prepare_module, weights_digest
from pipeline.runs.runner import Request

# Ray must not write a token into the home folder of whoever runs the tests.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

# The cases of property tests are the same in every run: a test that passed fails only if something changed. For others:
# `pytest -m hypothesis --hypothesis-profile=explore`.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")

# Two processes of tests share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "photos"

if TYPE_CHECKING:
    from pipeline.names.clip_model import ClipModel

# Overrides that make any run small: a tiny timm network with random weights, few steps, no Ray.
TINY = [
    "model=timm",
    "model.name=test_efficientnet",
    "model.weights=null",
    "model.input_size=64",
    "layers=convs",
    "layers.include=[conv_stem,blocks.1.0.*,conv_head,classifier]",
    "layers.channels='0:3'",
    "render.steps=4",
    "render.size=32",
    "render.margin=4",
    "engine=inline",
    "engine.batch=2",
    "examples.k=3",
    "examples.batch=4",
    "examples.per_task=8",
]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """Write an uncompressed archive, as a shard of WebDataset is."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


class TinyNet(nn.Module):
    """Every difficulty in one: an in-place ReLU, a ReLU used twice, a residual sum, a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.late = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = x + self.block(x)
        x = self.relu(self.late(x))
        return self.head(x.mean((2, 3)))


def tiny_model(size: int = 32, channels: int = 3) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = TinyNet()
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            # An untrained normalisation is nearly an identity; make it count.
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    recipe = Preprocessing((size, size), size, (0.5,) * channels, (0.25,) * channels)
    return Model(prepare_module(module), "tiny", recipe, weights_digest(module), tuple("abcde"))


@pytest.fixture(scope="session")
def tiny() -> Model:
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_layers(tiny: Model) -> dict[str, Layer]:
    return {layer.name: layer for layer in enumerate_layers(tiny)}


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 photographs in 4 labelled folders: coloured noise of different scales, so that no two are alike."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(20):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (4 + i, 5 + i, 3), np.uint8)
        image = Image.fromarray(coarse).resize((90 + i, 70 + 2 * i), Image.Resampling.BICUBIC)
        folder = root / f"label {i % 4}"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{i:02d}.png")
    return root


def compose(overrides: list[str]) -> Request:
    """What the command line would make of `overrides`."""
    return request_of(composed(overrides))


@pytest.fixture
def tiny_run(tmp_path: Path, photo_folder: Path) -> list[str]:
    """Overrides of a small whole run in a folder of its own."""
    return [*TINY, "data=folder", f"data.root={photo_folder}", f"run.root={tmp_path}", "run.name=tiny"]


@pytest.fixture(scope="session")
def tiny_result(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    """The folder of a finished small run, which tests copy."""
    root = tmp_path_factory.mktemp("result")
    assert main(["run", *TINY, "data=folder", f"data.root={photo_folder}", f"run.root={root}", "run.name=tiny"]) == 0
    return root / "tiny"


@pytest.fixture
def finished(tiny_result: Path, tmp_path: Path, tiny_run: list[str]) -> Path:
    """A finished run of its own, which `tiny_run` goes on with."""
    return Path(shutil.copytree(tiny_result, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny CLIP model."""
    from tiny_clip import make_clip  # loads transformers, which few tests need

    return make_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> "ClipModel":
    """A tiny CLIP model."""
    from pipeline.names.clip_model import ClipModel

    return ClipModel(str(clip_folder))
