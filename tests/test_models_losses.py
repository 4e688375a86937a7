"""Losses against torch.distributions, SciPy and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import logsumexp
from scipy.stats import entropy
from torch import distributions

from models import losses


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(*shape: int, seed: int) -> torch.Tensor:
    root = normal(*shape, shape[-1], seed=seed)
    return root @ root.mT + torch.eye(shape[-1], dtype=torch.float64)


def test_squared_error() -> None:
    prediction = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert losses.squared_error(prediction, target).tolist() == [2.0, 12.5]


def test_cross_entropies() -> None:
    logits = normal(5, 7)
    targets = torch.tensor([0, 6, 3, 3, 1])
    by_hand = logsumexp(logits.numpy(), axis=1) - logits.numpy()[np.arange(5), targets.numpy()]
    np.testing.assert_allclose(losses.cross_entropy(logits, targets), by_hand)
    ignored = targets.clone()
    ignored[1] = -100
    assert losses.cross_entropy_sum(logits[None], ignored[None], -100).item() == pytest.approx(
        by_hand.sum() - by_hand[1]
    )
    assert losses.cross_entropy_sum(logits.bfloat16()[None], targets[None], -100).dtype == torch.float32
    x = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)
    p = logits[0, :3].sigmoid()
    torch.testing.assert_close(losses.binary_cross_entropy(logits[0, :3], x), -(x * p.log() + (1 - x) * (1 - p).log()))


def test_categorical_divergences() -> None:
    log_p = normal(4, 6, seed=1).log_softmax(-1)
    log_q = normal(4, 6, seed=2).log_softmax(-1)
    np.testing.assert_allclose(losses.categorical_kl(log_p, log_q), entropy(log_p.exp(), log_q.exp(), axis=1))
    np.testing.assert_allclose(
        losses.jensen_shannon(log_p, log_q), jensenshannon(log_p.exp(), log_q.exp(), axis=1) ** 2
    )
    torch.testing.assert_close(losses.jensen_shannon(log_p, log_q), losses.jensen_shannon(log_q, log_p))
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).log()
    assert losses.jensen_shannon(apart[0], apart[1]).item() == pytest.approx(math.log(2))
    assert losses.categorical_kl(apart[0], torch.tensor([0.5, 0.5]).log().double()).item() == pytest.approx(math.log(2))
    assert losses.categorical_kl(log_p, log_p).abs().max() == 0


def test_gaussian_divergences() -> None:
    mean_p, mean_q, log_var_p, log_var_q = (normal(3, 4, seed=seed) for seed in range(4))
    p = distributions.Normal(mean_p, (0.5 * log_var_p).exp())
    q = distributions.Normal(mean_q, (0.5 * log_var_q).exp())
    elementwise = losses.gaussian_kl(mean_p, log_var_p, mean_q, log_var_q)
    torch.testing.assert_close(elementwise, distributions.kl_divergence(p, q))
    torch.testing.assert_close(
        losses.standard_gaussian_kl(mean_p, log_var_p), distributions.kl_divergence(p, distributions.Normal(0.0, 1.0))
    )
    cov_p = covariance(3, 4, seed=5)
    cov_q = covariance(3, 4, seed=6)
    full = distributions.kl_divergence(
        distributions.MultivariateNormal(mean_p, cov_p), distributions.MultivariateNormal(mean_q, cov_q)
    )
    torch.testing.assert_close(losses.full_gaussian_kl(mean_p, cov_p, mean_q, cov_q), full)
    diagonal = losses.full_gaussian_kl(mean_p, log_var_p.exp().diag_embed(), mean_q, log_var_q.exp().diag_embed())
    torch.testing.assert_close(diagonal, elementwise.sum(1))


def test_monte_carlo_kl_covers_the_closed_form() -> None:
    p = distributions.Normal(torch.zeros(50).double(), 1.0)
    q = distributions.Normal(torch.linspace(-1, 1, 50).double(), 1.5)
    draws = normal(4000, 50, seed=7)
    mean, error = losses.monte_carlo_kl(p.log_prob(draws), q.log_prob(draws))
    off = (mean - distributions.kl_divergence(p, q)) / error
    assert (off.abs() < 2).double().mean() > 0.85  # 95 % are expected within two standard errors
    assert off.abs().max() < 4


def test_info_nce() -> None:
    similarity = normal(6, 9, seed=8)
    positive = torch.tensor([0, 1, 2, 3, 4, 8])
    scaled = similarity.numpy() / 0.1
    expected = logsumexp(scaled, axis=1) - scaled[np.arange(6), positive.numpy()]
    np.testing.assert_allclose(losses.info_nce(similarity, positive, 0.1), expected)
    # All candidates alike: log N, the bound that InfoNCE can tell of mutual information.
    assert losses.info_nce(torch.zeros(1, 16), torch.tensor([3])).item() == pytest.approx(math.log(16))
