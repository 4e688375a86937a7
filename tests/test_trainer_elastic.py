"""The number of workers may change: same samples, same losses, experts dealt out anew."""

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_job
from distributed import run_distributed
from whole_runs import losses, train_or_resume

from cluster.config.cluster import ClusterConfig
from data.ledger import verify
from launch.config import load
from trainer.config import RunConfig
from trainer.parsing import parse
from trainer.run_files import RunFiles
from trainer.storage import Folder


def job_of(corpus: Path, root: Path, name: str, steps: int) -> dict[str, Any]:
    every = {
        "root": str(root),
        "name": name,
        "tracking": {"enabled": False},
        "checkpoint": {"every": 2},
        "evaluate": {"samples": 0},
    }
    job = tiny_job(corpus, **every, engine={"name": "deepspeed", "zero": 1, "ep": "auto"}, stop={"steps": steps})
    return job | {"optimizer": {"lr": 0.01, "schedule": {"name": "constant"}}}


def test_workers_come_and_go_over_the_run(corpus: Path, tmp_path: Path) -> None:
    run_distributed(train_or_resume, 1, job_of(corpus, tmp_path, "still", 8))
    for world, steps in ((4, 2), (2, 4), (1, 6), (4, 8)):
        run_distributed(train_or_resume, world, job_of(corpus, tmp_path, "elastic", steps))
    still = losses(tmp_path / "still")
    elastic = losses(tmp_path / "elastic")
    assert sorted(elastic) == list(range(1, 9))
    assert elastic == pytest.approx(still, abs=1e-5)
    run = parse(RunConfig, job_of(corpus, tmp_path, "elastic", 8), "run")
    verdict = verify(
        run.objective.data, RunFiles(Folder(str(tmp_path / "elastic"))).ledger(), seed=run.seed, last_step=8
    )
    assert (verdict.lost, verdict.repeated, verdict.problems, verdict.attempts) == (0, 0, [], 4)


def test_automatic_expert_parallelism_is_the_most_that_divides(corpus: Path) -> None:
    run = parse(RunConfig, tiny_job(corpus, engine={"name": "deepspeed", "ep": "auto"}), "run")
    assert [run.ep(workers) for workers in (1, 2, 3, 4, 6, 8)] == [1, 2, 1, 4, 2, 4]
    dense = parse(RunConfig, tiny_job(corpus, engine={"name": "deepspeed", "zero": 3, "ep": "auto"}), "run")
    assert dense.ep(4) == 1


def test_every_number_of_workers_is_checked_before_anything_starts(corpus: Path, tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"run": tiny_job(corpus), "cluster": {"workers": [1, 2]}}))
    assert load(str(file)).cluster == ClusterConfig(workers=(1, 2))
    with pytest.raises(ValueError, match="16 is no multiple of 3 workers"):
        load(str(file), ["cluster.workers=[2, 4]"])
    with pytest.raises(ValueError, match=r"workers is \[3, 2\]"):
        load(str(file), ["cluster.workers=[3, 2]"])
