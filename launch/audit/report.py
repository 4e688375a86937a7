"""The report of an audit: the worst gradient per group of parameters, and the likely causes.

The error signal, as it travels from the loss back to the input, is drawn layer by layer.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from launch.console.tables import table
from trainer.audit.evidence import Evidence, group_of
from trainer.audit.verdict import Findings, Judged, Subject
from trainer.records.charts import INK, PLAIN, SOFT, plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNUSUAL_RATIO = 1e4
"""A signal this many times weaker or stronger than the median layer's is marked."""
_SAME = 1e-2
"""A gradient equals a multiple of the right one if at most this share of it remains unexplained."""
_MAX_NAMES = 8
"""The number of parameters that a line of the report names."""
_MAX_LABELS = 12
"""The number of layers that have a label in the picture."""
_SINGLE_CAUSES = (
    Subject.REFUSED,
    Subject.SAMPLES,
    Subject.WEIGHTS,
    Subject.ROUTER,
    Subject.ROUTING,
    Subject.RECURSION,
    Subject.DIFFERENCES,
)
"""The comparisons whose failure points at a cause by itself, the likeliest first."""


def likely_causes(findings: Findings) -> list[str]:
    """Say what is wrong, the likeliest cause first.

    Faults of the first step come before those of the next, which may follow from them. Failures
    that point at one part come before failures that other parts may have caused.
    """
    causes: list[str] = []
    for step in sorted({judged.step for judged in findings.judged}):
        judged_now = [judged for judged in findings.judged if judged.step == step]
        bad = [judged for judged in judged_now if not judged.good]
        for subject in _SINGLE_CAUSES:
            causes += [_single_cause(judged) for judged in bad if judged.what is subject]
        causes += _gradient_causes(
            [judged for judged in bad if judged.what is Subject.GRADIENT],
            [judged for judged in judged_now if judged.what is Subject.GRADIENT],
        )
        causes += [
            f"step {step}: the {judged.what} of {judged.name} is {_off(judged)}"
            for judged in bad
            if judged.what in (Subject.NORM, Subject.LOSS)
        ]
    return list(dict.fromkeys(causes))


def _off(judged: Judged) -> str:
    return f"off by {judged.error:.1e}, {judged.allowed:.1e} allowed"


def _single_cause(judged: Judged) -> str:
    step = judged.step
    name = judged.name
    match judged.what:
        case Subject.REFUSED:
            return f"step {step}: the batch was skipped: {name}"
        case Subject.SAMPLES:
            return f"step {step}: {judged.error:.0f} samples are missing from the global batch, or in it twice"
        case Subject.WEIGHTS:
            return f"{name}: step {step} computed with other values than the optimiser keeps (a stale shard)"
        case Subject.ROUTER:
            return f"{name}.weight: its scores and gates do not follow from its inputs: {_off(judged)}"
        case Subject.ROUTING:
            routed = "tokens went to other experts than their scores say, by margins that rounding does not explain"
            return f"{name}.router.weight: {routed}: {_off(judged)}"
        case Subject.RECURSION:
            return f"{name}: autograd differs from backpropagation written out: {_off(judged)}"
        case _:
            return f"{name}: the derivative differs from finite differences: {_off(judged)}"


def _gradient_causes(bad: Sequence[Judged], gradients: Sequence[Judged]) -> list[str]:
    """Gradients that do not arrive, then those off by a factor, then the others.

    Within a kind the parameter nearest to the loss comes first, because errors travel from there.
    """
    if not bad:
        return []
    missing = [judged for judged in bad if abs(judged.factor) < _SAME and judged.rest < _SAME]
    scaled = [judged for judged in bad if judged not in missing and judged.rest < _SAME]
    others = [judged for judged in bad if judged not in missing and judged not in scaled]
    causes = [f"{_names(missing)}: no gradient arrives"] if missing else []
    reasons = "accumulation, reduction across ranks or the weight of the loss"
    for factor in dict.fromkeys(f"{judged.factor:.3g}" for judged in scaled):
        alike = [judged for judged in scaled if f"{judged.factor:.3g}" == factor]
        everywhere = len(alike) >= len({judged.name for judged in gradients if judged.size})
        names = "every parameter" if everywhere else _names(alike)
        causes.append(f"{names}: the gradient is {factor} times what it should be ({reasons})")
    if others:
        worst = max(others, key=lambda judged: judged.error / max(judged.allowed, 1e-300))
        error = f"off by up to {worst.error:.1e} ({worst.name}), {worst.allowed:.1e} allowed"
        causes.append(f"{_names(others)}: the gradient is {error}")
    return causes


def _names(judged: Sequence[Judged]) -> str:
    names = [comparison.name for comparison in reversed(judged)]
    text = ", ".join(names[:_MAX_NAMES])
    more = len(names) - _MAX_NAMES
    return f"{text} and {more} more" if more > 0 else text


def unusual_signals(findings: Findings) -> list[str]:
    """Name the layers whose error signal vanishes or explodes, compared with the median layer's."""
    lines = []
    for phase, signals in findings.signals.items():
        norms = {layer: signal.norm for layer, signal in signals.items() if signal.size}
        middle = median(norms.values()) if norms else 0.0
        for layer, norm in norms.items():
            if norm < middle / _UNUSUAL_RATIO or norm > middle * _UNUSUAL_RATIO:
                change = "vanishes" if norm < middle else "explodes"
                lines.append(f"{phase}/{layer}: the error signal {change} ({norm:.1e}, median layer {middle:.1e})")
    return lines


