"""switchwork status on Kubernetes: why a job waits or died, in plain words.

The words of the component that knows the reason are quoted.
"""

import pytest
from kube_api import KubeApi
from kube_cluster import Status, Submit
from kube_operator import Operator


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (
            [
                (
                    "QuotaReserved",
                    "False",
                    "Pending",
                    "couldn't assign flavors to pod set workers: insufficient quota for nvidia.com/gpu, 2 more needed",
                )
            ],
            "2 more needed",
        ),
        (
            [("QuotaReserved", "False", "Inadmissible", "LocalQueue team doesn't exist")],
            "LocalQueue team doesn't exist",
        ),
        (
            [("Evicted", "True", "Preempted", "Preempted to accommodate a workload of higher priority")],
            "Preempted to accommodate",
        ),
        ([], "waits in queue team"),
    ],
)
def test_waiting_for_quota(
    kube: KubeApi, submit: Submit, job_status: Status, conditions: list[tuple[str, ...]], words: str
) -> None:
    operator = Operator(kube, "team")
    job_id = submit(queue="team")
    fields = ("type", "status", "reason", "message")
    listed = [dict(zip(fields, each)) | {"lastTransitionTime": "2026-01-01T00:00:00Z"} for each in conditions]
    operator.workload(job_id, conditions=listed)
    state, message = job_status(job_id)
    assert state == "PENDING"
    assert words in message
    assert "queue team" in message


WAITING = {
    "image": (
        {
            "containerStatuses": [
                {
                    "image": "registry.lab/x:1",
                    "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off: not found"}},
                }
            ]
        },
        None,
        ["cannot get its image registry.lab/x:1", "Back-off: not found"],
    ),
    "secret": (
        {
            "containerStatuses": [
                {"state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}}}
            ]
        },
        None,
        ["cannot be set up", 'secret "hub" not found'],
    ),
    "nodes": (
        {
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "0/3 nodes: 3 Insufficient nvidia.com/gpu.",
                }
            ]
        },
        None,
        ["cannot be scheduled", "3 Insufficient nvidia.com/gpu"],
    ),
    "nodes, by event": (
        {},
        ("FailedScheduling", "0/3 nodes: untolerated taint"),
        ["cannot be scheduled", "untolerated taint"],
    ),
    "storage": (
        {},
        ("FailedMount", 'persistentvolumeclaim "storage" not found'),
        ["waits for its storage", '"storage" not found'],
    ),
    "fetching": ({}, ("Pulling", "Pulling image"), ["its image is being pulled"]),
    "crashes": (
        {
            "containerStatuses": [
                {
                    "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                    "lastState": {"terminated": {"exitCode": 1, "message": "a\nNo module named ray\n"}},
                }
            ]
        },
        None,
        ["fails again and again", "exit code 1: No module named ray"],
    ),
}


@pytest.mark.parametrize("case", WAITING)
def test_waiting_for_pods(kube: KubeApi, submit: Submit, job_status: Status, case: str) -> None:
    reported, event, words = WAITING[case]
    operator = Operator(kube, "team")
    job_id = submit()
    operator.initialise(job_id, pods="Pending")
    assert "is starting" in job_status(job_id)[1]
    pod = f"{job_id}-00001-worker-0"
    operator.phase(f"{job_id}-00001-head", "Running")
    operator.phase(pod, "Pending", **reported)
    if event:
        operator.event("Pod", pod, "Warning", *event)
    state, message = job_status(job_id)
    assert state == "PENDING"
    for word in [f"pod {pod}", *words]:
        assert word in message


def test_what_a_job_died_of(kube: KubeApi, submit: Submit, job_status: Status) -> None:
    operator = Operator(kube, "team")
    job_id = submit()
    operator.initialise(job_id)
    operator.run(job_id)
    worker = f"{job_id}-00001-worker-1"
    operator.phase(
        worker, "Failed", containerStatuses=[{"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]
    )
    assert f"pod {worker} failed: out of memory" in job_status(job_id)[1]
    said = (
        "Job entrypoint command failed with exit code 1, last available logs:\n"
        "Traceback (most recent call last):\nerror: run.root: cannot write\n"
    )
    operator.end(job_id, failed=said)
    assert job_status(job_id) == (
        "FAILED",
        f"AppFailed: pod {worker}: out of memory (OOMKilled; raise memory): error: run.root: cannot write",
    )


def test_what_the_operator_refuses_is_told(kube: KubeApi, submit: Submit, job_status: Status) -> None:
    operator = Operator(kube, "team")
    job_id = submit()
    job = operator.job(job_id)
    job["spec"] |= {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 60}
    kube.update("ray.io", "rayjobs", job)
    operator.initialise(job_id)
    state, message = job_status(job_id)
    assert state == "INVALID"
    assert "cannot have TTLSecondsAfterFinished" in message
