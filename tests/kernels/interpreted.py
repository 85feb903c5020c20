"""Run the Triton kernels on a CPU, in Triton's interpreter, and compare them with PyTorch.

The interpreter has to be chosen before anything imports Triton: test_triton.py runs this file in a process of its own.
"""

import math
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from pipeline.kernels import adam, adam_triton, affine_sample, affine_sample_triton
from pipeline.visualization.optimizers import Adam, NAdam

TURN = 0.5
MATRICES = {
    "identity": [[1, 0, 0], [0, 1, 0]],
    "a shift by more than the image": [[1, 0, 40.3], [0, 1, -31.7]],
    "half": [[2, 0, 0.2], [0, 2, 0.1]],
    "double": [[0.5, 0, 0], [0, 0.5, 0.3]],
    "a flip": [[-1, 0, 0], [0, 1, 0.4]],
    "both flips, far away": [[-1.3, 0, 100.2], [0, -0.7, 50.6]],
    "a rotation": [[math.cos(TURN), -math.sin(TURN), 1.1], [math.sin(TURN), math.cos(TURN), -2.3]],
    "sheared and reflected many times": [[3.1, 1.7, 5.3], [-2.3, 4.9, -7.2]],
}
# Channels, size of the images, size of the views.
SHAPES = [(3, (13, 9), (11, 7)), (4, (8, 8), (16, 16)), (1, (1, 5), (3, 2)), (3, (13, 21), (19, 15))]


def matrix_of(rows: list[list[float]]) -> Tensor:
    return torch.tensor([[*rows, [0, 0, 1]]] * 2).float()


def seen(function: object, images: Tensor, matrix: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What a sampler shows, and the gradient of it weighted by noise."""
    images = images.clone().requires_grad_(True)
    view = function(images, matrix, tuple(noise.shape[2:]))  # type: ignore[operator]
    return view.detach(), torch.autograd.grad((view * noise).sum(), images)[0]


def sampled_views_and_gradients() -> None:
    for channels, picture, view in SHAPES:
        generator = torch.Generator().manual_seed(channels)
        images = torch.rand(2, channels, *picture, generator=generator)
        noise = torch.randn(2, channels, *view, generator=generator)
        for name, rows in MATRICES.items():
            matrix = matrix_of(rows)
            found = seen(affine_sample_triton.sample, images, matrix, noise)
            exact = seen(affine_sample.sample_with_pytorch, images.double(), matrix.double(), noise.double())
            where = f"{name}, {channels} channels, {picture} to {view}"
            for mine, theirs in zip(found, exact, strict=True):
                scale = max(1.0, float(theirs.abs().max()))
                assert float((mine - theirs).abs().max()) < 1e-5 * scale, where
            assert found[0].is_contiguous(memory_format=torch.channels_last), where
            if channels == 4:
                again = seen(affine_sample_triton.sample, images, matrix, noise)
                assert all(map(torch.equal, found, again)), where


def gradients_do_not_depend_on_the_order_of_addition() -> None:
    """A mirrored view adds the same numbers in another order, and a gradient may have any strides."""
    images = torch.rand(2, 3, 9, 11)
    noise = torch.randn(2, 3, 17, 20)
    for name in ("half", "a rotation", "both flips, far away"):
        matrix, mirrored = matrix_of(MATRICES[name]), matrix_of(MATRICES[name])
        mirrored[:, :, 0] *= -1
        one = seen(affine_sample_triton.sample, images, matrix, noise)[1]
        other = seen(affine_sample_triton.sample, images, mirrored, noise.flip(3))[1]
        assert torch.equal(one, other)
        strided = noise.contiguous(memory_format=torch.channels_last)
        assert torch.equal(one, seen(affine_sample_triton.sample, images, matrix, strided)[1])


def any_size_of_gradient() -> None:
    """Of each image for itself; what is not finite stays in its image."""
    images, matrix = torch.rand(2, 3, 9, 11), matrix_of(MATRICES["a rotation"])
    noise = torch.randn(2, 3, 7, 8)
    plain = seen(affine_sample_triton.sample, images, matrix, noise)[1]
    for factor in (2.0**-90, 2.0**-60, 2.0**60, 2.0**120):
        scaled = seen(
            affine_sample_triton.sample, images, matrix, noise * torch.tensor([factor, 1])[:, None, None, None]
        )
        assert torch.equal(scaled[1][0], plain[0] * factor) and torch.equal(scaled[1][1], plain[1])
    for value in (math.nan, math.inf):
        damaged = noise.clone()
        damaged[0, 1, 2, 3] = value
        gradient = seen(affine_sample_triton.sample, images, matrix, damaged)[1]
        assert gradient[0].isnan().all() and torch.equal(gradient[1], plain[1])
    assert not seen(affine_sample_triton.sample, images, matrix, noise * 0)[1].any()


def numbers_of(optimizer: Adam, step: int, rate: float) -> Tensor:
    """The numbers of `Adam.step`."""
    bias1, bias2 = 1 - optimizer.beta1 ** (step + 1), math.sqrt(1 - optimizer.beta2 ** (step + 1))
    factors = (1.0, 0.0)
    if optimizer.nesterov:
        factors = (optimizer.beta1 * bias1 / (1 - optimizer.beta1 ** (step + 2)), 1 - optimizer.beta1)
    size = rate / bias1 * bias2
    return torch.tensor([optimizer.beta1, optimizer.beta2, *factors, optimizer.damping, 1e-8 * bias2, size])


def steps_of_adam() -> None:
    """In Triton, in PyTorch with numbers on the device, and in the optimizer of the loop."""
    for optimizer in (Adam(), Adam(joint=False), NAdam(damping=0.1), Adam(beta1=0.9, beta2=0.999, damping=0.0)):
        for shape in ((1, 1), (3, 7, 5), (2, 3, 20, 27), (2, 3, 17, 21, 2)):
            walked = []
            for function in (adam_triton.fused_adam, adam.step, None):
                generator = torch.Generator().manual_seed(1)
                parameters = torch.zeros(shape)
                first, second = optimizer.init_state(parameters, paired=shape[-1] == 2)
                for step in range(5):
                    gradient = torch.randn(shape, generator=generator) * 10.0 ** (step - 2)
                    if function is None:
                        optimizer.step(parameters, gradient, (first, second), step, 0.1)
                    else:
                        function(parameters, gradient, first, second, numbers_of(optimizer, step, 0.1))
                walked.append((parameters, first, second))
            torch.testing.assert_close(walked[0], walked[1], rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(walked[1], walked[2], rtol=1e-5, atol=1e-6)


def checks_before_use() -> None:
    for check in (affine_sample.check_triton, adam.check_triton):
        check(torch.device("cpu"))


if __name__ == "__main__":
    parts = (
        sampled_views_and_gradients,
        gradients_do_not_depend_on_the_order_of_addition,
        any_size_of_gradient,
        steps_of_adam,
        checks_before_use,
    )
    for part in parts:
        part()
