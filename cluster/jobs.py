"""Jobs on a remote cluster, which is a Ray head (http://) or Kubernetes (k8s://)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import yaml

if TYPE_CHECKING:  # a job's config imports torch, and only `submit` has one
    from cluster.submission import Submission


class Jobs(Protocol):
    """The commands that both kinds of cluster understand; `address` is the value of --to.

    Every command raises ValueError with a message of one line for a problem that the user can
    solve.
    """

    def submit(self, address: str, job: "Submission") -> str:
        """Start the job and return its ID."""

    def listing(self, address: str) -> list[dict[str, str]]:
        """ID, state and message of all jobs, the newest first."""

    def status(self, address: str, job_id: str) -> dict[str, str]:
        """ID, state and message of one job."""

    def logs(self, address: str, job_id: str, follow: bool) -> Iterator[str]:
        """Yield the output of the job's driver; with `follow` until the job ends."""

    def stop(self, address: str, job_id: str) -> None:
        """End the job."""

    def suspend(self, address: str, job_id: str) -> None:
        """Give back the resources of the job, which can be resumed later."""

    def resume(self, address: str, job_id: str) -> None:
        """Let a suspended job continue."""


def jobs_at(address: str) -> Jobs:
    """The jobs of the cluster at `address`. Raises ValueError if it is neither kind of cluster."""
    match address.partition("://")[0]:
        case "k8s":
            from cluster.on_kubernetes import jobs as kubernetes_jobs

            return kubernetes_jobs
        case "http" | "https":
            from cluster.on_ray import jobs as ray_jobs

            return ray_jobs
        case _:
            raise ValueError(
                f"--to: {address!r} is not a cluster's address; use http://HEAD:8265 or k8s://CONTEXT/NAMESPACE"
            )


def render_for(address: str, job: "Submission") -> str:
    """The manifest that `submit` would send, as YAML, without asking a cluster.

    Raises ValueError for a Ray head, which accepts no manifests.
    """
    if not address.startswith("k8s://"):
        raise ValueError(
            f"--render: {address} accepts no manifest; leave --render out, or use --to k8s://CONTEXT/NAMESPACE"
        )
    from cluster.on_kubernetes.jobs import manifest

    return str(yaml.safe_dump(manifest(address, job), sort_keys=False, width=160))
