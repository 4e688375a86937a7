"""Arguments from which diffusers builds the same network and the same reverse process; an export
writes them."""

from models.diffusion.losses import DiffusionConfig, HybridLossConfig
from models.diffusion.parameterisation import Target
from models.diffusion.schedules import CosineScheduleConfig, LinearScheduleConfig, SigmoidScheduleConfig
from models.diffusion.unet import UNet


def unet_arguments(network: UNet, sample_size: int) -> dict[str, object]:
    """Return arguments of a `diffusers.UNet2DModel` that loads `network.state_dict()` unchanged and
    gives the same output."""
    config = network.config
    attention = [level in config.attention_levels for level in range(len(config.channels))]
    return {
        "sample_size": sample_size,
        "in_channels": network.conv_in.in_channels,
        "out_channels": network.conv_out.out_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_level,
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
        "attention_head_dim": config.head_channels,
        "norm_num_groups": config.norm_groups,
        "num_class_embeds": None if network.null_label is None else network.null_label + 1,
    }


def scheduler_arguments(config: DiffusionConfig) -> dict[str, object]:
    """Return arguments of a `diffusers.DDPMScheduler` that takes the same steps as `samplers.ddpm`
    over all timesteps with `parameterisation.clipped`.

    Raises ValueError for a cosine schedule that diffusers cannot express.
    """
    predictions: dict[Target, str] = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}
    match config.schedule:
        case LinearScheduleConfig(beta_start=start, beta_end=end):
            schedule: dict[str, object] = {"beta_schedule": "linear", "beta_start": start, "beta_end": end}
        case SigmoidScheduleConfig(beta_start=start, beta_end=end):
            schedule = {"beta_schedule": "sigmoid", "beta_start": start, "beta_end": end}
        case CosineScheduleConfig(offset=offset, largest_beta=largest):
            if (offset, largest) != (0.008, 0.999):
                raise ValueError(
                    "diffusers has the cosine schedule with offset 0.008 and largest_beta 0.999 only, "
                    f"but the run has {offset} and {largest}"
                )
            schedule = {"beta_schedule": "squaredcos_cap_v2"}
    variance = "learned_range" if isinstance(config.loss, HybridLossConfig) else f"fixed_{config.fixed_variance}"
    return {
        **schedule,
        "num_train_timesteps": config.schedule.steps,
        "prediction_type": predictions[config.prediction],
        "variance_type": variance,
        "clip_sample": True,
        "clip_sample_range": 1.0,
    }
