"""Fast variants of a network, each compared with the original network before it is used.

Folding batch normalizations, replacing convolutions and computing in bfloat16 make a step several times as fast. None
of them is correct for every network that PyTorch can run, so the variant for a layer is compared with the original
network on two images: by the values of the layer, and by the gradient with respect to the images. If a variant raises
an error or deviates, the next less modified one is tried; the last one is the original network. The comparison is in
IEEE float32, but for variants in bfloat16 and TF32.
"""

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pipeline.acceleration.batchnorm_folding import ConvNormPair, FoldedNorm, fold
from pipeline.acceleration.cpu_lowering import LoweredConv2d, in_precision
from pipeline.acceleration.fused_convolutions import FusedConv2d
from pipeline.acceleration.lowering import is_on_gpu, lower
from pipeline.acceleration.precision import dtype_of, has_tf32, ieee, steps_in
from pipeline.core.errors import first_line
from pipeline.kernels.device_errors import is_device_failure
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model, inplace_activations

log = logging.getLogger(__name__)

# Largest difference of the values and the input gradient of a float32 variant, relative to their norm in the original
# network. Rounding alone can exceed it in the gradient, because it turns units with an input close to 0 on or off, and
# with each of them a part of the gradient. In most networks this affects some images and not others, so only the image
# with the smaller difference is tested; values do not jump, and are tested for both. In deep networks all images are
# affected, so a variant may also differ by `ROUNDING_FACTOR` times the difference between the original network and
# itself in double precision, of which at most `MAX_ROUNDING` counts. A wrong border or stride changes the gradient of
# every image by far more.
FLOAT32_TOLERANCE = 1e-3
ROUNDING_FACTOR = 4.0
MAX_ROUNDING = 0.02

# Smallest cosine between the values and the input gradient of a bfloat16 variant and those of the original network. If
# the cosine of the original network in bfloat16 is itself smaller, the variant may have that cosine less
# `COSINE_MARGIN`, but not less than `MIN_COSINE`.
BFLOAT16_COSINE = 0.9
COSINE_MARGIN = 0.1
MIN_COSINE = 0.4

# Errors that say nothing about a variant: the device is out of memory, or lost.
DEVICE_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))

