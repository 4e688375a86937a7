"""A run's networks in one process, without an engine: for samples, measures and export."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from data.share import Batch
from models.init import initialise
from trainer.checkpoint.format import Manifest
from trainer.checkpoint.fragments import Fragment, weights
from trainer.checkpoint.load import load, newest
from trainer.config import RunConfig
from trainer.core.protocols import Objective, Sums
from trainer.core.training import add
from trainer.hooks.evaluate import evaluating
from trainer.objectives import build_objective
from trainer.run_files import RunFiles
from trainer.storage import Folder
from trainer.world import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def load_objective(run: RunConfig, folder: Folder, say: Callable[[str], None]) -> tuple[Objective, int]:
    """The objective of a run with the weights of its newest intact checkpoint, and its step.

    It takes the moving average of the weights if the checkpoint has one. The run may have had any
    layout, and DeepSpeed is not needed.
    """
    checkpoint = newest(RunFiles(folder).checkpoints, say)
    if checkpoint is None:
        raise ValueError(f"run {folder}: it has no checkpoint yet; set run.checkpoint.every, or let it end")
    checkpoint_folder, manifest = checkpoint
    objective = build_objective(run.objective, run.seed)
    for name, network in objective.networks.items():
        initialise(network, run.seed)
        fragments = [_averaged(fragment.named(name), manifest) for fragment in weights(network)]
        load(checkpoint_folder, manifest, fragments, ALONE)
    return objective, manifest["step"]


def _averaged(fragment: Fragment, manifest: Manifest) -> Fragment:
    """The moving average of a weight if the checkpoint has one, otherwise `fragment` itself."""
    average = replace(fragment, kind="ema")
    return average if fragment.kind == "weight" and average.key in manifest["tensors"] else fragment


def measure(objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
    """The objective's measures over `batches`."""
    sums: Sums = {}
    with evaluating(objective.networks):
        for batch in batches:
            add(sums, objective.evaluate(objective.networks, batch))
    return objective.report(sums)
