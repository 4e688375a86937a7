"""Commands for a run that is there: sample, eval, export, verify, promote, diff, ui."""

import json
import os
import sys
from typing import Annotated

import typer

from launch.cli.arguments import Json, RunFolder, console

app = typer.Typer()

Rules = Annotated[str | None, typer.Option("--rules", metavar="FILE.lp", help="rules that judge each text")]
Graph = Annotated[str | None, typer.Option("--graph", metavar="FILE.csv|.nt", help="knowledge graph for the rules")]


@app.command()
def sample(
    run: RunFolder,
    n: Annotated[int, typer.Option("--n", help="how many")] = 2,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    prompt: Annotated[str | None, typer.Option("--prompt", help="how the text begins")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="how long")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 for the most probable token each time")
    ] = None,
    rules: Rules = None,
    graph: Graph = None,
) -> None:
    """Samples from a run's last checkpoint; with --rules those only that break none."""
    from launch.commands.sample import show_samples
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
    from launch.commands.promote import promote as register
    from trainer.rules import RulesConfig
    from trainer.settle import find_run, read_run

    folder = find_run(run)
    if not register(console, folder, read_run(folder), RulesConfig(file=rules, graph=graph), name, samples, seed):
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    run: RunFolder,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="FILE.jsonl", help="questions with answers, instead of the held-out data"),
    ] = None,
    shots: Annotated[int, typer.Option("--shots", help="of the task, worked examples before each question")] = 0,
    style: Annotated[
        str,
        typer.Option(
            "--style", metavar="direct|chain_of_thought", help="of the task, the answer at once or after its steps"
        ),
    ] = "direct",
    tokens: Annotated[int, typer.Option("--tokens", help="of the task, the longest answer")] = 128,
    harness: Annotated[
        str | None,
        typer.Option("--harness", metavar="TASK,...", help="tasks of EleutherAI's lm-eval, which must be installed"),
    ] = None,
    harness_tasks: Annotated[
        str | None, typer.Option("--harness-tasks", metavar="FOLDER", help="more tasks for it (YAML)")
    ] = None,
    as_json: Json = False,
) -> None:
    """A run's last checkpoint, in one process: the objective's own measures on its held-out data, a few-shot task, or lm-eval's tasks."""
    from launch.commands.eval import evaluate_run, evaluate_task, style_of

    if harness is not None:
        from launch.commands.eval import evaluate_harness

        figures = evaluate_harness(console, run, harness, harness_tasks, shots)
    elif task is not None:
        figures = evaluate_task(console, run, task, shots, style_of(style), tokens)
    else:
        figures = evaluate_run(console, run)
    if as_json:
        print(json.dumps(figures, indent=1))


@app.command()
def export(
    run: RunFolder, to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="a new folder or URL")]
) -> None:
    """The weights of a run's last checkpoint as a folder that Hugging Face transformers loads."""
    from launch.commands.export import export as write

    write(console, run, to)


@app.command()
def verify(
    target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="a run, or one of its checkpoints")],
) -> None:
    """Derive again, offline, the receipts of checkpoints, and of a run all the data that its weights have seen."""
    from launch.commands.verify import verify as derive_again

    if not derive_again(console, target):
        raise typer.Exit(1)


@app.command()
def diff(first: RunFolder, second: RunFolder, as_json: Json = False) -> None:
    """What two runs differ in: config, code, data, results."""
    from launch.commands.diff import compare, show

    found = compare(first, second)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(console, first, second, found)


@app.command()
def ui(host: str = "127.0.0.1", port: int = 5000) -> None:
    """Open MLflow on the runs here."""
    from trainer.tracking.config import TrackingConfig, tracking_uri

    uri = tracking_uri(TrackingConfig())
    if uri.startswith("http"):
        console.print(f"the runs are at {uri}")
        return
    console.print(f"MLflow on {uri} at http://{host}:{port}; stop it with Ctrl-C")
    sys.stdout.flush()
    server = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    os.execve(
        sys.executable,
        server,
        os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
    )
