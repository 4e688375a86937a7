"""Commands for a cluster's jobs: submit, jobs, status, logs, stop, suspend, resume."""

import json
from typing import Annotated, Literal

import typer

from launch.arguments import JobFile, Json, Overrides

app = typer.Typer()

To = Annotated[str, typer.Option("--to", metavar="http://HEAD:8265|k8s://CONTEXT/NAMESPACE", help="the cluster")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="a job's id, as submit printed it")]


@app.command()
def submit(
    job: JobFile,
    to: To,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run of that name, from its last checkpoint")] = False,
    render: Annotated[bool, typer.Option("--render", help="Kubernetes: print the manifest instead")] = False,
    as_json: Json = False,
) -> None:
    """Hand the job to a Ray cluster or to Kubernetes, print its id and return."""
    from cluster.jobs import jobs_at, render_for
    from launch.config import for_cluster

    name, values = for_cluster(job, overrides or [])
    if render:
        print(render_for(to, values, name, resume), end="")
        return
    job_id = jobs_at(to).submit(to, values, name, resume)
    print(json.dumps({"id": job_id}) if as_json else job_id)


@app.command()
def jobs(to: To, as_json: Json = False) -> None:
    """The jobs of a cluster, the newest first."""
    from cluster.jobs import jobs_at

    found = jobs_at(to).listing(to)
    print(json.dumps(found, indent=1) if as_json else "\n".join(f"{each['state']:10} {each['id']}" for each in found))


@app.command()
def status(job_id: JobId, to: To, as_json: Json = False) -> None:
    """State of a job, and why: what it waits for, or what it died of."""
    from cluster.jobs import jobs_at

    found = jobs_at(to).status(to, job_id)
    print(json.dumps(found) if as_json else f"{found['id']}: {found['state']}. {found['message']}")


@app.command()
def logs(
    job_id: JobId, to: To, follow: Annotated[bool, typer.Option("-f", "--follow", help="until the job ends, over its restarts")] = False, as_json: Json = False
) -> None:
    """What a job has printed."""
    from cluster.jobs import jobs_at

    for text in jobs_at(to).logs(to, job_id, follow):
        print("\n".join(json.dumps({"line": line}) for line in text.splitlines()) if as_json else text, end="\n" if as_json and text else "", flush=True)


@app.command()
def stop(job_id: JobId, to: To, as_json: Json = False) -> None:
    """Stop a job: it saves, and leaves. On Kubernetes it is removed, with all that it made there, and does not wait to save."""
    _tell_job("stop", job_id, to, as_json)


@app.command()
def suspend(job_id: JobId, to: To, as_json: Json = False) -> None:
    """Kubernetes: give back a job's pods; its checkpoints stay."""
    _tell_job("suspend", job_id, to, as_json)


@app.command()
def resume(job_id: JobId, to: To, as_json: Json = False) -> None:
    """Kubernetes: let a suspended job go on, from its last checkpoint."""
    _tell_job("resume", job_id, to, as_json)


def _tell_job(what: Literal["stop", "suspend", "resume"], job_id: str, to: str, as_json: bool) -> None:
    from cluster.jobs import jobs_at

    cluster = jobs_at(to)
    {"stop": cluster.stop, "suspend": cluster.suspend, "resume": cluster.resume}[what](to, job_id)
    if as_json:
        print(json.dumps({"id": job_id, "done": what}))
