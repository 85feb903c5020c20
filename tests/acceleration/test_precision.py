"""What is measured is in IEEE float32 whatever the flags of PyTorch say; steps are in a precision that is checked."""

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import compose, tiny_model
from torch import Tensor, nn

from pipeline.acceleration import precision
from pipeline.acceleration.batchnorm_folding import foldable_pairs
from pipeline.acceleration.cpu_lowering import in_precision
from pipeline.acceleration.precision import (
    Capability,
    capability_of,
    dtype_of,
    float64_device,
    ieee,
    multiplies_bfloat16,
    precision_of,
    steps_in,
    usable,
)
from pipeline.acceleration.variants import cosine_of, observe, verified_fold, verified_variants
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.data import datasets
from pipeline.data.config import DataConfig
from pipeline.data.natural_spectrum import packaged_spectrum
from pipeline.engine.tasks import RangesTask
from pipeline.engine.worker import Worker
from pipeline.images import metrics
from pipeline.judges.judge import Judge
from pipeline.layers.finding import Layer
from pipeline.models.loading import Model, prepare_module
from pipeline.planning import heads, natural_deviations
from pipeline.planning.planner import make_plan
from pipeline.visualization.loop import render
from pipeline.visualization.render_job import RenderJob

BACKENDS: Any = torch.backends

# (TF32 in convolutions, TF32 in matrix products, benchmark, deterministic)
Flags = tuple[bool, bool, bool, bool]
WRONG: Flags = (True, True, True, False)
MEASURED: Flags = (False, False, False, False)
MERGED: Flags = (False, False, False, True)


def flags() -> Flags:
    cudnn = BACKENDS.cudnn
    return cudnn.allow_tf32, BACKENDS.cuda.matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic


def set_flags(values: Flags) -> None:
    cudnn = BACKENDS.cudnn
    cudnn.allow_tf32, BACKENDS.cuda.matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic = values


@pytest.fixture(autouse=True)
def wrong_flags() -> Iterator[None]:
    """Flags that round as much as PyTorch can."""
    set_flags(WRONG)
    yield
    if hasattr(BACKENDS, "fp32_precision"):
        BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    set_flags((True, False, False, False))


class Noted(torch.autograd.Function):
    """An identity that notes the flags in both directions."""

    seen: ClassVar[list[tuple[str, Flags]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Noted.seen.append(("forward", flags()))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Noted.seen.append(("backward", flags()))
        return gradients[0]


class Noting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Noted.apply(x)


def noting(model: Model) -> Model:
    """The network with a note of the flags behind its first convolution."""
    module = copy.deepcopy(model.module)
    module.stem = nn.Sequential(module.stem, Noting())
    return dataclasses.replace(model, module=prepare_module(module))


def seen_in(work: Callable[[], object]) -> set[tuple[str, Flags]]:
    Noted.seen.clear()
    work()
    return set(Noted.seen)


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("before", [WRONG, MEASURED, (True, False, False, True)])
def test_flags_come_back_also_after_an_error(before: Flags) -> None:
    set_flags(before)
    with pytest.raises(KeyError), ieee(deterministic=True):
        assert flags() == MERGED
        with steps_in("tf32"):
            assert flags()[:2] == (True, True)
            with ieee():
                assert flags() == MERGED  # the wish of the outer block holds
            assert flags()[:2] == (True, True)
        assert flags() == MERGED
        raise KeyError
    assert flags() == before
    for name in ("float32", "bfloat16"):
        with steps_in(name):
            assert flags() == (False, False, *before[2:])
    assert flags() == before


@pytest.mark.parametrize("name", ["medium", "high", "highest"])
def test_the_precision_of_matrix_products_comes_back(name: str) -> None:
    """`medium` means bfloat16 on a CPU."""
    torch.set_float32_matmul_precision(name)
    with ieee():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == name


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="flags of PyTorch 2.9")
@pytest.mark.parametrize("where", ["", "cudnn.conv", "cuda.matmul", "mkldnn.matmul"])
@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_a_network_may_use_the_newer_flags(where: str, value: str) -> None:
    """The older ones then raise an error when they are read."""
    names = [name for name in where.split(".") if name]
    target = BACKENDS
    for name in names:
        target = getattr(target, name)
    operators = [BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul]
    torch.set_float32_matmul_precision("highest")
    target.fp32_precision = value
    before = [operator.fp32_precision == "tf32" for operator in operators]
    with ieee():
        assert flags() == MEASURED
        assert all(operator.fp32_precision in ("none", "ieee") for operator in operators)
    with steps_in("tf32"):
        assert all(operator.fp32_precision == "tf32" for operator in operators)
    after = [operator.fp32_precision == "tf32" for operator in operators]
    assert after[0] == before[0] and after[2] == before[2]


# -------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("setting", "device", "capability", "chosen"),
    [
        ("auto", "cuda", (9, 0), "bfloat16"),
        ("auto", "cuda", (8, 0), "bfloat16"),
        ("auto", "cuda", (7, 5), "float32"),
        ("auto", "cuda", None, "bfloat16"),  # a GPU of another machine
        ("auto", "mps", None, "float32"),
        ("float32", "cuda", (9, 0), "float32"),
        ("tf32", "cuda", (9, 0), "tf32"),
        ("bfloat16", "cuda", (9, 0), "bfloat16"),
        ("bfloat16", "cpu", None, "bfloat16"),
        ("float32", "cpu", None, "float32"),
    ],
)
def test_the_precision_of_a_device(setting: str, device: str, capability: Capability | None, chosen: str) -> None:
    assert precision_of(setting, device, capability) == chosen
    if capability is not None:
        assert usable("bfloat16", device, capability) == ("bfloat16" if capability >= (8, 0) else "float32")


