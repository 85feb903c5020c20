"""Optimisers: those of the literature where they are plain, and every picture on its own."""

import pytest
import torch

from pipeline.visualization.optimizers import OPTIMIZERS, Adam, AdamW, NAdam, Sgd

# The settings of the literature: no damping, no warm-up, a constant rate.
PLAIN = {"lr": 0.05, "warmup": 0, "floor": 1.0, "beta1": 0.9, "beta2": 0.999, "damping": 0.0, "joint": False}


def test_adam_without_damping_is_adam() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.zeros(2, 5), torch.zeros(2, 5, requires_grad=True)
    optimizer, reference = Adam(**PLAIN), torch.optim.Adam([theirs], lr=0.05)
    state = optimizer.init_state(ours)
    for at in range(20):
        gradient = torch.randn(2, 5)
        optimizer.step(ours, gradient, state, at, 0.05)
        theirs.grad = -gradient
        reference.step()
    assert torch.allclose(ours, theirs.detach(), atol=1e-6)


def test_adams_rate_warms_up_and_decays() -> None:
    adam = Adam(lr=1.0, warmup=3, floor=0.1, fall="cosine")
    rates = [adam.rate(i, 20) for i in range(20)]
    assert rates[:3] == [0.25, 0.5, 0.75] and rates[3] == 1.0
    assert rates[3:] == sorted(rates[3:], reverse=True) and 0.1 <= rates[-1] < 0.13
    straight = Adam(lr=1.0, warmup=4, floor=0.2, fall="linear")
    assert [straight.rate(i, 20) for i in (4, 12, 20)] == pytest.approx([1.0, 0.6, 0.2])


def test_damping_is_each_pictures_own() -> None:
    optimizer = Adam(lr=0.1, damping=0.5)
    gradient = torch.stack([torch.ones(4), torch.ones(4) * 1000])
    both, alone = torch.zeros(2, 4), torch.zeros(1, 4)
    optimizer.step(both, gradient, optimizer.init_state(both), 0, 0.1)
    optimizer.step(alone, gradient[:1], optimizer.init_state(alone), 0, 0.1)
    assert torch.allclose(both[:1], alone)


def test_where_the_corner_of_a_picture_is_makes_no_difference_to_joint_steps() -> None:
    """Gradients of a picture that lies elsewhere lead to the same picture, elsewhere."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 1, 8, 10, generator=generator)

    def painted(adam: Adam, gradients: torch.Tensor) -> torch.Tensor:
        parameters = torch.zeros(1, 8, 6, 2)
        state = adam.init_state(parameters, paired=True)
        for at, gradient in enumerate(gradients):
            own = torch.view_as_real(torch.fft.rfft2(gradient)).contiguous()
            adam.step(parameters, own, state, at, 0.1)
        return torch.fft.irfft2(torch.view_as_complex(parameters), s=(8, 10))

    for joint in (True, False):
        adam = Adam(beta1=0.5, beta2=0.9, damping=0.03, joint=joint)
        moved = painted(adam, gradients.roll((3, 4), (2, 3))).roll((-3, -4), (1, 2))
        assert torch.allclose(moved, painted(adam, gradients), atol=1e-5) == joint


def test_adamw_is_torchs() -> None:
    torch.manual_seed(0)
    ours = AdamW(**PLAIN, weight_decay=0.1)
    mine, theirs = torch.ones(2, 5), torch.ones(2, 5, requires_grad=True)
    state, reference = ours.init_state(mine), torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1)
    for at in range(20):
        gradient = torch.randn(2, 5)
        ours.step(mine, gradient, state, at, 0.05)
        theirs.grad = -gradient
        reference.step()
    assert torch.allclose(mine, theirs.detach(), atol=1e-6)


def test_nadam_is_dozats() -> None:
    """Algorithm 2 of Dozat 2016 with a constant momentum, written out for one number."""
    gradients = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    ours, mine = NAdam(**PLAIN), torch.ones(1, 1)
    state = ours.init_state(mine)
    x, m, v, mu, nu = 1.0, 0.0, 0.0, 0.9, 0.999
    for t, g in enumerate(gradients, start=1):
        ours.step(mine, torch.tensor([[g]]), state, t - 1, 0.05)
        m, v = mu * m + (1 - mu) * g, nu * v + (1 - nu) * g * g
        lookahead = mu * m / (1 - mu ** (t + 1)) + (1 - mu) * g / (1 - mu**t)
        x += 0.05 * lookahead / ((v / (1 - nu**t)) ** 0.5 + 1e-8)
    assert mine.item() == pytest.approx(x, abs=1e-5)


def test_sgd_moves_by_its_rate_whatever_the_gradient() -> None:
    gradient = torch.randn(3, 4, 5) * torch.tensor([1e-6, 1.0, 1e6]).view(3, 1, 1)
    parameters = torch.zeros(3, 4, 5)
    sgd = Sgd(lr=0.043)
    sgd.step(parameters, gradient, sgd.init_state(parameters), 0, 0.043)
    assert torch.allclose(parameters.abs().mean(dim=(1, 2)), torch.full((3,), 0.043), rtol=1e-4)
    still = torch.zeros(1, 4)
    sgd.step(still, torch.zeros(1, 4), sgd.init_state(still), 0, 1.0)
    assert torch.equal(still, torch.zeros(1, 4))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_no_picture_feels_another(name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    gradients = torch.randn(10, 2, 6)
    gradients[:, 1] *= 1000
    both, alone = torch.zeros(2, 6), torch.zeros(1, 6)
    states = optimizer.init_state(both), optimizer.init_state(alone)
    for at, gradient in enumerate(gradients):
        optimizer.step(both, gradient, states[0], at, 0.1)
        optimizer.step(alone, gradient[:1], states[1], at, 0.1)
    assert torch.equal(both[:1], alone)
