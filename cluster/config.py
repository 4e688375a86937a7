"""The part of a job that says where its workers run."""

from dataclasses import dataclass

from cluster.kubernetes_config import KubernetesConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Ray workers and what each of them gets."""

    workers: int | tuple[int, int] = 1
    """Number of workers; with GPUs, one a GPU. [fewest, most]: as many as there is room for, more or fewer as nodes come and go."""
    cpus_per_worker: float = 1
    """CPU cores of a worker, and its threads."""
    gpus_per_worker: float | None = None
    """GPUs of a worker; null: one where the cluster has GPUs."""
    max_failures: int = 0
    """How often the workers may be started again after a failure."""
    address: str | None = None
    """Ray cluster to join; null: RAY_ADDRESS, else a new one on this machine."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """Image, pods, storage and queue, where the job goes to Kubernetes."""

    def __post_init__(self) -> None:
        if self.fewest < 1:
            raise ValueError(f"workers is {self.fewest}; it must be at least 1")
        if self.fewest > self.most:
            raise ValueError(f"workers is [{self.fewest}, {self.most}]; the first must not be above the second")
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cpus_per_worker is {self.cpus_per_worker}; it must be above 0")

    @property
    def fewest(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def sizes(self) -> range:
        """Every number of workers that there may be."""
        return range(self.fewest, self.most + 1)
