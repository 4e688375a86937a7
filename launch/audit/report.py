"""An audit in words: the worst of each group of parameters, and for what is wrong, who is to be suspected first."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from launch.console.tables import table
from trainer.audit.evidence import Evidence, group_of
from trainer.audit.verdict import Findings, Judged, Subject
from trainer.records.charts import INK, PLAIN, SOFT, plt

_FAR = 1e4
"""A signal this many times weaker or stronger than the median layer's is marked."""
_SAME = 1e-2
_MOST = 8
_BY_THEMSELVES = (
    Subject.REFUSED,
    Subject.SAMPLES,
    Subject.WEIGHTS,
    Subject.ROUTER,
    Subject.ROUTING,
    Subject.RECURSION,
    Subject.DIFFERENCES,
)


def likely_causes(findings: Findings) -> list[str]:
    """What is wrong, in words, the likeliest cause first: the first step's faults before those of the next, which may follow from them; and
    what is found in one place by itself before what others may have caused."""
    said = []
    for step in sorted({each.step for each in findings.judged}):
        judged = [each for each in findings.judged if each.step == step]
        bad = [each for each in judged if not each.good]
        said += [_alone(each) for what in _BY_THEMSELVES for each in bad if each.what == what]
        said += _gradients(
            [each for each in bad if each.what is Subject.GRADIENT],
            [each for each in judged if each.what is Subject.GRADIENT],
        )
        off = [each for each in bad if each.what in (Subject.NORM, Subject.LOSS)]
        said += [
            f"step {step}: the {each.what} of {each.name} is off by {each.error:.1e}, {each.allowed:.1e} allowed"
            for each in off
        ]
    return list(dict.fromkeys(said))


def _alone(each: Judged) -> str:
    off = f"off by {each.error:.1e}, {each.allowed:.1e} allowed"
    match each.what:
        case Subject.REFUSED:
            return f"step {each.step}: the batch was passed over: {each.name}"
        case Subject.SAMPLES:
            return f"step {each.step}: {each.error:.0f} samples are missing from the global batch, or in it twice"
        case Subject.WEIGHTS:
            return f"{each.name}: step {each.step} computed with other values than the optimiser keeps (a stale shard)"
        case Subject.ROUTER:
            return f"{each.name}.weight: its scores and gates are not those of its inputs: {off}"
        case Subject.ROUTING:
            return f"{each.name}.router.weight: tokens went elsewhere than their scores say, by margins that rounding does not explain: {off}"
        case Subject.RECURSION:
            return f"{each.name}: autograd differs from backpropagation written out: {off}"
        case _:
            return f"{each.name}: the derivative differs from finite differences: {off}"


def _gradients(bad: Sequence[Judged], judged: Sequence[Judged]) -> list[str]:
    """Gradients that do not arrive, then those off by a factor, then the others; of each kind the nearest to the loss first, as errors travel from there."""
    if not bad:
        return []
    missing = [each for each in bad if abs(each.factor) < _SAME and each.rest < _SAME]
    scaled = [each for each in bad if each not in missing and each.rest < _SAME]
    others = [each for each in bad if each not in missing and each not in scaled]
    said = [f"{_names(missing)}: no gradient arrives"] if missing else []
    for factor in dict.fromkeys(f"{each.factor:.3g}" for each in scaled):
        these = [each for each in scaled if f"{each.factor:.3g}" == factor]
        everywhere = len(these) >= len({each.name for each in judged if each.size})
        names = "every parameter" if everywhere else _names(these)
        said.append(
            f"{names}: the gradient is {factor} times what it should be (accumulation, reduction over ranks or the loss's weight)"
        )
    if others:
        worst = max(others, key=lambda each: each.error / max(each.allowed, 1e-300))
        said.append(
            f"{_names(others)}: the gradient is off by up to {worst.error:.1e} ({worst.name}), {worst.allowed:.1e} allowed"
        )
    return said


def _names(these: Sequence[Judged]) -> str:
    names = [each.name for each in reversed(these)]
    return ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")


def unusual_signals(findings: Findings) -> list[str]:
    """Layers whose error signal vanishes or explodes beside the median layer's of their network."""
    said = []
    for phase, signals in findings.signals.items():
        norms = {layer: signal.norm for layer, signal in signals.items() if signal.size}
        middle = median(norms.values()) if norms else 0.0
        for layer, norm in norms.items():
            if norm < middle / _FAR or norm > middle * _FAR:
                said.append(
                    f"{phase}/{layer}: the error signal {'vanishes' if norm < middle else 'explodes'} ({norm:.1e}, median layer {middle:.1e})"
                )
    return said


