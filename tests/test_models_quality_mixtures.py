"""Mixtures of Gaussians against torch.distributions, Tweedie's formula and simulation."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, distributions

from models.diffusion.schedules import LinearScheduleConfig, NoiseSchedule, betas
from models.quality.mixtures import GaussianMixture, ModeCoverage, grid, perfect_sampler, ring


def mixture() -> GaussianMixture:
    return GaussianMixture(
        weights_K=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        means_KD=torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.5, -1.5]], dtype=torch.float64),
        stds_K=torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    )


def independent(mixture: GaussianMixture, signal: float = 1.0, spread: float = 0.0) -> distributions.Distribution:
    stds = ((signal * mixture.stds_K).square() + spread**2).sqrt()
    components = distributions.Independent(
        distributions.Normal(signal * mixture.means_KD, stds[:, None].expand_as(mixture.means_KD)), 1
    )
    return distributions.MixtureSameFamily(distributions.Categorical(mixture.weights_K), components)


def test_density_equals_torch_distributions() -> None:
    torch.manual_seed(0)
    x = 2 * torch.randn(50, 2, dtype=torch.float64)
    torch.testing.assert_close(mixture().log_density(x), independent(mixture()).log_prob(x))


def test_moments_equal_torch_distributions_and_those_of_samples() -> None:
    torch.manual_seed(0)
    known = mixture()
    torch.testing.assert_close(known.mean(), independent(known).mean)
    torch.testing.assert_close(known.covariance().diag(), independent(known).variance)
    x = known.sample(torch.rand(100_000, dtype=torch.float64), torch.randn(100_000, 2, dtype=torch.float64))
    torch.testing.assert_close(x.mean(0), known.mean(), rtol=0, atol=0.02)
    torch.testing.assert_close(x.T.cov(), known.covariance(), rtol=0, atol=0.03)


def test_optimal_denoiser_satisfies_tweedies_formula() -> None:
    torch.manual_seed(0)
    schedule = NoiseSchedule(betas(LinearScheduleConfig()))
    for t in (0, 100, 500, 999):
        signal, spread = (s.item() for s in schedule.scales(t, torch.zeros(1, dtype=torch.float64)))
        x = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
        (score,) = torch.autograd.grad(independent(mixture(), signal, spread).log_prob(x).sum(), x)
        prediction = mixture().denoiser(schedule, x.detach(), torch.full((20,), t))
        torch.testing.assert_close(prediction.x0, (x.detach() + spread**2 * score) / signal)
        torch.testing.assert_close(prediction.noise, -spread * score)


def test_grid_and_ring_have_pacgans_modes() -> None:
    assert sorted(map(tuple, grid().means_KD.tolist())) == [
        (float(x), float(y)) for x, y in product(range(-4, 5, 2), repeat=2)
    ]
    assert grid().stds_K.unique().item() == pytest.approx(0.05)
    torch.testing.assert_close(ring().means_KD.norm(dim=1), torch.ones(8))
    assert ring().stds_K.square().unique().item() == pytest.approx(1e-4)


def test_coverage_of_hand_placed_samples() -> None:
    modes = GaussianMixture(
        weights_K=torch.full((3,), 1 / 3),
        means_KD=torch.tensor([[0.0, 0.0], [4.0, 0.0], [8.0, 0.0]]),
        stds_K=torch.full((3,), 0.1),
    )
    x = torch.tensor([[0.0, 0.29], [0.0, 0.31], [3.9, 0.0], [4.2, 0.0], [6.5, 0.0]])
    coverage = ModeCoverage.of(x, modes)
    assert coverage.nearest_K.tolist() == [2, 2, 1]
    assert coverage.high_quality_K.tolist() == [1, 2, 0]
    assert coverage.modes() == 2
    assert coverage.high_quality() == pytest.approx(0.6)
    expected = 0.8 * math.log(0.4 * 3) + 0.2 * math.log(0.2 * 3)
    assert coverage.reverse_kl(modes) == pytest.approx(expected, abs=1e-6)
    merged = ModeCoverage.of(x[:2], modes) + ModeCoverage.of(x[2:], modes)
    assert torch.equal(merged.nearest_K, coverage.nearest_K)
    assert torch.equal(merged.high_quality_K, coverage.high_quality_K)


def test_a_missing_mode_has_a_finite_reverse_kl() -> None:
    coverage = ModeCoverage.of(torch.zeros(10, 2), ring())
    assert coverage.reverse_kl(ring()) == pytest.approx(math.log(8), abs=1e-6)


def _perfect_run(known: GaussianMixture, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coverage = ModeCoverage.of(
        known.sample(torch.rand(2500, generator=generator), torch.randn(2500, 2, generator=generator)), known
    )
    return torch.tensor([coverage.modes(), coverage.high_quality(), coverage.reverse_kl(known)])


def test_ceilings_are_what_a_perfect_sampler_gets() -> None:
    runs = torch.stack([_perfect_run(grid(), seed) for seed in range(200)])
    ceiling = perfect_sampler(grid(), 2500)
    assert ceiling.high_quality == pytest.approx(1 - math.exp(-4.5))
    for simulated, expected in zip(runs.T, (ceiling.modes, ceiling.high_quality, ceiling.reverse_kl), strict=True):
        assert simulated.mean().item() == pytest.approx(
            expected, rel=0.01, abs=4 * simulated.std().item() / math.sqrt(200) + 1e-6
        )
