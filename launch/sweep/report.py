"""What `switchwork sweep` shows: a table of its trials, and a picture of the metric by each key and over the steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from launch.console import tables
from launch.sweep.config import SweepConfig
from launch.sweep.outcomes import TrialOutcome
from launch.sweep.trials import short_names

_PANELS = 3
_COLOURS = {"finished": "#4292c6", "pruned": "#d98c21", "failed": "#d64545", "stopped": "#9aa5b1"}
_BEST = "#08306b"
_SPREAD = 8.0  # a key whose values lie further apart than this factor gets a logarithmic axis


def table(outcomes: Sequence[TrialOutcome], config: SweepConfig) -> Table:
    """The finished trials, the best first, then the others, those that got furthest first."""
    short = short_names(list(config.over))
    rows = []
    for outcome in sorted(outcomes, key=lambda outcome: _place(outcome, config)):
        values = [_shown(outcome.trial.changes.get(key)) for key in short]
        rows.append(
            (
                outcome.trial.name,
                *values,
                str(outcome.step),
                "-" if outcome.value is None else f"{outcome.value:.4f}",
                outcome.words,
            )
        )
    headings = ("trial", *short.values(), "steps", config.metric, "status")
    return tables.table(f"{config.metric}, {config.mode}", headings, rows, left=(0, -1), cells="fold")


def _place(outcome: TrialOutcome, config: SweepConfig) -> tuple[bool, float]:
    value = outcome.value if outcome.value is not None and math.isfinite(outcome.value) else math.inf
    if outcome.status == "finished":
        return False, -value if config.mode == "max" and math.isfinite(value) else value
    return True, -outcome.step


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_sweep(outcomes: Sequence[TrialOutcome], config: SweepConfig, title: str, file: Path) -> Path:
    """A panel for each key of `over` (the first few), or one for the settings, and one with the metric over the steps."""
    from trainer.records.charts import INK, PLAIN, plt

    keys = short_names(list(config.over))
    shown = list(keys)[:_PANELS] or [""]
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(
            1, len(shown) + 1, figsize=(4.5 * (len(shown) + 1), 4), layout="constrained", squeeze=False
        )
        figure.suptitle(f"{title}: {config.metric}", color=INK)
        for axis, key in zip(axes[0], shown):
            _key_panel(axis, [(each.trial.changes.get(key) if key else each.trial.setting, each) for each in outcomes])
            axis.set_xlabel(keys.get(key, "setting"))
        _curves(axes[0][-1], outcomes, config)
        figure.savefig(file)
        plt.close(figure)
    return file


def _key_panel(axis: Any, points: Sequence[tuple[Any, TrialOutcome]]) -> None:
    """The last metric of each trial by the key's value: full for the finished, hollow for the rest."""
    points = [(key, each) for key, each in points if each.value is not None and math.isfinite(each.value)]
    numbers = [key for key, _ in points if isinstance(key, int | float) and not isinstance(key, bool)]
    if len(numbers) == len(points) and numbers:
        places = {str(key): float(key) for key in numbers}
        if min(numbers) > 0 and max(numbers) / min(numbers) >= _SPREAD:
            axis.set_xscale("log")
    else:
        places = {name: float(index) for index, name in enumerate(dict.fromkeys(str(key) for key, _ in points))}
        axis.set_xticks(list(places.values()), [name[:24] for name in places], rotation=30, ha="right")
    for key, each in points:
        colour = _COLOURS.get(each.status, _COLOURS["stopped"])
        axis.plot(
            places[str(key)],
            each.value,
            "o",
            color=colour,
            fillstyle="full" if each.status == "finished" else "none",
            markersize=5,
        )
    _keep_in_sight(axis, [each.value for _, each in points])


def _curves(axis: Any, outcomes: Sequence[TrialOutcome], config: SweepConfig) -> None:
    """The metric of each trial over the steps; a pruned one ends with a cross."""
    finished = [
        each for each in outcomes if each.status == "finished" and each.value is not None and math.isfinite(each.value)
    ]
    best = (max if config.mode == "max" else min)(finished, key=lambda each: each.value or 0.0, default=None)
    labelled = set()
    for each in outcomes:
        points = [(step, value) for step, value in each.curve if math.isfinite(value)]
        if not points:
            continue
        label = "best" if each is best else each.status
        colour, width = (_BEST, 2.0) if each is best else (_COLOURS.get(each.status, _COLOURS["stopped"]), 1.1)
        axis.plot(
            *zip(*points), color=colour, linewidth=width, zorder=1 + width, label=None if label in labelled else label
        )
        if each.status == "pruned":
            axis.plot(*points[-1], "x", color=colour)
        labelled.add(label)
    _keep_in_sight(axis, [value for each in outcomes for _, value in each.curve])
    axis.set_xlabel("step")
    if labelled:
        axis.legend(frameon=False)


def _keep_in_sight(axis: Any, values: Sequence[float | None]) -> None:
    """Leave out of the picture what has run away, so that the others can be told apart."""
    finite = sorted(value for value in values if value is not None and math.isfinite(value))
    if finite and finite[0] > 0 and finite[-1] > 4 * (middle := finite[len(finite) // 2]):
        axis.set_ylim(0.95 * finite[0], 2 * middle)
