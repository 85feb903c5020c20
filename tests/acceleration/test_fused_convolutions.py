"""Convolutions that add and rectify compute what the modules do, and are used only where they are faster."""

import collections
import dataclasses
import logging
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from pipeline.acceleration import cpu_lowering, fused_convolutions, gpu_lowering, lowering, variants
from pipeline.acceleration.batchnorm_folding import fold, foldable_pairs
from pipeline.acceleration.fused_convolutions import (
    ConvGeometry,
    FusedConv2d,
    JoiningConv2d,
    SkippingReLU,
    conv_add_relu,
    conv_relu,
    is_fusible,
)
from pipeline.acceleration.gpu_lowering import fuse_rectifiers
from pipeline.acceleration.redirected_relu import redirected
from pipeline.acceleration.variants import observe, verified_variants
from pipeline.layers.finding import Layer, enumerate_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, prepare_module

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

GEOMETRIES = [
    ConvGeometry((1, 1), (0, 0), (1, 1), 1),
    ConvGeometry((2, 1), (1, 2), (1, 1), 1),
    ConvGeometry((1, 1), (2, 2), (2, 2), 2),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_functions_are_convolution_sum_and_relu(geometry: ConvGeometry, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight = draw(2, 6, 7, 6).requires_grad_(True), draw(4, 6 // geometry.groups, 3, 3)
    offset = draw(4) if bias else None
    plain = F.conv2d(x, weight, offset, *geometry)
    residual = draw(*plain.shape).requires_grad_(True)
    noise = draw(*plain.shape)
    for inputs, found, expected in (
        ((x,), conv_relu(x, weight, offset, geometry), F.relu(plain)),
        ((x, residual), conv_add_relu(x, residual, weight, offset, geometry), F.relu(plain + residual)),
    ):
        assert torch.equal(found, expected)
        for mine, theirs in zip(
            torch.autograd.grad(found, inputs, noise),
            torch.autograd.grad(expected, inputs, noise, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)
    torch.autograd.gradcheck(lambda x, z: conv_add_relu(x, z, weight, offset, geometry), (x, residual))


# ---------------------------------------------------------------- networks


def model_of(module: nn.Module) -> Model:
    """With normalizations that count: those of an untrained network are nearly identities."""
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    recipe = Preprocessing((32, 32), 32, (0.5,) * 3, (0.25,) * 3)
    return Model(prepare_module(module), "network", recipe, "", ())


class Preactivated(nn.Module):
    """The sum reads what the normalization made before the rectifier does: it must not be rectified."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv, self.norm, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.last, self.last_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x)))
        # The second sum is in place, so that the rectifier gets the tensor that the normalization returned.
        y = self.last_norm(self.last(self.relu(x) + x))
        y += x
        return self.relu(y).mean((2, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    # A builder, and how many modules of each class the fused network has.
    "torchvision BasicBlock": (lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]), (4, 4, 5)),
    "torchvision Bottleneck": (lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]), (8, 4, 5)),
    "timm BasicBlock": (lambda: timm.create_model("resnet10t"), (6, 4, 11)),
    "timm Bottleneck": (lambda: timm.create_model("resnet14t"), (10, 4, 15)),
    "no block": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        (1, 0, 1),
    ),
    "two readers": (Preactivated, (0, 0, 0)),
}


@pytest.fixture(params=NETWORKS, scope="module")
def network(request: pytest.FixtureRequest) -> tuple[Model, tuple[int, int, int]]:
    build, counts = NETWORKS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return model_of(build()), counts


def probe() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def assert_observed_alike(one: Model, other: Model, layers: list[Layer]) -> None:
    torch.testing.assert_close(observe(one, layers, probe()), observe(other, layers, probe()), rtol=1e-4, atol=1e-6)


def test_a_fused_network_computes_the_same(network: tuple[Model, tuple[int, int, int]]) -> None:
    """Also while gradients are redirected, and the original stays as it is."""
    model, counts = network
    pairs = foldable_pairs(model)
    layers = enumerate_layers(model)[-1:]
    folded = fold(model, pairs, layers)
    before = collections.Counter(map(type, folded.module.modules()))
    fused = fuse_rectifiers(folded, folded, pairs)
    modules = [type(m) for m in fused.module.modules()]
    assert tuple(map(modules.count, (FusedConv2d, JoiningConv2d, SkippingReLU))) == counts
    assert_observed_alike(fused, folded, layers)
    with redirected(folded.module), redirected(fused.module):
        assert_observed_alike(fused, folded, layers)
    assert collections.Counter(map(type, folded.module.modules())) == before
    with torch.inference_mode():
        assert torch.isfinite(fused.module(fused.normalize(probe()))).all()


def test_no_relu_and_no_sum_is_left_in_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]))
    pairs = foldable_pairs(model)
    fused = fuse_rectifiers(folded := fold(model, pairs), folded, pairs)
    counted: list[str] = []
    relu = F.relu

    def count(x: Tensor, inplace: bool = False) -> Tensor:
        counted.append("relu")
        return relu(x, inplace)

    monkeypatch.setattr(F, "relu", count)
    fused.module(probe())
    assert counted == ["relu"]  # of the stem


@pytest.mark.parametrize("name", ["layer2.0.relu", "layer2.0.relu#2", "layer2.0.relu#3", "layer2.0", "layer2.0.conv2"])
def test_every_layer_inside_a_block_is_read_at_its_place(name: str) -> None:
    model = model_of(resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]))
    pairs = foldable_pairs(model)
    (layer,) = (layer for layer in enumerate_layers(model) if layer.name == name)
    folded = fold(model, pairs, [layer])
    fused = fuse_rectifiers(folded, folded, pairs)
    assert any(isinstance(m, JoiningConv2d) for m in fused.module.modules())
    assert_observed_alike(fused, folded, [layer])


def test_a_rectifier_behind_visible_values_stays() -> None:
    model = model_of(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]))
    pairs = foldable_pairs(model)
    folded = fold(model, pairs)
    fused = fuse_rectifiers(folded, folded, pairs, visible=["layer1.0.bn1", "layer2.0.bn2"])
    kinds = {path: type(m) for path, m in fused.module.named_modules()}
    assert kinds["layer1.0.conv1"] is kinds["layer2.0.conv2"] is nn.Conv2d
    assert kinds["layer1.0.conv2"] is JoiningConv2d and kinds["layer2.0.conv1"] is FusedConv2d
    assert kinds["layer2.0"] is resnet.BasicBlock
    assert_observed_alike(fused, folded, enumerate_layers(model)[-1:])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 64, 7, 2, 3),
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(64, 64, 7),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3).double(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        nn.ConvTranspose2d(8, 8, 1),
    ],
    ids=str,
)
def test_the_first_convolution_and_unusual_ones_stay(conv: nn.Module) -> None:
    assert not is_fusible(conv)
    assert is_fusible(nn.Conv2d(8, 8, 3))


def test_a_changed_map_is_rectified_again() -> None:
    conv, relu = FusedConv2d(nn.Conv2d(8, 8, 1)), SkippingReLU()
    y = conv(torch.randn(1, 8, 4, 4))
    assert relu(y) is y
    y -= 1
    assert relu(y).min() == 0 and y.min() < 0
    assert relu(-torch.ones(1, 1, 1, 1)) == 0


# ---------------------------------------------------------------- variants


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are lowered as for a GPU, but stay on the CPU."""
    for module in (lowering, variants):
        monkeypatch.setattr(module, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(cpu_lowering, "_replace_convolutions", lambda *_: None)


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_fusion_is_noticed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]))
    pairs, layers = foldable_pairs(model), enumerate_layers(model)[-1:]
    name = str(dtype).removeprefix("torch.")
    found = verified_variants(model, pairs, layers, name)
    assert found.level == f"lowered {name}"
    # What is measured does not depend on which convolution was faster.
    assert not any(isinstance(m, FusedConv2d) for m in found.exact.module.modules())
    # It rectifies what nothing rectified.
    monkeypatch.setattr(gpu_lowering, "_rectified_convolutions", lambda _, candidates: {*candidates, "fc"} - {"fc"})
    monkeypatch.setattr(gpu_lowering, "_residual_blocks", lambda *_: {})
    found = verified_variants(model, pairs, layers, name)
    assert found.level == f"folded {name}" and not any(isinstance(m, FusedConv2d) for m in found.steps.module.modules())


@pytest.mark.usefixtures("as_on_gpu")
def test_a_network_that_does_not_run_on_noise_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]))
    pairs = foldable_pairs(model)
    folded = fold(model, pairs)

    def fail(*_: object) -> None:
        raise RuntimeError("a size that it does not accept")

    monkeypatch.setattr(gpu_lowering, "_rectified_convolutions", fail)
    assert lowering.lower(folded, pairs, torch.bfloat16).module is not folded.module
    assert not any(isinstance(m, FusedConv2d) for m in lowering.lower(folded, pairs).module.modules())
    other = dataclasses.replace(folded, channels_last=False)
    assert not any(isinstance(m, FusedConv2d) for m in lowering.lower(other, pairs).module.modules())


