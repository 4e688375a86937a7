"""The comparison: the engine against the reference, and the reference against its witnesses.

A gradient g passes if |g - r| <= ALLOWANCE * d. Here r is the reference, and d is how far
r moves when every operation is rounded as the job's precision rounds (rounding.py; the root mean
square of REPEATS trials, and at least u |r|). ALLOWANCE leaves room for two things that the trials
do not imitate: the order of long sums, and that d is itself an estimate.
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
    """One comparison; `error` and `allowed` are relative to the size of the right value."""

    what: Subject
    step: int
    name: str
    """`network/parameter`, or the name of another subject."""
    error: float
    allowed: float
    factor: float = 1.0
    """The multiple of the right gradient that fits best, by least squares."""
    rest: float = 0.0
    """The relative part of the gradient that this multiple leaves unexplained."""
    size: float = 0.0
    """Norm of the right value."""

    @property
    def good(self) -> bool:
        return self.error <= self.allowed


@dataclass
class Findings:
    """All comparisons in their order, and the error signal of the last step."""

    judged: list[Judged] = field(default_factory=list)
    signals: dict[str, dict[str, Signal]] = field(default_factory=dict)
    """Error signals by phase, and by layer in the order of the forward pass."""
    flips: int = 0
    """Number of routing decisions that float64 would have made differently.

    All are near ties unless a comparison says otherwise.
    """
    decisions: int = 0
    """Number of routing decisions in all."""

    @property
    def good(self) -> bool:
        return all(judged.good for judged in self.judged)


def judge(run: RunConfig, evidence: Evidence, directions: int = 2) -> Findings:
    """Compare the steps of the workers with the reference."""
    findings = Findings()
    for step in evidence.steps:
        reference = Reference(run, step)
        findings.judged += _judge_facts(run, step)
        for name, call in step.routers.items():
            findings.judged.append(_judge_router(reference, step.facts.number, name, call))
        slopes_checked = directions if step is evidence.steps[-1] else 0
        for phase in reference.phases():
            findings.judged += _judge_phase(reference, phase, evidence.roundoff, slopes_checked, findings)
    return findings


def _judge_facts(run: RunConfig, step: AuditedStep) -> Iterator[Judged]:
    """Judge the facts of a step.

    Each sample of the global batch is there once, nothing was refused, and the forward passes used
    the weights that the optimiser keeps.
    """
    numbers = sorted(int(number) for batch in step.batches for number in batch["sample"])
    first = numbers[0] // run.batch.global_batch * run.batch.global_batch
    wrong = len(set(numbers) ^ set(range(first, first + run.batch.global_batch))) + len(numbers) - len(set(numbers))
    yield Judged(what=Subject.SAMPLES, step=step.facts.number, name="global batch", error=wrong, allowed=0)
    if step.facts.refused:
        refused = step.facts.refused
        yield Judged(what=Subject.REFUSED, step=step.facts.number, name=refused, error=float("inf"), allowed=0)
    for stale in step.facts.stale:
        yield Judged(what=Subject.WEIGHTS, step=step.facts.number, name=str(stale), error=float("inf"), allowed=0)


def _judge_router(reference: Reference, step: int, name: str, call: RouterCall) -> Judged:
    """Judge a router by itself, on the inputs that it had.

    Its scores and gates must be those of float64, as far as fp32 allows.
    """
    network, _, path = name.partition("/")
    router = reference.objective.networks[network].get_submodule(path)

    def right() -> Tensor:
        with Replayed([call.decision]):
            routing = router(call.x_GND.double(), call.keys_B)
        return torch.cat([routing.log_z_GN.flatten(), routing.gate_GA.flatten()]).detach()

    wanted = right()
    given = torch.cat([call.log_z_GN.flatten(), call.gate_GA.flatten()]).double()
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
    """The allowed distance relative to |right|: see the module's docstring."""
    deviation = (sum(norm_of(trial - right) ** 2 for trial in moved) / len(moved)) ** 0.5
    size = norm_of(right)
    return ALLOWANCE * relative(max(deviation, roundoff * size), size)


