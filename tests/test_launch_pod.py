"""A Kubernetes job that is retried on a new RayCluster continues from its storage.

It stays in the same MLflow run. The heads are real, and the manifest is the rendered one.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import BIN
from kube_jobs import job_file, render
from mlflow import MlflowClient
from ray_head import Head, environment, ray_head

ROOT = Path(__file__).parents[1]


def rendered(folder: Path, corpus: Path, steps: int, *overrides: str) -> dict[str, Any]:
    """A RayJob whose storage claim is the folder `folder`, tried twice."""
    asked = {"backoff_limit": 1, "claims": [{"claim": "storage", "path": str(folder)}]}
    run = {
        "root": f"{folder}/runs",
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "engine": {"name": "accelerate"},
        "device": "cpu",
        "stop": {"steps": steps},
        "checkpoint": {"every": 20},
    }
    return render(job_file(folder, corpus, asked, {"workers": 1, "gpus_per_worker": 0}, **run), *overrides)


def head_environment(body: dict[str, Any]) -> dict[str, str]:
    """What Kubernetes would set in the head's container."""
    (container,) = body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"]} | {"PYTHONPATH": str(ROOT)}


def start(head: Head, body: dict[str, Any]) -> None:
    """Submit as KubeRay's submitter does: the entrypoint goes through a shell, as one line."""
    options = f"--address {head.address} --submission-id {body['metadata']['name']} --no-wait"
    command = f"{BIN}/ray job submit {options} -- {body['spec']['entrypoint']}"
    subprocess.run(["bash", "-c", command], env=environment(), check=True, capture_output=True, timeout=60)


def wait_for(done: Any, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_tried_again_on_a_new_cluster_resumes_in_the_same_run(tmp_path: Path, corpus: Path) -> None:
    body = rendered(tmp_path, corpus, 120)
    folder = tmp_path / "runs" / body["metadata"]["name"]
    with ray_head(tmp_path / "log-1", **head_environment(body)) as first:
        start(first, body)
        wait_for(lambda: (folder / "checkpoints" / "step-00000020" / "manifest.json").exists(), "no checkpoint", 120)
        first.kill()
    assert not (folder / "summary.json").exists(), "the first try was over too soon to be cut off"
    with ray_head(tmp_path / "log-2", **head_environment(body)) as second:
        start(second, body)
        wait_for((folder / "summary.json").exists, "the second try did not end", 120)
        wait_for(lambda: b"SUCCEEDED" in status(second, body), "the job did not succeed", 60)
    events = (folder / "events.jsonl").read_text()
    assert "resumed from" in events
    assert json.loads((folder / "summary.json").read_text())["attempt"] == 1
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.run_id == (folder / "mlflow_run_id").read_text()
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, 121))


def status(head: Head, body: dict[str, Any]) -> bytes:
    command = [str(BIN / "switchwork"), "status", body["metadata"]["name"], "--to", head.address]
    return subprocess.run(command, env=environment(), capture_output=True, check=True, timeout=60).stdout


def test_another_job_of_the_same_name_is_refused(tmp_path: Path, corpus: Path) -> None:
    body = rendered(tmp_path, corpus, 2, "run.name=mine")
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "attempts.jsonl").write_text("{}\n")
    (folder / "job_id").write_text("somebody-elses-job")
    env = os.environ | head_environment(body) | {"RAY_ADDRESS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "launch.pod"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "run.name" in done.stderr
    assert "--resume" in done.stderr
    assert (folder / "job_id").read_text() == "somebody-elses-job"
