"""What `switchwork prove moe` shows: a table, the verdict in words, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from launch.console.progress import clock
from launch.prove.paired import CONFIDENCE, Difference
from launch.prove.variants import Leads, VariantOutcome
from trainer.storage import Folder, absolute

if TYPE_CHECKING:  # matplotlib takes a second to import, and is needed at the end
    from matplotlib.axes import Axes

TITLE = "Mixture of experts against a dense model of the same FLOPs a token"
COLOURS = {"dense": "#1f2933", "frozen router": "#d98c21", "permuted router": "#d64545"}
BLUES = ("#9ecae1", "#4292c6", "#08519c", "#08306b")


def show(
    console: Console, outcomes: Sequence[VariantOutcome], leads: Leads, ours: str, folder: str, minutes: float
) -> None:
    """Print all of it and draw `proof.png`; `minutes` is how long the runs take with that many processes."""
    console.print(table_of(outcomes, leads))
    for theirs in ("dense", "permuted router", "frozen router"):
        console.print(sentence(ours, theirs, leads[ours, theirs]), style="bold", highlight=False)
    draw_proof(outcomes, leads, TITLE, Path(Folder(absolute(folder)).path) / "proof.png")
    console.print(
        f"{clock(60 * minutes)} of training; figures in {folder}/results.json, picture in {folder}/proof.png",
        highlight=False,
    )


def sentence(ours: str, theirs: str, lead: Difference) -> str:
    """The verdict in words."""
    interval = f"{CONFIDENCE:.0%} interval {lead.low:+.4f} to {lead.high:+.4f}, {lead.n} paired seeds"
    match lead.verdict:
        case "ahead":
            return f"{ours}: ahead of {theirs} by {lead.mean:.4f} nats a token ({interval})"
        case "behind":
            return f"{ours}: behind {theirs} by {-lead.mean:.4f} nats a token ({interval})"
        case _:
            return f"{ours} against {theirs}: not decided, {lead.mean:+.4f} nats a token ({interval})"


def table_of(outcomes: Sequence[VariantOutcome], leads: Leads) -> Table:
    seeds = len(outcomes[0].losses)
    title = f"held-out loss in nats a token and the lead over dense, means of {seeds} paired seeds; training MFLOPs of a token"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("", "parameters", "MFLOPs", "loss", "lead", f"{CONFIDENCE:.0%} interval", "verdict"):
        table.add_column(heading, justify="left" if heading in ("", "verdict") else "right", no_wrap=True)
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
    """Under `title`: lead over the dense model by number of experts with its interval, loss over the steps, and the lead over the steps."""
    from trainer.records.charts import INK, PLAIN, plt

    numbers = [outcome for outcome in outcomes if outcome.name not in COLOURS]
    colours = COLOURS | {outcome.name: BLUES[min(index, len(BLUES) - 1)] for index, outcome in enumerate(numbers)}
    with plt.rc_context(PLAIN):
        figure, (at_the_end, losses, by_step) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
        figure.suptitle(f"{title}, {len(outcomes[0].losses)} paired seeds, held-out data", color=INK)
        _leads_panel(at_the_end, outcomes, leads, colours)
        _losses_panel(losses, outcomes, colours)
        _leads_by_step_panel(by_step, outcomes, colours)
        figure.savefig(file)
        plt.close(figure)


def _leads_panel(axis: "Axes", outcomes: Sequence[VariantOutcome], leads: Leads, colours: Mapping[str, str]) -> None:
    """A column per variant: its seeds as dots, the mean and the interval as a bar."""
    from trainer.records.charts import SOFT

    dense, others = outcomes[0], outcomes[1:]
    axis.axhline(0, color=SOFT, linewidth=0.8)
    for column, outcome in enumerate(others):
        lead = leads[outcome.name, "dense"]
        gaps = [their - our for their, our in zip(dense.losses, outcome.losses, strict=True)]
        axis.plot([column + 0.2] * len(gaps), gaps, "o", color=SOFT, markersize=3)
        axis.errorbar(
            column, lead.mean, yerr=lead.mean - lead.low, fmt="o", color=colours[outcome.name], capsize=4, markersize=5
        )
    axis.set_xticks(range(len(others)), [outcome.name.replace(" ", "\n") for outcome in others])
    axis.set_title(f"lead over dense at the end, {CONFIDENCE:.0%} intervals")
    axis.set_ylabel("nats a token")


def _losses_panel(axis: "Axes", outcomes: Sequence[VariantOutcome], colours: Mapping[str, str]) -> None:
    for outcome in outcomes:
        steps, losses = zip(*outcome.curve, strict=True)
        axis.plot(steps, losses, color=colours[outcome.name], label=outcome.name, linewidth=1.4)
    dense = outcomes[0].curve
    axis.set_ylim(top=dense[min(1, len(dense) - 1)][1] * 1.05)
    axis.set_title("loss, nats a token")
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
    axis.set_title("lead over dense, nats a token")
    axis.set_xlabel("step")
