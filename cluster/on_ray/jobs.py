"""Jobs on a Ray cluster, through its Jobs API: the client may leave, the job goes on.

The code travels with the job: a copy of the five packages and the job file. A cluster that wants a token finds it in
RAY_AUTH_TOKEN (or ~/.ray/auth_token), as Ray's own commands do.
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

if TYPE_CHECKING:  # Ray takes a second to import, and its address may be wrong; a job's config imports torch, and only `submit` has one
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

    from cluster.submission import Submission

PACKAGES = ("launch", "cluster", "trainer", "models", "data")
_STOP_WAIT_S = 600
_AGENT_WAIT_S = 60.0
_NO_AGENT = "No available agent"
"""What a head says that answers already and is not yet able to start anything."""
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}
"""A job that is stopped gets SIGTERM, saves and leaves; Ray would kill it after 3 s."""


def client(address: str) -> "JobSubmissionClient":
    """A client of the Jobs API at `address` (http://HEAD:8265). Raises ValueError if nobody answers there, or refuses."""
    if os.environ.get("RAY_AUTH_TOKEN") or Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ValueError(
            f"--to: no Ray cluster at {address} ({_line(error)}); is the head up, its port 8265 open, and RAY_AUTH_TOKEN right?"
        ) from None


def submit(address: str, job: "Submission") -> str:
    """Start the job and return its id."""
    root = job.run.root
    if "://" not in root and not Path(root).is_absolute():
        raise ValueError(
            f"run.root: {root} is relative, but a job on a cluster needs a folder that all its nodes share, or a URL; use run.root=/shared/runs, say"
        )
    job = job.tracked_at(_tracking_uri(job))
    jobs = client(address)
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            shutil.copytree(CHECKOUT / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / f"{job.name}.yaml").write_text(yaml.safe_dump(job.values, sort_keys=False))
        return _submit(jobs, address, job, folder)


def _tracking_uri(job: "Submission") -> str:
    """The job's own, else this shell's, else a database beside the runs. Raises ValueError where the runs are at a URL, which has none."""
    root = job.run.root
    uri = job.run.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and "://" in root:
        raise ValueError("run.tracking.uri: a run at a URL needs an MLflow server; set it, or MLFLOW_TRACKING_URI")
    return uri or f"sqlite:///{root}/mlflow.db"


def _submit(jobs: "JobSubmissionClient", address: str, job: "Submission", folder: str) -> str:
    """Hand over the working directory `folder`, and ask again while the head has no agent yet."""
    entrypoint = f"python -m launch.cli train {job.name}.yaml{' --resume' if job.resume else ''}"
    job_id = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    environment = {"working_dir": folder, "env_vars": _ENVIRONMENT | {"SWITCHWORK_COMMIT": code_name()}}
    deadline = time.monotonic() + _AGENT_WAIT_S
    while True:
        try:
            return str(jobs.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=environment))
        except (RuntimeError, ConnectionError) as error:
            if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise ValueError(f"--to: {address} did not take the job ({_line(error)})") from None
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
            f"job {job_id}: {address} does not know it; `switchwork jobs --to {address}` lists those it knows"
        ) from None


def logs(address: str, job_id: str, follow: bool) -> Iterator[str]:
    """What the job has printed; with `follow` until it ends."""
    status(address, job_id)
    jobs, printed = client(address), 0
    while True:
        ended = not follow or jobs.get_job_status(job_id).is_terminal()
        text = str(jobs.get_job_logs(job_id))
        yield text[printed:]
        printed = len(text)
        if ended:
            return
        time.sleep(1.0)


def stop(address: str, job_id: str) -> None:
    """Have the cluster stop the job, which saves first."""
    status(address, job_id)
    client(address).stop_job(job_id)


def suspend(address: str, job_id: str) -> None:
    """Ray's Jobs API has no such thing. Raises ValueError."""
    raise ValueError(
        f"job {job_id}: a Ray head suspends no jobs; use `switchwork stop`, and later `switchwork submit --resume`"
    )


def resume(address: str, job_id: str) -> None:
    """Ray's Jobs API has no such thing. Raises ValueError."""
    suspend(address, job_id)


def _facts(details: "JobDetails") -> dict[str, str]:
    return {
        "id": str(details.submission_id),
        "state": str(details.status.value),
        "message": _line(details.message or ""),
    }


def _line(text: object) -> str:
    return one_line(text, 300)