def _judge_phase(
    reference: Reference, phase: str, roundoff: float, directions: int, findings: Findings
) -> Iterator[Judged]:
    """Judge the gradients, the norm and the loss of one phase of a step."""
    step = reference.step
    network = reference.objective.networks[phase]
    with observing(reference, phase) as seen:
        loss, right, replay = reference.gradients(phase, step.batches)
    moved = []
    losses = []
    for seed in range(REPEATS):
        with rounded(network, roundoff, seed):
            moved_loss, gradients, _ = reference.gradients(phase, step.batches)
        moved.append(gradients)
        losses.append(torch.tensor(moved_loss))
    findings.signals[phase] = seen.signals
    findings.flips += sum(replay.flips.values())
    findings.decisions += sum(decision[..., 0].numel() for decision in replay.written)
    number = step.facts.number
    for layer, margin in replay.margins.items():
        name = f"{phase}/{layer}"
        yield Judged(what=Subject.ROUTING, step=number, name=name, error=margin, allowed=_margin(roundoff))
    for name, written in seen.written_out.items():
        allowed = _allowed(right[name], [trial[name] for trial in moved], roundoff) * DOUBLE / roundoff
        error = relative(norm_of(written - right[name]), norm_of(right[name]))
        yield Judged(what=Subject.RECURSION, step=number, name=name, error=error, allowed=allowed)
    if directions:
        yield from _judge_slopes(reference, phase, directions)
    yield from _judge_gradients(step, right, moved, roundoff)
    yield _judge_norm(step, phase, right, moved, roundoff)
    allowed = _allowed(torch.tensor(loss), losses, roundoff)
    error = relative(abs(step.facts.losses[phase] - loss), abs(loss))
    yield Judged(what=Subject.LOSS, step=number, name=phase, error=error, allowed=allowed, size=abs(loss))


def _judge_slopes(reference: Reference, phase: str, directions: int) -> Iterator[Judged]:
    """Judge the reference's gradients by finite differences, the worst direction per group."""
    for group, measured in slopes(reference, phase, directions, seed=0).items():
        worst = max(measured, key=lambda slope: slope.error)
        yield Judged(
            what=Subject.DIFFERENCES,
            step=reference.step.facts.number,
            name=group,
            error=worst.error,
            allowed=SLOPE + ALLOWANCE * worst.rounding,
        )


def _judge_gradients(
    step: AuditedStep, right: dict[str, Tensor], moved: Sequence[dict[str, Tensor]], roundoff: float
) -> Iterator[Judged]:
    """Judge the gradient of each parameter, of an expert's parameters by expert."""
    for name, reference in right.items():
        gradients = [step.gradients[name].double(), reference, *(trial[name] for trial in moved)]
        parts = [experts_of(name, gradient) for gradient in gradients]
        for (part, given), (_, wanted), *trials in zip(*parts, strict=True):
            size = norm_of(wanted)
            along = float((given * wanted).sum())
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
    """Judge the gradient norm by which the engine clips."""
    size, *norms = (_total_norm(gradients) for gradients in (right, *moved))
    deviation = [torch.tensor(norm) for norm in norms]
    error = relative(abs(step.facts.norms[phase] - size), size)
    return Judged(
        what=Subject.NORM,
        step=step.facts.number,
        name=phase,
        error=error,
        allowed=_allowed(torch.tensor(size), deviation, roundoff),
        size=size,
    )


def _total_norm(gradients: dict[str, Tensor]) -> float:
    """The norm of all gradients together."""
    total: float = sum(norm_of(gradient) ** 2 for gradient in gradients.values()) ** 0.5
    return total


def _margin(roundoff: float) -> float:
    """The distance, relative to the largest score, at which either decision is right."""
    return ALLOWANCE * 16 * roundoff