# Values of layers by name, and under "" the gradient with respect to the images.
Observed = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class ModelVariants:
    """The variants of a network that compute the visualizations of one layer.

    Attributes:
        folded: In float32 with batch normalizations folded; the original network if that is not equal.
        steps: For the optimization steps.
        exact: For the metrics of finished visualizations; in float32, on a GPU without fused rectifiers.
        level: Structure of `steps` ("lowered", "folded" or "original") and its precision.
        reason: Why `steps` is less modified than requested; empty if it is not.
    """

    folded: Model
    steps: Model
    exact: Model
    level: str
    reason: str = ""

    @property
    def plain_level(self) -> str:
        """The level of steps that need the original float32 weights, on `folded`."""
        return f"{_structure(self.folded)} float32"

    @property
    def precision(self) -> str:
        """Precision of the steps, one of `precision.PRECISIONS`."""
        return self.level.partition(" ")[2]


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A variant that can be built with `make`, with its structure and precision."""

    structure: str
    make: Callable[[], Model]
    precision: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.structure} {self.precision}"


@dataclasses.dataclass(frozen=True)
class _Reference:
    """Values of the original network that variants are compared with.

    Attributes:
        model: The original network.
        layers: The layers that are compared.
        images: Two images (2, C, H, W).
        observed: Values and gradient of the original network for these images.
    """

    model: Model
    layers: Sequence[Layer]
    images: Tensor
    observed: Observed

    @classmethod
    def of(cls, model: Model, layers: Sequence[Layer], size: tuple[int, int]) -> "_Reference":
        images = probe_images(model, size)
        return cls(model, layers, images, observe(model, layers, images))

    def first_equal(self, candidates: Sequence[_Candidate], reasons: list[str]) -> Model | None:
        """Return the first candidate that equals the original network, and append to `reasons` why others do not."""
        for candidate in candidates:
            try:
                variant = candidate.make()
                with steps_in(candidate.precision):
                    observed = observe(variant, self.layers, self.images)
                reason = self.deviation(observed, candidate.precision)
                if not reason:
                    return variant
            except DEVICE_ERRORS:
                raise
            except Exception as error:
                if is_device_failure(error):
                    raise
                # The code of the user is run in ways that it was not written for, and may raise any error.
                reason = f"{type(error).__name__}: {first_line(error)}"
            log.debug("%s does not equal the original network: %s", candidate.name, reason)
            reasons.append(f"{candidate.name}: {reason}")
        return None

    def deviation(self, observed: Observed, precision: str) -> str:
        """Describe the first deviation beyond the tolerance of a precision; empty if there is none."""
        for name, expected in self.observed.items():
            what = f"values of {name}" if name else "the input gradient"
            if name not in observed:
                return f"{what}: missing"
            finite = expected.isfinite()
            if not observed[name][finite].isfinite().all():
                return f"{what}: not finite"
            if precision == "float32":
                difference = _difference(name, observed[name], expected)
                if difference > FLOAT32_TOLERANCE and difference > ROUNDING_FACTOR * self._rounding(name):
                    return f"{what}: relative difference {difference:.2g}"
            else:
                cosine = cosine_of(observed[name], expected)
                if cosine < BFLOAT16_COSINE and cosine < smallest_cosine(self._cosine(name)):
                    return f"{what}: cosine {cosine:.3f}"
        return ""

    def _rounding(self, name: str) -> float:
        """Return the relative difference of the original network to itself in double precision, up to `MAX_ROUNDING`.

        It is 0 if the network does not run in double precision.
        """
        exact = self._in_double
        return min(relative_difference(self.observed[name], exact[name]), MAX_ROUNDING) if name in exact else 0.0

    def _cosine(self, name: str) -> float:
        """Return the cosine of the original network in bfloat16 with itself; 1 if it does not run in bfloat16."""
        rough = self._in_bfloat16
        return cosine_of(rough[name], self.observed[name]) if name in rough else 1.0

    @functools.cached_property
    def _in_bfloat16(self) -> Observed:
        return self._observe_in(torch.bfloat16)

    @functools.cached_property
    def _in_double(self) -> Observed:
        return self._observe_in(torch.float64)

    def _observe_in(self, dtype: torch.dtype) -> Observed:
        """Return values and gradient of the original network in a data type; empty if it does not run in it."""
        try:
            return observe(in_precision(self.model, dtype), self.layers, self.images)
        except Exception as error:
            if is_device_failure(error):
                raise
            log.debug("%s does not run in %s: %s", self.model.name, dtype, first_line(error))
            return {}


def _difference(name: str, values: Tensor, expected: Tensor) -> float:
    """Return the relative difference of the values of a layer; for the gradient (""), that of the better image."""
    if name:
        return relative_difference(values, expected)
    return min(relative_difference(image, reference) for image, reference in zip(values, expected, strict=True))


def relative_difference(values: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference of two tensors, relative to the norm of the second, over its finite values."""
    finite = reference.isfinite()
    values, reference = values[finite].double(), reference[finite].double()
    return float((values - reference).norm()) / max(float(reference.norm()), 1e-12)


def cosine_of(values: Tensor, reference: Tensor) -> float:
    """Return the cosine of two tensors over the finite values of the second; 1 if these are all zero."""
    finite = reference.isfinite()
    values, reference = values[finite].double(), reference[finite].double()
    # torch.cosine_similarity treats norms below 1e-8 as zero, but gradients of random networks can be smaller.
    norms = float(values.norm()) * float(reference.norm())
    if norms == 0:
        return float(not reference.any())
    return float(values @ reference) / norms


def smallest_cosine(rough: float) -> float:
    """Return the smallest cosine that a bfloat16 variant may have.

    Args:
        rough: Cosine of the original network in bfloat16 with itself in float32.
    """
    return min(BFLOAT16_COSINE, max(rough - COSINE_MARGIN, MIN_COSINE))


