"""GAN losses and gradients against formulas in NumPy; the value at the optimum against the
Jensen-Shannon divergence."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from models.gan.losses import (
    GanLoss,
    PenaltyConfig,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    jensen_shannon_estimate,
    r1_penalty,
    value,
)

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


# Loss of the discriminator, its derivatives by the real and by the fake logit.
DISCRIMINATOR: dict[
    str, tuple[Callable[[Array, Array], Array], Callable[[Array, Array], Array], Callable[[Array, Array], Array]]
] = {
    "minimax": (
        lambda r, f: -np.log(sigmoid(r)) - np.log(1 - sigmoid(f)),
        lambda r, f: sigmoid(r) - 1,
        lambda r, f: sigmoid(f),
    ),
    "non_saturating": (
        lambda r, f: -np.log(sigmoid(r)) - np.log(1 - sigmoid(f)),
        lambda r, f: sigmoid(r) - 1,
        lambda r, f: sigmoid(f),
    ),
    "least_squares": (lambda r, f: (r - 1) ** 2 / 2 + f**2 / 2, lambda r, f: r - 1, lambda r, f: f),
    "wasserstein": (lambda r, f: f - r, lambda r, f: -np.ones_like(r), lambda r, f: np.ones_like(f)),
    "hinge": (
        lambda r, f: np.maximum(0, 1 - r) + np.maximum(0, 1 + f),
        lambda r, f: -1.0 * (r < 1),
        lambda r, f: 1.0 * (f > -1),
    ),
    "relativistic": (
        lambda r, f: -np.log(sigmoid(r - f)),
        lambda r, f: sigmoid(r - f) - 1,
        lambda r, f: 1 - sigmoid(r - f),
    ),
}
# Loss of the generator and its derivative by the fake logit.
GENERATOR: dict[str, tuple[Callable[[Array, Array], Array], Callable[[Array, Array], Array]]] = {
    "minimax": (lambda r, f: np.log(1 - sigmoid(f)), lambda r, f: -sigmoid(f)),
    "non_saturating": (lambda r, f: -np.log(sigmoid(f)), lambda r, f: sigmoid(f) - 1),
    "least_squares": (lambda r, f: (f - 1) ** 2 / 2, lambda r, f: f - 1),
    "wasserstein": (lambda r, f: -f, lambda r, f: -np.ones_like(f)),
    "hinge": (lambda r, f: -f, lambda r, f: -np.ones_like(f)),
    "relativistic": (lambda r, f: -np.log(sigmoid(f - r)), lambda r, f: sigmoid(f - r) - 1),
}


@pytest.mark.parametrize("kind", list(DISCRIMINATOR))
def test_loss_and_gradient_equal_their_formulas(kind: GanLoss) -> None:
    torch.manual_seed(0)
    real, fake = (3 * torch.randn(50, dtype=torch.float64) for _ in range(2))
    real.requires_grad_()
    fake.requires_grad_()
    r = real.detach().numpy()
    f = fake.detach().numpy()

    loss, by_real, by_fake = DISCRIMINATOR[kind]
    ours = discriminator_loss(kind, real, fake)
    np.testing.assert_allclose(ours.detach().numpy(), loss(r, f), rtol=1e-9)
    for gradient, expected in zip(torch.autograd.grad(ours.sum(), [real, fake]), (by_real, by_fake), strict=True):
        np.testing.assert_allclose(gradient.numpy(), expected(r, f), rtol=1e-9)

    loss_g, by_fake_g = GENERATOR[kind]
    ours = generator_loss(kind, fake, real)
    np.testing.assert_allclose(ours.detach().numpy(), loss_g(r, f), rtol=1e-9)
    np.testing.assert_allclose(torch.autograd.grad(ours.sum(), fake)[0].numpy(), by_fake_g(r, f), rtol=1e-9)


def test_losses_are_finite_where_the_discriminator_is_sure() -> None:
    sure = torch.tensor([200.0, -200.0])
    for kind in ("minimax", "non_saturating", "relativistic"):
        assert discriminator_loss(kind, sure, -sure).isfinite().all()
        assert generator_loss(kind, sure, -sure).isfinite().all()


def test_value_at_the_optimum_is_twice_the_jensen_shannon_divergence_less_log_4() -> None:
    p = stats.norm(0.0, 1.0)
    q = stats.norm(1.2, 0.6)

    def kl_to_middle(x: float, a: stats.rv_continuous, b: stats.rv_continuous) -> float:
        return a.pdf(x) * (a.logpdf(x) - math.log(0.5 * (a.pdf(x) + b.pdf(x))))

    jsd = 0.5 * (
        integrate.quad(kl_to_middle, -9, 9, (p, q), limit=200)[0]
        + integrate.quad(kl_to_middle, -9, 9, (q, p), limit=200)[0]
    )
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    log_p = torch.from_numpy(p.logpdf(x.numpy()))
    log_q = torch.from_numpy(q.logpdf(x.numpy()))
    logit = log_p - log_q  # of the best discriminator (Goodfellow et al. 2014, eq. 2)
    # value() takes a real and a fake logit; one of them far out at the sure side adds nothing.
    sure = torch.full_like(x, 1e4)
    v = torch.trapezoid(log_p.exp() * value(logit, -sure), x) + torch.trapezoid(log_q.exp() * value(sure, logit), x)
    assert v.item() == pytest.approx(-math.log(4) + 2 * jsd, abs=1e-4)
    assert jensen_shannon_estimate(v.item()) == pytest.approx(jsd, abs=1e-4)


def test_any_other_discriminator_has_less_value() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(4000, generator=generator)
    fake = 0.6 * torch.randn(4000, generator=generator) + 1.2
    p = torch.distributions.Normal(0.0, 1.0)
    q = torch.distributions.Normal(1.2, 0.6)
    logits = [p.log_prob(x) - q.log_prob(x) for x in (real, fake)]  # of the best discriminator
    best = value(*logits).mean()
    assert all(
        value(logits[0] * scale + shift, logits[1] * scale + shift).mean() < best
        for scale, shift in [(0.7, 0.0), (1.4, 0.0), (1.0, 0.5), (1.0, -0.5)]
    )


def test_r1_of_a_quadratic_critic_and_its_gradient() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(3, 3, dtype=torch.float64)
    matrix = (matrix + matrix.T).requires_grad_()
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    penalty_M = r1_penalty(0.5 * ((x @ matrix) * x).sum(1), x, gamma=4.0)
    a = matrix.detach().numpy()
    points = x.detach().numpy()
    np.testing.assert_allclose(penalty_M.detach().numpy(), 2.0 * ((points @ a) ** 2).sum(1), rtol=1e-9)
    (gradient,) = torch.autograd.grad(penalty_M.sum(), matrix)
    # d logit / d x = (A + A^T) x / 2, so the gradient by A is the symmetric part of 4 (A x) x^T.
    outer = 4.0 * (points @ a).T @ points
    np.testing.assert_allclose(gradient.numpy(), 0.5 * (outer + outer.T), rtol=1e-9)


def test_penalties_see_a_pack_as_one_point() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, dtype=torch.float64)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)

    def critic(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(4, 6) @ weight

    expected_M = weight.square().sum().expand(4)
    torch.testing.assert_close(r1_penalty(critic(x), x, gamma=2.0), expected_M)
    penalty_M = gradient_penalty(critic, x, torch.randn_like(x), torch.rand(4), weight=10.0)
    torch.testing.assert_close(penalty_M, 10 * (weight.norm() - 1).square().expand(4))


def test_gradient_penalty_is_taken_between_real_and_fake() -> None:
    real = torch.tensor([[0.0], [0.0], [0.0]])
    fake = torch.tensor([[4.0], [4.0], [4.0]])
    # logit = x^2 / 2 has the gradient x, so the penalty tells where it was taken.
    penalty_M = gradient_penalty(
        lambda x: 0.5 * x.square().sum(1), real, fake, torch.tensor([1.0, 0.5, 0.0]), weight=1.0
    )
    torch.testing.assert_close(penalty_M, torch.tensor([1.0, 1.0, 9.0]), rtol=1e-4, atol=1e-4)


def test_gradient_penalty_of_a_constant_critic_has_finite_gradients() -> None:
    weight = torch.zeros(3, requires_grad=True)
    gradient_penalty(
        lambda x: x @ weight, torch.randn(4, 3), torch.randn(4, 3), torch.rand(4), weight=1.0
    ).sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_a_penalty_every_zero_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"penalty\.every is 0"):
        PenaltyConfig(every=0)
