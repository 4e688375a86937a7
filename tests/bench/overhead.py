"""The worker's share of a training step: its loop, engine and hooks next to a bare PyTorch loop.

    python tests/bench/overhead.py [--json FILE] [--rounds 9] [--engine accelerate|deepspeed]
                                   [--steps 6]

One process, one thread, the quickstart's model, the same batches. The bare loop is the one that one
writes by hand: forward, cross-entropy and router loss, backward, clip, AdamW. The worker's side is
`train_step` with the metrics hook, as in a run.
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
from models.init import initialise
from models.moe.layer import router_loss
from models.transformer.model import Transformer
from trainer.config import RunConfig
from trainer.core.loop import train_step
from trainer.hooks.report import Report
from trainer.parsing import parse, read_job
from trainer.tracking.tracker import NullTracker
from trainer.worker.main import build_training
from trainer.world import World, joined

JOB = str(Path(__file__).parents[2] / "launch/configs/switch_lm_quickstart.yaml")


def the_worker(run: RunConfig, world: World, batches: list[list[Batch]]) -> Callable[[], None]:
    training = build_training(run, world)
    report = Report(NullTracker(), peak_flops=1e9)

    def steps() -> None:
        for micro_batches in batches:
            train_step(training, micro_batches)
            training.progress.step += 1
            training.progress.samples += run.batch.global_batch
        report(training)

    return steps


def bare(run: RunConfig, vocab_size: int, batches: list[list[Batch]]) -> Callable[[], None]:
    config = run.objective.model
    assert config.moe is not None
    model = Transformer(config, vocab_size)
    initialise(model, run.seed)
    moe = config.moe
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.optimizer.lr, betas=run.optimizer.betas, fused=True)

    def steps() -> None:
        for micro_batches in batches:
            for batch in micro_batches:
                tokens = batch["tokens"]
                logits, stats = model(tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + router_loss(moe, stats).mean()
                (loss / len(micro_batches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--engine", choices=("accelerate", "deepspeed"), default="deepspeed")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps of a round")
    chosen = parser.parse_args()
    engine = {"name": "accelerate"} if chosen.engine == "accelerate" else {"name": "deepspeed", "zero": 0, "ep": 1}
    job = read_job(JOB)["run"] | {"engine": engine, "precision": "fp32", "device": "cpu"}
    run = parse(RunConfig, job, "run")
    with joined("cpu", threads=1) as world:
        training = build_training(run, world)
        share = Share(rank=0, world=1, global_batch=run.batch.global_batch, micro_batch=run.batch.micro_batch)
        stream = training.objective.stream(share, None)
        batches = [step.micro_batches for step in itertools.islice(iter(stream), chosen.steps)]
        stream.close()
        vocab_size = int(training.objective.networks["model"].vocab_size)
        del training
        samples = in_turn(
            {"worker": the_worker(run, world, batches), "bare loop": bare(run, vocab_size, batches)}, chosen.rounds
        )
    per_step = {name: [value / chosen.steps for value in values] for name, values in samples.items()}
    show(per_step, name="ms a step")
    over = ratio(samples["worker"], samples["bare loop"])
    print(f"worker / bare loop       {over:9.3f}   (engine {chosen.engine}; at most 1.05 is wanted)")
    write(chosen.json, {"ratio": over, "engine": chosen.engine, "seconds_per_step": per_step})


if __name__ == "__main__":
    main()
