"""A hook that logs the share of samples that the rules refuse, after each sampling."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.rules.gate import Candidate, Gate
from trainer.rules.log import DecisionLog
from trainer.run_rows import EventKind, Say

if TYPE_CHECKING:
    from trainer.core.training import Training
    from trainer.hooks.sample import Sample
    from trainer.tracking.tracker import Tracker


@dataclass
class ConflictRate:
    """A hook that runs after `sample`, on rank 0.

    Rules that fail are reported and skipped: they judge the network, and do not stop its training.
    """

    gate: Gate
    sample: "Sample"
    log: DecisionLog
    tracker: "Tracker"
    say: Say
    figures: dict[str, float] = field(default_factory=dict)

    def __call__(self, training: "Training") -> None:
        candidates = [Candidate(text=text) for text in self.sample.samples.text.values()]
        if not candidates:
            return
        try:
            decisions = self.gate.judge(candidates)
        except ValueError as error:
            self.say(EventKind.NOTE, f"samples of step {training.step} are not judged: {error}", training.step)
            return
        for candidate, decision in zip(candidates, decisions, strict=True):
            self.log.add(self.gate, candidate, decision, "evaluation", f"step {training.step}")
        refused = sum(not decision.accepted for decision in decisions)
        self.figures = {"rules/conflict_rate": refused / len(decisions), "rules/judged": len(decisions)}
        self.tracker.log(training.step, self.figures)
