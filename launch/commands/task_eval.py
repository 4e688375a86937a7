"""`switchwork eval RUN --task FILE.jsonl`: a few-shot task for the last checkpoint of a run.

Answers are kept in the run's folder as they come, so an interrupted evaluation continues where it
stopped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, get_args

import torch
from rich.console import Console

from launch.console.tables import table
from trainer.inference.few_shot import Answer, Answers, Style, digest_of, read_task, wilson
from trainer.inference.load import load_objective
from trainer.objectives.language.config import CausalConfig
from trainer.objectives.language.objective import LanguageObjective
from trainer.run_files import RunFiles
from trainer.settle import find_run, read_run
from trainer.storage import Folder

_BATCH = 64
_STYLES: tuple[Style, ...] = get_args(Style)

Metrics = dict[str, float]


class TaskReport(TypedDict):
    """The accuracy of a checkpoint on a task, as `switchwork eval --json` prints it."""

    task: str
    style: Style
    shots: int
    accuracy: dict[str, Metrics]
    """Metrics by group, and of `all` items."""


def style_of(text: str) -> Style:
    """The style that --style names. Raises ValueError for any other text."""
    for style in _STYLES:
        if text == style:
            return style
    raise ValueError(f"--style: {text!r}; use one of {', '.join(_STYLES)}")


def evaluate_task(console: Console, run: str, task: str, shots: int, style: Style, tokens: int) -> TaskReport:
    """Print and return the accuracy of the last checkpoint of `run` on `task`."""
    rows = answer_task(console, find_run(run), Path(task), shots, style, tokens)
    metrics = accuracy(rows)
    headings = ("", "items", "exact match", "95 %", "likeliest choice", "95 %")
    lines = [_line(group, values) for group, values in metrics.items()]
    console.print(table(f"{task}: {style}, {shots} examples in context", headings, lines))
    return {"task": task, "style": style, "shots": shots, "accuracy": metrics}


def _line(group: str, metrics: Mapping[str, float]) -> list[str]:
    """The row of a group in the table."""
    cells = [group, str(metrics["items"])]
    for name in ("exact_match", "choice"):
        if name in metrics:
            low = metrics[f"{name}_low"]
            high = metrics[f"{name}_high"]
            cells += [f"{metrics[name]:.3f}", f"{low:.3f} to {high:.3f}"]
        else:
            cells += ["", ""]
    return cells


def answer_task(
    console: Console, folder: Folder, task: Path, shots: int, style: Style, tokens: int = 128
) -> list[Answer]:
    """Return a row per item of `task`, answered by the last checkpoint of the run in `folder`.

    Rows that `evals/` in that folder already has for this checkpoint and task are reused.
    """
    config = read_run(folder)
    if not isinstance(config.objective, CausalConfig):
        raise ValueError(f"--task: a {config.objective.name} run answers no questions; name a run of moe_lm")
    items = read_task(task, style)
    config = replace(config, objective=replace(config.objective, init_from=None))
    objective, step = load_objective(config, folder, console.print)
    assert isinstance(objective, LanguageObjective)
    answers = Answers(objective.model, objective.tokenizer, items, shots, style, tokens, seed=0)
    name = f"{task.stem}-{digest_of(items)}-{style}-{shots}-{tokens}-step-{step:08d}.jsonl"
    evals = RunFiles(folder).evals.make()
    rows = _read(evals, name)
    answered = {row["item"] for row in rows}
    if answered:
        console.print(f"{len(answered)} of {len(items)} items are answered already")
    open_items = [index for index in range(len(items)) if index not in answered]
    pending: list[Answer] = []
    with torch.inference_mode():
        for row in answers.generate(open_items, _BATCH):
            pending.append(row)
            if len(pending) == _BATCH:
                _keep(evals, name, pending)
                rows += pending
                pending = []
    _keep(evals, name, pending)
    return sorted(rows + pending, key=lambda row: row["item"])


def _read(folder: Folder, name: str) -> list[Answer]:
    """The rows of an earlier call; a last line that was cut off when it was killed is removed."""
    if not folder.exists(name):
        return []
    content = folder.read(name)
    lines = content[: content.rfind(b"\n") + 1]
    if lines != content:
        folder.write(name, lines)
    return [json.loads(line) for line in lines.splitlines()]


def _keep(folder: Folder, name: str, rows: Sequence[Answer]) -> None:
    if rows:
        folder.append(name, "".join(json.dumps(row) + "\n" for row in rows).encode())


def accuracy(rows: Sequence[Answer]) -> dict[str, Metrics]:
    """Shares of right answers, with their 95 % intervals, by group and for `all` items."""
    groups = [group for group in dict.fromkeys(row["group"] for row in rows) if group]
    metrics: dict[str, Metrics] = {}
    for group in [*groups, "all"]:
        members = [row for row in rows if group in ("all", row["group"])]
        exact = [row["right"] for row in members]
        choices = [row["likeliest_right"] for row in members if "likeliest_right" in row]
        metrics[group] = {"items": float(len(members))} | _share("exact_match", exact) | _share("choice", choices)
    return metrics


def _share(name: str, right: Sequence[bool]) -> Metrics:
    """The share of right answers and the ends of its interval; nothing without answers."""
    if not right:
        return {}
    low, high = wilson(sum(right), len(right))
    return {name: sum(right) / len(right), f"{name}_low": low, f"{name}_high": high}
