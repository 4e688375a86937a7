"""What a person sees of a run that has ended: the figures, the experts' load, a sample, and where everything is."""

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
    figures(console, facts)
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
    """`text` with control characters, which an untrained model writes as well, shown as `?`: they could do things to a terminal."""
    return "".join(character if character.isprintable() or character in "\n\t" else "?" for character in text)


def figures(console: Console, facts: Summary) -> None:
    """Held-out measures, beside the baselines they are to be read against."""
    evaluation, baselines = facts["eval"], facts["baselines"]
    if "bits_per_byte" in evaluation:
        rows = {"bits per byte": evaluation["bits_per_byte"]} | {
            name.replace("_bits_per_byte_", " -9, "): value for name, value in baselines.items()
        }
    else:
        rows = {name: value for name, value in evaluation.items() if "/" not in name}
    console.print(
        table(
            "held out",
            ("", ""),
            [(name.replace("_", " "), f"{value:.3f}") for name, value in rows.items()],
            left=(0, 1),
        )
    )


def quality_table(console: Console, quality: dict[str, float]) -> None:
    """Measures of samples or features, beside the same of what they are to be compared with: held-out data and noise, say, or random features."""
    beside = list(dict.fromkeys(name.partition("/")[0] for name in quality if "/" in name))
    if not quality:
        return
    rows = []
    for name, value in quality.items():
        if "/" not in name:
            others = [quality.get(f"{each}/{name}") for each in beside]
            rows.append(
                (name.replace("_", " "), f"{value:.3f}", *("" if other is None else f"{other:.3f}" for other in others))
            )
    console.print(table("quality", ("", "this run", *(column.replace("_", " ") for column in beside)), rows))


def time_table(console: Console, seconds: Mapping[Spent, float]) -> None:
    """Where the time of all attempts went, the most first."""
    whole = sum(seconds.values())
    rows = []
    for what, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        if spent >= 0.0005 * whole:
            rows.append((NAMES[what], clock(spent), f"{100 * spent / whole:.1f} %", "█" * round(40 * spent / whole)))
    console.print(table(f"where {clock(whole)} went", ("", "", "", ""), rows, left=(0, 3)))


def load_table(console: Console, facts: Summary) -> None:
    """Share of the held-out tokens that each expert of each layer gets, in percent."""
    evaluation = facts["eval"]
    cells = {
        tuple(int("".join(filter(str.isdigit, part))) for part in name.split("/")[1:]): value
        for name, value in evaluation.items()
        if name.startswith("expert_load/")
    }
    if not cells:
        return
    layers, experts = sorted({layer for layer, _ in cells}), sorted({expert for _, expert in cells})
    shown = experts[:16]
    more, rows = ["..."] if len(experts) > len(shown) else [], []
    for layer in layers:
        loads = [f"{100 * cells[layer, expert]:.1f}" for expert in shown]
        imbalance, entropy = evaluation[f"load_max_over_mean/layer{layer}"], evaluation[f"router_entropy/layer{layer}"]
        rows.append((str(layer), *loads, *more, f"{imbalance:.2f}", f"{entropy:.2f}"))
    headings = ("layer", *map(str, shown), *more, "max/mean", "entropy")
    console.print(table("load of each expert, % of the held-out tokens", headings, rows, left=()))