def show(console: Console, name: str, findings: Findings, evidence: Evidence, report: str, picture: str) -> None:
    """Print the audit."""
    steps = " and ".join(str(step.facts.number) for step in evidence.steps)
    ranks = f"{evidence.world} rank{'s' * (evidence.world > 1)}"
    conditions = f"{ranks} on {evidence.device}, unit roundoff {evidence.roundoff:.1e}, steps {steps}"
    console.print(_table(findings))
    if findings.decisions:
        share = f"{findings.flips} of {findings.decisions:,} decisions"
        console.print(f"routing: {share} are near ties that float64 would have made otherwise")
    for line in unusual_signals(findings):
        console.print(line, markup=False)
    console.print(f"all comparisons  {report}\nerror signal     {picture}", soft_wrap=True)
    console.print(f"{'RIGHT' if findings.good else 'WRONG'}: {name} ({conditions})", style="bold")
    for line in likely_causes(findings):
        console.print(f"  {line}", markup=False)


def _error_share(judged: Judged) -> float:
    """The error as a share of the allowed one."""
    return judged.error / judged.allowed if judged.allowed else float(judged.error > 0)


def _table(findings: Findings) -> Table:
    """The worst gradient per group of parameters: its relative error and the one that is allowed.

    The last two columns are the errors of the reference according to its two witnesses.
    """
    witnesses = [_worst_of_groups(findings, witness) for witness in (Subject.DIFFERENCES, Subject.RECURSION)]
    groups: dict[str, list[Judged]] = {}
    for judged in findings.judged:
        if judged.what is Subject.GRADIENT:
            groups.setdefault(group_of(judged.name).removesuffix("[*]"), []).append(judged)
    rows = []
    for group, members in groups.items():
        worst = max(members, key=_error_share)
        share = f"{worst.error / worst.allowed:.0%}" if worst.allowed else ""
        numbers = "" if worst.name == group else _numbers(worst.name)
        seen = [f"{errors[group]:.0e}" if group in errors else "" for errors in witnesses]
        rows.append([group, f"{worst.error:.1e}", f"{worst.allowed:.1e}", share, numbers, *seen])
    headings = ("parameters", "error", "allowed", "share", "where", "differences", "recursion")
    return table("gradients, the worst of each group", headings, rows, left=(0, 4))


def _worst_of_groups(findings: Findings, witness: Subject) -> dict[str, float]:
    """The largest error per group of parameters, according to `witness`."""
    worst: dict[str, float] = {}
    for judged in findings.judged:
        if judged.what is witness:
            group = group_of(judged.name)
            worst[group] = max(worst.get(group, judged.error), judged.error)
    return worst


def _numbers(name: str) -> str:
    """The parts of a parameter's name that have numbers, which the group's name leaves out."""
    parts = name.replace("[", ".[").replace("/", ".").split(".")
    return " ".join(part for part in parts if any(character.isdigit() for character in part))


def draw_signal(findings: Findings, file: Path, title: str) -> Path:
    """Draw |dL / d output| and |dL / d weights| per layer, in the order of the forward pass.

    Each network has a panel of its own. The figure is small and its letters are large, so that the
    picture can still be read at 420 pixels.
    """
    panels = len(findings.signals)
    with plt.rc_context(PLAIN | {"font.size": 11, "savefig.dpi": 180}):
        figure, axes = plt.subplots(panels, 1, figsize=(6.5, 0.6 + 4 * panels), squeeze=False, layout="constrained")
        figure.suptitle(f"{title}: error signal by layer", color=INK)
        for axis, phase in zip(axes[:, 0], findings.signals, strict=True):
            _signal_panel(axis, findings, phase)
        figure.savefig(file)
        plt.close(figure)
    return file


def _signal_panel(axis: "Axes", findings: Findings, phase: str) -> None:
    """Draw the panel of one network; a dotted line marks a layer whose signal is unusual."""
    signals = findings.signals[phase]
    layers = [layer for layer, signal in signals.items() if signal.size and signal.squares]
    outputs = [signals[layer].norm for layer in layers]
    weights = [_gradient_norm(findings, f"{phase}/{layer}") for layer in layers]
    axis.semilogy(outputs, color="#1f4e79", marker="o", markersize=4, label="|dL / d output|")
    axis.semilogy(weights, color="#ca6f1e", marker="s", markersize=4, label="|dL / d weights|")
    marked = {line.partition(":")[0] for line in unusual_signals(findings)}
    for index, layer in enumerate(layers):
        if f"{phase}/{layer}" in marked:
            axis.axvline(index, color="#d64545", linestyle=":")
    stride = max(1, math.ceil(len(layers) / _MAX_LABELS))
    axis.set_xticks(range(0, len(layers), stride), layers[::stride], rotation=45, ha="right", rotation_mode="anchor")
    axis.set_title(f"{phase}, input to loss (dotted: vanishes or explodes)")
    axis.grid(axis="y", color=SOFT, alpha=0.3)
    axis.margins(y=0.2)  # room for the legend below the curves
    axis.legend(frameon=False, ncols=2, loc="lower left")


def _gradient_norm(findings: Findings, layer: str) -> float:
    """The norm of all gradients of one layer in the last step; NaN if it has none."""
    gradients = [
        judged
        for judged in findings.judged
        if judged.what is Subject.GRADIENT and judged.name.partition("[")[0].rpartition(".")[0] == layer
    ]
    last = max((judged.step for judged in gradients), default=0)
    return sum(judged.size**2 for judged in gradients if judged.step == last) ** 0.5 or float("nan")
