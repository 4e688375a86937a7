"""The part of a job that says where its workers run."""

from dataclasses import dataclass, field

from cluster.config.kubernetes import KubernetesConfig
from cluster.config.pods import check_variable
from cluster.placement import RankOrder, Strategy

_OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Ray workers and what each of them gets."""

    workers: int | tuple[int, int] = 1
    """Number of workers; with GPUs, one a GPU. [min, max]: as many as there is room for, more or fewer as nodes come and go."""
    workers_multiple: int = 1
    """With a range of workers: only multiples of this number, such as the GPUs of a node."""
    cpus_per_worker: float = 1
    """CPU cores of a worker, and its threads."""
    gpus_per_worker: float | None = None
    """GPUs of a worker; null: one where the cluster has GPUs."""
    placement: Strategy = "PACK"
    """PACK: on as few nodes as there is room on; STRICT_PACK: all on one node, or none; SPREAD: evenly over the nodes."""
    ranks: RankOrder = "by_node"
    """by_node: ranks that share a set of experts sit on one node where they fit. round_robin: neighbours in rank sit on different nodes, so that
    tokens cross the network to their experts, and the copies of an expert share a node where they fit: for large experts and few tokens."""
    node_labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that workers may run on (`ray start --labels`): value, !value, in(a, b) or !in(a, b) each."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of the workers, such as NCCL's settings (NCCL_SOCKET_IFNAME, NCCL_IB_HCA); nothing secret: it is kept with the run."""
    max_failures: int = 0
    """How often the workers may be started again after a failure."""
    address: str | None = None
    """Ray cluster to join; null: RAY_ADDRESS, else a new one on this machine."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """Image, pods, storage and queue, where the job goes to Kubernetes."""

    def __post_init__(self) -> None:
        if self.min_workers < 1:
            raise ValueError(f"workers is {self.min_workers}; it must be at least 1")
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"workers is [{self.min_workers}, {self.max_workers}]; the first must not be above the second"
            )
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cpus_per_worker is {self.cpus_per_worker}; it must be above 0")
        if (
            self.workers_multiple < 1
            or self.min_workers % self.workers_multiple
            or self.max_workers % self.workers_multiple
        ):
            raise ValueError(
                f"workers is {self.workers}, and workers_multiple {self.workers_multiple}; use numbers of workers that are multiples of it"
            )
        for name in self.env:
            check_variable(name, "env")
            if name in _OURS:
                raise ValueError(f"env: {name} is set for each worker by Switchwork; leave it out")

    @property
    def selector(self) -> dict[str, str]:
        """`node_labels` as Ray takes them: it looks for a space as a part of the label."""
        return {name: value.replace(" ", "") for name, value in self.node_labels.items()}

    @property
    def min_workers(self) -> int:
        """The fewest workers that the job may run on."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the job may run on."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def sizes(self) -> range:
        """Every number of workers that there may be."""
        return range(self.min_workers, self.max_workers + 1, self.workers_multiple)