def test_the_precision_is_chosen_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, wanted in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda able=able: able)
        assert precision_of("auto", "cpu") == wanted
    with pytest.raises(AtlasError, match=r"engine\.precision='half': use auto, float32, tf32 \(NVIDIA GPUs\) or bf"):
        compose(["engine.precision=half"])


def test_tf32_is_refused_on_a_cpu_before_work_starts(tiny_run: list[str]) -> None:
    config = compose([*tiny_run, "engine.precision=tf32", "engine.device=cpu"]).config
    with pytest.raises(AtlasError, match=r"engine\.precision=tf32 is a number format of NVIDIA GPUs.*run on cpu"):
        make_plan(config, timed=False)
    assert not Path(config.folder).exists()


def with_gpu(monkeypatch: pytest.MonkeyPatch, capability: Capability) -> None:
    """Let PyTorch find a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_metrics_are_computed_where_float64_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capability_of("cuda") is None or torch.cuda.is_available()
    with_gpu(monkeypatch, (8, 9))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert capability_of("cuda:0") == (8, 9) and capability_of("cpu") is None
    assert float64_device(gpu, (9, 0)) == gpu and float64_device(gpu, (8, 9)) == cpu
    assert float64_device(torch.device("mps"), None) == cpu and float64_device(cpu, None) == cpu
    # Metrics of images of any device come from the CPU, unless that device is fast.
    asked = []
    monkeypatch.setattr(metrics, "float64_device", lambda *given: asked.append(given) or cpu)
    found = metrics.image_metrics(torch.rand(2, 3, 32, 32), (2,), packaged_spectrum())
    assert asked == [(cpu, None)] and all(value.dtype == torch.float64 for value in found.values())


@pytest.mark.parametrize(
    ("told", "able"),
    [(None, False), ("flags : avx512f avx512_vnni", False), ("flags : avx512_bf16", True), ("flags : amx_bf16", True)],
)
def test_a_processor_says_whether_it_multiplies_bfloat16(
    told: str | None, able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if told is not None:
        file.write_text(told)
    multiplies_bfloat16.cache_clear()
    monkeypatch.setattr(precision, "Path", lambda _: file)
    assert multiplies_bfloat16() == able
    multiplies_bfloat16.cache_clear()


# ------------------------------------------------------------------------------------------------------------ variants


def test_batch_normalizations_may_stay_in_float32(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    """As on a GPU: their maps are bfloat16 all the same, and values and gradient are nearer to float32."""
    layer, images = tiny_layers["late"], torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = observe(tiny, [layer], images)
    cosines = []
    for kept in (True, False):
        variant = in_precision(tiny, torch.bfloat16, exact_norms=kept)
        types = {name: tensor.dtype for name, tensor in variant.module.state_dict().items()}
        assert types["norm.running_var"] == types["norm.weight"] == (torch.float32 if kept else torch.bfloat16)
        assert types["stem.weight"] == torch.bfloat16
        found = observe(variant, [layer], images)
        cosines.append([cosine_of(found[name], exact[name]) for name in ("late", "")])
    assert min(cosines[0]) > 0.98 and cosines[0][0] >= cosines[1][0]
    assert tiny.module.get_submodule("norm").weight.dtype == torch.float32  # shared, not changed


class Gate(nn.Module):
    """It computes with a tensor that it creates in float32, and fails in any other type."""

    def __init__(self, tolerant: bool) -> None:
        super().__init__()
        self.tolerant, self.linear = tolerant, nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.ones(1)
        if not self.tolerant and x.dtype != self.linear.weight.dtype:
            raise RuntimeError("expected the same dtype")
        return self.linear(x)


def gated(tolerant: bool) -> Model:
    model = tiny_model()
    model.module.block = nn.Sequential(Gate(tolerant), nn.ReLU())
    return dataclasses.replace(model, module=prepare_module(model.module))


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
@pytest.mark.parametrize("asked", ["bfloat16", "tf32"])
def test_steps_fall_back_where_bfloat16_fails(
    asked: str, capability: Capability, tiny_layers: dict[str, Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To TF32 where the device has it, and else to float32; the reason says why."""
    monkeypatch.setattr("pipeline.acceleration.variants.has_tf32", lambda _: capability >= (8, 0))
    found = verified_variants(gated(False), (), [tiny_layers["late"]], asked)
    assert found.precision == ("tf32" if capability >= (8, 0) else "float32")
    assert (asked == "bfloat16") == ("mixed bfloat16: RuntimeError: expected the same dtype" in found.reason)
    assert found.steps is found.exact and next(found.exact.module.parameters()).dtype == torch.float32
    assert verified_variants(gated(False), (), [tiny_layers["late"]], "float32").precision == "float32"


