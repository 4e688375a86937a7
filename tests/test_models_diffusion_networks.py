"""A trained network against the best possible one on data whose optimal denoiser is known."""

import pytest
import torch
from torch import Tensor

from models.diffusion.losses import DiffusionConfig, diffusion_loss
from models.diffusion.networks import MLPDenoiserConfig, build_diffusion_network
from models.diffusion.schedules import LinearScheduleConfig, NoiseSchedule, betas
from models.diffusion.unet import UNetConfig
from models.init import initialise
from models.quality.mixtures import GaussianMixture

MIXTURE = GaussianMixture(
    weights_K=torch.tensor([0.5, 0.3, 0.2]),
    means_KD=torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.5, -1.5]]),
    stds_K=torch.tensor([0.3, 0.2, 0.25]),
)


def test_trained_network_comes_within_five_percent_of_the_optimal_denoiser() -> None:
    config = DiffusionConfig(schedule=LinearScheduleConfig(steps=100, beta_start=1e-3, beta_end=0.2))
    schedule = NoiseSchedule(betas(config.schedule))
    network = build_diffusion_network(MLPDenoiserConfig(hidden=64, blocks=2), (2,))
    initialise(network, seed=0)
    generator = torch.Generator().manual_seed(0)

    def draw(samples: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(2, samples, 2, generator=generator)
        return MIXTURE.sample(torch.rand(samples, generator=generator), noise[0]), noise[1]

    steps = 1500
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x0, noise = draw(512)
        t_M = torch.randint(0, 100, (512,), generator=generator)
        optimiser.zero_grad()
        diffusion_loss(
            config, schedule, network(schedule.diffuse(x0, t_M, noise), t_M), x0, t_M, noise
        ).mean().backward()
        optimiser.step()
        decay.step()

    trained = oracle = 0.0
    for t in range(100):
        x0, noise = draw(1000)
        t_M = torch.full((1000,), t)
        x_t = schedule.diffuse(x0, t_M, noise)
        with torch.no_grad():
            trained += diffusion_loss(config, schedule, network(x_t, t_M), x0, t_M, noise).mean().item()
        oracle += (
            diffusion_loss(config, schedule, MIXTURE.denoiser(schedule, x_t, t_M).noise, x0, t_M, noise).mean().item()
        )
    assert oracle < trained < 1.05 * oracle


@pytest.mark.parametrize("multiple", [1, 2])
def test_mlp_takes_labels_and_learns_a_variance(multiple: int) -> None:
    network = build_diffusion_network(MLPDenoiserConfig(hidden=16), (3,), multiple, num_classes=5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(4, 3)
    t_M = torch.tensor([0, 1, 5, 9])
    assert network(x, t_M, torch.arange(4)).shape == (4, 3 * multiple)
    torch.testing.assert_close(network(x, t_M), network(x, t_M, torch.full((4,), 5)), rtol=0, atol=0)
    assert not torch.allclose(network(x, t_M), network(x, t_M, torch.arange(4)))


def test_a_network_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"network unet accepts images of shape \(C, H, W\), but the samples have shape \(2,\)"
    ):
        build_diffusion_network(UNetConfig(), (2,))
    with pytest.raises(ValueError, match=r"network mlp accepts vectors"):
        build_diffusion_network(MLPDenoiserConfig(), (1, 8, 8))
