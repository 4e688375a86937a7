"""Commands for an existing run: sample, eval, export, verify, promote, diff, ui."""

import json
import os
import sys
from collections.abc import Mapping
from typing import Annotated

import typer

from launch.cli.arguments import Json, RunFolder, console

app = typer.Typer()

Harness = Annotated[
    str | None,
    typer.Option("--harness", metavar="TASK,...", help="Tasks of EleutherAI's lm-eval, which must be installed."),
]
HarnessTasks = Annotated[
    str | None,
    typer.Option("--harness-tasks", metavar="FOLDER", help="A folder of further tasks for lm-eval (YAML)."),
]

Rules = Annotated[str | None, typer.Option("--rules", metavar="FILE.lp", help="Rules that judge each text.")]
Graph = Annotated[
    str | None, typer.Option("--graph", metavar="FILE.csv|.nt", help="The knowledge graph that the rules read.")
]
Style = Annotated[
    str,
    typer.Option(
        "--style",
        metavar="direct|chain_of_thought",
        help="Whether the answer of a task comes at once or after its steps.",
    ),
]


@app.command()
def sample(
    run: RunFolder,
    n: Annotated[int, typer.Option("--n", help="The number of samples.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="The seed of the samples.")] = 0,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The beginning of the text.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="The length of the text in tokens.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="The sampling temperature; 0 takes the most probable token.")
    ] = None,
    rules: Rules = None,
    graph: Graph = None,
) -> None:
    """Draw samples from a run's last checkpoint; with --rules, only texts that break no rule."""
    from launch.commands.sample import show_samples
    from trainer.rules import RulesConfig

    changes = {"prompt": prompt, "sample_tokens": tokens, "temperature": temperature}
    given = {key: value for key, value in changes.items() if value is not None}
    show_samples(console, run, n, seed, given, RulesConfig(file=rules, graph=graph) if rules else None)


@app.command()
def promote(
    run: RunFolder,
    rules: Annotated[str, typer.Option("--rules", metavar="FILE.lp", help="Rules over the run's metrics and samples.")],
    graph: Graph = None,
    name: Annotated[str, typer.Option("--name", help="The model in MLflow's registry.")] = "switchwork",
    samples: Annotated[
        int, typer.Option("--samples", help="The number of texts to judge in addition to the metrics.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="The seed of the samples.")] = 0,
) -> None:
    """Register a run's last checkpoint; it becomes champion only if the rules hold.

    The exit code is 1 if they do not.
    """
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
        typer.Option("--task", metavar="FILE.jsonl", help="Questions with answers, in place of the held-out data."),
    ] = None,
    shots: Annotated[int, typer.Option("--shots", help="Worked examples before each question of a task.")] = 0,
    style: Style = "direct",
    tokens: Annotated[int, typer.Option("--tokens", help="The longest answer to a task, in tokens.")] = 128,
    harness: Harness = None,
    harness_tasks: HarnessTasks = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run's last checkpoint in one process.

    Measures the objective's own metrics on its held-out data, a few-shot task (--task), or tasks of
    lm-eval (--harness).
    """
    from launch.commands.eval import evaluate_harness, evaluate_run
    from launch.commands.task_eval import evaluate_task, style_of

    metrics: Mapping[str, object]
    if harness is not None:
        metrics = evaluate_harness(console, run, harness, harness_tasks, shots)
    elif task is not None:
        metrics = evaluate_task(console, run, task, shots, style_of(style), tokens)
    else:
        metrics = evaluate_run(console, run)
    if as_json:
        print(json.dumps(metrics, indent=1))


@app.command()
def export(
    run: RunFolder, to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="A new folder or URL.")]
) -> None:
    """Write the weights of a run's last checkpoint for Hugging Face transformers or diffusers."""
    from launch.commands.export import export as write

    write(console, run, to)


@app.command()
def verify(
    target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, or one of its checkpoints.")],
) -> None:
    """Check, offline, the receipts of checkpoints and all data that a run's weights have seen.

    The exit code is 1 if anything differs.
    """
    from launch.commands.verify import verify as derive_again

    if not derive_again(console, target):
        raise typer.Exit(1)


@app.command()
def diff(first: RunFolder, second: RunFolder, as_json: Json = False) -> None:
    """Show how two runs differ: config, code, data, results."""
    from launch.commands.diff import compare, show

    differing = compare(first, second)
    if as_json:
        print(json.dumps(differing, indent=1))
    else:
        show(console, first, second, differing)


@app.command()
def ui(
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port to listen on.")] = 5000,
) -> None:
    """Open MLflow on the runs of this folder."""
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
