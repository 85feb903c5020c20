"""The path that users run, on every network of `conf/model` and others: a worker's own code against plain PyTorch."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "networks"))

from check import check, configuration

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"

# Inputs as small as each network takes, so that all of this is done in three minutes.
SIZES = {"inception_v3": 96}
ARGUMENTS = {"vit_b_16": ["model.arguments={image_size: 64}"]}

MORE = {
    "squeezenet1_1": ["model=torchvision", "model.input_size=64"],
    "shufflenet_v2_x0_5": ["model=torchvision", "model.input_size=64"],
    "lraspp_mobilenet_v3_large": ["model=torchvision", "model.input_size=96"],
    "ssdlite320_mobilenet_v3_large": ["model=torchvision", "model.input_size=96"],
    "mobilenetv4_conv_small": ["model=timm", "model.input_size=64"],
    "repvgg_a0": ["model=timm", "model.input_size=64"],
    "eva02_tiny_patch14_224": ["model=timm"],
    "deit_tiny_distilled_patch16_224": ["model=timm"],
    "convnextv2_atto": ["model=timm", "model.input_size=64"],
    "edgenext_xx_small": ["model=timm", "model.input_size=64"],
    "test_resnet": ["model=timm", "model.arguments={features_only: true}", "model.input_size=64"],
    "test_vit": ["model=timm", "model.arguments={num_classes: 0}"],
}


# Networks of the short suite; the others take a quarter of a minute each.
SHORT = ("efficientnet_lite0",)
SHORT_MORE = ("squeezenet1_1", "test_resnet", "test_vit")


def shipped() -> list[str]:
    """Every file of conf/model that names a network."""
    return sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "custom")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SHORT else [pytest.mark.long]) for n in shipped()])
def test_every_shipped_network_is_rendered_with_right_values(name: str, tmp_path: Path) -> None:
    overrides = [f"model={name}", "model.weights=null", f"model.input_size={SIZES.get(name, 64)}"]
    overrides += ARGUMENTS.get(name, [])
    found = check(configuration([*overrides, f"run.root={tmp_path}"]), layers=2)
    assert found.rendered == 4 and not found.wrong, found
    # All of these but the transformer have convolutions that a CPU runs lowered.
    assert name == "vit_b_16" or any("lowered" in level for level in found.levels), found


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SHORT_MORE else [pytest.mark.long]) for n in MORE])
def test_other_architectures_are_rendered_with_right_values(name: str, tmp_path: Path) -> None:
    overrides = [*MORE[name], f"model.name={name}", "model.weights=null"]
    found = check(configuration([*overrides, f"run.root={tmp_path}"]), layers=2)
    assert found.rendered == 4 and not found.wrong, found


NETS = '''
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm
from torch.nn.utils.parametrizations import weight_norm as parametrized


class Net(nn.Module):
    """A convolution, `how` it is called and what is written over its output, and a classifier."""

    def __init__(self, how, conv=None, norm=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = conv or nn.Conv2d(8, 8, 1)
        self.norm = norm or nn.BatchNorm2d(8)
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.act = nn.ReLU()
        self.head = nn.Linear(8, 4)
        self.table = None
        self.how = how

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.conv(input=x) if self.how == "keyword" else self.conv(x)
        y = self.norm(input=y) if self.how == "keyword" else self.norm(y)
        if self.how == "add":
            y += x
        if self.how == "mul":
            y.mul_(0.5)
        if self.how == "relu":
            y = F.relu(y, inplace=True)
        if self.how == "clamp":
            y.clamp_(-1, 1)
        if self.how == "slice":
            y[:, :2] = y[:, :2] * 2
        if self.how == "constant":
            y = y + torch.linspace(0, 1, y.shape[-1], device=y.device)
        if self.how == "cached":
            if self.table is None:
                self.table = torch.linspace(0, 1, y.shape[-1], dtype=y.dtype, device=y.device)
            y = y + self.table[: y.shape[-1]]
        if self.how == "fft":
            y = torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=y.shape[-2:]) + x
        if self.how == "view":
            y = y.view(len(y), 8, -1).unflatten(2, x.shape[-2:])
        y = self.act(input=y)
        return self.head(y.mean((2, 3)))


def made(how, **parts):
    torch.manual_seed(1)
    return Net(how, **parts)


def add(): return made("add")
def mul(): return made("mul")
def relu(): return made("relu")
def clamp(): return made("clamp")
def slice_(): return made("slice")
def keyword(): return made("keyword")
def constant(): return made("constant")
def cached(): return made("cached")
def fft(): return made("fft")
def view(): return made("view")
def depthwise(): return made("add", conv=nn.Conv2d(8, 8, 3, padding=1, groups=8))
def weight_normed(): return made("add", conv=weight_norm(nn.Conv2d(8, 8, 1)))
def spectral_normed(): return made("add", conv=spectral_norm(nn.Conv2d(8, 8, 1)))
def parametrized_conv(): return made("add", conv=parametrized(nn.Conv2d(8, 8, 1)))


def hooked():
    net = made("add")
    net.conv.register_forward_hook(lambda m, i, o: o * 3 + 1)
    return net


class Standardised(nn.Conv2d):
    """A convolution that computes its weights anew at every call."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def standardised(): return made("add", conv=Standardised(8, 8, 1))


