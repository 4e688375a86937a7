"""The picture of a fire drill: the losses of both runs, and how far apart they are."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from trainer.records.charts import INK, PLAIN, SOFT
from trainer.run_files import RunFiles, run_files
from trainer.run_rows import Fault
from trainer.tracking.tracker import history

UNDISTURBED, DRILL = "#9aa5b1", "#d64545"
_REPLAYED = "#f0b4b4"


def draw_drill(root: Path) -> Path:
    """Draw the drill in `root` from the folders of its two runs alone; returns drill.png."""
    drill, undisturbed = run_files(str(root), "drill"), run_files(str(root), "undisturbed")
    faults = sorted(drill.faults(), key=lambda fault: fault["step"])
    with plt.rc_context(PLAIN):
        figure, (losses, gaps) = plt.subplots(
            2, 1, figsize=(8, 5), height_ratios=(3, 1), sharex=True, layout="constrained"
        )
        _draw_losses(losses, drill, undisturbed)
        _draw_gaps(gaps, drill, undisturbed)
        _mark(losses, gaps, faults)
        figure.savefig(root / "drill.png")
        plt.close(figure)
    return root / "drill.png"


def _draw_losses(axis: Axes, drill: RunFiles, undisturbed: RunFiles) -> None:
    """The loss per step; a replayed step also has its earlier values, as dots."""
    logged = [(row.step, row.metrics["loss"]) for row in drill.metrics() if "loss" in row.metrics]
    last = dict(logged)
    times = Counter(step for step, _ in logged)
    replayed = [(step, loss) for step, loss in logged if times[step] > 1]
    steady = history(undisturbed, "loss")
    axis.plot(*zip(*steady, strict=True), color=UNDISTURBED, linewidth=4, label="undisturbed")
    axis.plot(*zip(*sorted(last.items()), strict=True), color=DRILL, linewidth=1.2, label="drill")
    if replayed:
        steps, values = zip(*replayed, strict=True)
        axis.scatter(steps, values, s=22, color=_REPLAYED, zorder=3, label="steps done again")
    axis.set_ylabel("training loss")
    axis.set_title("Loss with and without faults", color=INK, loc="left")
    axis.legend(frameon=False, loc="upper right")


def _draw_gaps(axis: Axes, drill: RunFiles, undisturbed: RunFiles) -> None:
    """The distance between the losses per step, on a scale that shows an exact 0."""
    mine = dict(history(drill, "loss"))
    gaps = [(step, abs(mine[step] - loss)) for step, loss in history(undisturbed, "loss") if step in mine]
    equal = [step for step, gap in gaps if gap == 0.0]
    other = [(step, gap) for step, gap in gaps if gap != 0.0]
    axis.set_yscale("symlog", linthresh=1e-4)
    axis.scatter(equal, [0.0] * len(equal), s=10, color=INK, label=f"bit-identical ({len(equal)} steps)")
    if other:
        steps, distances = zip(*other, strict=True)
        axis.scatter(steps, distances, s=10, color=DRILL, label=f"different ({len(other)} steps)")
    axis.set_ylim(bottom=-2e-5)
    axis.set_ylabel("difference")
    axis.set_xlabel("step")
    axis.legend(frameon=False, loc="upper left")


def _mark(losses: Axes, gaps: Axes, faults: Sequence[Fault]) -> None:
    """A line at each fault, with its name at the top."""
    for fault in faults:
        for axis in (losses, gaps):
            axis.axvline(fault["step"], color=SOFT, linewidth=0.8, linestyle="--", zorder=0)
        name = fault["name"].replace("_", " ")
        place = losses.get_xaxis_transform()
        losses.text(fault["step"], 0.02, name, rotation=90, ha="right", color=INK, fontsize=8, transform=place)
