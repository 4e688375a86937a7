"""The `switchwork` command.

A wrong input ends with exit code 2 and one line that names the field, the value and the fix.
"""

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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the resolved job, then stop.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last intact checkpoint, in the same MLflow run.")
    ] = False,
) -> None:
    """Train a job from this machine: start or join Ray, and show the progress until it ends."""
    from launch.commands.train import dry_run as show_job
    from launch.commands.train import train as run_job

    if dry_run:
        show_job(console, job, overrides or [], resume)
    else:
        run_job(console, job, overrides or [], resume, time.time())


@app.command()
def data(
    job: JobFile, overrides: Overrides = None, n: Annotated[int, typer.Option("--n", help="The number of samples.")] = 3
) -> None:
    """Show the first decoded training samples, as the model will see them."""
    from launch.commands.data import show_data

    show_data(console, job, overrides or [], n)


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="The number of GPUs. Default: the job's workers.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="h100-80gb", help="The kind of GPU. Default: this machine's, or cpu.")
    ] = None,
    per_node: Annotated[
        int | None, typer.Option("--per-node", help="GPUs that share a node. Default: the usual number for this kind.")
    ] = None,
    efficiency: Annotated[
        float, typer.Option("--efficiency", help="The share of the peak FLOPs that matrix products reach.")
    ] = 0.45,
    notice: Annotated[
        float, typer.Option("--notice", help="Seconds between the notice of a preemption and the end of the node.")
    ] = 30.0,
    storage: Annotated[
        float, typer.Option("--storage", help="GB/s that all workers together write to run.root.")
    ] = 2.0,
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE.png", help="Draw the memory of each layout into this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether the job will divide, fit and end in time, before any GPU is requested.

    The exit code is 1 if it will not.
    """
    from launch.commands.plan import MachineOptions
    from launch.commands.plan import plan as make_plan

    options = MachineOptions(gpu=gpu, per_node=per_node, efficiency=efficiency, notice_s=notice, storage_gb=storage)
    if not make_plan(console, job, overrides or [], gpus, options, as_json, picture):
        raise typer.Exit(1)


@app.command()
def audit(job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check the job's gradients, with its sharding, precision and machine, against float64.

    Two optimiser steps are compared. The exit code is 1 if the gradients are wrong.
    """
    from launch.audit.run import audit as compare

    if not compare(console, job, overrides or [], as_json):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of job files, for editors."""
    from launch.commands.schema import job_schema

    print(json.dumps(job_schema(), indent=1))


for group in (cli_jobs, cli_runs, cli_proofs):
    app.add_typer(group.app)


def main() -> None:
    """Run the console script; what the user can mend is printed as one line."""
    try:
        app()
    except ValueError as error:
        if os.environ.get("SWITCHWORK_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
