"""The parts of the ELBO against torch.distributions and direct sums."""

import math

import pytest
import torch
from torch import distributions

from models.losses import standard_gaussian_kl
from models.vae.elbo import (
    LatentStatistics,
    bits_per_dimension,
    free_bits,
    importance_bound,
    kl_weight,
    log_normal,
    reparameterise,
)


def test_gaussian_kl_and_log_normal_equal_torch_distributions() -> None:
    torch.manual_seed(0)
    mean, log_var, z = torch.randn(3, 10, 4, dtype=torch.float64)
    posterior = distributions.Normal(mean, (0.5 * log_var).exp())
    torch.testing.assert_close(
        standard_gaussian_kl(mean, log_var), distributions.kl_divergence(posterior, distributions.Normal(0.0, 1.0))
    )
    torch.testing.assert_close(log_normal(z, mean, log_var), posterior.log_prob(z).sum(-1))


def test_reparameterised_noise_has_the_posteriors_moments() -> None:
    noise = torch.tensor([[1.0], [-1.0]])
    z = reparameterise(torch.tensor([[3.0]]), torch.tensor([[math.log(4.0)]]), noise)
    torch.testing.assert_close(z, torch.tensor([[5.0], [1.0]]))


def test_free_bits_raise_small_dimensions_and_leave_them_without_gradient() -> None:
    kl_ML = torch.tensor([[0.1, 2.0], [0.3, 4.0]], requires_grad=True)
    free_M = free_bits(kl_ML, 0.5, group=2)
    assert free_M.tolist() == [3.5, 3.5]
    free_M.sum().backward()
    assert kl_ML.grad is not None
    assert kl_ML.grad.tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_free_bits_do_not_depend_on_the_micro_batch() -> None:
    torch.manual_seed(0)
    kl_ML = torch.rand(12, 5)
    whole = free_bits(kl_ML, 0.5, group=3)
    torch.testing.assert_close(torch.cat([free_bits(part, 0.5, group=3) for part in kl_ML.split(6)]), whole)
    with pytest.raises(ValueError, match="12 samples does not divide into free-bits groups of 5"):
        free_bits(kl_ML, 0.5, group=5)


def test_kl_warm_up_is_linear() -> None:
    assert [kl_weight(step, 2.0, 4) for step in (0, 1, 4, 9)] == [0.0, 0.5, 2.0, 2.0]
    assert kl_weight(0, 2.0, 0) == 2.0


def test_importance_bound_is_the_log_of_the_mean_weight() -> None:
    weights_KM = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    torch.testing.assert_close(importance_bound(weights_KM.log()), torch.tensor([2.0, 4.0]).log())
    torch.testing.assert_close(
        importance_bound(weights_KM.log() - 1000) + 1000, torch.tensor([2.0, 4.0]).log(), rtol=0, atol=1e-3
    )


def test_bits_of_a_uniform_byte() -> None:
    assert bits_per_dimension(torch.tensor([-10 * math.log(256)]), 10).item() == pytest.approx(8)
    # The uniform density on [0, 1] seen as 256 equal bins.
    assert bits_per_dimension(torch.tensor([0.0]), 10, bin_width=1 / 256).item() == pytest.approx(8)


def test_latent_statistics_merge_to_one_pass_and_tell_active_dimensions() -> None:
    torch.manual_seed(0)
    mean_ML = torch.randn(60, 3) * torch.tensor([1.0, 0.5, 0.01])
    log_var_ML = torch.zeros(60, 3) - torch.tensor([2.0, 1.0, 0.0])
    whole = LatentStatistics.of(mean_ML, log_var_ML)
    merged = LatentStatistics.of(mean_ML[:7], log_var_ML[:7]) + LatentStatistics.of(mean_ML[7:], log_var_ML[7:])
    torch.testing.assert_close(merged.activity(), whole.activity())
    torch.testing.assert_close(merged.kl(), standard_gaussian_kl(mean_ML, log_var_ML).double().mean(0))
    torch.testing.assert_close(whole.activity(), mean_ML.double().var(0, correction=0))
    assert (whole.activity() > 0.01).tolist() == [True, True, False]
