"""Small jobs of the image objectives: data, networks, and the rest of a job around them."""

import copy
from pathlib import Path
from typing import Any

DIGITS = {"source": {"name": "sklearn_digits"}, "classes": 10, "lanes": 8, "window": 64, "prefetch": 0}
GRID = {"name": "gaussian_grid", "held_out": 64}
MLP_GAN = {
    "name": "mlp",
    "generator_hidden": [16, 16],
    "discriminator_hidden": [16, 16],
    "batch_norm_group": 4,
    "data_scale": 2.8,
}

TOWERS = {
    "image": {"channels": [8, 16], "norm_groups": 4},
    "text": {"layers": 1, "d_model": 16, "heads": 2, "ffn": 16},
    "width": 8,
    "chunk": 5,
}

# Every kind of network, loss and penalty once.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "vae-mlp": {
        "name": "vae",
        "data": DIGITS,
        "network": {"name": "mlp", "latent": 4, "hidden": [32]},
        "likelihood": {"name": "bernoulli"},
    },
    "vae-convolutional": {
        "name": "vae",
        "data": DIGITS,
        "network": {"latent": 4, "channels": [8, 16], "hidden": 32},
        "likelihood": {"name": "discretised_logistic", "levels": 17},
        "free_bits": 0.1,
        "free_bits_group": 4,
        "kl_warmup_steps": 3,
    },
    "vae-gaussian": {
        "name": "vae",
        "data": DIGITS,
        "network": {"name": "mlp", "latent": 4, "hidden": [16]},
        "likelihood": {"variance": "shared"},
    },
    "ddpm-unet": {
        "name": "ddpm",
        "data": DIGITS,
        "network": {"channels": [8, 16], "layers_per_level": 1, "norm_groups": 4},
        "diffusion": {"loss": {"name": "hybrid"}, "schedule": {"name": "cosine", "steps": 100}},
        "conditional": True,
    },
    "ddpm-points": {
        "name": "ddpm",
        "data": GRID,
        "network": {"name": "mlp", "hidden": 16, "blocks": 2},
        "diffusion": {"prediction": "v"},
    },
    "gan-mlp-packed": {"name": "gan", "data": GRID, "network": MLP_GAN, "pack": 2},
    "gan-wasserstein": {
        "name": "gan",
        "data": GRID,
        "network": MLP_GAN | {"batch_norm": False, "maxout": 0},
        "loss": "wasserstein",
        "penalty": {"gradient_penalty": 10.0},
        "generator_every": 2,
    },
    "gan-dcgan": {
        "name": "gan",
        "data": DIGITS,
        "network": {"latent": 8, "channels": [8, 8], "batch_norm_group": 4},
        "discriminator_rate": 2.0,
    },
    "gan-residual": {
        "name": "gan",
        "data": DIGITS,
        "network": {
            "name": "residual",
            "latent": 8,
            "channels": [8, 8],
            "class_embedding": 8,
            "batch_norm_group": 4,
            "attention_level": 0,
        },
        "loss": "hinge",
        "conditional": True,
    },
    "gan-style": {
        "name": "gan",
        "data": DIGITS,
        "network": {"name": "style", "latent": 8, "channels": [8, 8], "std_group": 4},
        "loss": "relativistic",
        "penalty": {"r1": 1.0, "r2": 1.0, "every": 2},
    },
    "contrastive-simclr": {
        "name": "simclr",
        "data": DIGITS,
        "encoder": {"channels": [8, 16], "norm_groups": 4},
        "projection": [16, 8],
        "augment": {"rotate": 10, "noise": 0.1},
        "chunk": 5,
    },
    "contrastive-clip": {"name": "clip", "data": DIGITS} | TOWERS,
    "contrastive-siglip": {"name": "siglip", "data": DIGITS, "temperature": 0.1, "bias": -3.0} | TOWERS,
}

SMALL_UNET = {"channels": [8, 8], "layers_per_level": 1, "norm_groups": 4}
# One of each family, for whole runs.
SMALL_OBJECTIVES: dict[str, dict[str, Any]] = {
    "vae": {"name": "vae", "network": {"latent": 4, "channels": [8], "hidden": 16}, "importance_samples": 4},
    "ddpm": {
        "name": "ddpm",
        "network": SMALL_UNET,
        "conditional": True,
        "guidance": 2.0,
        "sampler": {"name": "dpm_solver", "steps": 4},
        "bound_timesteps": 4,
    },
    "gan": {"name": "gan", "network": {"latent": 8, "channels": [8], "batch_norm_group": 4}, "conditional": True},
}


def image_job(root: Path, name: str, objective: dict[str, Any], steps: int, **changes: Any) -> dict[str, Any]:
    """A job of an image objective that takes a fraction of a second per step."""
    job = {
        "name": name,
        "root": str(root),
        "objective": objective,
        "batch": {"global_batch": 16, "micro_batch": 8},
        "optimizer": {"lr": 0.003, "weight_decay": 0.0, "schedule": {"name": "constant"}},
        "engine": {"name": "deepspeed", "zero": 2},
        "ema": {"decay": 0.9},
        "stop": {"steps": steps},
        "evaluate": {"samples": 16},
        "checkpoint": {"every": 3},
        "tracking": {"enabled": False},
        "log_every": 1,
        "device": "cpu",
        "threads": 1,
    }
    return copy.deepcopy(job | changes)
