"""Fast variants of a network, each checked against the network itself before it is used.

Folding batch normalizations, replacing convolutions and computing in bfloat16 make a step several times as fast. None
of them is right for every network that PyTorch runs, so the variant for a layer is compared on two images with the
plain network: values of the layer and gradient with respect to the images. Where it raises or deviates, the next
plainer variant is tried; the last one is the network as it was loaded.
"""

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pipeline.acceleration.batchnorm_folding import FoldedNorm, Pair, fold
from pipeline.acceleration.cpu_lowering import LoweredConv2d, in_precision, lower
from pipeline.core.errors import first_line
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model, in_place

log = logging.getLogger(__name__)

# Largest difference of a float32 variant's values and input gradient, relative to the norm of the plain network's.
# Rounding alone can exceed it in the gradient: it switches units whose input is nearly 0 on or off, and with each a
# part of the gradient. In most networks this concerns some images and not others, so the image with the smaller
# difference counts; values, which do not jump, count for all. In deep networks it concerns all images, so a variant
# may also differ by `ROUNDING` times what the plain network differs from itself in double precision. A wrong border
# or stride changes the gradient of every image, and by far more.
FLOAT32_TOLERANCE = 1e-3
ROUNDING = 4.0
MOST_ROUNDING = 0.02

# Least cosine of a bfloat16 variant's values and input gradient with those of the plain network. Where the plain
# network in bfloat16 has less, its gradient is that rough by itself: a variant may be as rough, down to `ROUGHEST`.
BFLOAT16_COSINE = 0.9
ROUGHER = 0.1
ROUGHEST = 0.4


@dataclasses.dataclass(frozen=True)
class ModelVariants:
    """The variants of a network that visualizations of one layer are computed with.

    Attributes:
        folded: The network in float32 with batch normalizations folded; the plain network where that is not equal.
        steps: What optimisation steps are computed with.
        exact: What finished visualizations are measured with; in float32.
        level: What `steps` is: "lowered", "folded" or "original", and its precision.
        reason: Why `steps` is plainer than asked; empty where it is not.
    """

    folded: Model
    steps: Model
    exact: Model
    level: str
    reason: str = ""

    @property
    def plain_level(self) -> str:
        """The level of steps that need the original float32 weights: see `RenderConfig.requires_original_weights`."""
        return f"{_structure(self.folded)} float32"

    @property
    def precision(self) -> str:
        """Name of the data type of the steps."""
        return self.level.partition(" ")[2]


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A variant by the name of its level, made when it is needed."""

    level: str
    make: Callable[[], Model]
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Two images, and what the plain network gives for them at some layers."""

    model: Model
    layers: Sequence[Layer]
    images: Tensor
    reference: "Observed"

    @classmethod
    def of(cls, model: Model, layers: Sequence[Layer], size: tuple[int, int]) -> "_Probe":
        images = probe_images(model, size)
        return cls(model, layers, images, observe(model, layers, images))

    def first(self, candidates: Sequence[_Candidate], reasons: list[str]) -> Model | None:
        """The first candidate that equals the plain network; why the others do not is added to `reasons`."""
        for candidate in candidates:
            variant = None
            try:
                variant = candidate.make()
                reason = self.deviation(observe(variant, self.layers, self.images), candidate.dtype)
            except Exception as error:
                # A variant runs the user's code in ways that it was not written for, which may raise anything.
                reason = f"{type(error).__name__}: {first_line(error)}"
            if not reason and variant is not None:
                return variant
            name = f"{candidate.level} {str(candidate.dtype).removeprefix('torch.')}"
            log.debug("%s does not equal the plain network: %s", name, reason)
            reasons.append(f"{name}: {reason}")
        return None

    def deviation(self, observed: "Observed", dtype: torch.dtype) -> str:
        """In words, where `observed` deviates from the reference beyond the tolerance of a data type; "" if nowhere."""
        for name, wanted in self.reference.items():
            what = f"values of {name}" if name else "the input gradient"
            if name not in observed:
                return f"{what}: missing"
            finite = wanted.isfinite()
            if not observed[name][finite].isfinite().all():
                return f"{what}: not finite"
            if dtype == torch.float32:
                difference = _difference(name, observed[name], wanted)
                if difference > FLOAT32_TOLERANCE and difference > ROUNDING * min(self.rounding(name), MOST_ROUNDING):
                    return f"{what}: relative difference {difference:.2g}"
                continue
            cosine = cosine_of(observed[name], wanted)
            if cosine < BFLOAT16_COSINE and cosine < max(self.roughness(name) - ROUGHER, ROUGHEST):
                return f"{what}: cosine {cosine:.3f}"
        return ""

    def rounding(self, name: str) -> float:
        """Relative difference of the plain network from itself in double precision; 0 where it does not run in that."""
        exact = self._in_double
        return relative_difference(self.reference[name], exact[name]) if name in exact else 0.0

    def roughness(self, name: str) -> float:
        """Cosine of the plain network in bfloat16 with itself in float32; 1 where it does not run in bfloat16."""
        rough = self._in_bfloat16
        return cosine_of(rough[name], self.reference[name]) if name in rough else 1.0

    @functools.cached_property
    def _in_bfloat16(self) -> "Observed":
        return self._plain_in(torch.bfloat16)

    def _plain_in(self, dtype: torch.dtype) -> "Observed":
        try:
            return observe(in_precision(self.model, dtype), self.layers, self.images)
        except Exception as error:
            log.debug("%s does not run in %s: %s", self.model.name, dtype, first_line(error))
            return {}

    @functools.cached_property
    def _in_double(self) -> "Observed":
        return self._plain_in(torch.float64)


