"""The comparison: engine against reference, reference against its witnesses.

A gradient passes if |g - r| <= ALLOWANCE * d, where r is the reference's and d is by how much r moves when every operation is rounded as the
job's precision rounds (rounding.py; root mean square of REPEATS trials, and at least u |r|). ALLOWANCE leaves room for what the trials do not
imitate: the order of long sums, and that d is itself an estimate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from trainer.audit.decisions import Replayed
from trainer.audit.differences import SLOPE, slopes
from trainer.audit.evidence import AuditedStep, Evidence, RouterCall, experts_of, norm_of, relative
from trainer.audit.recursion import Signal, observing
from trainer.audit.reference import Reference
from trainer.audit.rounding import FP32, rounded
from trainer.config import RunConfig

ALLOWANCE = 8.0
REPEATS = 2
DOUBLE = 2.0**-53


class Subject(StrEnum):
    """The subject of a comparison."""

    REFUSED = "refused"
    SAMPLES = "samples"
    WEIGHTS = "weights"
    ROUTER = "router"
    ROUTING = "routing"
    RECURSION = "recursion"
    DIFFERENCES = "differences"
    GRADIENT = "gradient"
    NORM = "norm"
    LOSS = "loss"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One comparison; `error` and `allowed` are relative to the size of what is compared."""

    what: Subject
    step: int
    name: str
    """`network/parameter`, or what else is judged."""
    error: float
    allowed: float
    factor: float = 1.0
    """Of a gradient: how many times the right one it is, in the least-squares sense."""
    rest: float = 0.0
    """Of a gradient: what that leaves unexplained, relative."""
    size: float = 0.0
    """Norm of the right one."""

    @property
    def good(self) -> bool:
        return self.error <= self.allowed


@dataclass
class Findings:
    """All comparisons, in the order in which they are made, and the error signal of the last step."""

    judged: list[Judged] = field(default_factory=list)
    signals: dict[str, dict[str, Signal]] = field(default_factory=dict)
    """By phase, and by layer in the order of the forward pass."""
    flips: int = 0
    """Routing decisions that float64 would have made otherwise, all of them near ties unless judged otherwise."""
    decisions: int = 0
    """Of so many."""

    @property
    def good(self) -> bool:
        return all(each.good for each in self.judged)


def judge(run: RunConfig, evidence: Evidence, directions: int = 2) -> Findings:
    """Compare what the workers did with what is right."""
    findings = Findings()
    for step in evidence.steps:
        reference = Reference(run, step)
        findings.judged += _judge_facts(run, step)
        findings.judged += [
            _judge_router(reference, step.facts.number, name, call) for name, call in step.routers.items()
        ]
        for phase in reference.phases():
            findings.judged += _judge_phase(
                reference, phase, evidence.roundoff, directions if step is evidence.steps[-1] else 0, findings
            )
    return findings


def _judge_facts(run: RunConfig, step: AuditedStep) -> Iterator[Judged]:
    """Each sample of the global batch once, no refusal, and forward passes with the weights that the optimiser keeps."""
    numbers = sorted(int(number) for batch in step.batches for number in batch["sample"])
    first = numbers[0] // run.batch.global_batch * run.batch.global_batch
    wrong = len(set(numbers) ^ set(range(first, first + run.batch.global_batch))) + len(numbers) - len(set(numbers))
    yield Judged(what=Subject.SAMPLES, step=step.facts.number, name="global batch", error=wrong, allowed=0)
    if step.facts.refused:
        yield Judged(
            what=Subject.REFUSED, step=step.facts.number, name=step.facts.refused, error=float("inf"), allowed=0
        )
    for stale in step.facts.stale:
        yield Judged(what=Subject.WEIGHTS, step=step.facts.number, name=str(stale), error=float("inf"), allowed=0)


def _judge_router(reference: Reference, step: int, name: str, call: RouterCall) -> Judged:
    """A router by itself: on the inputs that it had, are its scores and gates those of float64, as far as fp32 allows?"""
    network, _, path = name.partition("/")
    router = reference.objective.networks[network].get_submodule(path)

    def right() -> Tensor:
        with Replayed([call.decision]):
            routing = router(call.x_GND.double(), call.keys_B)
        return torch.cat([routing.log_z_GN.flatten(), routing.gate_GA.flatten()]).detach()

    wanted, given = right(), torch.cat([call.log_z_GN.flatten(), call.gate_GA.flatten()]).double()
    moved = []
    for seed in range(REPEATS):
        with rounded(router, FP32, seed):
            moved.append(right())
    allowed = _allowed(wanted, moved, FP32)
    return Judged(
        what=Subject.ROUTER,
        step=step,
        name=name,
        error=relative(norm_of(given - wanted), norm_of(wanted)),
        allowed=allowed,
    )


