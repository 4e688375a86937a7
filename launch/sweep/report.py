"""The table and the picture that `switchwork sweep` makes of its trials.

The picture shows the metric by each key that varies, and over the steps.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from launch.console import tables
from launch.sweep.config import SweepConfig
from launch.sweep.outcomes import TrialOutcome
from launch.sweep.trials import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = 3
_COLOURS = {"finished": "#4292c6", "pruned": "#d98c21", "failed": "#d64545", "stopped": "#9aa5b1"}
_BEST = "#08306b"
_SPREAD = 8.0  # a key whose values lie further apart than this factor gets a logarithmic axis


def table(outcomes: Sequence[TrialOutcome], config: SweepConfig) -> Table:
    """The finished trials, the best first, then the others by the number of their steps."""
    short = short_names(list(config.over))
    rows = []
    for outcome in sorted(outcomes, key=lambda outcome: _rank(outcome, config)):
        values = [_shown(outcome.trial.changes.get(key)) for key in short]
        metric = "-" if outcome.value is None else f"{outcome.value:.4f}"
        rows.append((outcome.trial.name, *values, str(outcome.step), metric, outcome.words))
    headings = ("trial", *short.values(), "steps", config.metric, "status")
    return tables.table(f"{config.metric}, {config.mode}", headings, rows, left=(0, -1), cells="fold")


def _rank(outcome: TrialOutcome, config: SweepConfig) -> tuple[bool, float]:
    """The sort key of the table."""
    if outcome.status != "finished":
        return True, -outcome.step
    if outcome.value is None or not math.isfinite(outcome.value):
        return False, math.inf
    return False, -outcome.value if config.mode == "max" else outcome.value


def _shown(value: Any) -> str:
    """The value of a key as the table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_sweep(outcomes: Sequence[TrialOutcome], config: SweepConfig, title: str, file: Path) -> Path:
    """Draw a panel for each of the first keys of `over`, and one with the metric over the steps.

    If `over` is empty, one panel shows the settings.
    """
    from trainer.records.charts import INK, PLAIN, plt

    keys = short_names(list(config.over))
    shown = list(keys)[:_PANELS] or [""]
    panels = len(shown) + 1
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 4), layout="constrained", squeeze=False)
        figure.suptitle(f"{title}: {config.metric}", color=INK)
        for axis, key in zip(axes[0], shown):
            values = [outcome.trial.changes.get(key) if key else outcome.trial.setting for outcome in outcomes]
            _draw_key(axis, list(zip(values, outcomes)))
            axis.set_xlabel(keys.get(key, "setting"))
        _draw_curves(axes[0][-1], outcomes, config)
        figure.savefig(file)
        plt.close(figure)
    return file


def _has_value(outcome: TrialOutcome) -> bool:
    return outcome.value is not None and math.isfinite(outcome.value)


def _colour(outcome: TrialOutcome) -> str:
    return _COLOURS.get(outcome.status, _COLOURS["stopped"])


def _draw_key(axis: "Axes", points: Sequence[tuple[Any, TrialOutcome]]) -> None:
    """Draw each trial's last metric by the key's value, hollow if the trial is not finished."""
    points = [(value, outcome) for value, outcome in points if _has_value(outcome)]
    positions = _positions(axis, [value for value, _ in points])
    for value, outcome in points:
        fill: Literal["full", "none"] = "full" if outcome.status == "finished" else "none"
        x = positions[str(value)]
        axis.plot(x, outcome.value or 0.0, "o", color=_colour(outcome), fillstyle=fill, markersize=5)
    _leave_out_diverged(axis, [outcome.value for _, outcome in points])


def _positions(axis: "Axes", values: Sequence[Any]) -> dict[str, float]:
    """The x coordinate of each value: the value itself if all are numbers, else its index."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values) and numbers:
        if min(numbers) > 0 and max(numbers) / min(numbers) >= _SPREAD:
            axis.set_xscale("log")
        return {str(number): float(number) for number in numbers}
    names = dict.fromkeys(str(value) for value in values)
    positions = {name: float(index) for index, name in enumerate(names)}
    axis.set_xticks(list(positions.values()), [name[:24] for name in positions], rotation=30, ha="right")
    return positions


def _draw_curves(axis: "Axes", outcomes: Sequence[TrialOutcome], config: SweepConfig) -> None:
    """Draw the metric of each trial over the steps, with a cross where a trial was pruned."""
    finished = [outcome for outcome in outcomes if outcome.status == "finished" and _has_value(outcome)]
    choose = max if config.mode == "max" else min
    best = choose(finished, key=lambda outcome: outcome.value or 0.0, default=None)
    labelled = set()
    for outcome in outcomes:
        points = [(step, value) for step, value in outcome.curve if math.isfinite(value)]
        if not points:
            continue
        label = "best" if outcome is best else outcome.status
        colour = _BEST if outcome is best else _colour(outcome)
        width = 2.0 if outcome is best else 1.1
        shown_label = None if label in labelled else label
        axis.plot(*zip(*points), color=colour, linewidth=width, zorder=1 + width, label=shown_label)
        if outcome.status == "pruned":
            axis.plot(*points[-1], "x", color=colour)
        labelled.add(label)
    evaluations = itertools.chain.from_iterable(outcome.curve for outcome in outcomes)
    _leave_out_diverged(axis, [value for _, value in evaluations])
    axis.set_xlabel("step")
    if labelled:
        axis.legend(frameon=False)


def _leave_out_diverged(axis: "Axes", values: Sequence[float | None]) -> None:
    """Cut values far above the median off the picture, so that the others can be told apart."""
    finite = sorted(value for value in values if value is not None and math.isfinite(value))
    if not finite or finite[0] <= 0:
        return
    middle = finite[len(finite) // 2]
    if finite[-1] > 4 * middle:
        axis.set_ylim(0.95 * finite[0], 2 * middle)
