"""An audit in words: the worst of each group of parameters, and for what is wrong, who is to be suspected first."""

from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.table import Table

from trainer.audit.evidence import Evidence, group_of
from trainer.audit.verdict import Findings, Judged

_FAR = 1e4
"""A signal this many times weaker or stronger than the median layer's is marked."""
_SAME = 1e-2
_MOST = 8


_BY_THEMSELVES = ("refused", "samples", "weights", "router", "routing", "recursion", "differences")


def suspects(findings: Findings) -> list[str]:
    """What is wrong, in words, the likeliest cause first: the first step's faults before those of the next, which may follow from them; and
    what is found in one place by itself before what others may have caused."""
    said = []
    for step in sorted({each.step for each in findings.judged}):
        judged = [each for each in findings.judged if each.step == step]
        bad = [each for each in judged if not each.good]
        said += [_alone(each) for what in _BY_THEMSELVES for each in bad if each.what == what]
        said += _gradients([each for each in bad if each.what == "gradient"], [each for each in judged if each.what == "gradient"])
        off = [each for each in bad if each.what in ("norm", "loss")]
        said += [f"step {step}: the {each.what} of {each.name} is off by {each.error:.1e}, {each.allowed:.1e} allowed" for each in off]
    return list(dict.fromkeys(said))


def _alone(each: Judged) -> str:
    off = f"off by {each.error:.1e}, {each.allowed:.1e} allowed"
    match each.what:
        case "refused":
            return f"step {each.step}: the batch was passed over: {each.name}"
        case "samples":
            return f"step {each.step}: {each.error:.0f} samples are missing from the global batch, or in it twice"
        case "weights":
            return f"{each.name}: step {each.step} computed with other values than the optimiser keeps (a stale shard)"
        case "router":
            return f"{each.name}.weight: its scores and gates are not those of its inputs: {off}"
        case "routing":
            return f"{each.name}.router.weight: tokens went elsewhere than their scores say, by margins that rounding does not explain: {off}"
        case "recursion":
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
        said.append(f"{names}: the gradient is {factor} times what it should be (accumulation, reduction over ranks or the loss's weight)")
    if others:
        worst = max(others, key=lambda each: each.error / max(each.allowed, 1e-300))
        said.append(f"{_names(others)}: the gradient is off by up to {worst.error:.1e} ({worst.name}), {worst.allowed:.1e} allowed")
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
                said.append(f"{phase}/{layer}: the error signal {'vanishes' if norm < middle else 'explodes'} ({norm:.1e}, median layer {middle:.1e})")
    return said


def show(console: Console, name: str, findings: Findings, evidence: Evidence, report: str, picture: str) -> None:
    """Print the audit."""
    steps = " and ".join(str(step.number) for step in evidence.steps)
    where = f"{evidence.world} rank{'s' * (evidence.world > 1)} on {evidence.device}, unit roundoff {evidence.roundoff:.1e}, steps {steps}"
    console.print(_table(findings))
    if findings.decisions:
        console.print(f"routing: {findings.flips} of {findings.decisions:,} decisions are near ties that float64 would have made otherwise", highlight=False)
    for line in unusual_signals(findings):
        console.print(line, highlight=False, markup=False)
    console.print(f"all comparisons  {report}\nerror signal     {picture}", soft_wrap=True, highlight=False)
    console.print(f"{'RIGHT' if findings.good else 'WRONG'}: {name} ({where})", style="bold", highlight=False)
    for line in suspects(findings):
        console.print(f"  {line}", highlight=False, markup=False)


def _table(findings: Findings) -> Table:
    """The worst gradient of each group of parameters, relative error beside what precision allows, and what the witnesses say of the reference."""
    table = Table(title="gradients, the worst of each group", title_justify="left", box=None, pad_edge=False)
    for heading in ("parameters", "error", "allowed", "share", "where", "differences", "recursion"):
        table.add_column(heading, justify="left" if heading in ("parameters", "where") else "right")
    witnesses = {
        what: {group: max((each for each in findings.judged if each.what == what and group_of(each.name) == group), key=lambda each: each.error)
               for group in {group_of(each.name) for each in findings.judged if each.what == what}}
        for what in ("differences", "recursion")
    }  # fmt: skip
    groups: dict[str, list[Judged]] = {}
    for each in findings.judged:
        if each.what == "gradient":
            groups.setdefault(group_of(each.name).removesuffix("[*]"), []).append(each)
    for group, members in groups.items():
        worst = max(members, key=lambda each: each.error / each.allowed if each.allowed else float(each.error > 0))
        share = f"{worst.error / worst.allowed:.0%}" if worst.allowed else ""
        seen = [f"{witnesses[what][group].error:.0e}" if group in witnesses[what] else "" for what in ("differences", "recursion")]
        table.add_row(group, f"{worst.error:.1e}", f"{worst.allowed:.1e}", share, "" if worst.name == group else _place(worst.name), *seen)
    return table


def _place(name: str) -> str:
    """The numbers that the group's name leaves out, with what they number."""
    return " ".join(part for part in name.replace("[", ".[").replace("/", ".").split(".") if any(character.isdigit() for character in part))
