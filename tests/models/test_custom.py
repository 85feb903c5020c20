"""The user's own network: builders, files, checkpoints, odd modules, and clear words where it can't be."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyNet, compose
from PIL import Image
from test_architectures import CIFAR_NET
from torch import Tensor, nn

import pipeline
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.data import multiband
from pipeline.layers.finding import Layer, ReceptiveField, capture, enumerate_layers
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.layers.selection import LayersConfig, list_layers, select_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, ModelConfig, load_model, prepare_module
from pipeline.planning.planner import make_plan


def custom(target: str, **settings: Any) -> ModelConfig:
    return ModelConfig("custom", "mine", **{"target": target, "input_size": 32, **settings})


def wrapped(module: nn.Module, size: int | tuple[int, int] = 32, channels: int = 3) -> Model:
    pair = (size, size) if isinstance(size, int) else size
    return Model(
        prepare_module(module), "mine", Preprocessing(pair, min(pair), (0.5,) * channels, (0.5,) * channels), "", ()
    )


def named(model: Model, **settings: Any) -> dict[str, Layer]:
    return {la.name: la for la in list_layers(model, LayersConfig(**settings))}


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "widths.py").write_text("WIDTH = 6\n")
    (tmp_path / "my_net.py").write_text(
        "import widths\nfrom torch import nn\nclasses = 5\n"
        "def build(channels=3):\n    return nn.Sequential(nn.Conv2d(channels, widths.WIDTH, 3), nn.Dropout(0.5),\n"
        "        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths.WIDTH, 5))\n"
        "def broken():\n    raise ValueError('no such depth')\n"
        "def lazy():\n    return nn.Sequential(nn.LazyConv2d(4, 3))\n"
        "def half():\n    return build().half()\n"
        "def words():\n    return ['not', 'a', 'module']\n"
    )
    return f"{tmp_path}/my_net.py"


def test_a_file_builds_with_what_lies_beside_it(net: str) -> None:
    model = load_model(custom(f"{net}:build", arguments={"channels": 2}, channels=2))
    assert model.preprocessing == Preprocessing((32, 32), 32, (0.0, 0.0), (1.0, 1.0)) and not model.module.training
    assert load_model(custom(f"{net}:half")).module.get_submodule("0").weight.dtype == torch.float32


def test_the_digest_follows_the_code_but_not_its_comments(net: str) -> None:
    config = custom(f"{net}:build")
    first = load_model(config).digest
    text = Path(net).read_text()
    Path(net).write_text(text + "\n# a remark\n")
    assert load_model(config).digest == first
    Path(net).write_text(text.replace("nn.ReLU(inplace=True)", "nn.Tanh()"))
    assert load_model(config).digest != first


def test_an_import_path_with_arguments() -> None:
    model = load_model(custom("torchvision.models:resnet18", arguments={"num_classes": 7}))
    assert model.module.get_submodule("fc").weight.shape[0] == 7


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{net}:biuld", "no function 'biuld'. Nearest: build"),
        ("{net}:broken", r"failed: ValueError: no such depth \(my_net.py, line 8\)"),
        ("{net}:words", "returned a list; it must return a torch.nn.Module"),
        ("{net}:lazy", "0.weight has no size yet"),
        ("{net}", "names no function"),
        ("nowhere.py:build", "there is no file"),
        ("no_such_package.nets:build", "can't be imported: ModuleNotFoundError"),
        ("weights.pt", "there is no such file"),
        ("{folder}/syntax.py:build", "can't be run: SyntaxError"),
        ("", "needs model.target"),
    ],
)
def test_targets_that_are_no_network(net: str, tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "syntax.py").write_text("def build(:\n")
    with pytest.raises(AtlasError, match=message):
        load_model(custom(target.format(net=net, folder=tmp_path)))


def test_torchscript_is_refused_and_an_exported_program_is_looked_into(tmp_path: Path) -> None:
    net = TinyNet().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(tmp_path / "net.pt")
        batch, sides = torch.export.Dim("batch"), torch.export.Dim.AUTO
        program = torch.export.export(
            net, (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: batch, 2: sides, 3: sides},)
        )
        torch.export.save(program, tmp_path / "net.pt2")
        torch.export.save(torch.export.export(net, (torch.rand(1, 3, 32, 32),)), tmp_path / "one.pt2")
    with pytest.raises(AtlasError, match="is TorchScript, whose inner modules do not run forward hooks"):
        load_model(custom(str(tmp_path / "net.pt")))
    exported, own = load_model(custom(str(tmp_path / "net.pt2"))), wrapped(net)
    own = dataclasses.replace(own, preprocessing=exported.preprocessing)
    a, b = named(exported, policy="convs"), named(own)
    convs = select_layers(exported, list(a.values()), LayersConfig("convs"))
    assert [la.name for la in convs] == ["stem", "block.0", "late", "head"]
    images = torch.rand(3, 3, 32, 32)
    with capture(exported, convs) as one, capture(own, [b[la.name] for la in convs]) as two, torch.no_grad():
        first, second = one(images), two(images)
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-5), name
    with pytest.raises(AtlasError, match="takes one image at a time"):
        enumerate_layers(load_model(custom(str(tmp_path / "one.pt2"))))
    (tmp_path / "not.pt2").write_text("hello")
    with pytest.raises(AtlasError, match="can't be read as an exported program"):
        load_model(custom(str(tmp_path / "not.pt2")))


def test_value_range_mean_and_std() -> None:
    recipe = Preprocessing((8, 8), 8, (127.5,), (50.0,), value_range=(0.0, 255.0))
    model = dataclasses.replace(wrapped(nn.Conv2d(1, 2, 1), channels=1), preprocessing=recipe)
    assert torch.allclose(model.normalize(torch.tensor([[[[0.0, 1.0]]]])), torch.tensor([[[[-2.55, 2.55]]]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "one value per channel"),
        ({"channels": 4, "mean": (0.5,) * 3}, "one value per channel"),
        ({"std": (0.0,) * 3}, "above 0"),
        ({"value_range": (1.0, 0.0)}, "black must be below"),
        ({"labels": "nowhere.txt"}, "can't be read"),
        ({"checkpoint": "nowhere.pt"}, "There is no checkpoint"),
    ],
)
def test_settings_that_make_no_sense(net: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        load_model(custom(f"{net}:build", **settings))


def test_labels_from_lists_and_files(net: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "b.json").write_text('{"0": ["n01", "tench"], "1": ["n02", "goldfish"]}')
    for labels, expected in (("a.txt", ("one", "two", "three")), ("b.json", ("tench", "goldfish")), (("x",), ("x",))):
        assert load_model(custom(f"{net}:build", labels=labels, folder=str(tmp_path))).labels == expected
    tree = ["model=custom", f"model.target={net}:build", "model.input_size=32", "model.labels=[a,b]", "engine=inline"]
    with pytest.raises(AtlasError, match="2 names, but 5 has 5 outputs"):
        make_plan(compose(tree).config, timed=False)


# ---- checkpoints


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "net", "ema", "model"])
def test_common_wrappers_and_prefixes(wrapper: str, tmp_path: Path) -> None:
    from pipeline.models.checkpoints import load_checkpoint
    from pipeline.models.loading import weights_digest

    net, other = TinyNet(), TinyNet()
    prefix = "backbone." if wrapper == "net" else "module._orig_mod."
    torch.save({wrapper: {prefix + k: v for k, v in net.state_dict().items()}, "epoch": 1}, tmp_path / "c.pt")
    load_checkpoint(other, tmp_path / "c.pt")
    assert weights_digest(other) == weights_digest(net)


def test_trust_and_strictness(tmp_path: Path) -> None:
    from pipeline.models.checkpoints import load_checkpoint

    torch.save(TinyNet(), tmp_path / "whole.pt")
    with pytest.raises(AtlasError, match=r"model\.trust_checkpoint=true"):
        load_checkpoint(TinyNet(), tmp_path / "whole.pt")
    load_checkpoint(TinyNet(), tmp_path / "whole.pt", trust=True)
    state = TinyNet().state_dict()
    state["head.weight"] = torch.zeros(9, 8)
    state["extra"] = state.pop("head.bias")
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(AtlasError, match=r"model\.strict=false loads"):
        load_checkpoint(TinyNet(), tmp_path / "other.pt")
    net = TinyNet()
    load_checkpoint(net, tmp_path / "other.pt", strict=False)
    assert torch.equal(net.stem.weight, state["stem.weight"])
    torch.save({"a": torch.zeros(1)}, tmp_path / "none.pt")
    with pytest.raises(AtlasError, match="Not one tensor fits"):
        load_checkpoint(TinyNet(), tmp_path / "none.pt", strict=False)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:500])
    for path, message in (("torn.pt", "can't be read"), ("words.pt", "can't be read|no state dict")):
        (tmp_path / "words.pt").write_text("hello")
        with pytest.raises(AtlasError, match=message):
            load_checkpoint(TinyNet(), tmp_path / path)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(AtlasError, match="with the keys epoch"):
        load_checkpoint(TinyNet(), tmp_path / "empty.pt")


# ---- odd networks


@dataclasses.dataclass
class Answer:
    logits: Tensor
    features: Tensor


class Odd(nn.Module):
    """Functional in-place sums, a shared convolution, a dataclass, a tuple and a dict for outputs."""

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x.mean()

    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": x + 1, "aux": x}

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.pair, self.named = self.Pair(), self.Named()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Answer:
        y = self.shared(x)
        y += 1.0
        y = self.shared(y).relu_()
        y, _ = self.pair(y)
        y = self.named(y)["out"]
        return Answer(self.head(y.mean((2, 3))), y)


def test_odd_outputs_and_functional_in_place_sums() -> None:
    model = wrapped(Odd())
    layers = named(model)
    assert set(layers) == {"shared", "shared#2", "pair", "named", "head"}
    images = torch.rand(2, 3, 32, 32)
    with capture(model, list(layers.values())) as forward, torch.no_grad():
        seen = forward(images)
    net = model.module
    assert torch.equal(seen["shared"], net.shared(model.normalize(images)))
    assert torch.equal(seen["named"], seen["pair"] + 1) and seen["shared#2"].min() < 0


class Tokens(nn.Module):
    """A transformer with a class token and two registers, its sequence first if asked, over any size of picture."""

    def __init__(self, sequence_first: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.extra = nn.Parameter(torch.rand(3, 8))
        self.first = sequence_first
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=not sequence_first)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
        x = self.layer(x.transpose(0, 1)).transpose(0, 1) if self.first else self.layer(x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("sequence_first", [False, True])
def test_tokens_are_laid_out_as_the_map_of_their_patches(sequence_first: bool) -> None:
    model = wrapped(Tokens(sequence_first), (32, 48))
    layer = named(model)["layer"]
    assert (layer.layout, layer.prefix) == ("tokens_first" if sequence_first else "tokens", 3)
    assert (layer.channels, layer.height, layer.width) == (8, 8, 12)
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        with capture(model, [layer]) as forward:
            maps = forward(images)["layer"]
        net, seen = model.module, []
        handle = net.layer.register_forward_hook(lambda *a: seen.append(a[2]))
        net(model.normalize(images))
        handle.remove()
    tokens = seen[0].transpose(0, 1) if sequence_first else seen[0]
    assert torch.allclose(maps[1, 5, 2, 7], tokens[1, 3 + 2 * 12 + 7, 5], atol=1e-5)
    every, prefix = named(model, tokens="all")["layer"], named(model, tokens="prefix")["layer"]
    assert (every.height, every.width, prefix.width) == (1, 99, 3)
    # Another size of picture is another grid of the same patches.
    with capture(model, [layer]) as forward, torch.no_grad():
        assert forward(torch.rand(1, 3, 64, 48))["layer"].shape == (1, 8, 16, 12)


def test_layouts_can_be_said_and_are_checked() -> None:
    model = wrapped(Tokens(False))
    assert named(model, layouts={"layer.linear*": "flat"})["layer.linear1"].channels == 67
    for layouts, message in (
        ({"layer": "maps"}, "can't be 'maps'"),
        ({"layer": "map"}, "is not one of"),
        ({"lawyer": "tokens"}, "no layer matches 'lawyer'. Nearest: layer"),
    ):
        with pytest.raises(AtlasError, match=message):
            named(model, layouts=layouts)


class Coupled(nn.Module):
    def __init__(self, chance: bool) -> None:
        super().__init__()
        self.conv, self.mix, self.chance = nn.Conv2d(3, 4, 3), nn.Identity(), chance

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.mix(nn.functional.dropout(x, 0.5, True) if self.chance else x - x.mean(0, keepdim=True) / 2)


@pytest.mark.parametrize("chance", [False, True])
def test_networks_that_couple_images_or_roll_dice_are_refused(chance: bool) -> None:
    with pytest.raises(AtlasError, match="begins between 'conv' and 'mix'"):
        enumerate_layers(wrapped(Coupled(chance)))


def test_a_network_that_does_not_take_its_own_input_says_so() -> None:
    with pytest.raises(AtlasError, match=r"mine does not take 1 × 1 × 32 × 32 .*\n?.*model.channels"):
        enumerate_layers(wrapped(nn.Sequential(nn.Conv2d(3, 4, 3)), channels=1))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, padding=1)


def test_a_network_of_functions_is_its_output() -> None:
    model = wrapped(Functional())
    layers = named(model)
    assert list(layers) == ["output"]
    assert receptive_fields(model, list(layers.values()))["output"] == ReceptiveField((3, 3), (1, 1), (-1, -1))
    with pytest.raises(AtlasError, match="has no classifier: no linear layer or convolution"):
        select_layers(model, list(layers.values()), LayersConfig("logits"))


def test_aliases_are_names_for_globs() -> None:
    model = wrapped(TinyNet())
    layers = list_layers(model, LayersConfig(), {"mixed4c": "block", "conv1": "stem"})
    found = select_layers(model, layers, LayersConfig(include=("mixed4c*", "conv1")))
    assert [(la.name, la.alias) for la in found] == [
        ("stem", "conv1"), ("block.0", "mixed4c.0"), ("block.1", "mixed4c.1"), ("block.2", "mixed4c.2"),
        ("block", "mixed4c"),
    ]  # fmt: skip
    with pytest.raises(AtlasError, match="Nearest: mixed4c"):
        select_layers(model, layers, LayersConfig(include=("mixed4d",)))


@pytest.mark.long
def test_every_alias_of_the_configurations_is_a_module() -> None:
    for name in ("googlenet", "inception_v3", "alexnet", "vgg16"):
        config = compose([f"model={name}", "model.weights=null"]).config.model
        modules = dict(load_model(config).module.named_modules())
        assert config.aliases and not set(config.aliases.values()) - set(modules)


# ---- whole runs

SMALL = [
    "model=custom", "model.input_size=32", "layers=tour", "layers.count=3", "layers.channels='0:2'", "render.steps=3",
    "render.margin=4", "engine=inline", "examples.k=2", "run.name=mine",
]  # fmt: skip


# With 3 channels docs/models.md does it, in tests/project/test_docs.py.
@pytest.mark.parametrize("channels", [3, 1, 5])
@pytest.mark.long
def test_small_networks_go_the_whole_way(channels: int, tmp_path: Path, photo_folder: Path) -> None:
    (tmp_path / "cifar.py").write_text(CIFAR_NET)
    folder = photo_folder
    if channels == 5:
        folder = tmp_path / "bands"
        folder.mkdir()
        for i in range(6):
            values = np.random.default_rng(i).random((40, 50, 5))
            np.save(folder / f"{i}.npy", values.transpose(2, 0, 1) if i % 2 else (values * 255).astype(np.uint8))
    arguments = [
        *SMALL, f"model.target={tmp_path}/cifar.py:build", f"model.arguments={{channels: {channels}}}",
        f"model.channels={channels}", "data=folder", f"data.root={folder}", f"run.root={tmp_path}",
    ]  # fmt: skip
    assert main(["run", *arguments]) == 0
    assert main(["verify", str(tmp_path / "mine"), "run.trust=true"]) == 0
    with pipeline.open_atlas(tmp_path / "mine") as atlas:
        assert len(atlas.layers) == 3
        layer = atlas[atlas.layers[1]]
        assert layer.image(0).shape == (32, 32, channels)
        best = layer.examples("max")
        assert best is not None
        photo = atlas.input_image(int(best.index[0, 0]))
        assert photo is not None and photo.mode == ("L" if channels == 1 else "RGB")
    assert (tmp_path / "mine" / "site" / "index.html").is_file()


def test_bands_are_read_and_refused(tmp_path: Path) -> None:
    import tifffile

    stack = np.arange(6 * 4 * 5, dtype=np.uint16).reshape(6, 4, 5) * 500
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    read = np.asarray(multiband.read_bands(tmp_path / "a.tif", 6, None))
    assert read.shape == (4, 5, 6) and abs(int(read[3, 4, 5]) - round(119 * 500 / 65535 * 255)) <= 1
    with pytest.raises(ValueError, match="no picture of 4 bands"):
        multiband.read_bands(tmp_path / "a.tif", 4, None)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"only \.npy"):
        multiband.read_bands(tmp_path / "b.png", 6, None)
    assert [multiband.to_display_image(np.zeros((2, 2, n), np.uint8)).mode for n in (1, 2, 3, 4)] == [
        "L",
        "L",
        "RGB",
        "RGB",
    ]
    tree = [*SMALL, "model.target=torchvision.models:resnet18", "model.channels=6"]
    with pytest.raises(AtlasError, match=r"files of 6 bands"):
        make_plan(compose(tree).config, timed=False)
