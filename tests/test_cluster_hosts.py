"""Three hosts (network namespaces) with Ray, and a job submitted from outside.

One host is lost, or its link cut, and the others finish.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_job
from distributed import run_distributed
from hosts import Cluster, ray_hosts, why_not
from ray_head import switchwork
from whole_runs import losses, train_or_resume

from data.ledger import verify
from trainer.config import RunConfig
from trainer.parsing import parse
from trainer.run_files import RunFiles
from trainer.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(540), pytest.mark.skipif(bool(reason := why_not()), reason=reason)]
STEPS = 80
BACK_S = 60


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Room for two workers on each host."""
    with ray_hosts(tmp_path, cpus=2) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the same job in one process, to its end."""
    root = tmp_path_factory.mktemp("still")
    run_distributed(
        train_or_resume, 1, job_of(corpus, ep=1) | {"root": str(root), "name": "still", "tracking": {"enabled": False}}
    )
    return root / "still"


def job_of(corpus: Path, ep: int = 2) -> dict[str, Any]:
    """A mixture of experts that six and four workers can train, two of them per set of experts."""
    job = tiny_job(
        corpus,
        engine={"name": "deepspeed", "zero": 1, "ep": ep},
        stop={"steps": STEPS},
        checkpoint={"every": 5},
        evaluate={"samples": 0},
    )
    job["objective"]["data"]["lanes"] = 12
    return job | {"batch": {"global_batch": 24, "micro_batch": 2}, "hang_timeout_s": 100}


@pytest.mark.parametrize("loss", ["killed", "cut"])
def test_a_lost_host_leaves_two_that_finish(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: Path, loss: str
) -> None:
    folder = tmp_path / "runs" / loss
    where = {"workers": [4, 6], "workers_multiple": 2, "placement": "SPREAD", "ranks": "round_robin", "max_failures": 3}
    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump({"run": job_of(corpus) | {"root": str(tmp_path / "runs"), "name": loss}, "cluster": where})
    )
    submitted = switchwork("submit", str(tmp_path / "job.yaml"), "--to", cluster.address)
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.strip()
    wait_for_step(folder, 12, cluster, job_id)
    lost = cluster.hosts[2]
    assert workers_on(lost) == 2
    lost.kill() if loss == "killed" else lost.cut()
    at = time.time()
    while (state := json.loads(switchwork("status", job_id, "--to", cluster.address, "--json").stdout)["state"]) in (
        "PENDING",
        "RUNNING",
    ):
        assert time.time() < at + 300, said(cluster, job_id)
        time.sleep(2)
    assert state == "SUCCEEDED", said(cluster, job_id)
    check_run(folder, at, undisturbed)


def check_run(folder: Path, at: float, undisturbed: Path) -> None:
    """Six workers, then four, soon after; samples and losses are those of an unbroken run."""
    attempts = RunFiles(Folder(str(folder))).attempts_begun()
    assert [attempt.world for attempt in attempts] == [6, 4], attempts
    said = str(RunFiles(Folder(str(folder))).attempts_ended()[0].stopped)
    assert said.startswith("rank "), said
    first = next(
        row.time
        for row in RunFiles(Folder(str(folder))).metrics()
        if "loss" in row.metrics and row.time > attempts[1].time
    )
    print(f"the first step after the loss: {first - at:.1f} s")
    assert first - at < BACK_S
    run = parse(RunConfig, yaml.safe_load((folder / "resolved.yaml").read_text())["run"], "run")
    verdict = verify(run.objective.data, RunFiles(Folder(str(folder))).ledger(), seed=run.seed, last_step=STEPS)
    assert (verdict.lost, verdict.repeated, verdict.problems, verdict.attempts) == (0, 0, [], 2)
    assert losses(folder) == pytest.approx(losses(undisturbed), abs=1e-4)
    mine, theirs = (json.loads((each / "summary.json").read_text()) for each in (folder, undisturbed))
    assert (mine["samples_seen"], mine["tokens_seen"]) == (theirs["samples_seen"], theirs["tokens_seen"])


def wait_for_step(folder: Path, step: int, cluster: Cluster, job_id: str) -> None:
    deadline = time.monotonic() + 200
    while not ((folder / "metrics.jsonl").exists() and max(losses(folder), default=0) >= step):
        assert time.monotonic() < deadline, said(cluster, job_id)
        time.sleep(0.2)


def workers_on(host: Any) -> int:
    """Training processes on a host, by the name that Ray gives them."""
    return sum(b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in host.pids())


def said(cluster: Cluster, job_id: str) -> str:
    return switchwork("logs", job_id, "--to", cluster.address).stdout
