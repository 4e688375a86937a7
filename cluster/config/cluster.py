"""The section `cluster` of a job file: how many workers it has, and where they run."""

from dataclasses import dataclass, field

from cluster.config.kubernetes import KubernetesConfig
from cluster.config.pods import check_variable
from cluster.placement import RankOrder, Strategy

_OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Number, resources and placement of a job's Ray workers."""

    workers: int | tuple[int, int] = 1
    """Number of workers; with GPUs, one per GPU.

    [min, max]: as many as there is room for, more or fewer as nodes come and go.
    """
    workers_multiple: int = 1
    """With a range of workers, only multiples of this number, such as the GPUs of a node."""
    cpus_per_worker: float = 1
    """CPU cores per worker, and its number of threads."""
    gpus_per_worker: float | None = None
    """GPUs per worker; null: one where the cluster has GPUs."""
    placement: Strategy = "PACK"
    """PACK: on few nodes; STRICT_PACK: on one node; SPREAD: evenly across all nodes."""
    ranks: RankOrder = "by_node"
    """How ranks are assigned to nodes.

    by_node: ranks that share a set of experts sit on one node where they fit. round_robin:
    neighbours in rank sit on different nodes. Tokens then cross the network to their experts, and
    the copies of an expert share a node where they fit, which suits large experts and few tokens.
    """
    node_labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that workers may run on (`ray start --labels`).

    Each is `value`, `!value`, `in(a, b)` or `!in(a, b)`.
    """
    env: dict[str, str] = field(default_factory=dict)
    """Environment of the workers, such as NCCL_SOCKET_IFNAME and NCCL_IB_HCA.

    It is kept with the run, so put no secrets here.
    """
    max_failures: int = 0
    """Number of times that the workers may be restarted after a failure."""
    address: str | None = None
    """Address of the Ray cluster to join; null: RAY_ADDRESS, else a new cluster on this machine."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """Image, pods, storage and queue of a job that is submitted to Kubernetes."""

    def __post_init__(self) -> None:
        if self.min_workers < 1:
            raise ValueError(f"workers is {self.min_workers}; it must be at least 1")
        if self.min_workers > self.max_workers:
            bounds = f"[{self.min_workers}, {self.max_workers}]"
            raise ValueError(f"workers is {bounds}; the first number must not be above the second")
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cpus_per_worker is {self.cpus_per_worker}; it must be above 0")
        if not self._are_multiples():
            raise ValueError(
                f"workers is {self.workers}, and workers_multiple {self.workers_multiple}; "
                "use numbers of workers that are multiples of it"
            )
        for name in self.env:
            check_variable(name, "env")
            if name in _OURS:
                raise ValueError(f"env: {name} is set for each worker by Switchwork; leave it out")

    def _are_multiples(self) -> bool:
        multiple = self.workers_multiple
        return multiple >= 1 and self.min_workers % multiple == 0 and self.max_workers % multiple == 0

    @property
    def selector(self) -> dict[str, str]:
        """`node_labels` without spaces, which Ray would read as part of a label."""
        return {name: value.replace(" ", "") for name, value in self.node_labels.items()}

    @property
    def min_workers(self) -> int:
        """The smallest number of workers that the job may run on."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The largest number of workers that the job may run on."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def sizes(self) -> range:
        """Every number of workers that the job may run on."""
        return range(self.min_workers, self.max_workers + 1, self.workers_multiple)