def _allowed(right: Tensor, moved: Sequence[Tensor], roundoff: float) -> float:
    """What precision allows, relative to |right|: see the module's docstring."""
    deviation = (sum(norm_of(each - right) ** 2 for each in moved) / len(moved)) ** 0.5
    size = norm_of(right)
    return ALLOWANCE * relative(max(deviation, roundoff * size), size)


def _judge_phase(
    reference: Reference, phase: str, roundoff: float, directions: int, findings: Findings
) -> Iterator[Judged]:
    step, network = reference.step, reference.objective.networks[phase]
    with observing(reference, phase) as seen:
        loss, right, replay = reference.gradients(phase, step.batches)
    moved, losses = [], []
    for seed in range(REPEATS):
        with rounded(network, roundoff, seed):
            moved_loss, gradients, _ = reference.gradients(phase, step.batches)
        moved.append(gradients)
        losses.append(torch.tensor(moved_loss))
    findings.signals[phase] = seen.signals
    findings.flips += sum(replay.flips.values())
    findings.decisions += sum(decision[..., 0].numel() for decision in replay.written)
    for layer, margin in replay.margins.items():
        yield Judged(
            what=Subject.ROUTING,
            step=step.facts.number,
            name=f"{phase}/{layer}",
            error=margin,
            allowed=_margin(roundoff),
        )
    for name, written in seen.written_out.items():
        allowed = _allowed(right[name], [trial[name] for trial in moved], roundoff) * DOUBLE / roundoff
        error = relative(norm_of(written - right[name]), norm_of(right[name]))
        yield Judged(what=Subject.RECURSION, step=step.facts.number, name=name, error=error, allowed=allowed)
    for group, found in (slopes(reference, phase, directions, seed=0) if directions else {}).items():
        worst = max(found, key=lambda each: each.error)
        yield Judged(
            what=Subject.DIFFERENCES,
            step=step.facts.number,
            name=group,
            error=worst.error,
            allowed=SLOPE + ALLOWANCE * worst.rounding,
        )
    yield from _judge_gradients(step, right, moved, roundoff)
    yield _judge_norm(step, phase, right, moved, roundoff)
    allowed, error = (
        _allowed(torch.tensor(loss), losses, roundoff),
        relative(abs(step.facts.losses[phase] - loss), abs(loss)),
    )
    yield Judged(what=Subject.LOSS, step=step.facts.number, name=phase, error=error, allowed=allowed, size=abs(loss))


def _judge_gradients(
    step: AuditedStep, right: dict[str, Tensor], moved: Sequence[dict[str, Tensor]], roundoff: float
) -> Iterator[Judged]:
    for name, whole in right.items():
        parts = [
            experts_of(name, each) for each in (step.gradients[name].double(), whole, *(trial[name] for trial in moved))
        ]
        for (part, given), (_, wanted), *trials in zip(*parts, strict=True):
            size, along = norm_of(wanted), float((given * wanted).sum())
            factor = along / size**2 if size else 1.0
            yield Judged(
                what=Subject.GRADIENT,
                step=step.facts.number,
                name=part,
                error=relative(norm_of(given - wanted), size),
                allowed=_allowed(wanted, [trial for _, trial in trials], roundoff),
                factor=factor,
                rest=relative(norm_of(given - factor * wanted), size),
                size=size,
            )


def _judge_norm(
    step: AuditedStep, phase: str, right: dict[str, Tensor], moved: Sequence[dict[str, Tensor]], roundoff: float
) -> Judged:
    """The norm that the engine clips by."""
    size, *norms = (sum(norm_of(value) ** 2 for value in each.values()) ** 0.5 for each in (right, *moved))
    deviation = [torch.tensor(each) for each in norms]
    error = relative(abs(step.facts.norms[phase] - size), size)
    return Judged(
        what=Subject.NORM,
        step=step.facts.number,
        name=phase,
        error=error,
        allowed=_allowed(torch.tensor(size), deviation, roundoff),
        size=size,
    )


def _margin(roundoff: float) -> float:
    """Scores as close as this, relative to the largest, may be decided either way."""
    return ALLOWANCE * 16 * roundoff
