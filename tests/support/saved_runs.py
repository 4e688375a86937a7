"""Run folders made without training: a saved checkpoint, its model, and a model started from it."""

from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import tiny_job
from torch import Tensor
from training_state import whole_state

from models.init import initialise
from models.transformer.model import Transformer
from trainer.checkpoint import fragments as shards
from trainer.checkpoint.save import CheckpointConfig, Checkpointer
from trainer.config import RunConfig
from trainer.endings import ALL_STEPS_DONE, Stopped
from trainer.inference.load import ALONE, load_objective
from trainer.objectives import build_objective
from trainer.parsing import parse, plain
from trainer.run_files import run_files
from trainer.run_rows import Job, Summary
from trainer.settle import resolve_run
from trainer.storage import Folder

SWITCH = {"experts": 4, "ffn": 48, "router": {"name": "switch"}}


def job_of(corpus: Path, root: Path, name: str, model: dict[str, Any], **objective: Any) -> dict[str, Any]:
    job = tiny_job(corpus, root=str(root), name=name, tracking={"enabled": False}, engine={"name": "accelerate"})
    job["objective"] |= {
        "model": {"layers": 3, "d_model": 64, "heads": 4, "kv_heads": 2, "ffn": 48, "init_std": 0.1} | model
    } | objective
    return job


def save_run(job: dict[str, Any]) -> Path:
    """Save a run's first weights, norms and router noise included, untrained; return its folder."""
    run = resolve_run(parse(RunConfig, job, "run"), "job", 1, resume=False)
    files = run_files(run.root, run.name)
    files.write_job(Job(run=plain(run)))
    model = build_objective(run.objective, run.seed).networks["model"]
    initialise(model, run.seed)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(1, 0.2, generator=generator)
    saver = Checkpointer(files.checkpoints, ALONE, CheckpointConfig(), attempt=0)
    saver.save(1, [fragment.named("model") for fragment in shards.weights(model)], {"step": 1})
    saver.wait()
    return Path(files.folder.path)


def summary_of(step: int, stopped: Stopped = ALL_STEPS_DONE, name: str = "run") -> Summary:
    """What a run without any figures has come to at `step`."""
    return Summary(
        name=name,
        step=step,
        tokens_seen=0,
        samples_seen=0,
        stopped=str(stopped),
        ending=stopped.ending,
        failed=stopped.ending.is_failure,
        anomalies=[],
        world=1,
        attempt=0,
        train_seconds=1.0,
        steps_this_attempt=step,
        seconds={},
        training={},
        eval={},
        quality={},
        samples={},
    )


def model_of(run: Path) -> Transformer:
    config = parse(RunConfig, yaml.safe_load((run / "resolved.yaml").read_text())["run"], "run")
    model = load_objective(config, Folder(str(run)), print)[0].networks["model"]
    assert isinstance(model, Transformer)
    return model.eval()


def begun(job: dict[str, Any]) -> Transformer:
    """The model of `job` at its step 0, in one process."""
    run = resolve_run(parse(RunConfig, job, "run"), "job", 1, resume=False)
    model = build_objective(run.objective, run.seed).networks["model"]
    assert isinstance(model, Transformer)
    initialise(model, run.seed)
    assert run.objective.start is not None
    run.objective.start.fill([fragment.named("model") for fragment in shards.weights(model)], lambda line: None)
    return model.eval()


def tokens(samples: int = 3) -> Tensor:
    return torch.randint(256, (samples, 24), generator=torch.Generator().manual_seed(1))


def started_state(world: Any, jobs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """The weights at step 0 of each of `jobs`, after the network took them over.

    Where each rank holds whole parameters, they equal the network's own.
    """
    from trainer.core.training import fragments
    from trainer.worker.main import build_training

    states = []
    for job in jobs:
        run = parse(RunConfig, job, "run")
        training = build_training(run, world)
        assert run.objective.start is not None
        run.objective.start.fill(fragments(training), lambda line: None)
        for engine in training.engines.values():
            engine.refresh()
        states.append({key: value for key, value in whole_state(training).items() if key.startswith("weight/")})
        if run.engine.name == "deepspeed" and run.engine.zero < 3:
            for name, parameter in training.objective.networks["model"].named_parameters():
                if not hasattr(parameter, "group_name"):
                    assert torch.equal(parameter.detach().flatten(), states[-1][f"weight/model/{name}"]), name
    return states
