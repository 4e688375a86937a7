"""Objects as Kubernetes' API hands them out: the fields that are read here, and no others."""

from typing import NotRequired, TypedDict


class Owner(TypedDict):
    """The object that another belongs to."""

    uid: str


class Metadata(TypedDict):
    """What every object has."""

    name: str
    uid: str
    creationTimestamp: str
    labels: NotRequired[dict[str, str]]
    annotations: NotRequired[dict[str, str]]
    ownerReferences: NotRequired[list[Owner] | None]


class Condition(TypedDict):
    """One aspect of an object's state, and who says so in which words."""

    type: str
    status: str
    reason: NotRequired[str]
    message: NotRequired[str]


class RayJobSpec(TypedDict, total=False):
    """What was asked of KubeRay."""

    suspend: bool
    backoffLimit: int
    shutdownAfterJobFinishes: bool


class RayJobStatus(TypedDict, total=False):
    """What KubeRay says of a job."""

    jobDeploymentStatus: str
    jobStatus: str
    rayClusterName: str
    failed: int
    reason: str
    message: str


class RayJob(TypedDict):
    """A job, as KubeRay has it."""

    metadata: Metadata
    spec: RayJobSpec
    status: NotRequired[RayJobStatus | None]


class WorkloadSpec(TypedDict, total=False):
    """What was asked of Kueue."""

    active: bool
    queueName: str


class WorkloadStatus(TypedDict, total=False):
    """What Kueue says of a job."""

    conditions: list[Condition] | None


class Workload(TypedDict):
    """A job, as Kueue has it."""

    metadata: Metadata
    spec: WorkloadSpec
    status: NotRequired[WorkloadStatus | None]


class Stage(TypedDict, total=False):
    """Why a container waits, or how it ended."""

    reason: str
    message: str
    exitCode: int


class ContainerState(TypedDict, total=False):
    """A container waits, runs or has ended."""

    waiting: Stage | None
    terminated: Stage | None


class ContainerStatus(TypedDict, total=False):
    """What a node says of a container."""

    image: str
    state: ContainerState | None
    lastState: ContainerState | None


class PodStatus(TypedDict, total=False):
    """What the scheduler and the node say of a pod."""

    phase: str
    reason: str
    message: str
    conditions: list[Condition] | None
    initContainerStatuses: list[ContainerStatus] | None
    containerStatuses: list[ContainerStatus] | None


class EnvironmentVariable(TypedDict):
    """A variable, which may have its value from elsewhere."""

    name: str
    value: NotRequired[str]


class Container(TypedDict):
    """What a container was given."""

    env: NotRequired[list[EnvironmentVariable] | None]


class PodSpec(TypedDict):
    """What was asked of the node."""

    containers: list[Container]


class Pod(TypedDict):
    """A pod."""

    metadata: Metadata
    spec: PodSpec
    status: NotRequired[PodStatus | None]


class Involved(TypedDict):
    """The object that an event is about."""

    name: str


class Event(TypedDict):
    """What was noted about an object."""

    involvedObject: Involved
    type: NotRequired[str]
    reason: NotRequired[str]
    message: NotRequired[str]
    lastTimestamp: NotRequired[str | None]
    eventTime: NotRequired[str | None]


def job_status(job: RayJob) -> RayJobStatus:
    """Empty until KubeRay has looked at the job."""
    return job.get("status") or {}


def pod_status(pod: Pod) -> PodStatus:
    """Empty until a scheduler has looked at the pod."""
    return pod.get("status") or {}


def ended_state(state: ContainerState | None) -> Stage | None:
    """How a container ended; None if it did not."""
    return state.get("terminated") if state else None
