"""The picture of a fire drill: both losses, the faults, and how far the losses differ."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator

from trainer.records.charts import INK, PLAIN, SOFT, plt
from trainer.run_files import RunFiles
from trainer.tracking.tracker import history

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DRILL, _FAULT, _DIFFERENT, _IDENTICAL = "#1f4e79", "#d64545", "#ca6f1e", "#2d8659"
_LABEL_WIDTH = 0.04
"""The width of an upright label, as a share of the axis."""


def draw_drill(undisturbed: RunFiles, drill: RunFiles, file: Path) -> Path:
    """Draw the losses of the two runs per step, and their absolute differences, as the PNG `file`.

    Everything comes from the two run folders. The figure is small and its letters are large, so
    that the picture can still be read at 420 pixels.
    """
    calm, latest = dict(history(undisturbed, "loss")), dict(history(drill, "loss"))
    with plt.rc_context(PLAIN | {"font.size": 11, "axes.titlesize": 12, "savefig.dpi": 180}):
        figure, (losses, differences) = plt.subplots(
            2, 1, figsize=(6.5, 5.2), sharex=True, layout="constrained", height_ratios=(3, 2)
        )
        _loss_panel(losses, calm, latest, _replaced(drill))
        _difference_panel(differences, calm, latest)
        _mark_faults(losses, differences, _names_of_faults(drill))
        differences.set_xlabel("step", color=INK)
        differences.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.draw_without_rendering()  # the layout needs a second pass to leave room for the names
        figure.savefig(file)
        plt.close(figure)
    return file


def _replaced(files: RunFiles) -> dict[int, float]:
    """The first loss of every step that was replayed."""
    first: dict[int, float] = {}
    replayed: set[int] = set()
    for row in files.metrics():
        if "loss" not in row.metrics:
            continue
        if row.step in first:
            replayed.add(row.step)
        first.setdefault(row.step, row.metrics["loss"])
    return {step: first[step] for step in sorted(replayed)}


def _names_of_faults(files: RunFiles) -> dict[int, list[str]]:
    """The faults that happened, by step."""
    names: dict[int, list[str]] = {}
    for fault in files.faults():
        names.setdefault(fault["step"], []).append(fault["name"].replace("_", " "))
    return names


def _mark_faults(losses: "Axes", differences: "Axes", names: Mapping[int, Sequence[str]]) -> None:
    """Draw a dotted line through both panels per fault, and its name above them.

    The names stand upright, which keeps neighbours apart. If two faults are too close even so, the
    later name moves to the right, and a thin line joins it to its step.
    """
    first, last = losses.get_xlim()
    width = _LABEL_WIDTH * (last - first)
    free = first
    for step, faults in sorted(names.items()):
        label_at = max(step, free)
        free = label_at + width
        losses.annotate(
            ", ".join(faults),
            (step, 1.0),
            (label_at, 1.06),
            xycoords=losses.get_xaxis_transform(),
            rotation=90,
            ha="center",
            va="bottom",
            color=_FAULT,
            annotation_clip=False,
            fontsize=10,
            arrowprops={"arrowstyle": "-", "color": _FAULT, "linewidth": 0.8, "relpos": (0.5, 0.0)},
        )
        for axis in (losses, differences):
            axis.axvline(step, color=_FAULT, linestyle=":", linewidth=1.2)


def _loss_panel(
    axis: "Axes", calm: Mapping[int, float], latest: Mapping[int, float], replaced: Mapping[int, float]
) -> None:
    """Draw both losses; of a replayed step the latest one, and faintly the first."""
    axis.plot(list(calm), list(calm.values()), color=SOFT, linewidth=4, label="undisturbed")
    axis.plot(list(latest), list(latest.values()), color=_DRILL, linewidth=1.4, label="drill")
    if replaced:
        first = list(replaced.values())
        axis.plot(list(replaced), first, "o", color=_DRILL, alpha=0.3, label="drill, before the replay")
    axis.set_ylabel("loss")
    axis.legend(frameon=False)


def _difference_panel(axis: "Axes", calm: Mapping[int, float], latest: Mapping[int, float]) -> None:
    """Draw the absolute differences; bit-identical losses lie on the zero line, in green."""
    shared = [step for step in calm if step in latest]
    same = [step for step in shared if calm[step].hex() == latest[step].hex()]
    differences = {step: abs(calm[step] - latest[step]) for step in shared}
    gaps = {step: gap for step, gap in differences.items() if math.isfinite(gap) and gap > 0}
    linear = 10.0 ** math.floor(math.log10(min(gaps.values(), default=1e-6)))
    axis.set_yscale("symlog", linthresh=linear, linscale=0.4)
    axis.plot(same, [0.0] * len(same), "s", color=_IDENTICAL, markersize=4, label="bit-identical")
    if gaps:
        axis.plot(list(gaps), list(gaps.values()), "o", color=_DIFFERENT, markersize=4, label="different")
    axis.set_ylim(-0.3 * linear, 10 * max(gaps.values(), default=1e-6))
    axis.set_ylabel("|difference|")
    axis.legend(frameon=False, ncols=2, loc="upper left")
