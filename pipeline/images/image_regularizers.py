"""Image regularizers: losses of the image that are minimized while the objective is maximized.

Regularizers are sums over pixels, as in lucid, so that the gradient of a pixel does not depend on the size of the
image. With `relative` (the default) the weight is relative to the objective: it holds for an objective whose gradient
has a root mean square of 1 over the pixels of the image. Activations have no common unit, and a weight that suits one
layer would be far too large or too small for another. With `relative: false` the weight multiplies the sum itself, as
in lucid.

With a `budget` the weight is only the start of a multiplier λ of each image, which moves until the mean of the
regularizer over its terms (for total variation: the mean absolute difference of neighbors) is the budget. A budget has
the same meaning in every layer, which a weight has not.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.errors import AtlasError
from pipeline.core.registry import ADDED_LATER, Registry, registered_name
from pipeline.core.validation import Use
from pipeline.data.image_filters import blur, frequencies

PENALTIES = Registry("penalty")

# Gains of the control of λ in the logarithm, by the relative excess e = value / target - 1, at most 1. λ is
# proportional to exp(BUDGET_GAIN · e + BUDGET_RATE · (sum of e over all steps)). Without the first term λ oscillates,
# as the image follows it with a delay of some ten steps.
BUDGET_RATE = 0.1
BUDGET_GAIN = 2.0
# The state of the control stays within these factors of the weight.
MULTIPLIER_RANGE = (1e-3, 1e3)
# A value within this fraction of the target meets the budget.
BUDGET_TOLERANCE = 0.1

Budget = Annotated[
    Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["natural"] | None,
    Use("natural, null (a fixed weight), or a number above 0"),
]


@dataclasses.dataclass(frozen=True)
class ImageRegularizer:
    """Base class of image regularizers.

    Attributes:
        weight: Factor of the loss; with a budget, its value before the first step.
        relative: Whether the weight is relative to the gradient of the objective.
        budget: Target of `mean`: a number, "natural" for `natural_value`, or None for a fixed weight.
        anchored: Whether the regularizer compares with the initial image.
        natural_value: Median of `mean` over natural images with the default settings of the class; None if it was not
            measured. Those of this module: 500 photographs of as many ImageNet classes, one of each, shorter side
            resized to 256 pixels (bicubic), values in [0, 1], center crops of 160 pixels. Center crops of 128 and of
            192 pixels differ by at most 7 %.
    """

    weight: float
    relative: bool = True
    budget: Budget = dataclasses.field(default=None, metadata=ADDED_LATER, kw_only=True)

    anchored: ClassVar[bool] = False
    natural_value: ClassVar[float | None] = None

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the loss of each image.

        Args:
            images: (B, C, H, W) in [0, 1].
            reference: (B, C, H, W) initial images; only valid for regularizers that are `anchored`.

        Returns:
            (B,) sums over pixels, at least 0.
        """
        raise NotImplementedError

    def num_terms(self, images: Tensor) -> int:
        """Return the number of terms that `value` is a sum of, for each of (B, C, H, W) images: C · H · W."""
        return images[0].numel()

    def mean(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return `value` ÷ `num_terms`, (B,): it does not depend on the size of the image."""
        return self.value(images, reference) / self.num_terms(images)

    @property
    def target(self) -> float | None:
        """The budget as a number; None for a fixed weight."""
        return self.natural_value if self.budget == "natural" else self.budget

    def check(self) -> None:
        """Raise `AtlasError` if the budget is "natural" and its value unknown, or the weight not above 0."""
        if self.budget is None:
            return
        where = f"render.penalties: {registered_name(self)}"
        if not self.weight > 0:
            raise AtlasError(f"{where}: weight={self.weight} must be above 0 with a budget, which multiplies it.")
        if self.budget != "natural":
            return
        if self.natural_value is None:
            raise AtlasError(
                f"{where}: budget=natural needs the class variable natural_value, the median over natural images. "
                "Set it, or give the budget as a number."
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("weight", "relative", "budget") and value != field.default:
                raise AtlasError(
                    f"{where}: budget=natural was measured with {field.name}={field.default}, not {value}. Give the "
                    "budget as a number."
                )

    def controlled(self, multipliers: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        """Return the λ of this step and the state of its control for the next step, each image by itself.

        Proportional and integral control of log λ by the relative excess e = m / target - 1: with the state s,
        λ = s · exp(`BUDGET_GAIN` · e) and s ← s · exp(`BUDGET_RATE` · e).

        Args:
            multipliers: (B,) s of this step.
            means: (B,) `mean` m of the images of this step.

        Returns:
            λ and s, (B,) each; `multipliers` without a budget, and where m is not finite.
        """
        if self.target is None:
            return multipliers, multipliers
        excess = (means / self.target - 1).nan_to_num(0.0, posinf=0.0).clamp(max=1.0)
        low, high = (self.weight * factor for factor in MULTIPLIER_RANGE)
        state = (multipliers * torch.exp(BUDGET_RATE * excess)).clamp(low, high)
        return multipliers * torch.exp(BUDGET_GAIN * excess), state


@PENALTIES.add("tv")
@dataclasses.dataclass(frozen=True)
class TotalVariation(ImageRegularizer):
    """Sum of |d| over the differences d of neighbors, down and right (lucid `total_variation`).

    Mahendran & Vedaldi 2015 with β = 1. |d| is computed as sqrt(d² + softness²) - softness, whose gradient is
    continuous at 0.
    """

    weight: float = 1.0
    softness: float = 1e-3

    natural_value: ClassVar[float | None] = 0.041

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the total variation, (B,)."""
        down = images[..., 1:, :] - images[..., :-1, :]
        right = images[..., :, 1:] - images[..., :, :-1]
        soft = self.softness
        vertical = (down.pow(2) + soft**2).sqrt().sub(soft).sum(dim=(1, 2, 3))
        horizontal = (right.pow(2) + soft**2).sqrt().sub(soft).sum(dim=(1, 2, 3))
        return vertical + horizontal

    def num_terms(self, images: Tensor) -> int:
        """Return the number of pairs of neighbors: `mean` is the mean absolute difference of neighboring values."""
        channels, height, width = images.shape[1:]
        return max(1, channels * ((height - 1) * width + height * (width - 1)))


@PENALTIES.add("l1")
@dataclasses.dataclass(frozen=True)
class L1(ImageRegularizer):
    """Sum of |x - grey| (lucid `L1`, constant 0.5)."""

    weight: float = 0.05
    grey: float = 0.5

    natural_value: ClassVar[float | None] = 0.227

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the sum of absolute distances, (B,)."""
        return (images - self.grey).abs().sum(dim=(1, 2, 3))


@PENALTIES.add("l2")
@dataclasses.dataclass(frozen=True)
class L2(ImageRegularizer):
    """Sum of (x - grey)²: the square of lucid's `L2`, so that the gradient grows with the distance."""

    weight: float = 0.5
    grey: float = 0.5

    natural_value: ClassVar[float | None] = 0.0695

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the sum of squared distances, (B,)."""
        return (images - self.grey).pow(2).sum(dim=(1, 2, 3))


@PENALTIES.add("lp")
@dataclasses.dataclass(frozen=True)
class Lp(ImageRegularizer):
    """Sum of |2 (x - grey)|^power: weak near grey, strong near black and white.

    Mahendran & Vedaldi 2015 use power 6.
    """

    weight: float = 0.1
    grey: float = 0.5
    power: float = 6.0

    natural_value: ClassVar[float | None] = 0.099

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the sum of powers, (B,)."""
        return (2 * (images - self.grey)).abs().pow(self.power).sum(dim=(1, 2, 3))


@PENALTIES.add("blur")
@dataclasses.dataclass(frozen=True)
class BlurDistance(ImageRegularizer):
    """Half the sum of squared distances to the blurred image (lucid `blur_input_each_step`).

    Minimizing it blurs the image slightly at each step, by way of the optimizer. `sigma` is in pixels.
    """

    weight: float = 1.0
    sigma: float = 1.0

    natural_value: ClassVar[float | None] = 0.00104

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return half the sum of squared distances, (B,)."""
        return 0.5 * (images - blur(images, self.sigma)).pow(2).sum(dim=(1, 2, 3))


@PENALTIES.add("high_frequency")
@dataclasses.dataclass(frozen=True)
class HighFrequency(ImageRegularizer):
    """Energy above `cutoff` cycles per pixel, of the orthonormal Fourier transform (a sum over pixels, by Parseval)."""

    weight: float = 1.0
    cutoff: float = 0.25

    natural_value: ClassVar[float | None] = 0.00206

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the energy, (B,)."""
        height, width = images.shape[-2:]
        spectrum = torch.fft.rfft2(images, norm="ortho")
        energy = spectrum.real.pow(2) + spectrum.imag.pow(2)
        # Each column of the half spectrum stands for two, except the first and, for an even width, the Nyquist column.
        multiplicity = torch.full((width // 2 + 1,), 2.0, dtype=images.dtype, device=images.device)
        multiplicity[0] = 1.0
        if width % 2 == 0:
            multiplicity[-1] = 1.0
        is_high = frequencies(height, width, device=images.device) > self.cutoff
        return (energy * (is_high * multiplicity)).sum(dim=(1, 2, 3))


@PENALTIES.add("prior")
@dataclasses.dataclass(frozen=True)
class Prior(ImageRegularizer):
    """Half the sum of squared distances to the initial image."""

    weight: float = 0.1

    anchored: ClassVar[bool] = True

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return half the sum of squared distances, (B,)."""
        return 0.5 * (images - reference).pow(2).sum(dim=(1, 2, 3))
