"""Plain words for what a job on Kubernetes waits for or died of.

Pure functions of the RayJob, its pods, their events and Kueue's Workload.
"""

import re
from collections.abc import Sequence

from cluster.on_kubernetes.objects import (
    Condition,
    ContainerStatus,
    Event,
    Pod,
    PodStatus,
    RayJob,
    RayJobStatus,
    Stage,
    Workload,
    WorkloadStatus,
    ended_state,
    job_status,
    pod_status,
)
from trainer.parsing import one_line

ENDED = ("SUCCEEDED", "FAILED", "STOPPED", "INVALID")
_DEPLOYMENT = {
    "": "PENDING",
    "New": "PENDING",
    "Initializing": "PENDING",
    "Waiting": "PENDING",
    "Running": "RUNNING",
    "Complete": "SUCCEEDED",
    "Failed": "FAILED",
    "ValidationFailed": "INVALID",
    "Suspending": "SUSPENDED",
    "Suspended": "SUSPENDED",
    "Retrying": "RETRYING",
}
_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_MOUNT = ("FailedMount", "FailedAttachVolume")


def is_queued(job: RayJob) -> bool:
    """Whether Kueue decides when the job runs."""
    return "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {})


def state(job: RayJob, workload: Workload | None) -> str:
    """The state of a job.

    PENDING, RUNNING, SUCCEEDED, FAILED and STOPPED mean the same as in Ray. There are also
    SUSPENDED, RETRYING, and INVALID for a job that the operator refuses.
    """
    status = job_status(job)
    deployment = _DEPLOYMENT.get(status.get("jobDeploymentStatus", ""), "PENDING")
    if deployment == "SUCCEEDED" and status.get("jobStatus") in ("FAILED", "STOPPED"):
        return str(status["jobStatus"])
    if deployment in ("PENDING", "SUSPENDED") and is_queued(job):  # Kueue suspends a job that waits in a queue
        return "SUSPENDED" if workload and workload["spec"].get("active") is False else "PENDING"
    return "SUSPENDED" if deployment == "PENDING" and job["spec"].get("suspend") else deployment


def explain(job: RayJob, pods: Sequence[Pod], events: Sequence[Event], workload: Workload | None) -> str:
    """Why the job is in its state, on one line and in the words of the component that knows.

    `events` are the events of the job and of its pods.
    """
    status = job_status(job)
    match state(job, workload):
        case "SUCCEEDED":
            return "all done"
        case "STOPPED":
            return "the driver was stopped"
        case "INVALID":
            return f"the KubeRay operator refuses it: {line(status.get('message') or status.get('reason'))}"
        case "FAILED":
            return _failure(status, pods)
        case "RETRYING":
            return f"{_tries(job)} failed; a new RayCluster is starting. {_failure(status, pods)}"
        case "SUSPENDED":
            return _quota(workload) or "suspended; `switchwork resume` lets it continue"
        case "RUNNING":
            running = f"{_tries(job)} on RayCluster {status.get('rayClusterName')}"
            stuck = _stuck_pods(pods, events)
            return f"{running}; {stuck}" if stuck else running
        case _:
            waiting = _quota(workload) or _stuck_pods(pods, events) or _not_picked_up(status, events)
            return waiting or "the RayCluster is starting"


def _tries(job: RayJob) -> str:
    failed = job_status(job).get("failed") or 0
    limit = job["spec"].get("backoffLimit") or 0
    number = failed if state(job, None) == "RETRYING" else failed + 1
    return f"try {number} of {limit + 1}"


def _quota(workload: Workload | None) -> str:
    """Kueue's reason for holding the job back; "" if it does not."""
    if workload is None:
        return ""
    status: WorkloadStatus = workload.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or []}
    if workload["spec"].get("active") is False:
        return "suspended; `switchwork resume` queues it again"
    if (admitted := conditions.get("Admitted")) and admitted["status"] == "True":
        return ""
    queue = workload["spec"].get("queueName")
    if (evicted := conditions.get("Evicted")) and evicted["status"] == "True":
        return f"queue {queue}: put back ({evicted.get('reason')}): {line(evicted.get('message'))}"
    if (reserved := conditions.get("QuotaReserved")) and reserved["status"] == "False":
        return f"waits for quota in queue {queue}: {line(reserved.get('message'))}"
    return f"waits in queue {queue}"