def _difference(name: str, given: Tensor, wanted: Tensor) -> float:
    """Relative difference of a layer's values, or of the gradient (""): there of the image where it is smaller."""
    if name:
        return relative_difference(given, wanted)
    return min(relative_difference(one, other) for one, other in zip(given, wanted, strict=True))


def relative_difference(given: Tensor, wanted: Tensor) -> float:
    """Norm of the difference of two tensors, relative to the norm of the second, over its finite values."""
    finite = wanted.isfinite()
    given, wanted = given[finite].double(), wanted[finite].double()
    return float((given - wanted).norm()) / max(float(wanted.norm()), 1e-12)


def cosine_of(given: Tensor, wanted: Tensor) -> float:
    """Cosine of two tensors over the finite values of the second; 1 where that is zero everywhere."""
    finite = wanted.isfinite()
    given, wanted = given[finite].double(), wanted[finite].double()
    # Not cosine_similarity, which takes norms under 1e-8 for zero: gradients of random networks are smaller.
    norms = float(given.norm()) * float(wanted.norm())
    if norms == 0:
        return float(not wanted.any())
    return float(given @ wanted) / norms


def verified_variants(
    model: Model,
    pairs: Sequence[Pair],
    layers: Sequence[Layer],
    dtype: torch.dtype,
    size: tuple[int, int] | None = None,
) -> ModelVariants:
    """Return the fastest variants that equal `model` at `layers`, for steps in `dtype`.

    Args:
        model: The plain network, on the device of the steps.
        pairs: The pairs that `foldable` returned for it.
        layers: The layers that will be read: batch normalizations inside them are not folded.
        dtype: Data type of the steps, float32 or bfloat16.
        size: (height, width) in pixels of the images that they are compared on; None for the network's own.
    """
    probe = _Probe.of(model, layers, size or model.recipe.size)
    reasons: list[str] = []
    folded = fold(model, pairs, layers)
    exact = probe.first([_Candidate("lowered", lambda: lower(folded, pairs))], reasons)
    if exact is None and folded is not model:
        # A copy whose convolutions were replaced holds the folded weights, so that one comparison is enough for both.
        folded = probe.first([_Candidate("folded", lambda: folded)], reasons) or model
        exact = folded
    exact = exact or model
    steps = None
    if dtype != torch.float32:
        steps = probe.first(
            [
                _Candidate("lowered", lambda: lower(folded, pairs, dtype), dtype),
                _Candidate("mixed", lambda: lower(folded, pairs, dtype, mixed=True), dtype),
            ],
            reasons,
        )
    precision = "float32" if steps is None else str(dtype).removeprefix("torch.")
    # Where the steps are what was asked for, an attempt that failed on the way does not matter.
    told = "" if steps is not None else "; ".join(dict.fromkeys(reasons))
    steps = steps or exact
    return ModelVariants(folded, steps, exact, f"{_structure(steps)} {precision}", told)


def _structure(variant: Model) -> str:
    modules = list(variant.module.modules())
    if any(isinstance(module, LoweredConv2d) for module in modules):
        return "lowered"
    return "folded" if any(isinstance(module, FoldedNorm) for module in modules) else "original"


