"""What a job on Kubernetes waits for, or died of, in plain words: from the RayJob, its pods, their events and Kueue's Workload. Pure."""

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
    """PENDING, RUNNING, SUCCEEDED, FAILED and STOPPED as Ray has them; also SUSPENDED, RETRYING, and INVALID: refused by the operator."""
    status = job_status(job)
    found = _DEPLOYMENT.get(status.get("jobDeploymentStatus", ""), "PENDING")
    if found == "SUCCEEDED" and status.get("jobStatus") in ("FAILED", "STOPPED"):
        return str(status["jobStatus"])
    if found in ("PENDING", "SUSPENDED") and is_queued(job):  # Kueue suspends what it lets wait
        return "SUSPENDED" if workload and workload["spec"].get("active") is False else "PENDING"
    return "SUSPENDED" if found == "PENDING" and job["spec"].get("suspend") else found


def explain(job: RayJob, pods: Sequence[Pod], events: Sequence[Event], workload: Workload | None) -> str:
    """One line: why the job is in its state, with the words of whoever knows. `events` are those of the job and of its pods."""
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
            return f"{_tries(job)} failed; a new RayCluster comes up. {_failure(status, pods)}"
        case "SUSPENDED":
            return _quota(workload) or "suspended; `switchwork resume` lets it go on"
        case "RUNNING":
            return "; ".join(
                filter(None, [f"{_tries(job)} on RayCluster {status.get('rayClusterName')}", _pods(pods, events)])
            )
        case _:
            return (
                _quota(workload) or _pods(pods, events) or _not_picked_up(status, events) or "the RayCluster comes up"
            )


def _tries(job: RayJob) -> str:
    failed = job_status(job).get("failed") or 0
    limit = job["spec"].get("backoffLimit") or 0
    number = failed if state(job, None) == "RETRYING" else failed + 1
    return f"try {number} of {limit + 1}"


def _quota(workload: Workload | None) -> str:
    """What Kueue says while it holds the job back."""
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


def _pods(pods: Sequence[Pod], events: Sequence[Event]) -> str:
    """The first thing that keeps a pod from running, and how many pods it keeps."""
    stuck = [(pod["metadata"]["name"], found) for pod in pods if (found := _stuck(pod, events))]
    if not stuck:
        return ""
    name, reason = stuck[0]
    more = f" (and {len(stuck) - 1} more of {len(pods)} pods)" if len(stuck) > 1 else ""
    return f"pod {name}{more} {reason}"


def _stuck(pod: Pod, events: Sequence[Event]) -> str:
    status = pod_status(pod)
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
        if event.get("reason") in _MOUNT and status.get("phase") == "Pending":
            return f"waits for its storage: {line(event.get('message'))}"
        if (
            event.get("reason") == "FailedScheduling"
            and status.get("phase") == "Pending"
            and not status.get("containerStatuses")
        ):
            return f"cannot be scheduled: {line(event.get('message'))}"
    if status.get("phase") == "Pending":
        return (
            "is starting: its image is fetched"
            if any(event.get("reason") == "Pulling" for event in own[-1:])
            else "is starting"
        )
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
    """What a failed pod has left: its own message (Evicted, say), else that of its first failed container."""
    status = pod_status(pod)
    if message := status.get("message"):
        return line(message)
    for container in status.get("containerStatuses") or []:
        ended = ended_state(container.get("state")) or ended_state(container.get("lastState"))
        if ended and ended.get("exitCode"):
            return _words(ended)
    return str(status.get("reason") or "no reason given")


def _words(ended: Stage) -> str:
    """`OOMKilled` and its kin, the exit code, and what the container wrote last."""
    reason = {"OOMKilled": "out of memory (OOMKilled; raise memory)"}.get(
        ended.get("reason", ""), f"exit code {ended.get('exitCode')}"
    )
    last = [text for text in str(ended.get("message") or "").splitlines() if text.strip()]
    return f"{reason}: {line(last[-1])}" if last else reason


def _failure(status: RayJobStatus, pods: Sequence[Pod]) -> str:
    """Why a job failed: a pod's own words if one failed, else the driver's last error, else the operator's."""
    message = str(status.get("message") or "")
    errors = re.findall(r"^(?:error: .*|\w*(?:Error|Exception): .*)$", message, re.MULTILINE)
    dead = [
        pod
        for pod in pods
        if pod_status(pod).get("phase") == "Failed" and "ray.io/cluster" in pod["metadata"].get("labels", {})
    ]
    words = [f"{status['reason']}" if status.get("reason") else "failed"]
    words += [f"pod {dead[0]['metadata']['name']}: {_last_words(dead[0])}"] if dead else []
    words += [line(errors[-1] if errors else message)] if message else []
    return ": ".join(words)


def _not_picked_up(status: RayJobStatus, events: Sequence[Event]) -> str:
    """Why a job waits that no operator has looked at yet; "": one has."""
    if not status.get("jobDeploymentStatus"):
        warnings = [event for event in events if event.get("type") == "Warning"]
        return (
            line(warnings[-1].get("message"))
            if warnings
            else "no operator has looked at it yet; is KubeRay running, and does it watch this namespace?"
        )
    return ""


def _condition(status: PodStatus, kind: str, value: str) -> Condition | None:
    return next(
        (each for each in status.get("conditions") or [] if each["type"] == kind and each["status"] == value), None
    )


def line(text: object) -> str:
    """`text` on one line, cut at 400 characters, the beginning first."""
    joined = one_line(text)
    return joined if len(joined) <= 400 else f"{joined[:400]} ..."
