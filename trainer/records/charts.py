"""Pictures of a run, drawn from its metrics: curves, and the load of each expert per step."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from trainer.run_files import CURVES, EXPERT_LOAD
from trainer.run_rows import MetricsRow

INK, SOFT = "#1f2933", "#9aa5b1"
PLAIN: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "font.size": 9,
    "figure.dpi": 120,
}


_HEAT: Any = {"cmap": "RdBu_r", "vmin": 0, "vmax": 2}

Steps = Sequence[tuple[int, dict[str, float]]]
"""All metrics of each step, in the order of the steps."""


def by_step(rows: Iterable[MetricsRow]) -> Steps:
    """Each step once. If a step was replayed after a restart, the last attempt counts."""
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        steps.setdefault(row.step, {}).update(row.metrics)
    return sorted(steps.items())


def series(rows: Steps, name: str) -> tuple[list[int], list[float]]:
    """The steps that have the metric `name`, and its values."""
    points = [(step, metrics[name]) for step, metrics in rows if name in metrics]
    return [step for step, _ in points], [value for _, value in points]


def draw_run(metrics: Iterable[MetricsRow], folder: Path, title: str, baselines: dict[str, float]) -> list[Path]:
    """Draw all pictures for which the run has metrics, as PNG files in `folder`."""
    rows = by_step(metrics)
    folder.mkdir(parents=True, exist_ok=True)
    files = [curves(rows, folder / CURVES, title, baselines)] if rows else []
    matches = (re.fullmatch(r"expert_load/layer(\d+)/expert0", key) for key in _keys(rows))
    layers = sorted(int(match[1]) for match in matches if match)
    if layers:
        files.append(expert_load(rows, layers, folder / EXPERT_LOAD, title))
    return files


def curves(rows: Steps, file: Path, title: str, baselines: dict[str, float]) -> Path:
    """Draw training and held-out loss, gradient norm, learning rate and throughput."""
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
        figure.suptitle(title, color=INK)
        _loss_panel(axes[0, 0], rows, baselines)
        norms = [key for key in _keys(rows) if key.startswith("grad_norm")]
        _panel(axes[0, 1], rows, norms, "gradient norm", log=True)
        rates = [key for key in _keys(rows) if key.startswith("learning_rate")]
        _panel(axes[1, 0], rows, rates, "learning rate")
        rate = "tokens_per_s" if series(rows, "tokens_per_s")[0] else "samples_per_s"
        _panel(axes[1, 1], rows, [rate], rate.replace("_per_s", " per second"), zero=True)
        for axis in axes[1]:
            axis.set_xlabel("step")
        figure.savefig(file)
        plt.close(figure)
    return file


def _loss_panel(axis: Any, rows: Steps, baselines: dict[str, float]) -> None:
    """Bits per byte for text, else the loss; each baseline is a line."""
    held_out = series(rows, "eval/bits_per_byte")
    if held_out[0]:
        steps, nats = series(rows, "cross_entropy")
        per_byte = series(rows, "eval/bytes_per_token")[1][-1] * 0.6931471805599453
        axis.plot(steps, [value / per_byte for value in nats], color=SOFT, label="training")
        axis.plot(*held_out, color="#d64545", marker="o", markersize=4, label="held out")
        for style, (name, value) in zip((":", "--"), baselines.items()):
            label = name.replace("_bits_per_byte", "").replace("_", " ")
            axis.axhline(value, color=INK, linestyle=style, linewidth=1, label=f"{label}: {value:.2f}")
        axis.set_title("bits per byte")
    else:
        axis.plot(*series(rows, "loss"), color=SOFT, label="training")
        if series(rows, "eval/loss")[0]:
            axis.plot(*series(rows, "eval/loss"), color="#d64545", marker="o", markersize=4, label="held out")
        axis.set_title("loss")
    axis.legend(frameon=False)


def _keys(rows: Steps) -> list[str]:
    """The names of all metrics, in the order of their first appearance."""
    keys: dict[str, None] = {}
    for _, row in rows:
        keys |= dict.fromkeys(row)
    return list(keys)


def _panel(axis: Any, rows: Steps, names: Sequence[str], title: str, log: bool = False, zero: bool = False) -> None:
    for name in names:
        axis.plot(*series(rows, name), linewidth=1.2, label=name.partition("/")[2])
    axis.set_title(title)
    if log:
        axis.set_yscale("log")
    if zero:
        axis.set_ylim(bottom=0)
    if len(names) > 1:
        axis.legend(frameon=False)


def expert_load(rows: Steps, layers: Sequence[int], file: Path, title: str) -> Path:
    """Draw a heat map per layer: each expert's share of the tokens (or token copies) per step.

    1 is an equal share. Lines mark collapses.
    """
    routed = [(step, row) for step, row in rows if f"expert_load/layer{layers[0]}/expert0" in row]
    first = routed[0][0]
    last = max(routed[-1][0], first + 1)
    # A row tells of the steps up to its own, so the first cell begins before the first row.
    start = first - (last - first) / max(1, len(routed) - 1)
    experts = sum(1 for key in routed[0][1] if key.startswith(f"expert_load/layer{layers[0]}/"))
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(
            len(layers), 1, figsize=(10, 1.1 + 1.25 * len(layers)), sharex=True, squeeze=False, layout="constrained"
        )
        figure.suptitle(f"{title}: load of each expert divided by an equal share", color=INK)
        for axis, layer in zip(axes[:, 0], layers, strict=True):
            names = [f"expert_load/layer{layer}/expert{expert}" for expert in range(experts)]
            shares = [[row[name] * experts for _, row in routed] for name in names]
            extent = (start, last, experts - 0.5, -0.5)
            image = axis.imshow(shares, aspect="auto", interpolation="nearest", extent=extent, **_HEAT)
            axis.set_ylabel(f"layer {layer}\nexpert")
            for step in series(rows, f"collapse/layer{layer}")[0]:
                axis.axvline(step, color="#f7c948", linestyle=":", linewidth=2)
        axes[-1, 0].set_xlabel("step")
        figure.colorbar(image, ax=axes[:, 0], label="load / equal share", shrink=0.9, extend="max")
        figure.savefig(file)
        plt.close(figure)
    return file