def verified_fold(model: Model, pairs: Sequence[Pair], layers: Sequence[Layer]) -> Model:
    """Return `model` folded for forward passes in which all `layers` are read, or itself where their values differ."""
    inside = {layer.module for layer in layers}
    folded = fold(model, [pair for pair in pairs if pair[0] not in inside])
    if folded is model:
        return model
    images = probe_images(model, model.recipe.size)
    with torch.no_grad():
        reference = _values(model, layers, images)
        probe = _Probe(model, layers, images, reference)
        try:
            with in_place(folded):
                reason = probe.deviation(_values(folded, layers, images), torch.float32)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
    if reason:
        log.warning("%s: the dataset pass runs without folded batch normalizations: %s", model.name, reason)
        return model
    return folded


def probe_images(model: Model, size: tuple[int, int]) -> Tensor:
    """Two images (2, C, H, W) in [0, 1] for comparisons: white noise, and noise of eight pixels' width."""
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(1, model.recipe.channels, *size, generator=generator)
    coarse = torch.rand(1, model.recipe.channels, *(max(1, side // 8) for side in size), generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)
    return torch.cat([fine, coarse]).to(next(model.module.parameters()).device)


Observed = dict[str, Tensor]


def observe(model: Model, layers: Sequence[Layer], images: Tensor) -> Observed:
    """Values of `layers` by name, and under "" the gradient of a fixed random sum of them by the images.

    The sum weights every value of a layer by a random sign, so that each channel has its part in the gradient. There is
    no gradient where the network passes none.
    """
    images = images.clone().requires_grad_(True)
    maps = _values(model, layers, images)
    total = torch.zeros((), device=images.device)
    for one in maps.values():
        if one.requires_grad:
            signs = torch.randint(0, 2, one.shape, generator=torch.Generator().manual_seed(0)).to(one.device) * 2 - 1
            total = total + (one * signs).sum() / one.detach().norm().clamp_min(1e-12)
    observed = {name: one.detach() for name, one in maps.items()}
    if total.requires_grad:
        observed[""] = torch.autograd.grad(total, images)[0]
    return observed


def _values(model: Model, layers: Sequence[Layer], images: Tensor) -> Observed:
    with capture(model, layers) as forward:
        return {name: maps.float() for name, maps in forward(images).items()}


def layers_without_gradient(model: Model, layers: Sequence[Layer]) -> dict[str, str]:
    """Return why visualizations of some layers can't be optimised, by layer name: no gradient reaches the image.

    One forward pass finds the layers that autograd does not connect to the images (`no_grad`, `inference_mode`,
    `detach`). A second one in forward mode finds those whose derivative is zero everywhere (rounding, thresholds);
    backward passes of these layers alone confirm it. Where an operator has no forward-mode derivative, the second
    pass is left out.
    """
    images = _small_probe(model)
    maps = _values(model, layers, images.clone().requires_grad_(True))
    reasons = {
        name: "it is computed without gradients (no_grad, inference_mode or detach before it)"
        for name, one in maps.items()
        if not one.requires_grad
    }
    del maps
    connected = [layer for layer in layers if layer.name not in reasons]
    for layer in _constant(model, connected, images):
        gradient = observe(model, [layer], images).get("")
        if gradient is not None and not gradient.any():
            reasons[layer.name] = "its gradient is zero everywhere (rounding or a threshold before it)"
    return reasons


def _small_probe(model: Model) -> Tensor:
    """One image (1, C, H, W) of noise, of half the network's own size if it takes that: for what no size changes."""
    own = model.recipe.size
    half = (own[0] // 2, own[1] // 2)
    if min(half) >= 64:
        images = probe_images(model, half)[:1]
        try:
            with torch.no_grad():
                model.module(model.normalise(images))
            return images
        except Exception:
            log.debug("%s does not take images of %d x %d pixels", model.name, *half)
    return probe_images(model, own)[:1]


def _constant(model: Model, layers: Sequence[Layer], images: Tensor) -> list[Layer]:
    """The layers whose derivative along a random direction is exactly zero for every value."""
    if not layers:
        return []
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).to(images.device)
    constant: list[Layer] = []

    def look(layer: Layer, maps: Tensor) -> None:
        tangent = forward_ad.unpack_dual(maps).tangent
        if tangent is None or not tangent.any():
            constant.append(layer)

    try:
        with warnings.catch_warnings():
            # PyTorch compiles its forward-mode derivatives with TorchScript, which it deprecates.
            warnings.simplefilter("ignore", FutureWarning)
            with torch.no_grad(), forward_ad.dual_level(), capture(model, layers, look) as forward:
                forward(forward_ad.make_dual(images, direction))
    except Exception as error:
        log.debug("no forward-mode derivatives of %s: %s: %s", model.name, type(error).__name__, first_line(error))
        return []
    return constant
