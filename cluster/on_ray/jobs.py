"""Jobs on a Ray cluster, through its Jobs API; a job continues after its client has left.

The code travels with the job, as a copy of the five packages next to the job file. The token of a
cluster is read from RAY_AUTH_TOKEN or ~/.ray/auth_token, as Ray's own commands do.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from trainer.checkout import CHECKOUT
from trainer.parsing import one_line
from trainer.records.code_version import code_name

if TYPE_CHECKING:
    # Ray takes a second to import, which is wasted if the address is wrong.
    # A job's config imports torch, and only `submit` has one.
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

    from cluster.submission import Submission

PACKAGES = ("launch", "cluster", "trainer", "models", "data")
_STOP_WAIT_S = 600
_AGENT_WAIT_S = 60.0
_NO_AGENT = "No available agent"
"""The message of a head that already answers but cannot start jobs yet."""
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}
"""A stopped job gets SIGTERM and saves before it leaves; by default Ray kills it after 3 s."""


def client(address: str) -> "JobSubmissionClient":
    """A client of the Jobs API at `address` (http://HEAD:8265).

    Raises ValueError if there is no answer, or the token is refused.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ValueError(
            f"--to: no Ray cluster at {address} ({_short(error)}); "
            "is the head up, its port 8265 open, and RAY_AUTH_TOKEN right?"
        ) from None


def submit(address: str, job: "Submission") -> str:
    """Start the job and return its ID."""
    root = job.run.root
    if "://" not in root and not Path(root).is_absolute():
        raise ValueError(
            f"run.root: {root} is relative, but a job on a cluster needs a URL or a folder that all its nodes share; "
            "use run.root=/shared/runs, say"
        )
    job = job.tracked_at(_tracking_uri(job))
    jobs = client(address)
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            shutil.copytree(CHECKOUT / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / f"{job.name}.yaml").write_text(yaml.safe_dump(job.values, sort_keys=False))
        return _submit(jobs, address, job, folder)


def _tracking_uri(job: "Submission") -> str:
    """The job's own tracking URI, else this shell's, else that of a database next to the runs.

    Raises ValueError if the runs are at a URL, which cannot hold a database.
    """
    root = job.run.root
    uri = job.run.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and "://" in root:
        raise ValueError("run.tracking.uri: a run at a URL needs an MLflow server; set it, or MLFLOW_TRACKING_URI")
    return uri or f"sqlite:///{root}/mlflow.db"


def _submit(jobs: "JobSubmissionClient", address: str, job: "Submission", folder: str) -> str:
    """Submit the working directory `folder`; try again while the head has no agent yet."""
    entrypoint = f"python -m launch.cli train {job.name}.yaml{' --resume' if job.resume else ''}"
    job_id = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    environment = {"working_dir": folder, "env_vars": _ENVIRONMENT | {"SWITCHWORK_COMMIT": code_name()}}
    deadline = time.monotonic() + _AGENT_WAIT_S
    while True:
        try:
            return str(jobs.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=environment))
        except (RuntimeError, ConnectionError) as error:
            if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise ValueError(f"--to: {address} did not accept the job ({_short(error)})") from None
        time.sleep(1.0)


def listing(address: str) -> list[dict[str, str]]:
    """All jobs that were submitted to the cluster, the newest first."""
    jobs = [details for details in client(address).list_jobs() if details.submission_id]
    return [_facts(details) for details in sorted(jobs, key=lambda details: -(details.start_time or 0))]


def status(address: str, job_id: str) -> dict[str, str]:
    """State and message of one job. Raises ValueError if there is no such job."""
    try:
        return _facts(client(address).get_job_info(job_id))
    except RuntimeError:
        raise ValueError(
            f"job {job_id}: not known to {address}; choose one that `switchwork jobs --to {address}` lists"
        ) from None


def logs(address: str, job_id: str, follow: bool) -> Iterator[str]:
    """Yield the output of the job's driver; with `follow` until the job ends."""
    status(address, job_id)
    jobs = client(address)
    printed = 0
    while True:
        ended = not follow or jobs.get_job_status(job_id).is_terminal()
        text = str(jobs.get_job_logs(job_id))
        yield text[printed:]
        printed = len(text)
        if ended:
            return
        time.sleep(1.0)


def stop(address: str, job_id: str) -> None:
    """Ask the cluster to stop the job, which saves first."""
    status(address, job_id)
    client(address).stop_job(job_id)


def suspend(address: str, job_id: str) -> None:
    """Raises ValueError, because Ray's Jobs API cannot suspend jobs."""
    raise ValueError(
        f"job {job_id}: a Ray head suspends no jobs; use `switchwork stop`, and later `switchwork submit --resume`"
    )


def resume(address: str, job_id: str) -> None:
    """Raises ValueError, because Ray's Jobs API cannot suspend jobs."""
    suspend(address, job_id)


def _facts(details: "JobDetails") -> dict[str, str]:
    return {
        "id": str(details.submission_id),
        "state": str(details.status.value),
        "message": _short(details.message or ""),
    }


def _short(text: object) -> str:
    return one_line(text, 300)
