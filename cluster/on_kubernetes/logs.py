"""The driver's log, from the pod that follows it: KubeRay's submitter, a new one for each try.

A broken stream is continued where it ended. A submitter that replaces another prints the driver's
log from the beginning, so lines that were shown before are left out.
"""

import time
from collections.abc import Callable, Iterator
from typing import cast

import urllib3
from kubernetes.client.exceptions import ApiException

from cluster.on_kubernetes.client import Namespace, changes, refusals
from cluster.on_kubernetes.objects import Pod, pod_status
from cluster.on_kubernetes.status import ENDED

_CONTAINER = "ray-job-submitter"
_OVERLAP_S = 60
_LOOK_AHEAD = 50


def print_driver(cluster: Namespace, job_id: str) -> str | None:
    """The log of the newest try so far; None if no try has one."""
    with refusals(cluster, "list pods"):
        pods = _started(cluster.pods(label_selector=_selector(job_id))["items"])
    if not pods:
        return None
    with refusals(cluster, "read logs"):
        return str(cluster.log(pods[-1]["metadata"]["name"], _CONTAINER).data.decode(errors="replace"))


def follow_driver(cluster: Namespace, job_id: str, facts: Callable[[], dict[str, str]]) -> Iterator[str]:
    """Yield the lines of all tries as they come, until the job has ended.

    While the job waits, its state and the reason come in brackets. `facts` returns the job's
    current state and message.
    """
    pods: dict[str, Pod] = {}
    finished: set[str] = set()
    printed = Printed()
    last_note = ""
    selector = _selector(job_id)
    for kind, objects in changes(cluster, lambda **options: cluster.pods(label_selector=selector, **options)):
        _keep(pods, kind, cast(list[Pod], objects))
        for pod in _started(list(pods.values())):
            if pod["metadata"]["uid"] not in finished:
                printed.begin(_ray_job(pod))
                yield from (text for text in _stream(cluster, pod["metadata"]["name"]) if printed.new(text))
                finished.add(pod["metadata"]["uid"])
        if kind in ("QUIET", "LISTED"):
            now = facts()
            note = f"[{now['state']}: {now['message']}]\n"
            started = {pod["metadata"]["uid"] for pod in _started(list(pods.values()))}
            if now["state"] in ENDED and started <= finished:
                yield note
                return
            if now["state"] != "RUNNING" and note != last_note:
                yield note
                last_note = note


class Printed:
    """The lines of one Ray job that were shown.

    A second submitter of the same Ray job prints them again; only its new lines are shown.
    """

    def __init__(self) -> None:
        self.ray_job = ""
        self.shown: list[str] = []
        self.fresh: list[str] = []
        self.position = 0

    def begin(self, ray_job: str) -> None:
        """Note that a new submitter of `ray_job` begins to print."""
        self.shown = [*self.shown, *self.fresh] if ray_job and ray_job == self.ray_job else []
        self.ray_job = ray_job
        self.fresh = []
        self.position = 0

    def new(self, text: str) -> bool:
        """Whether `text`, the current submitter's next line, was not shown before.

        Lines that were shown come again in the same order.
        """
        ahead = self.shown[self.position : self.position + _LOOK_AHEAD]
        if text in ahead:
            self.position += ahead.index(text) + 1
            return False
        self.fresh.append(text)
        return True


def _keep(pods: dict[str, Pod], kind: str, changed: list[Pod]) -> None:
    if kind == "LISTED":
        pods.clear()
    for pod in changed:
        if kind == "DELETED":
            pods.pop(pod["metadata"]["uid"], None)
        else:
            pods[pod["metadata"]["uid"]] = pod


def _started(pods: list[Pod]) -> list[Pod]:
    """The pods that have a log, the oldest first."""
    logging = [pod for pod in pods if pod_status(pod).get("phase") in ("Running", "Succeeded", "Failed")]
    return sorted(logging, key=lambda pod: pod["metadata"]["creationTimestamp"])


def _selector(job_id: str) -> str:
    return f"batch.kubernetes.io/job-name={job_id}"


def _ray_job(pod: Pod) -> str:
    """The Ray job that a submitter follows, which KubeRay names in its environment."""
    variables = pod["spec"]["containers"][0].get("env") or []
    values = {variable["name"]: str(variable.get("value")) for variable in variables}
    return values.get("RAY_JOB_SUBMISSION_ID", "")


def _stream(cluster: Namespace, pod: str) -> Iterator[str]:
    """Yield a pod's log to its end, each line once, across broken connections.

    The server's time stamps tell which lines are new.
    """
    last = ""
    heard = 0.0
    while True:
        shown = last
        since: dict[str, object] = {"since_seconds": int(time.monotonic() - heard) + _OVERLAP_S} if last else {}
        try:
            answer = cluster.log(pod, _CONTAINER, follow=True, timestamps=True, _request_timeout=(5, 3600), **since)
            for row in _rows(answer):
                stamp, _, text = row.partition(" ")
                if stamp > shown:
                    last = stamp
                    heard = time.monotonic()
                    yield f"{text}\n"
        except (urllib3.exceptions.HTTPError, OSError):
            time.sleep(1)
        except ApiException as error:
            if error.status == 404:
                return  # the pod was removed
            if error.status is not None and error.status < 500 and _runs(cluster, pod):
                with refusals(cluster, "read logs"):
                    raise
            time.sleep(1)  # the pod's node does not answer, or the pod was evicted with its log
        if not _runs(cluster, pod):
            return


def _rows(answer: urllib3.BaseHTTPResponse) -> Iterator[str]:
    """Yield the complete lines of a streamed answer."""
    rest = b""
    for chunk in answer.stream(amt=None, decode_content=False):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")


def _runs(cluster: Namespace, pod: str) -> bool:
    """Whether the pod still runs, so that its stream ended for some other reason."""
    with refusals(cluster, "list pods"):
        pods: list[Pod] = cluster.pods(field_selector=f"metadata.name={pod}")["items"]
    return bool(pods) and pod_status(pods[0]).get("phase") == "Running"
