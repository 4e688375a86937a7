"""Jobs as RayJobs: a rendered job passes the CRD's strict validation and the operator's rules.

A job that could not run is refused with the right words.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import kube_schema
import pytest
import yaml
from kube_jobs import CLAIM, STORE, job_file, render
from kube_operator import admission_problem, validation_problem
from kubernetes.utils import parse_quantity

from cluster.config.pods import size_in_bytes
from cluster.on_kubernetes.rayjob import job_name
from trainer.config import RunConfig

GOOD: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "least": ({}, {}, {}),
    "object store": (STORE, {}, {}),
    "claim": (CLAIM, {}, {"root": "/storage/runs", "name": "mine"}),
    "cpu": ({"memory": "4Gi", "shared_memory": "512Mi"}, {"gpus_per_worker": 0}, {"device": "cpu"}),
    "pods of four": (
        {"workers_per_pod": 4, "memory": "1.5Ti", "shared_memory": "256Gi"},
        {"workers": 8, "cpus_per_worker": 12},
        {"batch": {"global_batch": 64, "micro_batch": 4}},
    ),
    "retried": ({"backoff_limit": 3, "deadline_s": 86400, "start_deadline_s": 1800, **STORE}, {}, {}),
    "queued": ({"queue": "team", "priority": "urgent", "delete_after_s": 0}, {}, {}),
    "autoscaled": (
        {"autoscaling": {"min_workers": 0, "max_workers": 4, "idle_timeout_s": 600}, "start_timeout_s": 12},
        {},
        {},
    ),
    "come and go": (
        {"autoscaling": {"min_workers": 1, "max_workers": 2}, "start_timeout_s": 12},
        {"workers": [1, 2]},
        {},
    ),
    "volcano": ({"gang": {"scheduler": "volcano", "queue": "training"}, "priority": "high"}, {}, {}),
    "yunikorn": ({"gang": {"scheduler": "yunikorn", "queue": "root.training"}}, {}, {}),
    "scheduler plugins": ({"gang": {"scheduler": "scheduler-plugins"}}, {}, {}),
    "kai": ({"gang": {"scheduler": "kai-scheduler", "queue": "training"}}, {}, {}),
    "asleep": ({"suspend": True}, {}, {}),
    "kept": ({"delete_after_s": None}, {}, {}),
    "nodes": (
        {
            "node_selector": {"node.kubernetes.io/instance-type": "h100"},
            "tolerations": [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
                {"key": "team", "value": "lab"},
            ],
            "service_account": "switchwork-job",
            "image_pull_secrets": ["registry"],
            "image_pull_policy": "Always",
            "gpu_resource": "amd.com/gpu",
        },
        {},
        {},
    ),
    "secrets": (
        {
            "env": {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN"},
            "secret_env": [{"name": "HF_TOKEN", "secret": "hub", "key": "token"}],
            "secret_volumes": [{"secret": "certificates", "path": "/etc/lab-certificates"}],
            "claims": [{"claim": "books", "path": "/books", "read_only": True}],
        },
        {},
        {},
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_rendered_manifests_pass_strict_validation(case: str, tmp_path: Path, corpus: Path) -> None:
    kubernetes, cluster, run = GOOD[case]
    body = render(job_file(tmp_path, corpus, kubernetes, cluster, **run))
    assert kube_schema.check(body) == []
    assert validation_problem(body) == ""
    assert admission_problem(body) == ""
    body["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resource"] = {}
    assert "unknown field" in kube_schema.check(body)[0], "the check would have found a wrong field"


WRONG: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "no image": ({"image": None}, [], ["cluster.kubernetes.image", "k8s/Dockerfile"]),
    "long name": ({}, ["run.name=a-run-name-of-thirty-two-letters"], ["run.name", "48", "47", "31"]),
    "name of digits": ({}, ["run.name=7b"], ["run.name", "'7b'", "begins with a letter"]),
    "pod's disk": ({}, ["run.root=/data/runs"], ["run.root", "/data/runs", "s3://", "claims"]),
    "retry on a pod's disk": (
        {"backoff_limit": 2, **CLAIM},
        ["run.root=runs"],
        ["run.root", "backoff_limit 2", "/storage"],
    ),
    "read-only claim": (
        {"claims": [{"claim": "c", "path": "/c", "read_only": True}]},
        ["run.root=/c/runs"],
        ["run.root", "/c/runs"],
    ),
    "no GPUs said": ({}, ["cluster.gpus_per_worker=null"], ["cluster.gpus_per_worker", "set 1, or 0"]),
    "half a GPU": ({}, ["cluster.gpus_per_worker=0.5"], ["cluster.gpus_per_worker", "0.5", "whole"]),
    "half a pod": ({"workers_per_pod": 4}, [], ["workers_per_pod", "2 workers", "4"]),
    "more shared memory than memory": ({"memory": "4Gi", "shared_memory": "8Gi"}, [], ["shared_memory", "8Gi", "4Gi"]),
    "no size": ({"memory": "64 GB"}, [], ["memory", "'64 GB'", "64Gi"]),
    "tiny head": ({"head_memory": "100Mi"}, [], ["head_memory", "100Mi", "1Gi"]),
    "queue without removal": ({"queue": "team", "delete_after_s": None}, [], ["delete_after_s", "Kueue"]),
    "asleep without removal": ({"suspend": True, "delete_after_s": None}, [], ["delete_after_s", "suspend"]),
    "queue and autoscaling": (
        {"queue": "team", "autoscaling": {"max_workers": 4}},
        [],
        ["autoscaling", "queue 'team'"],
    ),
    "queue and gang": ({"queue": "team", "gang": {"scheduler": "volcano"}}, [], ["gang", "Kueue"]),
    "queue and asleep": ({"queue": "team", "suspend": True}, [], ["suspend", "Kueue"]),
    "more than the most": ({"autoscaling": {"max_workers": 1}}, [], ["autoscaling", "2", "0 to 1"]),
    "least above most": (
        {"autoscaling": {"min_workers": 3, "max_workers": 1}},
        [],
        ["min_workers is 3", "max_workers 1"],
    ),
    "deadlines": ({"deadline_s": 60, "start_deadline_s": 60}, [], ["start_deadline_s is 60", "deadline_s 60"]),
    "no deadline": ({"deadline_s": 0}, [], ["deadline_s is 0", "at least 1"]),
    "tries": ({"backoff_limit": -1}, [], ["backoff_limit is -1", "at least 0"]),
    "secret's name": (
        {"secret_env": [{"name": "A", "secret": "My Secret", "key": "k"}]},
        [],
        ["secret", "'My Secret'"],
    ),
    "variable twice": (
        {"env": {"A": "1"}, "secret_env": [{"name": "A", "secret": "s", "key": "k"}]},
        [],
        ["A is set twice"],
    ),
    "KubeRay's variable": ({"env": {"RAY_AUTH_TOKEN": "1"}}, [], ["RAY_AUTH_TOKEN", "KubeRay"]),
    "two volumes in one place": (
        {"claims": [{"claim": "a", "path": "/x"}, {"claim": "b", "path": "/x"}]},
        [],
        ["/x", "path of its own"],
    ),
    "a claim over shared memory": ({"claims": [{"claim": "a", "path": "/dev/shm"}]}, [], ["'/dev/shm'"]),
    "toleration": ({"tolerations": [{"operator": "Exists", "value": "x"}]}, [], ["value is 'x'", "Exists"]),
    "no MLflow": ({}, ["run.tracking.uri=null"], ["run.tracking.uri", "http://mlflow:5000"]),
    "MLflow on a pod's disk": (
        {},
        ["run.tracking.uri=sqlite:////data/mlflow.db"],
        ["run.tracking.uri", "http://mlflow:5000"],
    ),
    "unknown field": ({"tolerance": []}, [], ["cluster.kubernetes.tolerance", "did you mean tolerations"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_jobs_are_refused_in_one_line(
    case: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    kubernetes, overrides, words = WRONG[case]
    with pytest.raises(ValueError) as refused:
        render(job_file(tmp_path, corpus, kubernetes), *overrides)
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_pods_get_what_the_job_asks_for(tmp_path: Path, corpus: Path) -> None:
    asked = {"workers_per_pod": 2, "memory": "64Gi", "shared_memory": "16Gi", "env": {"NCCL_DEBUG": "INFO"}, **STORE}
    spec = render(job_file(tmp_path, corpus, asked, {"workers": 4, "cpus_per_worker": 2.5}))["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    worker = group["template"]["spec"]["containers"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    assert (
        worker["resources"]["limits"]
        == worker["resources"]["requests"]
        == {"cpu": "5", "memory": "64Gi", "nvidia.com/gpu": "2"}
    )
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in group["template"][
        "spec"
    ]["volumes"]
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in worker["volumeMounts"]
    assert int(group["rayStartParams"]["object-store-memory"]) == 8 * 2**30
    by_name = {each["name"]: each for each in worker["env"]}
    assert by_name["AWS_SECRET_ACCESS_KEY"]["valueFrom"] == {
        "secretKeyRef": {"name": "object-store", "key": "AWS_SECRET_ACCESS_KEY"}
    }
    assert by_name["AWS_ENDPOINT_URL"]["value"] == "http://object-store:8333"
    assert by_name["NCCL_DEBUG"]["value"] == "INFO"
    head = spec["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    for pod in (head["template"]["spec"], group["template"]["spec"]):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False


def test_pods_come_and_go_between_the_bounds(tmp_path: Path, corpus: Path) -> None:
    fixed = render(job_file(tmp_path, corpus, {}, {"workers": [1, 2]}))["spec"]["rayClusterSpec"]
    assert [fixed["workerGroupSpecs"][0][name] for name in ("minReplicas", "replicas", "maxReplicas")] == [2, 2, 2]
    assert "enableInTreeAutoscaling" not in fixed
    scaled = render(
        job_file(
            tmp_path,
            corpus,
            {"autoscaling": {"min_workers": 1, "max_workers": 8, "idle_timeout_s": 77}},
            {"workers": [1, 2]},
        )
    )
    spec = scaled["spec"]["rayClusterSpec"]
    assert [spec["workerGroupSpecs"][0][name] for name in ("minReplicas", "replicas", "maxReplicas")] == [1, 1, 8]
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 77
    with pytest.raises(ValueError, match=r"cluster\.workers is \[1, 2\], outside 0 to 1"):
        render(job_file(tmp_path, corpus, {"autoscaling": {"max_workers": 1}}, {"workers": [1, 2]}))


def test_the_job_travels_whole_and_names_its_run_once(tmp_path: Path, corpus: Path) -> None:
    path = job_file(tmp_path, corpus, {})
    body = render(path, "run.objective.prompt=costs $(HOME) and $5")
    env = {
        each["name"]: each.get("value", "")
        for each in body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    }
    given = json.loads(env["SWITCHWORK_JOB"])
    assert "$" not in env["SWITCHWORK_JOB"], "Kubernetes would put $(HOME)'s value there"
    assert given["job"]["run"]["objective"]["prompt"] == "costs $(HOME) and $5"
    assert given["id"] == body["metadata"]["name"] == given["job"]["run"]["name"], (
        "an unnamed run is called after its job, over all tries"
    )
    assert body["metadata"]["annotations"]["switchwork/run"] == f"s3://runs/{given['id']}"
    named = render(path, "run.name=mine")
    assert named["metadata"]["annotations"]["switchwork/run"] == "s3://runs/mine"
    with pytest.raises(ValueError, match="do not fit into a pod's environment"):
        render(path, f"run.objective.prompt={'x' * 100_000}")


def test_what_a_job_leaves_out_has_the_defaults_of_the_run(tmp_path: Path, corpus: Path) -> None:
    path = Path(job_file(tmp_path, corpus, {}))
    job = yaml.safe_load(path.read_text())
    del job["run"]["root"]
    path.write_text(yaml.safe_dump(job))
    (default,) = (field.default for field in fields(RunConfig) if field.name == "root")
    with pytest.raises(ValueError, match=f"run.root: {default} is on the pod's own disk"):
        render(str(path))


def test_names_are_dns_labels_of_at_most_47_characters() -> None:
    stamp = "20260101-000000"
    assert job_name("Switch_LM.quickstart", stamp) == "switch-lm-quickstart-20260101-000000"
    longest = job_name("a" * 31, stamp)
    assert len(longest) == 47
    for name in ("a" * 32, "---", "1a"):
        with pytest.raises(ValueError, match=r"run\.name"):
            job_name(name, stamp)


@pytest.mark.parametrize("size", ["512Mi", "64Gi", "1.5Ti", "3G", "1000k", "17"])
def test_sizes_are_read_as_kubernetes_reads_them(size: str) -> None:
    assert size_in_bytes(size, "memory") == parse_quantity(size)