def _stuck_pods(pods: Sequence[Pod], events: Sequence[Event]) -> str:
    """The first pod that cannot run, its reason, and the number of other such pods."""
    stuck = [(pod["metadata"]["name"], reason) for pod in pods if (reason := _stuck(pod, events))]
    if not stuck:
        return ""
    name, reason = stuck[0]
    more = f" (and {len(stuck) - 1} more of {len(pods)} pods)" if len(stuck) > 1 else ""
    return f"pod {name}{more} {reason}"


def _stuck(pod: Pod, events: Sequence[Event]) -> str:
    """The reason why a pod does not run; "" if it runs or has succeeded."""
    status = pod_status(pod)
    is_pending = status.get("phase") == "Pending"
    if status.get("phase") == "Failed":
        return f"failed: {_last_words(pod)}"
    if unscheduled := _condition(status, "PodScheduled", "False"):
        return f"cannot be scheduled: {line(unscheduled.get('message') or unscheduled.get('reason'))}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        state = container.get("state")
        if state and (waiting := state.get("waiting")) and (reason := _waiting(container, waiting)):
            return reason
    own = [event for event in events if event["involvedObject"]["name"] == pod["metadata"]["name"]]
    for event in reversed(own):
        if event.get("reason") in _MOUNT and is_pending:
            return f"waits for its storage: {line(event.get('message'))}"
        if event.get("reason") == "FailedScheduling" and is_pending and not status.get("containerStatuses"):
            return f"cannot be scheduled: {line(event.get('message'))}"
    if is_pending:
        is_pulling = bool(own) and own[-1].get("reason") == "Pulling"
        return "is starting: its image is being pulled" if is_pulling else "is starting"
    return ""


def _waiting(container: ContainerStatus, waiting: Stage) -> str:
    reason = waiting.get("reason", "")
    message = line(waiting.get("message") or "")
    if reason in _IMAGE:
        return f"cannot get its image {container.get('image')}: {message or reason}"
    if reason in _CONFIG:
        return f"cannot be set up: {message or reason}"
    if reason == "CrashLoopBackOff":
        ended = ended_state(container.get("lastState"))
        return f"fails again and again: {_words(ended) if ended else message}"
    return ""


def _last_words(pod: Pod) -> str:
    """The message of a failed pod (for example Evicted), else of its first failed container."""
    status = pod_status(pod)
    if message := status.get("message"):
        return line(message)
    for container in status.get("containerStatuses") or []:
        ended = ended_state(container.get("state")) or ended_state(container.get("lastState"))
        if ended and ended.get("exitCode"):
            return _words(ended)
    return str(status.get("reason") or "no reason given")


def _words(ended: Stage) -> str:
    """The reason or exit code of a container, and the last line that it wrote."""
    reason = f"exit code {ended.get('exitCode')}"
    if ended.get("reason") == "OOMKilled":
        reason = "out of memory (OOMKilled; raise memory)"
    last = [text for text in str(ended.get("message") or "").splitlines() if text.strip()]
    return f"{reason}: {line(last[-1])}" if last else reason


def _failure(status: RayJobStatus, pods: Sequence[Pod]) -> str:
    """Why a job failed: the operator's reason, a failed pod's words, the driver's last error."""
    message = str(status.get("message") or "")
    errors = re.findall(r"^(?:error: .*|\w*(?:Error|Exception): .*)$", message, re.MULTILINE)
    ray_pods = [pod for pod in pods if "ray.io/cluster" in pod["metadata"].get("labels", {})]
    failed = [pod for pod in ray_pods if pod_status(pod).get("phase") == "Failed"]
    parts = [str(status.get("reason") or "failed")]
    if failed:
        parts.append(f"pod {failed[0]['metadata']['name']}: {_last_words(failed[0])}")
    if message:
        parts.append(line(errors[-1] if errors else message))
    return ": ".join(parts)


def _not_picked_up(status: RayJobStatus, events: Sequence[Event]) -> str:
    """Why no operator has looked at the job yet; "" if one has."""
    if status.get("jobDeploymentStatus"):
        return ""
    warnings = [event for event in events if event.get("type") == "Warning"]
    if warnings:
        return line(warnings[-1].get("message"))
    return "no operator has looked at it yet; is KubeRay running, and does it watch this namespace?"


def _condition(status: PodStatus, kind: str, value: str) -> Condition | None:
    for condition in status.get("conditions") or []:
        if condition["type"] == kind and condition["status"] == value:
            return condition
    return None


def line(text: object) -> str:
    """The first 400 characters of `text`, on one line."""
    joined = one_line(text)
    return joined if len(joined) <= 400 else f"{joined[:400]} ..."
