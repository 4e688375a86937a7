"""`switchwork eval RUN --task FILE.jsonl`: the last checkpoint answers a task, with worked examples in context. Goes on where it was cut off."""

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast, get_args

import torch
from rich.console import Console

from launch.commands.export import export
from launch.console.tables import table
from trainer.inference.few_shot import Answer, Answers, Style, digest_of, read_task, wilson
from trainer.inference.load import ALONE, load_objective, measure
from trainer.objectives.language.config import CausalConfig
from trainer.objectives.language.objective import LanguageObjective
from trainer.run_files import RunFiles
from trainer.settle import find_run, read_run
from trainer.storage import Folder

_BATCH = 64


def style_of(text: str) -> Style:
    """What --style says."""
    for style in get_args(Style):
        if text == style:
            return cast(Style, style)
    raise ValueError(f"--style: {text!r}; use one of {', '.join(get_args(Style))}")


def evaluate_task(console: Console, run: str, task: str, shots: int, style: Style, tokens: int) -> dict[str, Any]:
    """Print and return the accuracy of the last checkpoint of `run` on `task`."""
    rows = answer_task(console, find_run(run), Path(task), shots, style, tokens)
    figures = accuracy(rows)
    lines = []
    for group, each in figures.items():
        cells = [group, str(each["items"])]
        for name in ("exact_match", "choice"):
            cells += (
                [f"{each[name]:.3f}", f"{each[f'{name}_low']:.3f} to {each[f'{name}_high']:.3f}"]
                if name in each
                else ["", ""]
            )
        lines.append(cells)
    headings = ("", "items", "exact match", "95 %", "likeliest choice", "95 %")
    console.print(table(f"{task}: {style}, {shots} examples in context", headings, lines))
    return {"task": task, "style": style, "shots": shots, "accuracy": figures}


def answer_task(
    console: Console, folder: Folder, task: Path, shots: int, style: Style, tokens: int = 128
) -> list[Answer]:
    """A row for each item of `task`; those that `evals/` in the run's folder has already, of this checkpoint and task, are kept."""
    config = read_run(folder)
    if not isinstance(config.objective, CausalConfig):
        raise ValueError(f"--task: a {config.objective.name} run answers no questions; name a run of moe_lm")
    items = read_task(task, style)
    objective, step = load_objective(
        replace(config, objective=replace(config.objective, init_from=None)), folder, console.print
    )
    assert isinstance(objective, LanguageObjective)
    answers = Answers(objective.model, objective.tokenizer, items, shots, style, tokens, seed=0)
    name = f"{task.stem}-{digest_of(items)}-{style}-{shots}-{tokens}-step-{step:08d}.jsonl"
    evals = RunFiles(folder).evals.make()
    rows = _read(evals, name)
    there = {row["item"] for row in rows}
    if there:
        console.print(f"{len(there)} of {len(items)} items are answered already")
    pending: list[Answer] = []
    with torch.inference_mode():
        for row in answers.generate([index for index in range(len(items)) if index not in there], _BATCH):
            pending.append(row)
            if len(pending) == _BATCH:
                _keep(evals, name, pending)
                rows, pending = rows + pending, []
    _keep(evals, name, pending)
    return sorted(rows + pending, key=lambda row: int(row["item"]))


def _read(folder: Folder, name: str) -> list[Answer]:
    """The rows of an earlier call; half a line at the end, of one that was killed, is cut off."""
    if not folder.exists(name):
        return []
    content = folder.read(name)
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        folder.write(name, whole)
    return [json.loads(line) for line in whole.splitlines()]


def _keep(folder: Folder, name: str, rows: Sequence[Answer]) -> None:
    if rows:
        folder.append(name, "".join(json.dumps(row) + "\n" for row in rows).encode())


def accuracy(rows: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Shares of right answers with their 95 % intervals: of each group, and of `all`."""
    groups = [group for group in dict.fromkeys(row["group"] for row in rows) if group]
    figures: dict[str, dict[str, float]] = {}
    for group in [*groups, "all"]:
        members = [row for row in rows if group in ("all", row["group"])]
        figures[group] = {"items": float(len(members))}
        measures = {
            "exact_match": [row["right"] for row in members],
            "choice": [row["likeliest_right"] for row in members if "likeliest_right" in row],
        }
        for name, judged in measures.items():
            if judged:
                low, high = wilson(sum(judged), len(judged))
                figures[group] |= {name: sum(judged) / len(judged), f"{name}_low": low, f"{name}_high": high}
    return figures


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
        raise ValueError(
            f"--harness: lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and --harness-tasks adds a folder of your own"
        )
    with TemporaryDirectory() as scratch:
        export(console, run, f"{scratch}/model")
        arguments = {"pretrained": f"{scratch}/model", "dtype": "float32", "max_length": config.objective.data.seq_len}
        found = simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=names,
            num_fewshot=shots or None,
            task_manager=manager,
            device="cpu",
            batch_size=16,
        )
    figures: dict[str, Any] = {
        task: {key: value for key, value in each.items() if isinstance(value, float | int)}
        for task, each in found["results"].items()
    }
    RunFiles(folder).write_lm_eval(figures)
    rows = []
    for task, each in figures.items():
        for key, value in each.items():
            rows.append((task, key, f"{value:.4f}"))
    console.print(table(f"lm-eval: {folder.name}", ("task", "measure", "value"), rows, left=(0, 1, 2)))
    return figures


def evaluate_run(console: Console, run: str) -> dict[str, float]:
    """Print and return the measures of the last checkpoint of `run` on its held-out data."""
    folder = find_run(run)
    config = read_run(folder)
    objective, step = load_objective(config, folder, console.print)
    figures = measure(objective, list(objective.held_out(config.evaluation_share(ALONE))))
    rows = []
    for name, value in (figures | objective.baselines()).items():
        if "/expert" not in name:
            rows.append((name, f"{value:.4f}" if math.isfinite(value) else str(value)))
    console.print(table(f"{config.name}, step {step}, held out", ("", ""), rows, left=(0, 1)))
    return figures
