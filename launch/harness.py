"""`switchwork eval RUN --harness TASK,...`: the exported model in EleutherAI's lm-eval, an optional extra (`pip install 'switchwork[harness]'`)."""

import importlib.util
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from launch.console.tables import table
from launch.export import export
from launch.inspect import read_run
from trainer.objectives.language_config import CausalConfig
from trainer.run_files import RunFiles
from trainer.run_folder import find_run


def evaluate_harness(console: Console, run: str, tasks: str, more: str | None, shots: int) -> dict[str, Any]:
    """Print, return and keep in the run's folder what lm-eval says of the last checkpoint on `tasks`, of which `more` is a folder."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--harness: lm-eval is not installed; install it with pip install 'switchwork[harness]'")
    folder = find_run(run)
    config = read_run(folder)
    if not isinstance(config.objective, CausalConfig):
        raise ValueError(f"--harness: a {config.objective.name} run answers no questions; name a run of moe_lm")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=more)
    names = tasks.split(",")
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ValueError(f"--harness: lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and --harness-tasks adds a folder of your own")
    with TemporaryDirectory() as scratch:
        export(console, run, f"{scratch}/model")
        arguments = {"pretrained": f"{scratch}/model", "dtype": "float32", "max_length": config.objective.data.seq_len}
        found = simple_evaluate(model="hf", model_args=arguments, tasks=names, num_fewshot=shots or None, task_manager=manager, device="cpu", batch_size=16)
    figures: dict[str, Any] = {task: {key: value for key, value in each.items() if isinstance(value, float | int)} for task, each in found["results"].items()}
    RunFiles(folder).write_lm_eval(figures)
    rows = []
    for task, each in figures.items():
        for key, value in each.items():
            rows.append((task, key, f"{value:.4f}"))
    console.print(table(f"lm-eval: {folder.name}", ("task", "measure", "value"), rows, left=(0, 1, 2)))
    return figures
