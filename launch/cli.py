"""The `switchwork` command. A wrong input ends with exit code 2 and one line that names the field, the values and the fix."""

import json
import os
import sys
import time
from typing import Annotated, Literal

import typer
from rich.console import Console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train large models on a Ray cluster, and prove it exact.",
)
console = Console(soft_wrap=True)

JobFile = Annotated[str, typer.Argument(metavar="JOB.yaml", help="the job file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="fields of the job, set from here")]


@app.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, print the resolved job, and stop")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint, in the same MLflow run")] = False,
) -> None:
    """Train here: start or join Ray, show progress, until done."""
    from launch.train import dry_run as show_job
    from launch.train import train as run_job

    if dry_run:
        show_job(console, job, overrides or [], resume)
    else:
        run_job(console, job, overrides or [], resume, time.time())


To = Annotated[str, typer.Option("--to", metavar="http://HEAD:8265|k8s://CONTEXT/NAMESPACE", help="the cluster")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="a job's id, as submit printed it")]
Json = Annotated[bool, typer.Option("--json", help="for programs")]


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


@app.command()
def data(job: JobFile, overrides: Overrides = None, n: Annotated[int, typer.Option("--n", help="how many")] = 3) -> None:
    """Print the first decoded training samples: what the model will see."""
    from launch.inspect import show_data

    show_data(console, job, overrides or [], n)


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="how many; else the job's workers")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="h100-80gb", help="which; else this machine's, or cpu")] = None,
    per_node: Annotated[int | None, typer.Option("--per-node", help="GPUs that share a node; else as usual for this GPU")] = None,
    efficiency: Annotated[float, typer.Option("--efficiency", help="share of the peak that matrix products reach")] = 0.45,
    notice: Annotated[float, typer.Option("--notice", help="seconds from the notice of a preemption to its end")] = 30.0,
    storage: Annotated[float, typer.Option("--storage", help="GB/s that all workers together write to run.root")] = 2.0,
    picture: Annotated[str | None, typer.Option("--picture", metavar="FILE.png", help="draw the memory of each layout")] = None,
    as_json: Json = False,
) -> None:
    """Will it fit, divide and end in time? Before any GPU is asked for; exit code 1 for no."""
    from launch.plan import plan as make_plan

    options = {"gpu": gpu, "per_node": per_node, "efficiency": efficiency, "notice_s": notice, "storage_gb": storage}
    if not make_plan(console, job, overrides or [], gpus, options, as_json, picture):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """The JSON Schema of job files, for editors."""
    from launch.schema import job_schema

    print(json.dumps(job_schema(), indent=1))


RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="the run's folder, URL, or name below runs/")]

Rules = Annotated[str | None, typer.Option("--rules", metavar="FILE.lp", help="rules that judge each text")]
Graph = Annotated[str | None, typer.Option("--graph", metavar="FILE.csv|.nt", help="knowledge graph for the rules")]


@app.command()
def sample(
    run: RunFolder,
    n: Annotated[int, typer.Option("--n", help="how many")] = 2,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    prompt: Annotated[str | None, typer.Option("--prompt", help="how the text begins")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="how long")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 for the most probable token each time")] = None,
    rules: Rules = None,
    graph: Graph = None,
) -> None:
    """Samples from a run's last checkpoint; with --rules those only that break none."""
    from launch.inspect import show_samples
    from trainer.rules import RulesConfig

    changes = {"prompt": prompt, "sample_tokens": tokens, "temperature": temperature}
    given = {key: value for key, value in changes.items() if value is not None}
    show_samples(console, run, n, seed, given, RulesConfig(file=rules, graph=graph) if rules else None)


