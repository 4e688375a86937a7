"""The section `cluster.kubernetes`: image, pod sizes, storage, secrets, queue and deadlines.

`cluster/on_kubernetes/rayjob.py` makes a RayJob of KubeRay 1.7 from it. Settings that KubeRay or
Kueue would refuse only after accepting the job are refused here.
"""

from dataclasses import dataclass, field
from typing import Literal

from cluster.config.pods import (
    Claim,
    ObjectStore,
    SecretEnv,
    SecretVolume,
    Toleration,
    check_name,
    check_variable,
    size_in_bytes,
)

_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Autoscaling:
    """Ray's autoscaler, which adds pods when workers wait for room and removes idle pods."""

    min_workers: int = 0
    """Number of workers whose pods are always kept."""
    max_workers: int
    """Largest number of workers that pods are created for."""
    idle_timeout_s: int = 300
    """Seconds that a pod may be idle before it is removed.

    Too short a time removes the pods of workers that are being restarted.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.min_workers <= self.max_workers or self.max_workers < 1:
            raise ValueError(
                f"min_workers is {self.min_workers} and max_workers {self.max_workers}; "
                "use 0 <= min_workers <= max_workers, and a max_workers of at least 1"
            )
        if self.idle_timeout_s < 1:
            raise ValueError(f"idle_timeout_s is {self.idle_timeout_s}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Gang:
    """Gang scheduling: all pods of the job are started, or none.

    This needs a KubeRay operator that was started with the same --batch-scheduler.
    """

    scheduler: Literal["volcano", "yunikorn", "scheduler-plugins", "kai-scheduler"]
    """The batch scheduler of the KubeRay operator."""
    queue: str | None = None
    """Queue of the batch scheduler; null: the scheduler's default."""


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """How the job runs on Kubernetes, as a RayJob."""

    image: str | None = None
    """Image of all pods, which is this checkout built with k8s/Dockerfile; required to submit."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node pulls the image."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of the Secrets with the credentials of the image's registry."""
    workers_per_pod: int = 1
    """Workers per pod; as many as a node has GPUs, they share its fast links."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the resource by which nodes offer their GPUs."""
    memory: str = "8Gi"
    """Memory per worker pod."""
    shared_memory: str = "2Gi"
    """Size of /dev/shm per worker pod, which counts towards the pod's memory.

    Half of it is for Ray's object store, half for NCCL and data workers.
    """
    head_cpus: int = 2
    """CPU cores of the head pod, which runs the driver and no workers."""
    head_memory: str = "8Gi"
    """Memory of the head pod."""
    tolerations: tuple[Toleration, ...] = ()
    """Node taints that the worker pods tolerate."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that worker pods may run on."""
    service_account: str | None = None
    """ServiceAccount of the pods; its token is mounted only where Ray's autoscaler needs it."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of the head and worker pods, such as NCCL's settings.

    It is readable in the RayJob, so put no secrets here.
    """
    secret_env: tuple[SecretEnv, ...] = ()
    """Environment variables of the head and worker pods whose values are in Secrets."""
    secret_volumes: tuple[SecretVolume, ...] = ()
    """Secrets that the head and worker pods see as files."""
    claims: tuple[Claim, ...] = ()
    """PersistentVolumeClaims that the head and worker pods mount."""
    object_store: ObjectStore | None = None
    """The object store behind s3:// URLs; null: none is configured."""
    backoff_limit: int = 0
    """Number of times that a failed job is retried.

    Each try gets a new RayCluster and continues from the last checkpoint.
    """
    deadline_s: int | None = None
    """Seconds that a try may take, waiting included, before the job is ended; null: no limit."""
    start_deadline_s: int | None = None
    """Seconds that the job may wait for its pods; null: no limit."""
    delete_after_s: int | None = 600
    """Seconds from the job's end to the removal of its pods; null: until `switchwork stop`."""
    queue: str | None = None
    """Kueue LocalQueue in which the job waits, suspended, until the quota admits all of it."""
    priority: str | None = None
    """Kueue's WorkloadPriorityClass for a job with a queue, else the pods' PriorityClass."""
    gang: Gang | None = None
    """Gang scheduling of the pods, for clusters without Kueue; null: none."""
    autoscaling: Autoscaling | None = None
    """Pods that are added and removed while the job runs.

    null: as many pods as the largest number of cluster.workers needs, all created at the start.
    """
    start_timeout_s: int = 30
    """Seconds that workers may take to start before Ray looks again at which nodes it has.

    A lost node is noticed after about this time and 20 s more.
    """
    suspend: bool = False
    """Submit the job suspended; `switchwork resume` starts it."""

    @property
    def object_store_bytes(self) -> int:
        """Half of the shared memory, for Ray's object store."""
        return int(size_in_bytes(self.shared_memory, "shared_memory") / 2)

    def __post_init__(self) -> None:
        self._check_names()
        self._check_sizes()
        self._check_paths()
        self._check_times()
        self._check_together()

    def _check_names(self) -> None:
        for name in ("queue", "priority", "service_account"):
            check_name(getattr(self, name), name)
        for secret in self.image_pull_secrets:
            check_name(secret, "image_pull_secrets")
        for name in self.env:
            check_variable(name, "env")
        names = [*self.env, *(variable.name for variable in self.secret_env)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"secret_env: {name} is set twice, here or in env; keep one")

    def _check_sizes(self) -> None:
        if self.workers_per_pod < 1 or self.head_cpus < 1:
            raise ValueError(
                f"workers_per_pod is {self.workers_per_pod} and head_cpus {self.head_cpus}; both must be at least 1"
            )
        memory, shared = size_in_bytes(self.memory, "memory"), size_in_bytes(self.shared_memory, "shared_memory")
        if shared >= memory:
            raise ValueError(
                f"shared_memory: {self.shared_memory} is part of the pod's memory of {self.memory} and must be less; "
                "raise memory"
            )
        if shared < 2**28:
            raise ValueError(
                f"shared_memory: {self.shared_memory} is too little for Ray's object store and NCCL; use at least 256Mi"
            )
        if size_in_bytes(self.head_memory, "head_memory") < 2**30:
            raise ValueError(
                f"head_memory: {self.head_memory} is too little for Ray's head and the driver; use at least 1Gi"
            )

    def _check_paths(self) -> None:
        paths = [claim.path for claim in self.claims] + [volume.path for volume in self.secret_volumes]
        for path in paths:
            if paths.count(path) > 1:
                raise ValueError(f"claims: two volumes are mounted at {path}; give each a path of its own")

    def _check_times(self) -> None:
        for name, least in (
            ("backoff_limit", 0),
            ("deadline_s", 1),
            ("start_deadline_s", 1),
            ("delete_after_s", 0),
            ("start_timeout_s", 1),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= _INT32:
                raise ValueError(f"{name} is {value}; it must be at least {least} and at most {_INT32}")
        start, end = self.start_deadline_s, self.deadline_s
        if start is not None and end is not None and start >= end:
            raise ValueError(f"start_deadline_s is {start}, and the whole job ends after deadline_s {end}; use less")

    def _check_together(self) -> None:
        if self.delete_after_s is None and self.queue:
            raise ValueError(
                f"delete_after_s is null with queue {self.queue!r}: Kueue admits no job that keeps its pods; "
                "set delete_after_s"
            )
        if self.delete_after_s is None and self.suspend:
            raise ValueError(
                "delete_after_s is null with suspend: KubeRay suspends no job that keeps its pods; set delete_after_s"
            )
        if self.queue and self.autoscaling:
            raise ValueError(
                f"autoscaling with queue {self.queue!r}: by default Kueue admits no job whose size changes; "
                "leave one of them out"
            )
        if self.queue and self.gang:
            raise ValueError(
                f"gang with queue {self.queue!r}: Kueue by itself admits all of the job or nothing; leave gang out"
            )
        if self.queue and self.suspend:
            raise ValueError(
                f"suspend with queue {self.queue!r}: Kueue starts the job when the quota admits it; "
                "leave suspend out, and use `switchwork suspend` later"
            )
