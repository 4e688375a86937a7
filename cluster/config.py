"""The part of a job that says where its workers run."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Ray workers and what each of them gets."""

    workers: int = 1
    """Number of workers; with GPUs, one a GPU."""
    cpus_per_worker: float = 1
    """CPU cores of a worker, and its threads."""
    gpus_per_worker: float | None = None
    """GPUs of a worker; null: one where the cluster has GPUs."""
    max_failures: int = 0
    """How often the workers may be started again after a failure."""
    address: str | None = None
    """Ray cluster to join; null: RAY_ADDRESS, else a new one on this machine."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1")
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cpus_per_worker is {self.cpus_per_worker}; it must be above 0")