@app.command()
def promote(
    run: RunFolder,
    rules: Annotated[str, typer.Option("--rules", metavar="FILE.lp", help="rules over its measures and samples")],
    graph: Graph = None,
    name: Annotated[str, typer.Option("--name", help="model in the MLflow registry")] = "switchwork",
    samples: Annotated[int, typer.Option("--samples", help="texts to judge beside the measures")] = 0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Register a run's last checkpoint; it becomes champion only if the rules hold (exit code 1 if not)."""
    from launch.inspect import read_run
    from launch.rules import promote as register
    from trainer.rules import RulesConfig
    from trainer.run_folder import find_run

    folder = find_run(run)
    if not register(console, folder, read_run(folder), RulesConfig(file=rules, graph=graph), name, samples, seed):
        raise typer.Exit(1)


@app.command("eval")
def evaluate(run: RunFolder, as_json: Json = False) -> None:
    """The objective's own measures on a run's held-out data, from its last checkpoint, in one process."""
    from launch.inspect import evaluate_run

    figures = evaluate_run(console, run)
    if as_json:
        print(json.dumps(figures, indent=1))


@app.command()
def export(run: RunFolder, to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="a new folder or URL")]) -> None:
    """The weights of a run's last checkpoint as a folder that Hugging Face transformers loads."""
    from launch.export import export as write

    write(console, run, to)


@app.command()
def verify(target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="a run, or one of its checkpoints")]) -> None:
    """Derive again, offline, the receipts of checkpoints, and of a run all the data that its weights have seen."""
    from launch.verify import verify as derive_again

    if not derive_again(console, target):
        raise typer.Exit(1)


@app.command()
def chaos(
    job: JobFile,
    faults: Annotated[str, typer.Option("--faults", metavar="FILE", help="what goes wrong, and when: launch/configs/chaos_quickstart.yaml is one")],
    overrides: Overrides = None,
    folder: Annotated[str, typer.Option("--folder", help="a new folder for the two runs and drill.json")] = "drills/chaos",
) -> None:
    """A fire drill: the job without faults, then with them; ends with what each fault cost."""
    from launch.chaos import chaos as drill

    if not drill(console, job, faults, overrides or [], folder):
        raise typer.Exit(1)


prove = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Experiments that show what a part of this is worth, with intervals.")
app.add_typer(prove, name="prove")


@prove.callback()
def prove_group() -> None:
    """Makes `prove` a group while it has one member."""


@prove.command("moe")
def prove_moe(
    overrides: Overrides = None,
    job: Annotated[str | None, typer.Option("--job", metavar="JOB.yaml", help="default: the recipe launch/configs/prove_moe.yaml")] = None,
    experts: Annotated[str, typer.Option("--experts", help="numbers of experts beside the job's own")] = "4,8,16",
    seeds: Annotated[int, typer.Option("--seeds", help="how many, from the job's own on")] = 4,
    minutes: Annotated[float | None, typer.Option("--minutes", help="time for all of it: the speed is measured, and the steps follow")] = None,
    processes: Annotated[int | None, typer.Option("--processes", help="runs at a time; default: as many as there are cores for")] = None,
    folder: Annotated[str, typer.Option("--folder", help="runs, results.json and proof.png; runs that are there already are kept")] = "proofs/moe",
) -> None:
    """Switch beside dense at equal FLOPs, steps and data, with a frozen and a permuted router as controls: leads with intervals, and a verdict."""
    from launch.prove_moe import RECIPE, Options, prove

    prove(console, job or RECIPE, overrides or [], Options(experts=experts, seeds=seeds, processes=processes, minutes=minutes, folder=folder))


@app.command()
def diff(first: RunFolder, second: RunFolder, as_json: Json = False) -> None:
    """What two runs differ in: config, code, data, results."""
    from launch.diff import compare, show

    found = compare(first, second)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(console, first, second, found)


@app.command()
def ui(host: str = "127.0.0.1", port: int = 5000) -> None:
    """Open MLflow on the runs here."""
    from trainer.tracking import TrackingConfig, tracking_uri

    uri = tracking_uri(TrackingConfig())
    if uri.startswith("http"):
        console.print(f"the runs are at {uri}")
        return
    console.print(f"MLflow on {uri} at http://{host}:{port}; stop it with Ctrl-C")
    sys.stdout.flush()
    server = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    os.execve(sys.executable, server, os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"})


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
