"""Jobs on Kubernetes: submits, lists, explains, follows, suspends and removes RayJobs.

All of it goes through the API server. Only jobs with the label
app.kubernetes.io/managed-by=switchwork, which `submit` sets, are touched.
"""

import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, cast

from cluster.on_kubernetes.client import KUEUE, RAY, Namespace, changes, connect, refusals
from cluster.on_kubernetes.logs import follow_driver, print_driver
from cluster.on_kubernetes.objects import Event, Pod, RayJob, Workload, job_status, pod_status
from cluster.on_kubernetes.rayjob import MANAGER, job_name, rayjob
from cluster.on_kubernetes.status import explain, is_queued, line, state
from trainer.parsing import Json
from trainer.run_files import EVENTS

if TYPE_CHECKING:  # a job's config imports torch, and only `submit` has one
    from cluster.submission import Submission

_OURS = ",".join(f"{key}={value}" for key, value in MANAGER.items())
_REMOVAL_S = 120


def manifest(address: str, job: "Submission") -> Json:
    """The RayJob that `submit` would create; needs no cluster.

    A run without a name is named after its job, once for all its tries.
    """
    job_id = job_name(job.name, time.strftime("%Y%m%d-%H%M%S"))
    job = job.named(job.run.name or job_id)
    own_uri = os.environ.get("MLFLOW_TRACKING_URI")
    if own_uri and not job.run.tracking.uri and "MLFLOW_TRACKING_URI" not in job.cluster.kubernetes.env:
        job = job.tracked_at(own_uri)
    _, slash, namespace = address.removeprefix("k8s://").rpartition("/")
    return rayjob(job_id, namespace if slash else "default", job, version("ray"))


def submit(address: str, job: "Submission") -> str:
    """Create the job's RayJob, checked strictly by the API server, and return its name."""
    body = manifest(address, job)
    cluster = connect(address)
    body["metadata"]["namespace"] = cluster.name
    return str(cluster.create(RAY, "rayjobs", body)["metadata"]["name"])


def listing(address: str) -> list[dict[str, str]]:
    """The jobs of the namespace, the newest first."""
    cluster = connect(address)
    with refusals(cluster, "list rayjobs"):
        jobs: list[RayJob] = cluster.objects(RAY, "rayjobs", label_selector=_OURS)["items"]
    newest = sorted(jobs, key=lambda job: job["metadata"]["creationTimestamp"], reverse=True)
    return [
        {
            "id": job["metadata"]["name"],
            "state": state(job, None),
            "message": line(job_status(job).get("message") or ""),
        }
        for job in newest
    ]


def status(address: str, job_id: str) -> dict[str, str]:
    """ID and state of one job, and what it waits for or died of."""
    cluster = connect(address)
    return _facts(cluster, _job(cluster, job_id))


def logs(address: str, job_id: str, follow: bool) -> Iterator[str]:
    """Yield the driver's output; with `follow` until the job ends, across its tries."""
    cluster = connect(address)
    job = _job(cluster, job_id)
    if follow:
        yield from follow_driver(cluster, job_id, lambda: _facts(cluster, _find(cluster, job_id)))
        return
    printed = print_driver(cluster, job_id)
    if printed is None:
        facts = _facts(cluster, job)
        raise ValueError(
            f"job {job_id}: it has no log ({facts['state']}, {facts['message']}); "
            f"look at its events in {_run_of(job)}/{EVENTS}"
        )
    yield printed


def stop(address: str, job_id: str) -> None:
    """Remove the RayJob and, through it, its RayCluster, submitter, pods, service and token.

    The run folder and MLflow's run stay.
    """
    cluster = connect(address)
    uid = _job(cluster, job_id)["metadata"]["uid"]
    cluster.delete(RAY, "rayjobs", job_id, uid)
    deadline = time.monotonic() + _REMOVAL_S
    selector = f"metadata.name={job_id}"
    for _ in changes(cluster, lambda **options: cluster.objects(RAY, "rayjobs", field_selector=selector, **options)):
        job = _find(cluster, job_id)
        if job is None or job["metadata"]["uid"] != uid:
            return
        if time.monotonic() > deadline:
            raise ValueError(
                f"job {job_id}: still being removed after {_REMOVAL_S} s; "
                "check that the KubeRay operator is running, as it has to release the job first"
            )


