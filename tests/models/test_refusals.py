"""What a network is refused for, in words that lead to a network that runs: each fix is tried where it is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose
from torch import nn

from pipeline.core.errors import AtlasError
from pipeline.layers.finding import capture
from pipeline.layers.selection import LayersConfig, list_layers, logit_layers, select_layers
from pipeline.models.loading import ModelConfig, load_model
from pipeline.planning.planner import make_plan
from pipeline.runs.runner import plan_run, run
from pipeline.store.reader import open_atlas
from pipeline.store.writer import render_groups

NETS = '''
import torch
import torch.nn.functional as F
from torch import nn


class Head(nn.Module):
    """A convolution, something in between, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Linear(8, 4)

    def between(self, x):
        return x

    def forward(self, x):
        return self.head(self.between(self.act(self.conv(x))).mean((2, 3)))


class Huge(Head):
    def between(self, x):
        return self.scale(x)

    def __init__(self, by):
        super().__init__()
        self.scale = Exp(by)


class Exp(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return torch.exp(x * self.by)


def huge(by=1000.0): return Huge(by)


class Dropped(Head):
    def between(self, x):
        return F.dropout(x, 0.5, training=self.on)


def dropped(on=True):
    net = Dropped()
    net.on = on
    return net


def batch_statistics(track=False):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=track), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Half(Head):
    def forward(self, x):
        return super().forward(x.half() if self.hard else x.to(self.conv.weight.dtype))


def half(hard=True):
    net = Half().half()
    net.hard = hard
    return net


class Two(Head):
    def forward(self, x, meta):
        return super().forward(x) + meta


class OneInput(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images, meta=torch.zeros(len(images), 4))


def two(wrapped=False): return OneInput(Two()) if wrapped else Two()