@ieee()
def verified_variants(
    model: Model,
    pairs: Sequence[ConvNormPair],
    layers: Sequence[Layer],
    precision: str,
    size: tuple[int, int] | None = None,
    norms: Mapping[str, Layer] | None = None,
) -> ModelVariants:
    """Return the fastest variants that equal `model` at `layers`.

    Args:
        model: The original network, on the device of the optimization steps.
        pairs: The pairs that `foldable_pairs` returned for it.
        layers: The layers that will be read; batch normalizations inside them are not folded.
        precision: Precision of the steps, one of `precision.PRECISIONS`. If a bfloat16 variant deviates on a device
            that multiplies TF32, they are in TF32.
        size: (height, width) in pixels of the images for the comparison; None for the network's own input size.
        norms: Normalized values that will be read as well, by the path of the batch normalization. It is folded all the
            same: the folded network has the values too.
    """
    norms = norms or {}
    reference = _Reference.of(model, [*layers, *norms.values()], size or model.preprocessing.size)
    reasons: list[str] = []
    folded = fold(model, pairs, layers)
    # Which rectifiers a GPU fuses depends on measurements of time: metrics must not.
    lowered = _Candidate("lowered", lambda: lower(folded, pairs, visible=norms, fuse=False))
    exact = reference.first_equal([lowered], reasons)
    if exact is None and folded is not model:
        # The lowered network contains the folded weights: only if it deviates, the folded one has to be compared.
        folded = reference.first_equal([_Candidate("folded", lambda: folded)], reasons) or model
        exact = folded
    exact = exact or model
    steps, made = _verified_steps(reference, _Lowering(folded, pairs, norms), exact, precision, reasons)
    # Failed attempts do not matter if the steps are in bfloat16.
    reason = "" if made == "bfloat16" else "; ".join(dict.fromkeys(reasons))
    return ModelVariants(folded, steps, exact, f"{_structure(steps)} {made}", reason)


@dataclasses.dataclass(frozen=True)
class _Lowering:
    """What `lower` is called with."""

    folded: Model
    pairs: Sequence[ConvNormPair]
    norms: Mapping[str, Layer]

    def candidate(self, name: str, precision: str, fuse: bool = True, mixed: bool = False) -> _Candidate:
        """Return a lowered variant for steps."""
        dtype = dtype_of(precision)
        return _Candidate(
            name, lambda: lower(self.folded, self.pairs, dtype, mixed, visible=self.norms, fuse=fuse), precision
        )


def _verified_steps(
    reference: _Reference, lowering: _Lowering, exact: Model, precision: str, reasons: list[str]
) -> tuple[Model, str]:
    """Return the variant for steps and its precision; why others deviate is appended to `reasons`."""
    on_gpu = is_on_gpu(lowering.folded)
    if precision == "bfloat16":
        unfused = [lowering.candidate("unfused", precision, fuse=False)] if on_gpu else []
        candidates = [lowering.candidate("lowered", precision), *unfused]
        steps = reference.first_equal([*candidates, lowering.candidate("mixed", precision, mixed=True)], reasons)
        if steps is not None:
            return steps, precision
    tf32 = precision != "float32" and has_tf32(reference.images.device)
    if not on_gpu and not tf32:
        return exact, "float32"
    made = "tf32" if tf32 else "float32"
    fused = [lowering.candidate("lowered", made)] if on_gpu else []
    steps = reference.first_equal([*fused, _Candidate(_structure(exact), lambda: exact, made)], reasons)
    return (exact, "float32") if steps is None else (steps, made)


def _structure(variant: Model) -> str:
    """Return "lowered", "folded" or "original"."""
    modules = list(variant.module.modules())
    if any(isinstance(module, (LoweredConv2d, FusedConv2d)) for module in modules):
        return "lowered"
    return "folded" if any(isinstance(module, FoldedNorm) for module in modules) else "original"


