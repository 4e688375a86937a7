"""Job files for Kubernetes, and the RayJobs that they become."""

from pathlib import Path
from typing import Any

import yaml
from conftest import tiny_job

from cluster.on_kubernetes.jobs import manifest
from launch.config import for_cluster

TO = "k8s://lab/team"
STORE: dict[str, Any] = {"object_store": {"secret": "object-store", "endpoint": "http://object-store:8333"}}
CLAIM: dict[str, Any] = {"claims": [{"claim": "storage", "path": "/storage"}]}


def job_file(
    folder: Path, corpus: Path, kubernetes: dict[str, Any], cluster: dict[str, Any] | None = None, **run: Any
) -> str:
    """Write a job file for Kubernetes and return its path.

    The job has two workers with one GPU each, an image, a bucket and an MLflow server.
    """
    base = tiny_job(corpus, root="s3://runs", tracking={"uri": "http://mlflow:5000"}, device="auto") | run
    whole = {
        "run": base,
        "cluster": {
            "workers": 2,
            "gpus_per_worker": 1,
            "kubernetes": {"image": "registry.lab/switchwork:1", **kubernetes},
        }
        | (cluster or {}),
    }
    path = folder / "moe.yaml"
    path.write_text(yaml.safe_dump(whole))
    return str(path)


def render(path: str, *overrides: str) -> dict[str, Any]:
    """Return the RayJob that `switchwork submit` would send."""
    return manifest(TO, for_cluster(path, overrides))
