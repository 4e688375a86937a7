"""Fixtures of the Kubernetes tests: an API server, its kubeconfig, and the command in this process.

tests/conftest.py imports them.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube_api import KubeApi, User

Run = Callable[..., tuple[int, str, str]]
Status = Callable[[str], tuple[str, str]]
Submit = Callable[..., str]
ROLE = Path(__file__).parents[2] / "k8s" / "base" / "namespace" / "rbac.yaml"


def rules() -> list[dict[str, Any]]:
    """What the Role switchwork-submitter allows."""
    (role,) = [
        each
        for each in yaml.safe_load_all(ROLE.read_text())
        if each["kind"] == "Role" and each["metadata"]["name"] == "switchwork-submitter"
    ]
    return list(role["rules"])


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeApi]:
    """An API server, with a kubeconfig whose context lab has the rights of the submitter's Role."""
    from trainer.world import free_port

    with KubeApi() as server:
        server.users["good-token"] = User("alice", rules())
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "clusters": [
                {"name": "lab", "cluster": {"server": server.url}},
                {"name": "away", "cluster": {"server": f"http://127.0.0.1:{free_port()}"}},
            ],
            "users": [
                {"name": "alice", "user": {"token": "good-token"}},
                {"name": "mallory", "user": {"token": "bad-token"}},
            ],
            "contexts": [
                {"name": "lab", "context": {"cluster": "lab", "user": "alice", "namespace": "team"}},
                {"name": "arn:aws:eks:eu:1:cluster/lab", "context": {"cluster": "lab", "user": "alice"}},
                {"name": "expired", "context": {"cluster": "lab", "user": "mallory"}},
                {"name": "away", "context": {"cluster": "away", "user": "alice"}},
            ],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield server


@pytest.fixture
def switchwork(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, in this process: exit code, what it printed, what it complained of."""

    from launch.cli.__main__ import main

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["switchwork", *arguments])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def submit(switchwork: Run, tmp_path: Path, corpus: Path) -> Callable[..., str]:
    """Submits a job with these fields of cluster.kubernetes, and returns its id."""

    from kube_jobs import TO, job_file

    def run(*overrides: str, **kubernetes: Any) -> str:
        code, printed, complaint = switchwork("submit", job_file(tmp_path, corpus, kubernetes), "--to", TO, *overrides)
        assert (code, complaint) == (0, "")
        return printed.strip()

    return run


@pytest.fixture
def job_status(switchwork: Run) -> Callable[[str], tuple[str, str]]:
    """State and message of a job."""
    from kube_jobs import TO

    def run(job_id: str) -> tuple[str, str]:
        code, printed, complaint = switchwork("status", job_id, "--to", TO, "--json")
        assert code == 0, complaint
        found = json.loads(printed)
        assert found["id"] == job_id
        assert "\n" not in found["message"]
        return found["state"], found["message"]

    return run