@ieee()
def verified_fold(model: Model, pairs: Sequence[ConvNormPair], layers: Sequence[Layer]) -> Model:
    """Return the folded network for forward passes that read all `layers`; `model` itself if their values differ."""
    inside = {layer.module for layer in layers}
    folded = fold(model, [pair for pair in pairs if pair[0] not in inside])
    if folded is model:
        return model
    images = probe_images(model, model.preprocessing.size)
    with torch.no_grad():
        reference = _Reference(model, layers, images, _values(model, layers, images))
        try:
            with inplace_activations(folded):
                reason = reference.deviation(_values(folded, layers, images), "float32")
        except DEVICE_ERRORS:
            raise
        except Exception as error:
            if is_device_failure(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
    if reason:
        log.warning("%s: batch normalizations are not folded for the dataset pass: %s", model.name, reason)
        return model
    return folded


def probe_images(model: Model, size: tuple[int, int]) -> Tensor:
    """Return two images (2, C, H, W) in [0, 1] for comparisons: white noise, and noise at 1/8 of the resolution."""
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(1, model.preprocessing.channels, *size, generator=generator)
    coarse = torch.rand(1, model.preprocessing.channels, *(max(1, side // 8) for side in size), generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)
    return torch.cat([fine, coarse]).to(model.device)


def observe(model: Model, layers: Sequence[Layer], images: Tensor) -> Observed:
    """Return the values of layers, and the gradient of their sum with random signs.

    With random signs, every channel contributes to the gradient.

    Args:
        model: The network.
        layers: The layers.
        images: Images (B, C, H, W) in [0, 1].

    Returns:
        Values by layer name, and under "" the gradient with respect to the images, if the network has one.
    """
    images = images.clone().requires_grad_(True)
    values = _values(model, layers, images)
    total = torch.zeros((), device=images.device)
    for maps in values.values():
        if maps.requires_grad:
            signs = torch.randint(0, 2, maps.shape, generator=torch.Generator().manual_seed(0)).to(maps.device) * 2 - 1
            total = total + (maps * signs).sum() / maps.detach().norm().clamp_min(1e-12)
    observed = {name: maps.detach() for name, maps in values.items()}
    if total.requires_grad:
        observed[""] = torch.autograd.grad(total, images)[0]
    return observed


def _values(model: Model, layers: Sequence[Layer], images: Tensor) -> Observed:
    """Return the values of layers in float32; of units that are computed from another layer, those of that layer.

    Latents that a top-k gate keeps change by more than rounding where two are almost equal.
    """
    with capture(model, [layer.source for layer in layers]) as forward:
        return {name: maps.float() for name, maps in forward(images).items()}


def layers_without_gradient(model: Model, layers: Sequence[Layer]) -> dict[str, str]:
    """Return the layers that can't be visualized because no gradient reaches the image, with the reason, by name.

    Layers that autograd does not connect with the images (`no_grad`, `inference_mode`, `detach`) are found by one
    forward pass. Layers whose derivative is zero everywhere (rounding, thresholds) are found by a second one in forward
    mode and confirmed by a backward pass for each of them. If an operator has no forward-mode derivative, the second
    test is skipped.
    """
    layers = [layer.source for layer in layers]
    images = _small_probe_image(model)
    values = _values(model, layers, images.clone().requires_grad_(True))
    reasons = {
        name: "it is computed without gradients (no_grad, inference_mode or detach before it)"
        for name, maps in values.items()
        if not maps.requires_grad
    }
    del values
    connected = [layer for layer in layers if layer.name not in reasons]
    for layer in _layers_with_zero_derivative(model, connected, images):
        gradient = observe(model, [layer], images).get("")
        if gradient is not None and not gradient.any():
            reasons[layer.name] = "its gradient is zero everywhere (rounding or a threshold before it)"
    return reasons


def _small_probe_image(model: Model) -> Tensor:
    """Return one image (1, C, H, W) of noise, of half the network's own size if the network accepts that."""
    size = model.preprocessing.size
    half = (size[0] // 2, size[1] // 2)
    if min(half) >= 64:
        images = probe_images(model, half)[:1]
        try:
            with torch.no_grad():
                model.module(model.normalize(images))
            return images
        except Exception as error:
            if is_device_failure(error):
                raise
            log.debug("%s does not accept images of %d × %d pixels", model.name, *half)
    return probe_images(model, size)[:1]


def _layers_with_zero_derivative(model: Model, layers: Sequence[Layer], images: Tensor) -> list[Layer]:
    """Return the layers whose derivative along a random direction is exactly zero for every value."""
    if not layers:
        return []
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).to(images.device)
    constant: list[Layer] = []

    def append_if_constant(layer: Layer, maps: Tensor) -> None:
        tangent = forward_ad.unpack_dual(maps).tangent
        if tangent is None or not tangent.any():
            constant.append(layer)

    try:
        with warnings.catch_warnings():
            # PyTorch compiles forward-mode derivatives with TorchScript, which is deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            with torch.no_grad(), forward_ad.dual_level(), capture(model, layers, append_if_constant) as forward:
                forward(forward_ad.make_dual(images, direction))
    except Exception as error:
        if is_device_failure(error):
            raise
        log.debug("no forward-mode derivatives of %s: %s: %s", model.name, type(error).__name__, first_line(error))
        return []
    return constant
