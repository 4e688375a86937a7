"""What `switchwork prove moe` shows: a table, the verdict in words, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from launch.paired import CONFIDENCE, Difference
from launch.progress import clock
from trainer.storage import Folder, absolute

if TYPE_CHECKING:
    from launch.prove_moe import Outcome

Leads = Mapping[tuple[str, str], Difference]
TITLE = "Mixture of experts against a dense model of the same FLOPs a token"
COLOURS = {"dense": "#1f2933", "frozen router": "#d98c21", "permuted router": "#d64545"}
BLUES = ("#9ecae1", "#4292c6", "#08519c", "#08306b")


def show(console: Console, outcomes: Sequence["Outcome"], leads: Leads, ours: str, folder: str, minutes: float) -> None:
    """Print all of it and draw `proof.png`; `minutes` is how long the runs take with that many processes."""
    console.print(table_of(outcomes, leads))
    for theirs in ("dense", "permuted router", "frozen router"):
        console.print(sentence(ours, theirs, leads[ours, theirs]), style="bold", highlight=False)
    draw(outcomes, leads, TITLE, Path(Folder(absolute(folder)).path) / "proof.png")
    console.print(f"{clock(60 * minutes)} of training; figures in {folder}/results.json, picture in {folder}/proof.png", highlight=False)


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


def table_of(outcomes: Sequence["Outcome"], leads: Leads) -> Table:
    seeds = len(outcomes[0].losses)
    title = f"held-out loss in nats a token and the lead over dense, means of {seeds} paired seeds; training MFLOPs of a token"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("", "parameters", "MFLOPs", "loss", "lead", f"{CONFIDENCE:.0%} interval", "verdict"):
        table.add_column(heading, justify="left" if heading in ("", "verdict") else "right", no_wrap=True)
    for each in outcomes:
        cells = [each.name, f"{each.parameters:,}", f"{each.flops_per_token / 1e6:.3f}", f"{sum(each.losses) / seeds:.4f}"]
        if lead := leads.get((each.name, "dense")):
            cells += [f"{lead.mean:+.4f}", f"{lead.low:+.4f} to {lead.high:+.4f}", lead.verdict]
        table.add_row(*cells)
    return table


def draw(outcomes: Sequence["Outcome"], leads: Leads, title: str, file: Path) -> None:
    """Under `title`: lead over the dense model by number of experts with its interval, loss over the steps, and the lead over the steps."""
    from trainer.charts import INK, PLAIN, SOFT, plt

    dense = outcomes[0]
    numbers = [each for each in outcomes if each.name not in COLOURS]
    colours = COLOURS | {each.name: BLUES[min(index, len(BLUES) - 1)] for index, each in enumerate(numbers)}
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
        seeds = len(dense.losses)
        figure.suptitle(f"{title}, {seeds} paired seeds, held-out data", color=INK)
        _leads_panel(axes[0], outcomes, leads, colours)
        for each in outcomes:
            steps, losses = zip(*each.curve, strict=True)
            axes[1].plot(steps, losses, color=colours[each.name], label=each.name, linewidth=1.4)
            gap = [their - our for (_, their), (_, our) in zip(dense.curve, each.curve, strict=True)]
            axes[2].plot(steps, gap, color=colours[each.name], linewidth=1.4, marker="o", markersize=3)
        axes[1].set_title("loss, nats a token")
        axes[1].set_ylim(top=dense.curve[min(1, len(dense.curve) - 1)][1] * 1.05)
        axes[1].legend(frameon=False)
        axes[2].set_title("lead over dense, nats a token")
        for axis in axes[1:]:
            axis.set_xlabel("step")
        axes[2].axhline(0, color=SOFT, linewidth=0.8)
        figure.savefig(file)
        plt.close(figure)


def _leads_panel(axis: Any, outcomes: Sequence["Outcome"], leads: Leads, colours: Mapping[str, str]) -> None:
    """One place for each variant: its seeds as dots, the mean and the interval as a bar."""
    from trainer.charts import SOFT

    dense, others = outcomes[0], outcomes[1:]
    axis.axhline(0, color=SOFT, linewidth=0.8)
    for place, each in enumerate(others):
        lead = leads[each.name, "dense"]
        gaps = [their - our for their, our in zip(dense.losses, each.losses, strict=True)]
        axis.plot([place + 0.2] * len(gaps), gaps, "o", color=SOFT, markersize=3)
        axis.errorbar(place, lead.mean, yerr=lead.mean - lead.low, fmt="o", color=colours[each.name], capsize=4, markersize=5)
    axis.set_xticks(range(len(others)), [each.name.replace(" ", "\n") for each in others])
    axis.set_title(f"lead over dense at the end, {CONFIDENCE:.0%} intervals")
    axis.set_ylabel("nats a token")