def show(console: Console, name: str, findings: Findings, evidence: Evidence, report: str, picture: str) -> None:
    """Print the audit."""
    steps = " and ".join(str(step.facts.number) for step in evidence.steps)
    where = f"{evidence.world} rank{'s' * (evidence.world > 1)} on {evidence.device}, unit roundoff {evidence.roundoff:.1e}, steps {steps}"
    console.print(_table(findings))
    if findings.decisions:
        console.print(
            f"routing: {findings.flips} of {findings.decisions:,} decisions are near ties that float64 would have made otherwise"
        )
    for line in unusual_signals(findings):
        console.print(line, markup=False)
    console.print(f"all comparisons  {report}\nerror signal     {picture}", soft_wrap=True)
    console.print(f"{'RIGHT' if findings.good else 'WRONG'}: {name} ({where})", style="bold")
    for line in likely_causes(findings):
        console.print(f"  {line}", markup=False)


def _table(findings: Findings) -> Table:
    """The worst gradient of each group of parameters, relative error beside what precision allows, and what the witnesses say of the reference."""
    witnesses = [_worst_of_groups(findings, witness) for witness in (Subject.DIFFERENCES, Subject.RECURSION)]
    groups: dict[str, list[Judged]] = {}
    for judged in findings.judged:
        if judged.what is Subject.GRADIENT:
            groups.setdefault(group_of(judged.name).removesuffix("[*]"), []).append(judged)
    rows = []
    for group, members in groups.items():
        worst = max(
            members, key=lambda judged: judged.error / judged.allowed if judged.allowed else float(judged.error > 0)
        )
        share = f"{worst.error / worst.allowed:.0%}" if worst.allowed else ""
        numbers = "" if worst.name == group else _numbers(worst.name)
        seen = [f"{errors[group]:.0e}" if group in errors else "" for errors in witnesses]
        rows.append([group, f"{worst.error:.1e}", f"{worst.allowed:.1e}", share, numbers, *seen])
    headings = ("parameters", "error", "allowed", "share", "where", "differences", "recursion")
    return table("gradients, the worst of each group", headings, rows, left=(0, 4))


def _worst_of_groups(findings: Findings, witness: Subject) -> dict[str, float]:
    """The largest error that `witness` found in each group of parameters."""
    worst: dict[str, float] = {}
    for judged in findings.judged:
        if judged.what is witness:
            group = group_of(judged.name)
            worst[group] = max(worst.get(group, judged.error), judged.error)
    return worst


def _numbers(name: str) -> str:
    """The numbers that the group's name leaves out, with what they number."""
    return " ".join(
        part
        for part in name.replace("[", ".[").replace("/", ".").split(".")
        if any(character.isdigit() for character in part)
    )


def draw_signal(findings: Findings, file: Path, title: str) -> Path:
    """A panel for each network: |dL / d output| and |dL / d weights| of its layers, in the order of the forward pass."""
    marked = {line.partition(":")[0] for line in unusual_signals(findings)}
    with plt.rc_context(PLAIN):
        panels = len(findings.signals)
        figure, axes = plt.subplots(panels, 1, figsize=(10, 1 + 3.4 * panels), squeeze=False, layout="constrained")
        figure.suptitle(f"{title}: the error signal, layer by layer", color=INK)
        for axis, (phase, signals) in zip(axes[:, 0], findings.signals.items(), strict=True):
            layers = [layer for layer, signal in signals.items() if signal.size and signal.squares]
            axis.semilogy(
                [signals[layer].norm for layer in layers],
                color="#1f4e79",
                marker="o",
                markersize=3,
                label="|dL / d output|",
            )
            axis.semilogy(
                [_gradient(findings, f"{phase}/{layer}") for layer in layers],
                color="#ca6f1e",
                marker="s",
                markersize=3,
                label="|dL / d weights|",
            )
            for place, layer in enumerate(layers):
                if f"{phase}/{layer}" in marked:
                    axis.axvline(place, color="#d64545", linestyle=":")
            axis.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
            axis.set_title(f"{phase}, from input to loss; dotted: vanishes or explodes")
            axis.grid(axis="y", color=SOFT, alpha=0.3)
            axis.legend(frameon=False)
        figure.savefig(file)
        plt.close(figure)
    return file


def _gradient(findings: Findings, layer: str) -> float:
    """Norm of all gradients of one layer in the last step."""
    mine = [
        each
        for each in findings.judged
        if each.what is Subject.GRADIENT and each.name.partition("[")[0].rpartition(".")[0] == layer
    ]
    last = max((each.step for each in mine), default=0)
    return sum(each.size**2 for each in mine if each.step == last) ** 0.5 or float("nan")