# ---------------------------------------------------------------- choice by measurement


class Cudnn:
    """Stands for the convolutions of cuDNN and for the clock of the GPU.

    The memory of the output of a plain fused convolution is always the same, as it is with an allocator that returns
    the block that was freed last.
    """

    def __init__(self) -> None:
        self.calls, self.faster, self.capturing = 0, True, False
        self.error: Exception | None = None
        self.reads_output = False
        self.memory: Tensor | None = None

    def full_like(self, tensor: Tensor, value: float) -> Tensor:
        self.memory = torch.empty_like(tensor).fill_(value)
        return self.memory

    def fused(self, operands: fused_convolutions._Operands) -> Tensor:
        self.calls += 1
        if self.error is not None:
            raise self.error
        y = fused_convolutions._plain(operands)
        if self.memory is None or self.memory.shape != y.shape:
            return y
        return self.memory.copy_(y + 0 * self.memory if self.reads_output else y)

    def milliseconds(self, function: object, operands: object) -> float:
        return 1.0 if (function is fused_convolutions._fused) == self.faster else 2.0


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudnn]:
    fake = Cudnn()
    can_fuse = fused_convolutions._can_fuse
    for name, value in {
        "_choices": {},
        "_failures": set(),
        "_fused": fake.fused,
        "_milliseconds": fake.milliseconds,
        "_can_fuse": lambda o: can_fuse(o._replace(x=OnGpu(o.x))),  # type: ignore[arg-type]
    }.items():
        monkeypatch.setattr(fused_convolutions, name, value)
    monkeypatch.setattr(torch, "full_like", fake.full_like)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    yield fake


