"""A job as a RayJob of KubeRay 1.7: a pure function from the job to the manifest, which `switchwork submit --render` prints.

The code is the image. The job's values travel in the head's environment (SWITCHWORK_JOB), not in a ConfigMap: one object is accepted or
refused as a whole, nothing is left behind when it goes, and a rendered manifest needs no second object that would have to know its uid.
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
    from cluster.submission import Submission
    from trainer.config import RunConfig
    from trainer.world import Device

MANAGER = {"app.kubernetes.io/managed-by": "switchwork"}
LONGEST_NAME = 47  # KubeRay makes the names of a RayCluster, its service and its pods from it
_LARGEST_JOB = 100_000  # Linux takes 131,072 bytes for one environment variable
_STAMP = len("-20260101-000000")


def job_name(name: str, stamp: str) -> str:
    """A RayJob's name from the run's and the time: a DNS-1035 label of at most 47 characters. Raises ValueError if it cannot be one."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label or not label[0].isalpha():
        raise ValueError(
            f"run.name: {name!r} gives no name for a job in Kubernetes, which begins with a letter; set another run.name"
        )
    if len(label) + _STAMP > LONGEST_NAME:
        long = f"{name!r} and the time make a job name of {len(label) + _STAMP} characters"
        raise ValueError(
            f"run.name: {long}, and KubeRay takes {LONGEST_NAME}; use a run.name of at most {LONGEST_NAME - _STAMP}"
        )
    return f"{label}-{stamp}"


def rayjob(job_id: str, namespace: str, job: "Submission", ray_version: str) -> Json:
    """The manifest of `job`, whose run is named. Raises ValueError for what cannot run on Kubernetes."""
    config = job.cluster.kubernetes
    check_job(job.run, job.cluster)
    own_env = {"SWITCHWORK_JOB": _carried(job_id, job)} | (
        {"SWITCHWORK_AUTOSCALING": "1"} if config.autoscaling else {}
    )
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


def _carried(job_id: str, job: "Submission") -> str:
    """The job as launch/pod.py reads it from the environment. Raises ValueError if it is too long for that."""
    text = json.dumps({"id": job_id, "resume": job.resume, "job": job.values}).replace(
        "$", "\\u0024"
    )  # Kubernetes would replace $(NAME)
    if len(text) > _LARGEST_JOB:
        raise ValueError(
            f"the job: {len(text)} characters do not fit into a pod's environment; keep it below {_LARGEST_JOB}, with long lists in files"
        )
    return text


def check_job(run: "RunConfig", cluster: ClusterConfig) -> None:
    """Raises ValueError, with the fix, for what does not go together in a job on Kubernetes."""
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
    config, scaling = cluster.kubernetes, cluster.kubernetes.autoscaling
    if scaling is None:
        return
    fewest, most = cluster.min_workers, cluster.max_workers
    if not scaling.min_workers <= fewest <= most <= scaling.max_workers:
        bounds = f"{scaling.min_workers} to {scaling.max_workers}"
        asked = f"{fewest}" if fewest == most else f"[{fewest}, {most}]"
        raise ValueError(
            f"cluster.kubernetes.autoscaling: cluster.workers is {asked}, outside {bounds}; widen min_workers and max_workers"
        )
    if scaling.min_workers % config.workers_per_pod or scaling.max_workers % config.workers_per_pod:
        bounds = f"{scaling.min_workers} and {scaling.max_workers}"
        raise ValueError(
            f"cluster.kubernetes.autoscaling: {bounds} workers do not fill pods of {config.workers_per_pod}; use multiples of it"
        )


def _check_tracking(run: "RunConfig", config: KubernetesConfig) -> None:
    uri = run.tracking.uri or config.env.get("MLFLOW_TRACKING_URI") or ""
    if run.tracking.enabled and not uri:
        raise ValueError(
            "run.tracking.uri: missing; pods need an MLflow server, such as http://mlflow:5000 of k8s/base, or run.tracking.enabled=false"
        )
    if uri.startswith("sqlite:") and not _on_claim(uri.removeprefix("sqlite:///"), config):
        raise ValueError(
            f"run.tracking.uri: {uri} is on the pod's own disk, which goes with the pod; name a server, such as http://mlflow:5000"
        )


def _check_storage(root: str, config: KubernetesConfig) -> None:
    if "://" in root or _on_claim(root, config):
        return
    retry = f", and backoff_limit {config.backoff_limit} would start again from nothing" if config.backoff_limit else ""
    paths = (
        " or ".join(claim.path for claim in config.claims if not claim.read_only)
        or "the path of one of cluster.kubernetes.claims"
    )
    raise ValueError(
        f"run.root: {root} is on the pod's own disk, which goes with the pod{retry}; use a URL such as s3://bucket/runs, or a folder below {paths}"
    )


def _on_claim(path: str, config: KubernetesConfig) -> bool:
    return any(path == each.path or path.startswith(f"{each.path}/") for each in config.claims if not each.read_only)


def _gpus(cluster: ClusterConfig, device: "Device") -> int:
    """GPUs of a pod: Kubernetes wants to be told, and gives whole ones."""
    each = cluster.gpus_per_worker
    if each is None and device != "cpu":
        raise ValueError(
            "cluster.gpus_per_worker: null leaves it to the cluster, but a pod must ask; set 1, or 0 for CPU workers"
        )
    if each is not None and (each < 0 or each != int(each)):
        raise ValueError(f"cluster.gpus_per_worker: {each:g}; Kubernetes gives whole GPUs: use a whole number")
    return int(each or 0) * cluster.kubernetes.workers_per_pod


def _ray_cluster(cluster: ClusterConfig, own_env: dict[str, str], ray_version: str) -> Json:
    config = cluster.kubernetes
    spec: Json = {
        "rayVersion": ray_version,
        "authOptions": {"mode": "token"},  # KubeRay makes a token for each cluster and gives it to all its pods
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
    each = config.workers_per_pod
    cpus = math.ceil(cluster.cpus_per_worker * each)
    least, most = cluster.max_workers, cluster.max_workers
    if config.autoscaling:
        least, most = config.autoscaling.min_workers, config.autoscaling.max_workers
    return {
        "groupName": "workers",
        "replicas": least // each,
        "minReplicas": least // each,
        "maxReplicas": most // each,
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
        labels |= {"ray.io/priority-class-name": config.priority} if config.priority else {}
        match config.gang.scheduler:
            case "volcano":
                labels |= {"volcano.sh/queue-name": config.gang.queue} if config.gang.queue else {}
            case "yunikorn":
                labels |= {"yunikorn.apache.org/app-id": job_id} | (
                    {"yunikorn.apache.org/queue": config.gang.queue} if config.gang.queue else {}
                )
            case "kai-scheduler":
                labels |= {"kai.scheduler/queue": config.gang.queue} if config.gang.queue else {}
            case "scheduler-plugins":
                pass
    return labels
