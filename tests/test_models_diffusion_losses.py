"""Losses and the variational bound of a diffusion, against closed forms and torch.distributions."""

import math

import pytest
import torch
from torch import Tensor, distributions

from models.diffusion.bound import discretised_gaussian_log_prob, prior_term, vlb_term
from models.diffusion.losses import (
    DiffusionConfig,
    HybridLossConfig,
    LossConfig,
    MinSNRLossConfig,
    SimpleLossConfig,
    diffusion_loss,
    loss_by_timestep,
)
from models.diffusion.parameterisation import Prediction, Target, predict, target
from models.diffusion.schedules import LinearScheduleConfig, NoiseSchedule, betas
from models.losses import gaussian_kl
from models.quality.mixtures import GaussianMixture

KINDS: list[Target] = ["noise", "x0", "v"]
SCHEDULE = NoiseSchedule(betas(LinearScheduleConfig()))


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x0, noise, output = torch.randn(3, 4, 3, 2, 2, dtype=torch.float64)
    return x0, noise, output, torch.tensor([0, 10, 500, 999])


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_target_is_read_back_as_x0_and_noise(kind: Target) -> None:
    x0, noise, _, t_M = batch()
    x_t = SCHEDULE.diffuse(x0, t_M, noise)
    prediction = predict(kind, SCHEDULE, target(kind, SCHEDULE, x0, t_M, noise), x_t, t_M)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.noise, noise)


@pytest.mark.parametrize("loss", [SimpleLossConfig(), MinSNRLossConfig()])
@pytest.mark.parametrize("kind", KINDS)
def test_the_true_target_has_no_loss(kind: Target, loss: LossConfig) -> None:
    x0, noise, _, t_M = batch()
    config = DiffusionConfig(prediction=kind, loss=loss)
    loss_M = diffusion_loss(config, SCHEDULE, target(kind, SCHEDULE, x0, t_M, noise), x0, t_M, noise)
    assert loss_M.shape == (4,)
    assert loss_M.abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_of_x0_by_min_of_snr_and_gamma(kind: Target) -> None:
    x0, noise, output, t_M = batch()
    prediction = predict(kind, SCHEDULE, output, SCHEDULE.diffuse(x0, t_M, noise), t_M)
    alpha_bar_M = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[t_M]
    expected_M = (alpha_bar_M / (1 - alpha_bar_M)).clamp_max(5) * (prediction.x0 - x0).square().flatten(1).mean(1)
    actual_M = diffusion_loss(
        DiffusionConfig(prediction=kind, loss=MinSNRLossConfig(gamma=5.0)), SCHEDULE, output, x0, t_M, noise
    )
    torch.testing.assert_close(actual_M, expected_M, rtol=1e-5, atol=0)


def test_hybrid_trains_the_mean_by_l_simple_and_the_variance_by_the_bound() -> None:
    x0, noise, output, t_M = batch()
    output.requires_grad_()
    variance = torch.zeros_like(output, requires_grad=True)
    config = DiffusionConfig(loss=HybridLossConfig(vlb_weight=0.001))
    hybrid_M = diffusion_loss(config, SCHEDULE, torch.cat([output, variance], dim=1), x0, t_M, noise)
    simple_M = diffusion_loss(DiffusionConfig(), SCHEDULE, output, x0, t_M, noise)
    mean = predict("noise", SCHEDULE, output, SCHEDULE.diffuse(x0, t_M, noise), t_M)
    bits_M = vlb_term(
        SCHEDULE, Prediction(mean.x0, mean.noise, (variance + 1) / 2), x0, SCHEDULE.diffuse(x0, t_M, noise), t_M
    )
    torch.testing.assert_close(hybrid_M, simple_M + 0.001 * 1000 * bits_M)
    (from_hybrid,) = torch.autograd.grad(hybrid_M.sum(), output, retain_graph=True)
    (from_simple,) = torch.autograd.grad(simple_M.sum(), output, retain_graph=True)
    torch.testing.assert_close(from_hybrid, from_simple)
    assert torch.autograd.grad(hybrid_M.sum(), variance)[0].abs().min() > 0


