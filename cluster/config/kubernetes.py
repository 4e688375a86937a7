"""The part of a job that only Kubernetes needs: image, sizes of the pods, storage, secrets, queue, deadlines.

`cluster/on_kubernetes/rayjob.py` makes a RayJob of KubeRay 1.7 from it. What KubeRay or Kueue would refuse only after the job was accepted is refused here.
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
    """Ray's autoscaler adds pods when workers wait for room, and takes idle ones away."""

    min_workers: int = 0
    """Workers whose pods are always there."""
    max_workers: int
    """Workers whose pods there may be at most."""
    idle_timeout_s: int = 300
    """How long a pod may be idle; too short a time takes away the pods of workers that are being started again."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_workers <= self.max_workers or self.max_workers < 1:
            raise ValueError(
                f"min_workers is {self.min_workers} and max_workers {self.max_workers}; use 0 <= min_workers <= max_workers, and at least one"
            )
        if self.idle_timeout_s < 1:
            raise ValueError(f"idle_timeout_s is {self.idle_timeout_s}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Gang:
    """All pods at once or none, by the batch scheduler that the KubeRay operator was started with (--batch-scheduler)."""

    scheduler: Literal["volcano", "yunikorn", "scheduler-plugins", "kai-scheduler"]
    """The scheduler."""
    queue: str | None = None
    """Its queue."""


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """How the job runs on Kubernetes, as a RayJob."""

    image: str | None = None
    """Image of all pods: this checkout, built with k8s/Dockerfile; needed to submit."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node fetches the image."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets that open the image's registry."""
    workers_per_pod: int = 1
    """Workers of one pod: as many as a node has GPUs, so that they share its fast links."""
    gpu_resource: str = "nvidia.com/gpu"
    """What the nodes call a GPU."""
    memory: str = "8Gi"
    """Memory of a worker pod."""
    shared_memory: str = "2Gi"
    """/dev/shm of a worker pod, a part of its memory: half for Ray's object store, half for NCCL and data workers."""
    head_cpus: int = 2
    """CPU cores of the head pod, which runs the driver and no worker."""
    head_memory: str = "8Gi"
    """Memory of the head pod."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that the worker pods put up with."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that worker pods may run on."""
    service_account: str | None = None
    """Whose name the pods carry; no token of it is mounted unless Ray's autoscaler needs one."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of every pod, such as NCCL's settings; nothing secret: it is readable in the RayJob."""
    secret_env: tuple[SecretEnv, ...] = ()
    """Environment whose values are in Secrets."""
    secret_volumes: tuple[SecretVolume, ...] = ()
    """Secrets as files."""
    claims: tuple[Claim, ...] = ()
    """Storage claims."""
    object_store: ObjectStore | None = None
    """The store behind s3:// URLs."""
    backoff_limit: int = 0
    """How often a failed job is tried again, each time on a new RayCluster; it goes on from its last checkpoint."""
    deadline_s: int | None = None
    """Seconds after which a try is ended, its waiting included, and with it the job; null: none."""
    start_deadline_s: int | None = None
    """Seconds that the job may wait for its pods; null: for ever."""
    delete_after_s: int | None = 600
    """Seconds from the job's end to the removal of its pods; null: they stay until `switchwork stop`."""
    queue: str | None = None
    """Kueue LocalQueue: the job waits, suspended, until the quota admits all of it."""
    priority: str | None = None
    """With a queue Kueue's WorkloadPriorityClass, else the pods' PriorityClass."""
    gang: Gang | None = None
    """All pods at once or none, where there is no Kueue."""
    autoscaling: Autoscaling | None = None
    """Pods come and go; null: as many as cluster.workers takes at most, all there before the job starts."""
    start_timeout_s: int = 30
    """How long workers may take to start before Ray looks again at which nodes are there: a lost node is noticed after about this time and 20 s more."""
    suspend: bool = False
    """Submit it asleep; `switchwork resume` starts it."""

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
        names = [*(self.env), *(each.name for each in self.secret_env)]
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
                f"shared_memory: {self.shared_memory} is a part of the pod's memory of {self.memory}, and must be less; raise memory"
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
        paths = [*(each.path for each in self.claims), *(each.path for each in self.secret_volumes)]
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
        if (
            self.deadline_s is not None
            and self.start_deadline_s is not None
            and self.start_deadline_s >= self.deadline_s
        ):
            raise ValueError(
                f"start_deadline_s is {self.start_deadline_s}, and the whole job ends after deadline_s {self.deadline_s}; use less"
            )

    def _check_together(self) -> None:
        if self.delete_after_s is None and (self.queue or self.suspend):
            name, reason = (
                ("queue", "Kueue admits no job that keeps its pods")
                if self.queue
                else ("suspend", "KubeRay suspends no job that keeps its pods")
            )
            raise ValueError(
                f"delete_after_s is null with {name} {getattr(self, name)!r}: {reason}; set delete_after_s"
            )
        if self.queue and self.autoscaling:
            raise ValueError(
                f"autoscaling with queue {self.queue!r}: Kueue admits no job whose size changes; leave one of them out"
            )
        if self.queue and self.gang:
            raise ValueError(
                f"gang with queue {self.queue!r}: Kueue admits all of the job or nothing by itself; leave gang out"
            )
        if self.queue and self.suspend:
            raise ValueError(
                f"suspend with queue {self.queue!r}: Kueue wakes the job when the quota admits it; leave suspend out, and use `switchwork suspend`"
            )
