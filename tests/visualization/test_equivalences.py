"""Statements about optimization that hold exactly, and need no study."""

import copy

import torch
from torch import Tensor, nn

from pipeline.images.gradient_preconditioners import ScaleSpectrum
from pipeline.images.parameterizations import Fourier


def test_gradient_ascent_in_fourier_coefficients_is_ascent_in_pixels_with_a_scaled_spectrum() -> None:
    """The parameterization is a preconditioner (Olah et al. 2017); with plain gradient steps, `spectrum` of power 2.

    Real coefficients stand for two frequencies each, but for those of the first and last column, with half the step.
    """
    size = (16, 24)
    canvas = Fourier(colour="plain", decay=1.0, gain=1.0)
    generator = torch.Generator().manual_seed(0)
    coefficients = canvas.initial(generator, 3, size)[None].requires_grad_(True)
    weights = torch.randn(1, 3, *size, generator=generator)

    def before_sigmoid(parameters: Tensor) -> Tensor:
        spectrum = torch.view_as_complex(parameters * canvas.scale(size)[..., None])
        return torch.fft.irfft2(spectrum, s=size, norm="ortho")

    (slope,) = torch.autograd.grad((before_sigmoid(coefficients) * weights).sum(), coefficients)
    with torch.no_grad():
        step = before_sigmoid(coefficients + slope) - before_sigmoid(coefficients)
        in_pixels = ScaleSpectrum(power=2.0).apply(weights, None)
    ratio = torch.fft.rfft2(step) / torch.fft.rfft2(in_pixels)
    inner = ratio[..., 1 : size[1] // 2]
    assert torch.allclose(inner, inner[0, 0, 0, 0].expand_as(inner), rtol=1e-3)
    # Columns of frequency 0 and of the highest frequency have no counterpart on the other side.
    rest = ratio[0, 0, 1 : size[0] // 2, 0]
    assert torch.allclose(rest * 2, inner[0, 0, 0, 0].expand_as(rest), rtol=1e-3)


def mirrored(module: nn.Module) -> nn.Module:
    """Return a copy with every kernel mirrored horizontally."""
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for layer in copied.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.copy_(layer.weight.flip(3))
    return copied


def test_mirroring_every_kernel_is_mirroring_the_image() -> None:
    """Some noise on the parameters is exactly noise on the image: here a reflection, for strides that fit the width."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2, padding=1),
    )
    image = torch.rand(2, 3, 17, 17)
    assert torch.allclose(mirrored(network)(image), network(image.flip(3)).flip(3), atol=1e-6)
    # With an even width the positions of a stride are not symmetric, and the statement does not hold.
    even = torch.rand(2, 3, 16, 16)
    assert not torch.allclose(mirrored(network)(even), network(even.flip(3)).flip(3), atol=1e-3)
