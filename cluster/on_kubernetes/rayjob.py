"""Turns a job into a RayJob manifest for KubeRay 1.7.

`rayjob` is a pure function from the job to the manifest, which `switchwork submit --render` prints.
The code is in the image. The job's values travel in the head's environment (SWITCHWORK_JOB) instead
of in a ConfigMap: one object is accepted or refused as a whole, nothing is left behind when it is
removed, and a rendered manifest needs no second object, which would need its uid as an owner.
"""

import json
import math
import re
from typing import TYPE_CHECKING

from cluster.config.cluster import ClusterConfig
from cluster.config.kubernetes import KubernetesConfig
from cluster.on_kubernetes.pods import container_security, head_pod, submitter_pod, worker_pod
from trainer.parsing import Json
from trainer.run_files import run_url

if TYPE_CHECKING:  # a job's config imports torch, and only `submit` has one
    from cluster.submission import PodJob, Submission
    from trainer.config import RunConfig
    from trainer.world import Device

MANAGER = {"app.kubernetes.io/managed-by": "switchwork"}
_LONGEST_NAME = 47  # KubeRay derives the names of the RayCluster, its service and its pods from it
_LARGEST_JOB = 100_000  # Linux allows 131,072 bytes per environment variable
_STAMP = len("-20260101-000000")
_QUEUE_LABELS = {
    "volcano": "volcano.sh/queue-name",
    "yunikorn": "yunikorn.apache.org/queue",
    "kai-scheduler": "kai.scheduler/queue",
}
"""The label of a batch scheduler's queue; scheduler-plugins has no queues."""


def job_name(name: str, stamp: str) -> str:
    """The name of a RayJob, made from the run's name and the time.

    It is a DNS-1035 label of at most 47 characters. Raises ValueError if no such label can be made.
    """
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label or not label[0].isalpha():
        raise ValueError(
            f"run.name: {name!r} cannot name a job on Kubernetes, whose name begins with a letter; use another run.name"
        )
    length = len(label) + _STAMP
    if length > _LONGEST_NAME:
        raise ValueError(
            f"run.name: {name!r} and the time make a job name of {length} characters, and KubeRay accepts "
            f"{_LONGEST_NAME}; use a run.name of at most {_LONGEST_NAME - _STAMP}"
        )
    return f"{label}-{stamp}"


def rayjob(job_id: str, namespace: str, job: "Submission", ray_version: str) -> Json:
    """The manifest of `job`; its run must already have a name.

    Raises ValueError if the job cannot run on Kubernetes.
    """
    config = job.cluster.kubernetes
    _check_job(job.run, job.cluster)
    own_env = {"SWITCHWORK_JOB": _encoded(job_id, job)}
    if config.autoscaling:
        own_env["SWITCHWORK_AUTOSCALING"] = "1"
    spec: Json = {
        "entrypoint": "python -m launch.pod",
        "submissionMode": "K8sJobMode",  # the submitter's log is the driver's, and outlives the head
        "backoffLimit": config.backoff_limit,
        "shutdownAfterJobFinishes": config.delete_after_s is not None,
        "suspend": config.suspend,
        "submitterPodTemplate": submitter_pod(config),
        "rayClusterSpec": _ray_cluster(job.cluster, own_env, ray_version),
    }
    times = {
        "ttlSecondsAfterFinished": config.delete_after_s,
        "activeDeadlineSeconds": config.deadline_s,
        "preRunningDeadlineSeconds": config.start_deadline_s,
    }
    spec |= {name: value for name, value in times.items() if value is not None}
    annotations = {"switchwork/run": run_url(job.run.root, job.run.name)}
    metadata = {"name": job_id, "namespace": namespace, "labels": _labels(job_id, config), "annotations": annotations}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _encoded(job_id: str, job: "Submission") -> str:
    """The job as text for launch/pod.py to decode. Raises ValueError if it is too long."""
    pod_job: PodJob = {"id": job_id, "resume": job.resume, "job": job.values}
    text = json.dumps(pod_job).replace("$", "\\u0024")  # Kubernetes would replace $(NAME)
    if len(text) > _LARGEST_JOB:
        raise ValueError(
            f"the job: {len(text)} characters do not fit into a pod's environment; "
            f"keep it below {_LARGEST_JOB}, with long lists in files"
        )
    return text


def _check_job(run: "RunConfig", cluster: ClusterConfig) -> None:
    """Raises ValueError if settings of a job exclude one another on Kubernetes."""
    config = cluster.kubernetes
    if not config.image:
        raise ValueError("cluster.kubernetes.image: missing; build one with k8s/Dockerfile, push it, and name it")
    for workers in (cluster.min_workers, cluster.max_workers):
        if workers % config.workers_per_pod:
            remainder = f"{workers} workers do not fill pods of {config.workers_per_pod}"
            raise ValueError(f"cluster.kubernetes.workers_per_pod: {remainder}; use a divisor of {workers}")
    _gpus(cluster, run.device)
    _check_autoscaling(cluster)
    _check_storage(run.root, config)
    _check_tracking(run, config)


