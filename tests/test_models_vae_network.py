"""The VAE against probabilistic PCA, whose likelihood is known in closed form (Tipping & Bishop
1999)."""

import math

import pytest
import torch
from torch import Tensor, distributions, nn

from models.init import initialise
from models.vae.elbo import importance_bound
from models.vae.likelihoods import BernoulliConfig, DiscretisedLogisticConfig, GaussianConfig, LikelihoodConfig
from models.vae.network import VAE, ConvVAEConfig, MLPVAEConfig, VAENetworkConfig

D = 6
L = 2


def data(samples: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    loadings = torch.randn(L, D, generator=generator, dtype=torch.float64)
    latent = torch.randn(samples, L, generator=generator, dtype=torch.float64)
    return 0.5 + latent @ loadings + 0.4 * torch.randn(samples, D, generator=generator, dtype=torch.float64)


class PPCA:
    """The maximum-likelihood solution (Tipping & Bishop 1999, eq. 7 and 8)."""

    def __init__(self, x_MD: Tensor) -> None:
        self.mean = x_MD.mean(0)
        values, vectors = torch.linalg.eigh(x_MD.T.cov(correction=0))
        self.variance = values[:-L].mean()
        self.loadings_DL = vectors[:, -L:] * (values[-L:] - self.variance).sqrt()

    def log_prob(self, x_MD: Tensor) -> Tensor:
        covariance = self.loadings_DL @ self.loadings_DL.T + self.variance * torch.eye(D, dtype=torch.float64)
        return distributions.MultivariateNormal(self.mean, covariance).log_prob(x_MD)


def linear_vae() -> VAE:
    return VAE(MLPVAEConfig(latent=L, hidden=()), GaussianConfig(variance="shared", std=0.5), (D,))


def optimal_vae(ppca: PPCA) -> VAE:
    """A linear VAE with the weights of probabilistic PCA and its exact posterior."""
    vae = linear_vae().double()
    encoder, decoder = (
        next(m for m in network.modules() if isinstance(m, nn.Linear)) for network in (vae.encoder, vae.decoder)
    )
    precision_LL = ppca.loadings_DL.T @ ppca.loadings_DL / ppca.variance + torch.eye(L, dtype=torch.float64)
    projection_LD = torch.linalg.solve(precision_LL, ppca.loadings_DL.T) / ppca.variance
    with torch.no_grad():
        decoder.weight.copy_(ppca.loadings_DL)
        decoder.bias.copy_(ppca.mean)
        encoder.weight.copy_(torch.cat([projection_LD, torch.zeros(L, D)]))
        encoder.bias.copy_(torch.cat([-projection_LD @ ppca.mean, -precision_LL.diag().log()]))
        vae.likelihood.log_std.copy_(0.5 * ppca.variance.log())
    return vae


def exact_elbo(vae: VAE, x: Tensor) -> Tensor:
    """The ELBO without sampling error: for a linear decoder the mean over these 2 L points is the
    mean over N(0, I)."""
    points = math.sqrt(L) * torch.cat([torch.eye(L), -torch.eye(L)]).to(x)
    elbos = []
    for point in points:
        parts = vae(x, point.expand(len(x), L))
        elbos.append(parts.log_likelihood_M - parts.kl_ML.sum(1))
    return torch.stack(elbos).mean(0)


@torch.no_grad()
def test_the_optimal_linear_vae_reaches_the_exact_likelihood() -> None:
    x = data()
    ppca = PPCA(x)
    vae = optimal_vae(ppca)
    torch.testing.assert_close(exact_elbo(vae, x), ppca.log_prob(x))
    # With the exact posterior, p(x, z) / q(z | x) is p(x) at every z.
    log_weights_KM = vae.log_weights(x, torch.randn(3, len(x), L, dtype=torch.float64))
    torch.testing.assert_close(log_weights_KM, ppca.log_prob(x).expand(3, -1))


def test_a_trained_linear_vae_comes_within_half_a_percent() -> None:
    x = data()
    vae = linear_vae()
    initialise(vae, seed=0)
    optimiser = torch.optim.Adam(vae.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 2000)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2000):
        parts = vae(x.float(), torch.randn(len(x), L, generator=generator))
        optimiser.zero_grad()
        (parts.kl_ML.sum(1) - parts.log_likelihood_M).mean().backward()
        optimiser.step()
        schedule.step()
    exact = PPCA(x).log_prob(x).mean().item()
    with torch.no_grad():
        elbo = exact_elbo(vae, x.float()).mean().item()
    assert exact - 0.005 * abs(exact) < elbo < exact + 1e-4


@torch.no_grad()
def test_importance_bound_rises_with_k_and_stays_below_the_likelihood() -> None:
    x = data(100)
    ppca = PPCA(x)
    vae = optimal_vae(ppca)
    encoder = next(m for m in vae.encoder.modules() if isinstance(m, nn.Linear))
    encoder.bias += torch.tensor([0.2, -0.2, 1.0, 0.7])
    torch.manual_seed(0)
    log_weights_KM = vae.log_weights(x.repeat(50, 1), torch.randn(256, 5000, L, dtype=torch.float64))
    bounds = [
        torch.stack([importance_bound(part) for part in log_weights_KM.split(k)]).mean().item()
        for k in (1, 4, 16, 64, 256)
    ]
    exact = ppca.log_prob(x).mean().item()
    assert bounds == sorted(bounds)
    assert bounds[1] - bounds[0] > 0.1
    assert bounds[-1] < exact < bounds[-1] + 0.01


@pytest.mark.parametrize(
    "likelihood", [BernoulliConfig(), GaussianConfig(variance="per_pixel"), DiscretisedLogisticConfig(levels=17)]
)
@pytest.mark.parametrize(
    "network", [MLPVAEConfig(latent=3, hidden=(16,)), ConvVAEConfig(latent=3, channels=(8, 8), hidden=16)]
)
def test_networks_fit_images_and_every_parameter_learns(
    network: VAENetworkConfig, likelihood: LikelihoodConfig
) -> None:
    torch.manual_seed(0)
    vae = VAE(network, likelihood, (2, 8, 12))
    initialise(vae, seed=0)
    x = torch.rand(4, 2, 8, 12)
    parts = vae(x, torch.randn(4, 3))
    assert parts.log_likelihood_M.shape == (4,)
    assert vae.generate(torch.randn(5, 3)).shape == (5, 2, 8, 12)
    assert vae.reconstruct(x).shape == x.shape
    (parts.kl_ML.sum(1) - parts.log_likelihood_M).sum().backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_log_weights_and_elbo_share_their_definition() -> None:
    torch.manual_seed(0)
    vae = VAE(ConvVAEConfig(latent=3, channels=(4,), hidden=8), BernoulliConfig(), (1, 4, 4)).double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    noise_KML = torch.randn(5000, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        sampled = vae.log_weights(x, noise_KML).mean(0)
        parts = vae(x.repeat_interleave(5000, 0), noise_KML.transpose(0, 1).flatten(0, 1))
    analytic = (parts.log_likelihood_M - parts.kl_ML.sum(1)).view(2, -1).mean(1)
    torch.testing.assert_close(sampled, analytic, rtol=0, atol=0.04)


def test_sides_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 6, 6\) cannot be halved 2 times"):
        VAE(ConvVAEConfig(channels=(8, 8)), BernoulliConfig(), (1, 6, 6))
