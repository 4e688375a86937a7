"""`switchwork eval RUN`: metrics of the last checkpoint on held-out data, or on tasks of lm-eval.

The option --task is in task_eval.py.
"""

import importlib.util
import math
from tempfile import TemporaryDirectory

from rich.console import Console

from launch.commands.export import export
from launch.console.tables import table
from trainer.inference.load import ALONE, load_objective, measure
from trainer.objectives.language.config import CausalConfig
from trainer.run_files import RunFiles
from trainer.settle import find_run, read_run

TaskMetrics = dict[str, dict[str, float]]
"""Metrics of lm-eval, by task."""


def evaluate_harness(console: Console, run: str, tasks: str, more: str | None, shots: int) -> TaskMetrics:
    """Let lm-eval evaluate the last checkpoint of `run` on `tasks`, names separated by commas.

    Prints its metrics, writes them to the run's folder and returns them. `more` is a folder of
    further tasks.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--harness: lm-eval is not installed; install it with pip install 'switchwork[harness]'")
    folder = find_run(run)
    config = read_run(folder)
    if not isinstance(config.objective, CausalConfig):
        raise ValueError(f"--harness: a {config.objective.name} run answers no questions; name a run of moe_lm")
    with TemporaryDirectory() as scratch:
        model = f"{scratch}/model"
        names = tasks.split(",")
        metrics = _run_harness(console, run, model, config.objective.data.seq_len, names, more, shots)
    RunFiles(folder).write_lm_eval(metrics)
    rows = []
    for task, values in metrics.items():
        for name, value in values.items():
            rows.append((task, name, f"{value:.4f}"))
    console.print(table(f"lm-eval: {folder.name}", ("task", "measure", "value"), rows, left=(0, 1, 2)))
    return metrics


def _run_harness(
    console: Console, run: str, model: str, seq_len: int, tasks: list[str], more: str | None, shots: int
) -> TaskMetrics:
    """Export the run to the folder `model`, and return the metrics of lm-eval for it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=more)
    for name in tasks:
        if not manager.match_tasks([name]):
            raise ValueError(
                f"--harness: lm-eval knows no task {name!r}; `lm-eval ls tasks` lists them, "
                "and --harness-tasks adds a folder of your own"
            )
    export(console, run, model)
    evaluation = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32", "max_length": seq_len},
        tasks=tasks,
        num_fewshot=shots or None,
        task_manager=manager,
        device="cpu",
        batch_size=16,
    )
    metrics: TaskMetrics = {}
    for task, values in evaluation["results"].items():
        metrics[task] = {name: value for name, value in values.items() if isinstance(value, float | int)}
    return metrics


def evaluate_run(console: Console, run: str) -> dict[str, float]:
    """Print and return the metrics of the last checkpoint of `run` on its held-out data."""
    folder = find_run(run)
    config = read_run(folder)
    objective, step = load_objective(config, folder, console.print)
    metrics = measure(objective, list(objective.held_out(config.evaluation_share(ALONE))))
    rows = []
    for name, value in (metrics | objective.baselines()).items():
        if "/expert" not in name:
            rows.append((name, f"{value:.4f}" if math.isfinite(value) else str(value)))
    console.print(table(f"{config.name}, step {step}, held out", ("", ""), rows, left=(0, 1)))
    return metrics
