"""An exported diffusion gives the same images as ours, from the same noise, in diffusers' own
pipeline."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from models.diffusion.diffusers_format import scheduler_arguments, unet_arguments
from models.diffusion.losses import DiffusionConfig, HybridLossConfig, SimpleLossConfig
from models.diffusion.parameterisation import clipped, denoiser
from models.diffusion.samplers import ddpm, timesteps
from models.diffusion.schedules import (
    CosineScheduleConfig,
    LinearScheduleConfig,
    NoiseSchedule,
    SigmoidScheduleConfig,
    betas,
)
from models.diffusion.unet import UNet, UNetConfig

CONFIGS = [
    DiffusionConfig(schedule=LinearScheduleConfig(steps=20, beta_start=1e-3, beta_end=0.3)),
    DiffusionConfig(schedule=CosineScheduleConfig(steps=20), prediction="v", loss=HybridLossConfig()),
    DiffusionConfig(
        schedule=SigmoidScheduleConfig(steps=20, beta_end=0.3), prediction="x0", loss=SimpleLossConfig(variance="large")
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_diffusers_pipeline_gives_the_same_images(config: DiffusionConfig) -> None:
    torch.manual_seed(0)
    network = UNet(UNetConfig(channels=(8, 16), layers_per_level=1, norm_groups=4), 1, config.output_multiple)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    theirs = UNet2DModel(**unet_arguments(network, 8))
    theirs.load_state_dict(network.state_dict())
    pipeline = DDPMPipeline(theirs, DDPMScheduler(**scheduler_arguments(config)))
    pipeline.set_progress_bar_config(disable=True)
    expected = torch.from_numpy(
        pipeline(batch_size=2, generator=torch.manual_seed(1), num_inference_steps=20, output_type="np").images
    )

    generator = torch.manual_seed(1)
    start = torch.randn(2, 1, 8, 8, generator=generator)
    schedule = NoiseSchedule(betas(config.schedule))
    denoise = clipped(denoiser(network, config.prediction, schedule), schedule)
    actual = ddpm(
        denoise,
        schedule,
        start,
        timesteps(20, 20),
        lambda t: torch.randn(start.shape, generator=generator),
        config.fixed_variance,
    )
    torch.testing.assert_close(((actual + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.02


def test_a_cosine_schedule_that_diffusers_lacks_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"offset 0\.008 and largest_beta 0\.999 only, but the run has 0\.01 and 0\.999"
    ):
        scheduler_arguments(DiffusionConfig(schedule=CosineScheduleConfig(offset=0.01)))