class OnGpu:
    """A tensor that says that it is on a GPU."""

    is_cuda = True

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> object:
        return getattr(self.tensor, name)


X, WEIGHT, GEOMETRY = torch.randn(4, 8, 6, 6), torch.randn(8, 8, 3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 1)


def run(batch: int = 3) -> None:
    x = X[:batch]
    torch.testing.assert_close(conv_relu(x, WEIGHT, None, GEOMETRY), F.relu(F.conv2d(x, WEIGHT, None, *GEOMETRY)))


def test_the_faster_one_is_used_from_the_first_use_on(cudnn: Cudnn) -> None:
    run()
    assert cudnn.calls == 2 and list(fused_convolutions._choices.values()) == [True]  # once to compare its values
    run()
    assert cudnn.calls == 3
    run(4)
    assert cudnn.calls == 4, "a batch of 4 shares the choice of 3"
    run(1)
    assert len(fused_convolutions._choices) == 2


def test_the_slower_one_is_not_used(cudnn: Cudnn) -> None:
    cudnn.faster = False
    run()
    run()
    assert cudnn.calls == 1 and list(fused_convolutions._choices.values()) == [False]


@pytest.mark.parametrize("problem", ["an error", "reads its output", "other memory"])
def test_what_fails_or_deviates_is_not_used(
    problem: str, cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if problem == "an error":
        cudnn.error = RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
    elif problem == "reads its output":
        cudnn.reads_output = True
    else:
        kept: list[Tensor] = []
        monkeypatch.setattr(torch, "full_like", lambda tensor, _: kept.append(torch.empty_like(tensor)) or kept[-1])
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        for _ in range(3):
            run()
            run(1)
    assert cudnn.calls == 2 and list(fused_convolutions._choices.values()) == [False, False]
    (record,) = caplog.records
    reason = {"an error": "NOT_SUPPORTED", "reads its output": "differ", "other memory": "can't be tested"}[problem]
    assert reason in record.getMessage()


def test_a_later_failure_ends_its_use(cudnn: Cudnn) -> None:
    run()
    cudnn.error = RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
    run()
    run()
    assert cudnn.calls == 3 and list(fused_convolutions._choices.values()) == [False]
    # What is wrong with the device is not the fault of the convolution.
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")):
        cudnn.error = error
        fused_convolutions._choices.clear()
        with pytest.raises(type(error), match="out of memory"):
            run()
        assert not fused_convolutions._choices


def test_nothing_is_measured_while_a_graph_is_captured(cudnn: Cudnn) -> None:
    cudnn.capturing = True
    run()
    assert cudnn.calls == 0 and not fused_convolutions._choices


@pytest.mark.parametrize("setting", ["deterministic", "not enabled"])
def test_settings_of_pytorch_are_kept(setting: str, cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused convolution has no deterministic mode."""
    if setting == "deterministic":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    run()
    assert cudnn.calls == 0


def test_a_residual_that_is_the_input_is_added_by_pytorch(cudnn: Cudnn) -> None:
    found = conv_add_relu(X, X, WEIGHT, None, GEOMETRY)
    torch.testing.assert_close(found, F.relu(F.conv2d(X, WEIGHT, None, *GEOMETRY) + X))
    assert cudnn.calls == 0


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_computes_the_same(dtype: torch.dtype) -> None:
    """And no convolution of cuDNN fails."""
    fused_convolutions._choices.clear()
    fused_convolutions._failures.clear()
    device = torch.device("cuda:0")
    for channels, outputs, kernel, size in ((64, 64, 3, 56), (64, 256, 1, 56), (256, 64, 1, 56), (512, 512, 3, 7)):
        geometry = ConvGeometry((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
        x, weight, bias, residual = (
            torch.randn(shape, device=device).to(dtype)
            for shape in (
                (16, channels, size, size),
                (outputs, channels, kernel, kernel),
                (outputs,),
                (16, outputs, size, size),
            )
        )
        x, weight, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, residual))
        weight = weight / (channels * kernel**2) ** 0.5
        plain = F.conv2d(x.float(), weight.float(), bias.float(), *geometry)
        for found, expected in (
            (conv_relu(x, weight, bias, geometry), F.relu(plain)),
            (conv_add_relu(x, residual, weight, bias, geometry), F.relu(plain + residual.float())),
        ):
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert (found.float() - expected).norm() < 0.01 * expected.norm()
    assert not fused_convolutions._failures