def _check_autoscaling(cluster: ClusterConfig) -> None:
    scaling = cluster.kubernetes.autoscaling
    if scaling is None:
        return
    smallest = cluster.min_workers
    largest = cluster.max_workers
    if not scaling.min_workers <= smallest <= largest <= scaling.max_workers:
        wanted = f"{smallest}" if smallest == largest else f"[{smallest}, {largest}]"
        raise ValueError(
            f"cluster.kubernetes.autoscaling: cluster.workers is {wanted}, outside "
            f"{scaling.min_workers} to {scaling.max_workers}; widen min_workers and max_workers"
        )
    per_pod = cluster.kubernetes.workers_per_pod
    if scaling.min_workers % per_pod or scaling.max_workers % per_pod:
        raise ValueError(
            f"cluster.kubernetes.autoscaling: {scaling.min_workers} and {scaling.max_workers} workers "
            f"do not fill pods of {per_pod}; use multiples of {per_pod}"
        )


def _check_tracking(run: "RunConfig", config: KubernetesConfig) -> None:
    uri = run.tracking.uri or config.env.get("MLFLOW_TRACKING_URI") or ""
    if run.tracking.enabled and not uri:
        raise ValueError(
            "run.tracking.uri: missing, and pods need an MLflow server; "
            "use http://mlflow:5000 of k8s/base, say, or set run.tracking.enabled=false"
        )
    if uri.startswith("sqlite:") and not _on_claim(uri.removeprefix("sqlite:///"), config):
        raise ValueError(
            f"run.tracking.uri: {uri} is on the pod's own disk, which is lost with the pod; "
            "use a server such as http://mlflow:5000"
        )


def _check_storage(root: str, config: KubernetesConfig) -> None:
    if "://" in root or _on_claim(root, config):
        return
    retry = f", and backoff_limit {config.backoff_limit} would start from nothing" if config.backoff_limit else ""
    paths = " or ".join(_writable_paths(config)) or "the path of one of cluster.kubernetes.claims"
    raise ValueError(
        f"run.root: {root} is on the pod's own disk, which is lost with the pod{retry}; "
        f"use a URL such as s3://bucket/runs, or a folder below {paths}"
    )


def _on_claim(path: str, config: KubernetesConfig) -> bool:
    return any(path == claim or path.startswith(f"{claim}/") for claim in _writable_paths(config))


def _writable_paths(config: KubernetesConfig) -> list[str]:
    return [claim.path for claim in config.claims if not claim.read_only]


def _gpus(cluster: ClusterConfig, device: "Device") -> int:
    """GPUs per pod. Raises ValueError unless the job asks for a whole number of them."""
    gpus = cluster.gpus_per_worker
    if gpus is None and device != "cpu":
        raise ValueError(
            "cluster.gpus_per_worker: null leaves it to the cluster, but a pod must ask for GPUs; "
            "set 1, or 0 for CPU workers"
        )
    if gpus is not None and (gpus < 0 or gpus != int(gpus)):
        raise ValueError(f"cluster.gpus_per_worker: {gpus:g}; use a whole number, as Kubernetes gives whole GPUs")
    return int(gpus or 0) * cluster.kubernetes.workers_per_pod


def _ray_cluster(cluster: ClusterConfig, own_env: dict[str, str], ray_version: str) -> Json:
    config = cluster.kubernetes
    spec: Json = {
        "rayVersion": ray_version,
        "authOptions": {"mode": "token"},  # KubeRay creates a token per cluster and gives it to all its pods
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": head_pod(config, own_env)},
        "workerGroupSpecs": [_worker_group(cluster)],
    }
    if (scaling := config.autoscaling) is not None:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": scaling.idle_timeout_s,
            "securityContext": container_security(),
        }
    return spec


def _worker_group(cluster: ClusterConfig) -> Json:
    config = cluster.kubernetes
    per_pod = config.workers_per_pod
    cpus = math.ceil(cluster.cpus_per_worker * per_pod)
    smallest = config.autoscaling.min_workers if config.autoscaling else cluster.max_workers
    largest = config.autoscaling.max_workers if config.autoscaling else cluster.max_workers
    return {
        "groupName": "workers",
        "replicas": smallest // per_pod,
        "minReplicas": smallest // per_pod,
        "maxReplicas": largest // per_pod,
        "rayStartParams": {"num-cpus": str(cpus), "object-store-memory": str(config.object_store_bytes)},
        "template": worker_pod(config, cpus, _gpus(cluster, "cpu")),
    }


def _labels(job_id: str, config: KubernetesConfig) -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "switchwork"} | MANAGER
    if config.queue:
        labels["kueue.x-k8s.io/queue-name"] = config.queue
        if config.priority:
            labels["kueue.x-k8s.io/priority-class"] = config.priority
    if config.gang:
        labels["ray.io/gang-scheduling-enabled"] = "true"
        if config.priority:
            labels["ray.io/priority-class-name"] = config.priority
        if config.gang.scheduler == "yunikorn":
            labels["yunikorn.apache.org/app-id"] = job_id
        if config.gang.queue and config.gang.scheduler in _QUEUE_LABELS:
            labels[_QUEUE_LABELS[config.gang.scheduler]] = config.gang.queue
    return labels
