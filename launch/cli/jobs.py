"""Commands for the jobs of a cluster: submit, jobs, status, logs, stop, suspend, resume."""

import json
from typing import Annotated

import typer

from launch.cli.arguments import JobFile, Json, Overrides

app = typer.Typer()

To = Annotated[str, typer.Option("--to", metavar="http://HEAD:8265|k8s://CONTEXT/NAMESPACE", help="The cluster.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The id of the job, as `submit` printed it.")]


@app.command()
def submit(
    job: JobFile,
    to: To,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run of this name from its last checkpoint.")
    ] = False,
    render: Annotated[
        bool, typer.Option("--render", help="Kubernetes: print the manifest, and submit nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Submit a job to a Ray cluster or to Kubernetes, print its id and return."""
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
    """List the jobs of a cluster, the newest first."""
    from cluster.jobs import jobs_at

    listing = jobs_at(to).listing(to)
    if as_json:
        print(json.dumps(listing, indent=1))
    else:
        print("\n".join(f"{job['state']:10} {job['id']}" for job in listing))


@app.command()
def status(job_id: JobId, to: To, as_json: Json = False) -> None:
    """Print the state of a job, and why: what it waits for, or what it died of."""
    from cluster.jobs import jobs_at

    job = jobs_at(to).status(to, job_id)
    print(json.dumps(job) if as_json else f"{job['id']}: {job['state']}. {job['message']}")


@app.command()
def logs(
    job_id: JobId,
    to: To,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Follow until the job ends, across its restarts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the output of a job."""
    from cluster.jobs import jobs_at

    for text in jobs_at(to).logs(to, job_id, follow):
        if as_json:
            for line in text.splitlines():
                print(json.dumps({"line": line}), flush=True)
        else:
            print(text, end="", flush=True)


@app.command()
def stop(job_id: JobId, to: To, as_json: Json = False) -> None:
    """Stop a job: it saves a checkpoint and ends.

    On Kubernetes the job is removed with everything that it created there, and does not save.
    """
    from cluster.jobs import jobs_at

    jobs_at(to).stop(to, job_id)
    _say_done("stop", job_id, as_json)


@app.command()
def suspend(job_id: JobId, to: To, as_json: Json = False) -> None:
    """Kubernetes: release the pods of a job; its checkpoints stay."""
    from cluster.jobs import jobs_at

    jobs_at(to).suspend(to, job_id)
    _say_done("suspend", job_id, as_json)


@app.command()
def resume(job_id: JobId, to: To, as_json: Json = False) -> None:
    """Kubernetes: let a suspended job continue from its last checkpoint."""
    from cluster.jobs import jobs_at

    jobs_at(to).resume(to, job_id)
    _say_done("resume", job_id, as_json)


def _say_done(command: str, job_id: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"id": job_id, "done": command}))