def suspend(address: str, job_id: str) -> None:
    """Give back the job's pods; its checkpoints stay."""
    _set_suspended(connect(address), job_id, True)


def resume(address: str, job_id: str) -> None:
    """Let a suspended job continue from its last checkpoint."""
    _set_suspended(connect(address), job_id, False)


def _set_suspended(cluster: Namespace, job_id: str, suspended: bool) -> None:
    """Suspend or resume a job.

    Kueue owns the `suspend` of a RayJob with a queue, so there the Workload is changed instead.
    """
    job = _job(cluster, job_id)
    if job["spec"].get("shutdownAfterJobFinishes") is not True:
        raise ValueError(
            f"job {job_id}: KubeRay suspends no job that keeps its pods; "
            "set cluster.kubernetes.delete_after_s and submit it again"
        )
    if not is_queued(job):
        cluster.patch(RAY, "rayjobs", job_id, {"spec": {"suspend": suspended}})
    elif (workload := _workload(cluster, job)) is not None:
        cluster.patch(KUEUE, "workloads", workload["metadata"]["name"], {"spec": {"active": not suspended}})
    else:
        raise ValueError(f"job {job_id}: Kueue has no Workload for it yet; try again in a few seconds")


def _find(cluster: Namespace, job_id: str) -> RayJob | None:
    return cast(RayJob | None, cluster.get(RAY, "rayjobs", job_id))


def _job(cluster: Namespace, job_id: str) -> RayJob:
    """The job with this ID. Raises ValueError if there is none that Switchwork made."""
    job = _find(cluster, job_id)
    if job is None:
        raise ValueError(
            f"job {job_id}: not known to {cluster.address}; "
            f"choose one that `switchwork jobs --to {cluster.address}` lists"
        )
    if not MANAGER.items() <= job["metadata"].get("labels", {}).items():
        raise ValueError(f"job {job_id}: not made by `switchwork submit`; use kubectl")
    return job


def _facts(cluster: Namespace, job: RayJob | None) -> dict[str, str]:
    """ID, state and message of a job, with as few requests as its state needs.

    `job` is None if the job was removed in the meantime.
    """
    if job is None:
        return {"id": "", "state": "STOPPED", "message": "removed"}
    name = job["metadata"]["name"]
    if state(job, None) in ("SUCCEEDED", "INVALID", "STOPPED"):
        return {"id": name, "state": state(job, None), "message": explain(job, [], [], None)}
    workload = _workload(cluster, job) if is_queued(job) else None
    pods = _pods(cluster, job)
    pending = [pod["metadata"]["name"] for pod in pods if pod_status(pod).get("phase") == "Pending"]
    names = [name, *pending[:3]] if state(job, workload) == "PENDING" else pending[:3]
    events: list[Event] = []
    for about in names:
        events += cluster.events(about)
    return {"id": name, "state": state(job, workload), "message": explain(job, pods, events, workload)}


def _pods(cluster: Namespace, job: RayJob) -> list[Pod]:
    """The pods of the job's current RayCluster, and of its submitter."""
    selectors = [f"batch.kubernetes.io/job-name={job['metadata']['name']}"]
    if ray_cluster := job_status(job).get("rayClusterName"):
        selectors.append(f"ray.io/cluster={ray_cluster}")
    pods: list[Pod] = []
    with refusals(cluster, "list pods"):
        for selector in selectors:
            pods += cluster.pods(label_selector=selector)["items"]
    return pods


def _workload(cluster: Namespace, job: RayJob) -> Workload | None:
    """Kueue's record of the job; None if there is none (yet)."""
    with refusals(cluster, "list workloads"):
        workloads: list[Workload] = cluster.objects(KUEUE, "workloads")["items"]
    uid = job["metadata"]["uid"]
    for workload in workloads:
        if any(owner["uid"] == uid for owner in workload["metadata"].get("ownerReferences") or []):
            return workload
    return None


def _run_of(job: RayJob) -> str:
    return str(job["metadata"].get("annotations", {}).get("switchwork/run", "the run folder"))