def test_networks_that_create_float32_tensors_run_mixed(tiny_layers: dict[str, Layer]) -> None:
    found = verified_variants(gated(True), (), [tiny_layers["late"]], "bfloat16")
    assert found.precision == "bfloat16" and not found.reason


def test_each_variant_is_compared_in_its_own_precision(
    tiny: Model, tiny_layers: dict[str, Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.acceleration.variants.has_tf32", lambda _: True)
    model = noting(tiny)
    layers = [tiny_layers["late"]]
    for asked, tf32 in (("float32", False), ("bfloat16", False), ("tf32", True)):
        seen = seen_in(lambda asked=asked: verified_variants(model, (), layers, asked))
        ieee_only = {("forward", MEASURED), ("backward", MEASURED)}
        steps = {(way, (True, True, False, False)) for way in ("forward", "backward")}
        assert seen == (ieee_only | steps if tf32 else ieee_only)
    pairs = foldable_pairs(tiny)
    assert pairs and seen_in(lambda: verified_fold(model, [("block.0", "block.1")], layers)) == {("forward", MEASURED)}


def test_an_error_of_the_device_says_nothing_about_a_variant(
    tiny: Model, tiny_layers: dict[str, Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Model:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pipeline.acceleration.variants.lower", full)
    with pytest.raises(torch.OutOfMemoryError):
        verified_variants(tiny, (), [tiny_layers["late"]], "bfloat16")


# --------------------------------------------------------------------------------------------- steps and measurements


@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16"])
def test_steps_are_in_their_precision_and_finished_images_measured_in_float32(
    name: str, tiny: Model, tiny_layers: dict[str, Layer]
) -> None:
    model = noting(tiny)
    preset = dataclasses.replace(compose(["render=naive"]).config.render, steps=2, size=32, attempts=1)
    steps = in_precision(model, dtype_of(name))
    job = RenderJob(model, tiny_layers["late"], preset, 0, step_model=steps, precision=name)
    on = name == "tf32"
    seen = seen_in(lambda: render(job, [(0, 0), (1, 0)]))
    assert {found for way, found in seen if way == "backward"} == {(on, on, True, False)}
    assert {found for way, found in seen if way == "forward"} == {(on, on, True, False), MEASURED}
    assert flags() == WRONG


def test_measurements_of_plans_and_judges_are_in_float32(
    tiny: Model, tiny_layers: dict[str, Layer], photo_folder: Path
) -> None:
    model = noting(tiny)
    dataset = datasets.list_dataset(DataConfig(source="folder", root=str(photo_folder)), 3)
    late, head = tiny_layers["late"], tiny_layers["head"]
    judge = Judge("tiny", model, head, (late,))
    images = torch.rand(2, 3, 32, 32)
    source = heads.HeadSource(model, model, dataset, "", head)
    for work in (
        lambda: judge.class_logits(images),
        lambda: judge.features(images, (32, 32)),
        lambda: natural_deviations.measure(tiny, model, dataset, [late]),
        lambda: heads._fit([heads.HeadLayer.on(late, head.channels)], source),
    ):
        assert seen_in(work) == {("forward", MEASURED)}


# Functions that measure, and the flags that they need.
MEASURING = {
    "visualization.evaluation.evaluate": MEASURED,
    "planning.natural_deviations.measure": MEASURED,
    "examples.sweep.measure_ranges": MERGED,
    "examples.sweep.sweep": MERGED,
    "examples.localize.localize": MERGED,
    "effects.measurement.measure": MERGED,
    "effects.relevance.measure_relevance": MERGED,
}


def test_every_round_of_a_run_measures_in_float32(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself: the default of the worker is switched off."""
    seen: dict[str, set[Flags]] = {}
    normalize = Model.normalize

    def noted(self: Model, images: Tensor) -> Tensor:
        frame: Any = sys._getframe(1)
        while frame is not None:
            name = f"{frame.f_globals['__name__']}.{frame.f_code.co_name}".removeprefix("pipeline.")
            if name in MEASURING:
                seen.setdefault(name, set()).add(flags())
            frame = frame.f_back
        return normalize(self, images)

    monkeypatch.setattr(Model, "normalize", noted)
    monkeypatch.setattr("pipeline.engine.worker.ieee", contextlib.nullcontext)
    effects = ["effects.images=4", "effects.ablated=1", "effects.batch=4", "effects.examples=1"]
    assert main(["run", *tiny_run, "layers.include=[conv_stem,classifier]", *effects]) == 0
    assert seen == {name: {wanted} for name, wanted in MEASURING.items()}


def test_a_worker_computes_in_float32_unless_told_otherwise(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(make_plan(compose(tiny_run).config, timed=False).setup)
    seen: list[Flags] = []
    monkeypatch.setattr(Worker, "_result", lambda *_: seen.append(flags()) or b"")
    worker.do(RangesTask(str(tmp_path / "one.h5"), "0", 1.0, ()))
    assert seen == [MEASURED] and flags() == WRONG


def test_an_older_gpu_computes_in_float32(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its driver, without a GPU, did not know."""
    setup = make_plan(compose(tiny_run).config, timed=False).setup
    setup = dataclasses.replace(setup, device="cuda", precision="bfloat16")
    for capability, name in (((9, 0), "bfloat16"), ((7, 5), "float32")):
        with_gpu(monkeypatch, capability)
        worker = Worker(setup)
        assert worker.precision == worker.precision == name
    assert [record.getMessage() for record in caplog.records if "lacks" in record.getMessage()] == [
        "steps run in float32: a GPU of compute capability 7.5 lacks bfloat16"
    ]


def test_images_of_a_cpu_do_not_depend_on_the_flags(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    preset = dataclasses.replace(compose(["render=naive"]).config.render, steps=4, size=32)
    job = RenderJob(tiny, tiny_layers["late"], preset, 0)
    (first,) = render(job, [(0, 0)])
    set_flags((True, False, False, False))
    (second,) = render(job, [(0, 0)])
    assert np.array_equal(first.image, second.image) and first.activation == second.activation