class Flat(nn.Module):
    """A network of one size, as of CIFAR: a view in the place of pooling."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 32 * 32, 4)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.head(x.view(len(x), -1))


def flat(): return Flat()
def grey(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
def sequence(): return nn.Sequential(nn.Conv1d(3, 8, 9), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4))
def clips(): return nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 4))


class Repeated(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images[:, :, None].expand(-1, -1, 8, -1, -1))


class Unrolled(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images.flatten(2))


def repeated(): return Repeated(clips())
def unrolled(): return Unrolled(sequence())


def quantized(done=True):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8) if done else net


class Frozen(Head):
    def between(self, x):
        if self.how == "round":
            return (x * 255).round() / 255
        return x.detach() if self.how == "detach" else x

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return super().forward(x)
        if self.how == "inference":
            with torch.inference_mode():
                return super().forward(x)
        return super().forward(x)


def frozen(how):
    torch.manual_seed(0)
    net = Frozen()
    net.how = how
    return net


def headless(): return nn.Sequential(maps_only(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def maps(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1))
def maps_only(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
'''


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path / "nets.py"


def layers_of(nets: Path, builder: str, **settings: Any) -> list[str]:
    """Names of all layers, found as a plan finds them."""
    config = ModelConfig("custom", "mine", target=f"{nets}:{builder}", **{"input_size": 16, **settings})
    return [layer.name for layer in list_layers(load_model(config).to("cpu"), LayersConfig())]


@pytest.mark.filterwarnings("ignore")  # PyTorch is giving up its former quantization
@pytest.mark.parametrize(
    ("builder", "arguments", "message", "fixed"),
    [
        ("huge", {}, r"infinity or NaN .* first in 'scale', a Exp", ("huge", {"by": 1.0})),
        ("dropped", {}, r"begins between 'act' and 'head'.*training=True", ("dropped", {"on": False})),
        ("batch_statistics", {}, r"begins in '1'.*track_running_stats", ("batch_statistics", {"track": True})),
        ("half", {}, r"float32 here, and its forward converts.*weight\.dtype", ("half", {"hard": False})),
        ("two", {}, r"needs meta beside the images.*class OneInput", ("two", {"wrapped": True})),
        ("sequence", {}, r"not a network of images.*flatten\(2\)", ("unrolled", {})),
        ("clips", {}, r"takes clips .*expand", ("repeated", {})),
        ("quantized", {}, r"is quantized: 3 is a Linear.*floating-point", ("quantized", {"done": False})),
    ],
)
def test_the_reason_is_said_and_the_fix_works(
    nets: Path, builder: str, arguments: dict[str, Any], message: str, fixed: tuple[str, dict[str, Any]]
) -> None:
    with pytest.raises(AtlasError, match=f"(?s){message}"):
        layers_of(nets, builder, arguments=arguments)
    assert layers_of(nets, fixed[0], arguments=fixed[1])


@pytest.mark.parametrize(
    ("builder", "message", "fix"),
    [
        ("flat", r"It takes 3 × 32 × 32: set model\.input_size=32\.", {"input_size": 32}),
        ("grey", r"It takes 1 × 16 × 16: set model\.channels=1\.", {"channels": 1}),
    ],
)
def test_sizes_and_channels_are_named_after_they_were_tried(
    nets: Path, builder: str, message: str, fix: dict[str, Any]
) -> None:
    with pytest.raises(AtlasError, match=message):
        layers_of(nets, builder)
    assert layers_of(nets, builder, **fix)


def test_the_failing_module_is_named(nets: Path) -> None:
    with pytest.raises(AtlasError, match=r"raised in head, a Linear"):
        layers_of(nets, "flat", input_size=20)


def test_a_network_that_flattens_by_view_runs_in_the_usual_memory_format(nets: Path) -> None:
    config = ModelConfig("custom", "mine", target=f"{nets}:flat", input_size=32)
    model = load_model(config).to("cpu")
    assert not model.channels_last
    (layer,) = [la for la in list_layers(model, LayersConfig()) if la.name == "conv"]
    images = torch.rand(2, 3, 32, 32)
    with capture(model, [layer], stop=False) as forward:
        maps = forward(images)["conv"]
    torch.testing.assert_close(maps, model.module.get_submodule("conv")(images))


@pytest.mark.parametrize(
    ("builder", "logits"), [("headless", None), ("maps", ["2"]), ("maps_only", None), ("huge", ["head"])]
)
def test_logits_are_asked_for_by_nothing_but_logits(nets: Path, builder: str, logits: list[str] | None) -> None:
    config = ModelConfig(
        "custom",
        "mine",
        target=f"{nets}:{builder}",
        input_size=16,
        arguments={"by": 0.1} if builder == "huge" else None,
    )
    model = load_model(config).to("cpu")
    layers = list_layers(model, LayersConfig())
    for policy in ("tour", "convs", "all"):
        assert select_layers(model, layers, LayersConfig(policy))
    if logits is None:
        with pytest.raises(AtlasError, match=r"has no classifier: no linear layer .* layers=convs"):
            select_layers(model, layers, LayersConfig("logits"))
    else:
        assert [la.name for la in select_layers(model, layers, LayersConfig("logits"))] == logits


@pytest.mark.parametrize("name", ["squeezenet1_1", "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_heads_of_torchvision_without_a_linear_layer(name: str) -> None:
    model = load_model(ModelConfig("torchvision", name, weights=None, input_size=96)).to("cpu")
    layers = list_layers(model, LayersConfig())
    heads = [(la.name, la.channels) for la in logit_layers(model, layers)]
    expected = {
        "squeezenet1_1": [("classifier.1", 1000)],
        "lraspp_mobilenet_v3_large": [("classifier.high_classifier", 21)],
    }
    assert heads == expected.get(name, [])
    # What a detector computes for its chosen regions is no layer of the image.
    assert not any(la.name.startswith("roi_heads") for la in layers)


def custom_run(nets: Path, builder: str, *more: str) -> list[str]:
    return [
        "model=custom", f"model.target={nets}:{builder}", "model.input_size=32", "layers=all", "layers.channels='0:2'",
        "render.steps=3", "render.attempts=1", "engine=inline", "examples.k=2", "data.limit=6",
        f"run.root={nets.parent}", *more,
    ]  # fmt: skip


def test_labels_need_a_classifier_with_as_many_classes(nets: Path) -> None:
    with pytest.raises(AtlasError, match=r"has no classifier.*Leave model\.labels null"):
        make_plan(compose(custom_run(nets, "headless", "model.labels=[a,b]")).config, timed=False)
    with pytest.raises(AtlasError, match=r"2 names, but 2 has 5 outputs"):
        make_plan(compose(custom_run(nets, "maps", "model.labels=[a,b]")).config, timed=False)
    made = make_plan(compose(custom_run(nets, "maps", "model.labels=[a,b,c,d,e]")).config, timed=False)
    assert made.labels == tuple("abcde")
    # Names that come with a network of a library do not stay for another head.
    other = ["model=resnet18", "model.weights=null", "model.arguments={num_classes: 3}", "model.input_size=32"]
    assert make_plan(compose([*other, "data.limit=2"]).config, timed=False).labels == ()


@pytest.mark.parametrize(
    ("how", "rendered", "reason"),
    [
        ("no_grad", [], "without gradients"),
        pytest.param("inference", [], "without gradients", marks=pytest.mark.long),
        ("detach", ["conv", "act"], "without gradients"),
        ("round", ["conv", "act"], "zero everywhere"),
        pytest.param("none", ["conv", "act", "head"], "", marks=pytest.mark.long),
    ],
)
def test_layers_without_gradient_keep_their_dataset_examples(
    nets: Path, how: str, rendered: list[str], reason: str
) -> None:
    request = compose(custom_run(nets, "frozen", f"model.arguments={{how: {how}}}", f"run.name={how}"))
    made = make_plan(request.config)
    assert [row.layer.name for row in made.rows] == rendered
    assert all(reason in one.reason for one in made.unrendered)
    assert {one.layer.name for one in made.unrendered} == {"conv", "act", "head"} - set(rendered)
    assert run(request, plan_run(request)) == 0
    with open_atlas(request.config.folder) as atlas:
        for name in ("conv", "act", "head"):
            view = atlas[name]
            assert bool(view.presets) == (name in rendered)
            assert bool(view.unrendered) == (name not in rendered)
            assert not view.unrendered or reason in view.unrendered
            examples = view.examples("max")
            assert examples is not None and (examples.index >= 0).any()
    kept = render_groups(request.config.folder / "atlas.h5").values()
    assert {shard.attributes["level"].split()[0] for shard in kept} <= {"lowered", "folded", "original"}


def test_builders_of_one_file_are_different_networks(nets: Path) -> None:
    """Their weights may be equal, and so is the file's source; what they compute is not."""
    digests = {
        load_model(ModelConfig("custom", "mine", target=f"{nets}:frozen", input_size=16, arguments={"how": how})).digest
        for how in ("round", "detach")
    }
    (nets.parent / "two.py").write_text(
        NETS + "\n\ndef one(): return frozen('round')\ndef other(): return frozen('detach')\n"
    )
    for builder in ("one", "other"):
        digests.add(
            load_model(ModelConfig("custom", "mine", target=f"{nets.parent}/two.py:{builder}", input_size=16)).digest
        )
    assert len(digests) == 4


def test_an_inner_script_takes_no_hooks() -> None:
    from pipeline.layers.tracing import modules_of

    with pytest.warns():
        inner = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    assert list(modules_of(nn.Sequential(nn.Conv2d(3, 3, 1), inner))) == ["", "0"]
