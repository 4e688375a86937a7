"""Objects of the Kubernetes API, with the fields that are read here and no others."""

from typing import NotRequired, TypedDict


class Owner(TypedDict):
    """An object that owns another."""

    uid: str


class Metadata(TypedDict):
    """The metadata of any object."""

    name: str
    uid: str
    creationTimestamp: str
    labels: NotRequired[dict[str, str]]
    annotations: NotRequired[dict[str, str]]
    ownerReferences: NotRequired[list[Owner] | None]


class Condition(TypedDict):
    """One aspect of an object's state, with its reason and message."""

    type: str
    status: str
    reason: NotRequired[str]
    message: NotRequired[str]


class RayJobSpec(TypedDict, total=False):
    """The wanted state of a RayJob."""

    suspend: bool
    backoffLimit: int
    shutdownAfterJobFinishes: bool


class RayJobStatus(TypedDict, total=False):
    """The state of a RayJob, written by KubeRay."""

    jobDeploymentStatus: str
    jobStatus: str
    rayClusterName: str
    failed: int
    reason: str
    message: str


class RayJob(TypedDict):
    """A job as KubeRay knows it."""

    metadata: Metadata
    spec: RayJobSpec
    status: NotRequired[RayJobStatus | None]


class WorkloadSpec(TypedDict, total=False):
    """The wanted state of a Workload."""

    active: bool
    queueName: str


class WorkloadStatus(TypedDict, total=False):
    """The state of a Workload, written by Kueue."""

    conditions: list[Condition] | None


class Workload(TypedDict):
    """A job as Kueue knows it."""

    metadata: Metadata
    spec: WorkloadSpec
    status: NotRequired[WorkloadStatus | None]


class Stage(TypedDict, total=False):
    """The reason why a container waits, or the way in which it ended."""

    reason: str
    message: str
    exitCode: int


class ContainerState(TypedDict, total=False):
    """The state of a container, which waits, runs or has ended."""

    waiting: Stage | None
    terminated: Stage | None


class ContainerStatus(TypedDict, total=False):
    """The status of a container, written by its node."""

    image: str
    state: ContainerState | None
    lastState: ContainerState | None


class PodStatus(TypedDict, total=False):
    """The status of a pod, written by the scheduler and its node."""

    phase: str
    reason: str
    message: str
    conditions: list[Condition] | None
    initContainerStatuses: list[ContainerStatus] | None
    containerStatuses: list[ContainerStatus] | None


class EnvironmentVariable(TypedDict):
    """An environment variable; without `value`, its value comes from another object."""

    name: str
    value: NotRequired[str]


class Container(TypedDict):
    """The specification of a container."""

    env: NotRequired[list[EnvironmentVariable] | None]


class PodSpec(TypedDict):
    """The specification of a pod."""

    containers: list[Container]


class Pod(TypedDict):
    """A pod: its specification and its status."""

    metadata: Metadata
    spec: PodSpec
    status: NotRequired[PodStatus | None]


class Involved(TypedDict):
    """The object that an event is about."""

    name: str


class Event(TypedDict):
    """An event that was recorded about an object."""

    involvedObject: Involved
    type: NotRequired[str]
    reason: NotRequired[str]
    message: NotRequired[str]
    lastTimestamp: NotRequired[str | None]
    eventTime: NotRequired[str | None]


def job_status(job: RayJob) -> RayJobStatus:
    """The job's status; empty until KubeRay has seen the job."""
    return job.get("status") or {}


def pod_status(pod: Pod) -> PodStatus:
    """The pod's status; empty until a scheduler has seen the pod."""
    return pod.get("status") or {}


def ended_state(state: ContainerState | None) -> Stage | None:
    """The way in which a container ended; None if it has not ended."""
    return state.get("terminated") if state else None
