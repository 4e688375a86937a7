"""The report of `switchwork prove moe`: a table, the verdicts in words, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from launch.console.progress import clock
from launch.prove.paired import CONFIDENCE, Difference
from launch.prove.variants import Leads, VariantOutcome
from trainer.storage import Folder, absolute

if TYPE_CHECKING:  # matplotlib takes a second to import, and only the picture needs it
    from matplotlib.axes import Axes

TITLE = "Mixture of experts against a dense model of the same FLOPs per token"
COLOURS = {"dense": "#1f2933", "frozen router": "#d98c21", "permuted router": "#d64545"}
BLUES = ("#9ecae1", "#4292c6", "#08519c", "#08306b")


def show(
    console: Console, outcomes: Sequence[VariantOutcome], leads: Leads, ours: str, folder: str, minutes: float
) -> None:
    """Print the table and the verdicts on the variant `ours`, and draw `proof.png`.

    `minutes` is the time that the runs take side by side.
    """
    console.print(table_of(outcomes, leads))
    for theirs in ("dense", "permuted router", "frozen router"):
        console.print(sentence(ours, theirs, leads[ours, theirs]), style="bold", highlight=False)
    draw_proof(outcomes, leads, TITLE, Path(Folder(absolute(folder)).path) / "proof.png")
    files = f"metrics in {folder}/results.json, picture in {folder}/proof.png"
    console.print(f"{clock(60 * minutes)} of training; {files}", highlight=False)


def sentence(ours: str, theirs: str, lead: Difference) -> str:
    """Return the verdict on `lead`, the lead of `ours` over `theirs`, in words."""
    interval = f"{CONFIDENCE:.0%} interval {lead.low:+.4f} to {lead.high:+.4f}, {lead.n} paired seeds"
    match lead.verdict:
        case "ahead":
            return f"{ours}: ahead of {theirs} by {lead.mean:.4f} nats per token ({interval})"
        case "behind":
            return f"{ours}: behind {theirs} by {-lead.mean:.4f} nats per token ({interval})"
        case _:
            return f"{ours} against {theirs}: not decided, {lead.mean:+.4f} nats per token ({interval})"


def table_of(outcomes: Sequence[VariantOutcome], leads: Leads) -> Table:
    """Return a table with a row per variant: its size, cost, loss and lead over dense."""
    seeds = len(outcomes[0].losses)
    means = f"held-out loss in nats per token and lead over dense, means of {seeds} paired seeds"
    table = Table(title=f"{means}; training MFLOPs per token", title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("parameters", "MFLOPs", "loss", "lead", f"{CONFIDENCE:.0%} interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for outcome in outcomes:
        cells = [
            outcome.name,
            f"{outcome.parameters:,}",
            f"{outcome.flops_per_token / 1e6:.3f}",
            f"{sum(outcome.losses) / seeds:.4f}",
        ]
        if lead := leads.get((outcome.name, "dense")):
            cells += [f"{lead.mean:+.4f}", f"{lead.low:+.4f} to {lead.high:+.4f}", lead.verdict]
        table.add_row(*cells)
    return table


def draw_proof(outcomes: Sequence[VariantOutcome], leads: Leads, title: str, file: Path) -> None:
    """Draw three panels under `title`.

    They are the lead of each variant over the dense model at the end, with its interval; the loss
    over the steps; and the lead over the steps.
    """
    from trainer.records.charts import INK, PLAIN, plt

    numbers = [outcome for outcome in outcomes if outcome.name not in COLOURS]
    colours = COLOURS | {outcome.name: BLUES[min(index, len(BLUES) - 1)] for index, outcome in enumerate(numbers)}
    with plt.rc_context(PLAIN):
        figure, (final, losses, by_step) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
        figure.suptitle(f"{title}, {len(outcomes[0].losses)} paired seeds, held-out data", color=INK)
        _leads_panel(final, outcomes, leads, colours)
        _losses_panel(losses, outcomes, colours)
        _leads_by_step_panel(by_step, outcomes, colours)
        figure.savefig(file)
        plt.close(figure)


def _leads_panel(axis: "Axes", outcomes: Sequence[VariantOutcome], leads: Leads, colours: Mapping[str, str]) -> None:
    """Draw a column per variant, with a dot per seed and a bar for the mean and its interval."""
    from trainer.records.charts import SOFT

    dense, *others = outcomes
    axis.axhline(0, color=SOFT, linewidth=0.8)
    for column, outcome in enumerate(others):
        lead = leads[outcome.name, "dense"]
        gaps = [their - our for their, our in zip(dense.losses, outcome.losses, strict=True)]
        axis.plot([column + 0.2] * len(gaps), gaps, "o", color=SOFT, markersize=3)
        reach = lead.mean - lead.low
        colour = colours[outcome.name]
        axis.errorbar(column, lead.mean, yerr=reach, fmt="o", color=colour, capsize=4, markersize=5)
    axis.set_xticks(range(len(others)), [outcome.name.replace(" ", "\n") for outcome in others])
    axis.set_title(f"lead over dense at the end, {CONFIDENCE:.0%} intervals")
    axis.set_ylabel("nats per token")


def _losses_panel(axis: "Axes", outcomes: Sequence[VariantOutcome], colours: Mapping[str, str]) -> None:
    for outcome in outcomes:
        steps, losses = zip(*outcome.curve, strict=True)
        axis.plot(steps, losses, color=colours[outcome.name], label=outcome.name, linewidth=1.4)
    dense = outcomes[0].curve
    axis.set_ylim(top=dense[min(1, len(dense) - 1)][1] * 1.05)
    axis.set_title("loss, nats per token")
    axis.set_xlabel("step")
    axis.legend(frameon=False)


def _leads_by_step_panel(axis: "Axes", outcomes: Sequence[VariantOutcome], colours: Mapping[str, str]) -> None:
    from trainer.records.charts import SOFT

    dense = outcomes[0].curve
    for outcome in outcomes:
        steps = [step for step, _ in outcome.curve]
        gaps = [their - our for (_, their), (_, our) in zip(dense, outcome.curve, strict=True)]
        axis.plot(steps, gaps, color=colours[outcome.name], linewidth=1.4, marker="o", markersize=3)
    axis.axhline(0, color=SOFT, linewidth=0.8)
    axis.set_title("lead over dense, nats per token")
    axis.set_xlabel("step")
