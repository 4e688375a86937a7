"""Images per second of the DDPM training step, next to diffusers' UNet2DModel in a plain loop.

    python tests/bench/generative.py [--json FILE] [--rounds 9] [--steps 4] [--threads 1]

Both sides have the same configuration, weights, batches, timesteps and noise, AdamW and clipping.
Ours is the loop's `train_step` with the engine of the quickstart; theirs is the step that
diffusers' own example writes by hand. Before timing, both losses are compared.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from paired import arguments, in_turn, ratio, show, write

from data.share import Batch, Share
from models.diffusion.diffusers_format import scheduler_arguments, unet_arguments
from models.random import derive, integers, normal, sample_keys
from trainer.config import RunConfig
from trainer.core.loop import train_step
from trainer.core.training import Training
from trainer.objectives.diffusion import DDPMObjective
from trainer.parsing import parse, read_job
from trainer.worker.main import build_training
from trainer.world import joined

JOB = str(Path(__file__).parents[2] / "launch/configs/ddpm_digits_quickstart.yaml")
PLAIN = [
    "run.objective.conditional=false",
    "run.objective.guidance=1.0",
    "run.objective.diffusion.loss={name: simple}",
    "run.ema=null",
    "run.optimizer.schedule={name: constant}",
]


def diffusers_loop(training: Training, run: RunConfig, batches: list[Batch]) -> tuple[Callable[[], float], int]:
    """One optimiser step of the plain loop, a batch at a time; returns the loss."""
    from diffusers import DDPMScheduler, UNet2DModel

    objective = training.objective
    assert isinstance(objective, DDPMObjective)
    network = UNet2DModel(**unet_arguments(objective.model, objective.data.shape[1]))
    network.load_state_dict(objective.model.state_dict())
    scheduler = DDPMScheduler(**scheduler_arguments(objective.config.diffusion))
    adam = torch.optim.AdamW(
        network.parameters(), lr=run.optimizer.lr, betas=run.optimizer.betas, weight_decay=0.0, fused=True
    )
    ahead = itertools.cycle(batches)

    def step() -> float:
        batch = next(ahead)
        keys_M = sample_keys(run.seed, batch["sample"], "diffusion")
        t_M = integers(derive(keys_M, "timestep"), objective.schedule.steps)
        noise = normal(derive(keys_M, "noise"), objective.data.shape)
        x0 = batch["image"].float() / 127.5 - 1
        output = network(scheduler.add_noise(x0, noise, t_M), t_M).sample
        loss = F.mse_loss(output, scheduler.get_velocity(x0, noise, t_M))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), run.optimizer.clip or float("inf"))
        adam.step()
        adam.zero_grad()
        return loss.item()

    return step, sum(parameter.numel() for parameter in network.parameters())


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a round; default: 4")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    given = parser.parse_args()
    job = read_job(JOB, [*PLAIN, "run.batch={global_batch: 128, micro_batch: 128}", "run.device=cpu"])
    run = parse(RunConfig, job["run"], "run")
    with joined("cpu", given.threads) as world:
        training = build_training(run, world)
        share = Share(rank=0, world=1, global_batch=128, micro_batch=128)
        stream = training.objective.stream(share, None)
        batches = [data.micro_batches for data in itertools.islice(iter(stream), 8)]
        stream.close()
        theirs, size = diffusers_loop(training, run, [batch for (batch,) in batches])
        ahead = itertools.cycle(batches)

        def ours() -> float:
            train_step(training, next(ahead))
            training.progress.step += 1
            sums = training.sums
            training.sums = {}
            return training.objective.report(sums)["loss"]

        pairs = [(ours(), theirs()) for _ in range(3)]
        for mine, other in pairs:
            assert abs(mine - other) < 1e-3 * other, f"the two sides do not train alike: {pairs}"
        samples = in_turn(
            {
                "switchwork": lambda: [ours() for _ in range(given.steps)],
                "diffusers": lambda: [theirs() for _ in range(given.steps)],
            },
            given.rounds,
        )
    print(
        f"U-Net of {size / 1e6:.2f} M parameters, 8 x 8 images, batch 128, "
        f"{given.threads} thread(s), {given.steps} steps per round"
    )
    show(samples)
    rates = {name: [128 * given.steps / seconds for seconds in each] for name, each in samples.items()}
    show(rates, unit=1, name="images/s")
    result = ratio(samples["switchwork"], samples["diffusers"])
    print(f"time of ours over theirs: {result:.3f}")
    write(given.json, {"ratio": result, "seconds": samples, "images_per_s": rates})


if __name__ == "__main__":
    main()
