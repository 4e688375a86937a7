"""Prints a run that has ended: its metrics, the experts' load, the time, samples and folders."""

from collections.abc import Mapping

from rich.console import Console

from launch.console.progress import clock
from launch.console.tables import table
from trainer.records.goodput import NAMES
from trainer.run_rows import Spent, Summary
from trainer.storage import Folder
from trainer.tracking.config import TrackingConfig, tracking_uri


def summary(console: Console, folder: Folder, facts: Summary, tracking: TrackingConfig) -> None:
    """Print the summary of the run in `folder`."""
    rate = facts["training"].get("tokens_per_s")
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    console.print(
        f"\n{facts['name']}: {facts['step']} steps in {clock(facts['train_seconds'])}{speed} ({facts['stopped']})",
        style="bold",
    )
    if "seconds_to_first_step" in facts:
        console.print(f"first optimiser step {facts['seconds_to_first_step']:.1f} s after the command")
    held_out_table(console, facts)
    quality_table(console, facts["quality"])
    load_table(console, facts)
    time_table(console, facts["goodput"])
    for name, text in facts["samples"].items():
        console.rule(name, align="left", style="dim")
        console.print(printable(text), markup=False)
    if facts["samples"]:
        console.rule(style="dim")
    console.print(f"run folder   {folder}", soft_wrap=True)
    if tracking.enabled:
        console.print(f"MLflow       switchwork ui   (store: {tracking_uri(tracking)})", soft_wrap=True)


def printable(text: str) -> str:
    """`text` with `?` in place of control characters.

    An untrained model writes them too, and a terminal would obey them.
    """
    return "".join(character if character.isprintable() or character in "\n\t" else "?" for character in text)


def held_out_table(console: Console, facts: Summary) -> None:
    """Print the metrics on held-out data, with their baselines below them."""
    evaluation = facts["eval"]
    if "bits_per_byte" in evaluation:
        baselines = {name.replace("_bits_per_byte_", " -9, "): value for name, value in facts["baselines"].items()}
        metrics = {"bits per byte": evaluation["bits_per_byte"]} | baselines
    else:
        metrics = {name: value for name, value in evaluation.items() if "/" not in name}
    rows = [(name.replace("_", " "), f"{value:.3f}") for name, value in metrics.items()]
    console.print(table("held out", ("", ""), rows, left=(0, 1)))


def quality_table(console: Console, quality: dict[str, float]) -> None:
    """Print the quality of samples or features next to that of references.

    References are held-out data and noise, say, or the features of a random network.
    """
    if not quality:
        return
    references = list(dict.fromkeys(name.partition("/")[0] for name in quality if "/" in name))
    rows = []
    for name, value in quality.items():
        if "/" not in name:
            others = [quality.get(f"{reference}/{name}") for reference in references]
            cells = ["" if other is None else f"{other:.3f}" for other in others]
            rows.append((name.replace("_", " "), f"{value:.3f}", *cells))
    columns = [reference.replace("_", " ") for reference in references]
    console.print(table("quality", ("", "this run", *columns), rows))


def time_table(console: Console, seconds: Mapping[Spent, float]) -> None:
    """Print the shares of the time of all attempts, the largest first."""
    total = sum(seconds.values())
    rows = []
    for activity, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        if spent >= 0.0005 * total:
            bar = "█" * round(40 * spent / total)
            rows.append((NAMES[activity], clock(spent), f"{100 * spent / total:.1f} %", bar))
    console.print(table(f"where {clock(total)} went", ("", "", "", ""), rows, left=(0, 3)))


def load_table(console: Console, facts: Summary) -> None:
    """Print the share of the held-out tokens that each expert of each layer gets, in percent."""
    evaluation = facts["eval"]
    cells = {
        tuple(int("".join(filter(str.isdigit, part))) for part in name.split("/")[1:]): value
        for name, value in evaluation.items()
        if name.startswith("expert_load/")
    }
    if not cells:
        return
    layers = sorted({layer for layer, _ in cells})
    experts = sorted({expert for _, expert in cells})
    shown = experts[:16]
    more = ["..."] if len(experts) > len(shown) else []
    rows = []
    for layer in layers:
        loads = [f"{100 * cells[layer, expert]:.1f}" for expert in shown]
        imbalance = evaluation[f"load_max_over_mean/layer{layer}"]
        entropy = evaluation[f"router_entropy/layer{layer}"]
        rows.append((str(layer), *loads, *more, f"{imbalance:.2f}", f"{entropy:.2f}"))
    headings = ("layer", *map(str, shown), *more, "max/mean", "entropy")
    console.print(table("load of each expert, % of the held-out tokens", headings, rows, left=()))
