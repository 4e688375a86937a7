"""Likelihoods of the VAE against torch.distributions."""

import math

import pytest
import torch
from torch import distributions

from models.init import initialise
from models.vae.likelihoods import BernoulliConfig, DiscretisedLogisticConfig, GaussianConfig, build_likelihood


def test_bernoulli_equals_torch_distributions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 3, 4, 4)
    x = torch.randint(0, 2, (5, 3, 4, 4)).float()
    expected_M = distributions.Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(build_likelihood(BernoulliConfig()).log_prob(logits, x), expected_M)
    torch.testing.assert_close(
        build_likelihood(BernoulliConfig()).mean(logits), distributions.Bernoulli(logits=logits).mean
    )


@pytest.mark.parametrize("variance", ["fixed", "shared"])
def test_gaussian_of_one_variance_equals_torch_distributions(variance: str) -> None:
    torch.manual_seed(0)
    mean, x = torch.randn(2, 5, 3, 4, 4)
    likelihood = build_likelihood(GaussianConfig(variance=variance, std=0.3))
    initialise(likelihood, seed=0)
    torch.testing.assert_close(
        likelihood.log_prob(mean, x), distributions.Normal(mean, 0.3).log_prob(x).flatten(1).sum(1)
    )
    assert len(list(likelihood.parameters())) == (variance == "shared")


def test_gaussian_per_pixel_equals_torch_distributions() -> None:
    torch.manual_seed(0)
    output = torch.randn(5, 6, 4, 4)
    x = torch.randn(5, 3, 4, 4)
    likelihood = build_likelihood(GaussianConfig(variance="per_pixel"))
    log_std = -6 + torch.log1p(torch.exp(output[:, 3:] + 6))
    expected_M = distributions.Normal(output[:, :3], log_std.exp()).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.log_prob(output, x), expected_M)
    assert likelihood.parameters_per_value == 2


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_discretised_logistic_integrates_the_logistic_density(levels: int) -> None:
    x = torch.linspace(0, 1, levels, dtype=torch.float64)[:, None]
    mean = torch.tensor([[0.4]], dtype=torch.float64)
    log_scale = torch.tensor([[-2.5]], dtype=torch.float64)
    log_p = build_likelihood(DiscretisedLogisticConfig(levels=levels)).log_prob(
        torch.cat([mean, log_scale], dim=1).expand(levels, 2), x
    )
    assert log_p.exp().sum().item() == pytest.approx(1)
    logistic = distributions.TransformedDistribution(
        distributions.Uniform(0.0, 1.0),
        [distributions.SigmoidTransform().inv, distributions.AffineTransform(0.4, math.exp(-2.5))],
    )
    edges = logistic.cdf(((x[1:] + x[:-1]) / 2).squeeze(1))
    torch.testing.assert_close(
        log_p.exp(), torch.diff(edges, prepend=edges.new_zeros(1), append=edges.new_ones(1)), rtol=1e-6, atol=1e-9
    )


def test_discretised_logistic_has_finite_gradients_far_from_the_mean() -> None:
    x = torch.linspace(0, 1, 256)[:, None]
    output = torch.tensor([[0.0, -6.9]]).repeat(256, 1).requires_grad_()
    log_p = build_likelihood(DiscretisedLogisticConfig()).log_prob(output, x)
    log_p.sum().backward()
    assert log_p.isfinite().all()
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_impossible_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"likelihood\.std is 0"):
        GaussianConfig(std=0)
    with pytest.raises(ValueError, match=r"likelihood\.levels is 1"):
        DiscretisedLogisticConfig(levels=1)