class Clip(nn.Module):
    """An image, repeated into a clip."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.conv(x[:, :, None].expand(-1, -1, 8, -1, -1)).relu().mean((2, 3, 4)))


def clip():
    torch.manual_seed(1)
    return Clip()


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).double()
        self.head = nn.Linear(8, 4).double()

    def forward(self, x):
        return self.head(self.conv(x.double()).relu().mean((2, 3)))


def double():
    torch.manual_seed(1)
    return Double()


def compiled(): return torch.compile(add())
def parallel(): return nn.DataParallel(add())


def scripted():
    net = made("none")
    net.act = torch.jit.script(Doubled())
    return net


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ReLU()

    def forward(self, input: torch.Tensor):
        return self.inner(input) * 2


def unet():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2)
    )
'''

LOWERED = ("add", "mul", "relu", "clamp", "slice_", "keyword", "depthwise", "hooked", "cached", "compiled", "parallel")
PLAINER = (
    "constant", "fft", "view", "weight_normed", "spectral_normed", "parametrized_conv", "standardised", "clip",
    "double", "scripted", "unet",
)  # fmt: skip

# One of each way to fall back, or not to.
SHORT_NETS = ("add", "depthwise", "hooked", "clip", "double", "unet")


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path / "nets.py"


@pytest.mark.filterwarnings("ignore")  # PyTorch is giving up TorchScript and the former weight_norm
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "builder",
    [pytest.param(b, marks=[] if b in SHORT_NETS else [pytest.mark.long]) for b in (*LOWERED, *PLAINER)],
)
def test_what_networks_do_beside_convolutions_keeps_its_values(
    nets: Path, builder: str, precision: str, tmp_path: Path
) -> None:
    overrides = ["model=custom", f"model.target={nets}:{builder}", "model.input_size=32", f"run.root={tmp_path}"]
    found = check(configuration([*overrides, f"engine.precision={precision}"]), layers=20)
    assert found.rendered and not found.wrong, found
    if builder in LOWERED:
        assert all(level.startswith("lowered") for level in found.levels), found


@pytest.mark.filterwarnings("ignore")
def test_wrappers_leave_no_trace_in_the_names(nets: Path) -> None:
    from pipeline.layers.selection import LayersConfig, list_layers
    from pipeline.models.loading import load_model

    names = {}
    for builder in ("add", "compiled", "parallel"):
        overrides = ["model=custom", f"model.target={nets}:{builder}", "model.input_size=32"]
        names[builder] = [la.name for la in list_layers(load_model(configuration(overrides).model), LayersConfig())]
    assert names["add"] == names["compiled"] == names["parallel"] and "conv" in names["add"]


def break_pointwise(monkeypatch: pytest.MonkeyPatch, part: tuple[slice, slice, int | slice]) -> None:
    """Make lowered convolutions forget a part of the gradient of their input: channels, then rows."""
    from pipeline.acceleration import cpu_lowering

    whole = cpu_lowering._Pointwise.backward

    def wrong(ctx: object, *gradients: torch.Tensor) -> object:
        back = list(whole(ctx, *gradients))
        back[0] = back[0].clone()
        back[0][part] = 0
        return tuple(back)

    monkeypatch.setattr(cpu_lowering._Pointwise, "backward", staticmethod(wrong))


@pytest.mark.long
def test_the_comparison_finds_a_wrong_network(nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution that is lowered wrongly in one corner falls back by itself, and is found out where it does not."""
    from pipeline.acceleration import variants

    break_pointwise(monkeypatch, (slice(None), slice(None), 0))
    overrides = ["model=custom", f"model.target={nets}:add", "model.input_size=32", f"run.root={tmp_path}"]
    overrides += ["engine.precision=float32"]
    found = check(configuration(overrides), layers=20)
    assert "folded float32" in found.levels and "lowered float32: the input gradient" in found.reasons[0]
    assert not found.wrong
    monkeypatch.setattr(variants, "FLOAT32_TOLERANCE", 10.0)
    assert check(configuration(overrides), layers=20).wrong


@pytest.mark.long
def test_the_comparison_finds_a_wrong_network_in_bfloat16(
    nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that lack three quarters of the channels are found out at every start."""
    from pipeline.acceleration import variants

    break_pointwise(monkeypatch, (slice(None), slice(2, None), slice(None)))
    overrides = ["model=custom", f"model.target={nets}:relu", "model.input_size=32", f"run.root={tmp_path}"]
    overrides += ["engine.precision=bfloat16"]
    found = check(configuration(overrides), layers=20)
    assert "folded float32" in found.levels and "cosine" in found.reasons[0] and not found.wrong, found
    monkeypatch.setattr(variants, "smallest_cosine", lambda rough: -1.0)
    assert "cosine" in check(configuration(overrides), layers=20).wrong