def test_gaussian_kl_equals_torch_distributions() -> None:
    torch.manual_seed(0)
    mean_p, log_var_p, mean_q, log_var_q = torch.randn(4, 100, dtype=torch.float64)
    p = distributions.Normal(mean_p, (0.5 * log_var_p).exp())
    q = distributions.Normal(mean_q, (0.5 * log_var_q).exp())
    torch.testing.assert_close(gaussian_kl(mean_p, log_var_p, mean_q, log_var_q), distributions.kl_divergence(p, q))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_discretised_gaussian_is_a_distribution_over_grey_values(levels: int) -> None:
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    mean = torch.tensor(0.3, dtype=torch.float64)
    log_var = torch.tensor(-3.0, dtype=torch.float64)
    log_p = discretised_gaussian_log_prob(values, mean, log_var, levels)
    assert log_p.exp().sum().item() == pytest.approx(1)
    normal = distributions.Normal(mean, (0.5 * log_var).exp())
    edges = normal.cdf((values[1:] + values[:-1]) / 2)
    expected = torch.diff(edges, prepend=edges.new_zeros(1), append=edges.new_ones(1))
    torch.testing.assert_close(log_p.exp(), expected, rtol=1e-9, atol=1e-14)


def test_discretised_gaussian_is_finite_far_from_the_mean_in_fp32() -> None:
    x = torch.linspace(-1, 1, 256)
    log_var = torch.tensor(-9.0, requires_grad=True)
    log_p = discretised_gaussian_log_prob(x, torch.tensor(-1.0), log_var)
    assert log_p.isfinite().all()
    log_p.sum().backward()
    assert log_var.grad is not None
    assert log_var.grad.isfinite()


def test_terms_are_kl_divergences_of_the_reverse_steps() -> None:
    x0, noise, output, _ = batch()
    t_M = torch.tensor([1, 10, 500, 999])
    x_t = SCHEDULE.diffuse(x0, t_M, noise)
    prediction = predict("noise", SCHEDULE, output, x_t, t_M)
    for fixed in ("small", "large"):
        std = SCHEDULE.posterior_variance(t_M, t_M - 1).sqrt().view(-1, 1, 1, 1)
        std_p = std if fixed == "small" else SCHEDULE.betas_T[t_M].sqrt().view(-1, 1, 1, 1)
        truth = distributions.Normal(SCHEDULE.posterior_mean(x0, x_t, t_M, t_M - 1), std)
        model = distributions.Normal(SCHEDULE.posterior_mean(prediction.x0, x_t, t_M, t_M - 1), std_p)
        expected_M = distributions.kl_divergence(truth, model).flatten(1).mean(1) / math.log(2)
        torch.testing.assert_close(vlb_term(SCHEDULE, prediction, x0, x_t, t_M, fixed=fixed), expected_M)
    prior = distributions.Normal(*SCHEDULE.scales(999, x0))
    prior_kl = distributions.kl_divergence(
        distributions.Normal(prior.loc * x0, prior.scale), distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(prior_term(SCHEDULE, x0), prior_kl.flatten(1).mean(1) / math.log(2))


def test_the_bound_of_the_optimal_denoiser_lies_just_above_the_entropy() -> None:
    # A fair coin at -1 and 1 has an entropy of 1 bit; no bound may go below it.
    schedule = NoiseSchedule(betas(LinearScheduleConfig()))
    coin = GaussianMixture(
        weights_K=torch.tensor([0.5, 0.5]).double(),
        means_KD=torch.tensor([[-1.0], [1.0]]).double(),
        stds_K=torch.full((2,), 1e-4).double(),
    )
    generator = torch.Generator().manual_seed(0)
    x0 = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(1000, 1)

    def term(t: int) -> Tensor:
        t_M = torch.full((len(x0),), t)
        x_t = schedule.diffuse(x0, t, torch.randn(x0.shape, generator=generator, dtype=torch.float64))
        return vlb_term(schedule, coin.denoiser(schedule, x_t, t_M), x0, x_t, t_M, fixed="small", levels=2)

    bound_M = torch.stack([term(t) for t in range(1000)]).sum(0) + prior_term(schedule, x0)
    standard_error = bound_M.std().item() / math.sqrt(2000)
    assert 1 - 4 * standard_error < bound_M.mean().item() < 1.03 + 4 * standard_error
    assert standard_error < 0.03


def test_loss_by_timestep_sums_and_counts_each_bucket() -> None:
    sums = loss_by_timestep(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 249, 250, 999]), 1000, 4)
    assert sums.tolist() == [[3.0, 4.0, 0.0, 8.0], [2.0, 1.0, 0.0, 1.0]]
