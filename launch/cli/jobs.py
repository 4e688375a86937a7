"""Commands for a cluster's jobs: submit, jobs, status, logs, stop, suspend, resume."""

import json
from typing import Annotated

import typer

from launch.cli.arguments import JobFile, Json, Overrides

app = typer.Typer()

To = Annotated[str, typer.Option("--to", metavar="http://HEAD:8265|k8s://CONTEXT/NAMESPACE", help="the cluster")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="a job's id, as submit printed it")]


@app.command()
def submit(
    job: JobFile,
    to: To,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run of that name, from its last checkpoint")
    ] = False,
    render: Annotated[bool, typer.Option("--render", help="Kubernetes: print the manifest instead")] = False,
    as_json: Json = False,
) -> None:
    """Hand the job to a Ray cluster or to Kubernetes, print its id and return."""
    from cluster.jobs import jobs_at, render_for
    from launch.config import for_cluster

    submission = for_cluster(job, overrides or [], resume)
    if render:
        print(render_for(to, submission), end="")
        return
    job_id = jobs_at(to).submit(to, submission)
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
    job_id: JobId,
    to: To,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="until the job ends, over its restarts")] = False,
    as_json: Json = False,
) -> None:
    """What a job has printed."""
    from cluster.jobs import jobs_at

    for text in jobs_at(to).logs(to, job_id, follow):
        print(
            "\n".join(json.dumps({"line": line}) for line in text.splitlines()) if as_json else text,
            end="\n" if as_json and text else "",
            flush=True,
        )


@app.command()
def stop(job_id: JobId, to: To, as_json: Json = False) -> None:
    """Stop a job: it saves, and leaves. On Kubernetes it is removed, with all that it made there, and does not wait to save."""
    from cluster.jobs import jobs_at

    jobs_at(to).stop(to, job_id)
    _say_done("stop", job_id, as_json)


@app.command()
def suspend(job_id: JobId, to: To, as_json: Json = False) -> None:
    """Kubernetes: give back a job's pods; its checkpoints stay."""
    from cluster.jobs import jobs_at

    jobs_at(to).suspend(to, job_id)
    _say_done("suspend", job_id, as_json)


@app.command()
def resume(job_id: JobId, to: To, as_json: Json = False) -> None:
    """Kubernetes: let a suspended job go on, from its last checkpoint."""
    from cluster.jobs import jobs_at

    jobs_at(to).resume(to, job_id)
    _say_done("resume", job_id, as_json)


def _say_done(command: str, job_id: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"id": job_id, "done": command}))
