"""The `switchwork` command. A wrong input ends with exit code 2 and one line that names the field, the values and the fix."""

import json
import os
import sys
import time
from typing import Annotated

import typer

from launch.cli import jobs as cli_jobs
from launch.cli import proofs as cli_proofs
from launch.cli import runs as cli_runs
from launch.cli.arguments import JobFile, Json, Overrides, console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train large models on a Ray cluster, and prove it exact.",
)


@app.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, print the resolved job, and stop")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint, in the same MLflow run")
    ] = False,
) -> None:
    """Train here: start or join Ray, show progress, until done."""
    from launch.commands.train import dry_run as show_job
    from launch.commands.train import train as run_job

    if dry_run:
        show_job(console, job, overrides or [], resume)
    else:
        run_job(console, job, overrides or [], resume, time.time())


@app.command()
def data(
    job: JobFile, overrides: Overrides = None, n: Annotated[int, typer.Option("--n", help="how many")] = 3
) -> None:
    """Print the first decoded training samples: what the model will see."""
    from launch.commands.data import show_data

    show_data(console, job, overrides or [], n)


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="how many; else the job's workers")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="h100-80gb", help="which; else this machine's, or cpu")
    ] = None,
    per_node: Annotated[
        int | None, typer.Option("--per-node", help="GPUs that share a node; else as usual for this GPU")
    ] = None,
    efficiency: Annotated[
        float, typer.Option("--efficiency", help="share of the peak that matrix products reach")
    ] = 0.45,
    notice: Annotated[
        float, typer.Option("--notice", help="seconds from the notice of a preemption to its end")
    ] = 30.0,
    storage: Annotated[float, typer.Option("--storage", help="GB/s that all workers together write to run.root")] = 2.0,
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE.png", help="draw the memory of each layout")
    ] = None,
    as_json: Json = False,
) -> None:
    """Will it fit, divide and end in time? Before any GPU is asked for; exit code 1 for no."""
    from launch.commands.plan import MachineOptions
    from launch.commands.plan import plan as make_plan

    options = MachineOptions(gpu=gpu, per_node=per_node, efficiency=efficiency, notice_s=notice, storage_gb=storage)
    if not make_plan(console, job, overrides or [], gpus, options, as_json, picture):
        raise typer.Exit(1)


@app.command()
def audit(job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Are this job's gradients right, with its sharding, precision and machine? Two steps beside float64; exit code 1 for no."""
    from launch.audit.run import audit as compare

    if not compare(console, job, overrides or [], as_json):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """The JSON Schema of job files, for editors."""
    from launch.commands.schema import job_schema

    print(json.dumps(job_schema(), indent=1))


for group in (cli_jobs, cli_runs, cli_proofs):
    app.add_typer(group.app)


def main() -> None:
    """The console script: user errors as one line."""
    try:
        app()
    except ValueError as error:
        if os.environ.get("SWITCHWORK_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
