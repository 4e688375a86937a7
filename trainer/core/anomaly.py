"""Losses and gradients that would poison the weights: noticed by all ranks together, before the update.

A batch that is passed over is a step without an update: the step number, the schedule, the count of samples and the data go
on, while weights, moments and buffers stay as they were and its loss enters no figure; hooks are called as after any step, so a
moving average goes on moving towards the weights. Of several networks, those that were
updated before the one that objects keep their update. Which steps were passed over is written into the run folder at once
(anomalies.jsonl) and into every checkpoint, with the losses that a spike is measured by: a resumed run passes over the same ones.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.checkpoint.format import GuardState
from trainer.checkpoint.fragments import persistent_buffers
from trainer.run_rows import Anomaly
from trainer.world import World

_FEWEST_LOSSES = 16
"""Of which a spread can be told."""


@dataclass(frozen=True, kw_only=True)
class AnomalyConfig:
    """What happens at a loss or gradient that is not finite, or at a loss spike."""

    action: Literal["skip", "rollback", "stop"] = "skip"
    """skip: pass over the batch; rollback: go back to the newest checkpoint and pass over the batches since then (before there is one:
    skip); stop: end the run, with a checkpoint of the step before."""
    budget: int = 10
    """How many times in the whole run; one more ends it."""
    spike: float | None = None
    """A loss that lies this many robust standard deviations (1.4826 x the median distance from the median, at least 1 % of it) above the
    median of the last `window` losses is a spike, 6 to 10 say; null: none is."""
    window: int = 64
    """Losses that a spike is measured by; at least 16 must be there."""
    back: int | None = None
    """With rollback, how many steps before the anomaly are passed over too; null: all since the checkpoint."""

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"budget is {self.budget}; it must be at least 0")
        if self.spike is not None and self.spike <= 0:
            raise ValueError(f"spike is {self.spike}; it must be above 0, such as 8, or null for none")
        if self.window < _FEWEST_LOSSES:
            raise ValueError(f"window is {self.window}; it must be at least {_FEWEST_LOSSES}")
        if self.back is not None and (self.back < 0 or self.action != "rollback"):
            raise ValueError(
                f"back is {self.back} with the action {self.action}; it must be at least 0, and goes with rollback only"
            )


Note = Callable[[Anomaly, int], None]
"""Writes down an anomaly, the nth of the run, before the run goes on; called on every rank."""


def unnoted(anomaly: Anomaly, nth: int) -> None:
    """For a training without a run folder."""


def no_checkpoint() -> int:
    """For a training that saves nothing."""
    return -1


class Guard:
    """Decides whether a network may be updated. The same on all ranks: it looks at what they have agreed on."""

    def __init__(
        self,
        config: AnomalyConfig,
        world: World,
        networks: Mapping[str, nn.Module],
        note: Note = unnoted,
        newest_checkpoint: Callable[[], int] = no_checkpoint,
    ):
        self.config, self.world, self.note, self.newest_checkpoint = config, world, note, newest_checkpoint
        self.buffers = [buffer.data for network in networks.values() for _, buffer in persistent_buffers(network)]
        self.kept = [torch.empty_like(buffer) for buffer in self.buffers]
        self.losses = {phase: deque[float](maxlen=config.window) for phase in networks}
        self.found: list[Anomaly] = []
        """Every anomaly of the run."""

    def keep_buffers(self) -> None:
        """Remember the networks' buffers: a forward pass of a poisoned batch writes into running statistics."""
        if self.buffers:
            torch._foreach_copy_(self.kept, self.buffers)

    def objection(self, phase: str, loss_sum: Tensor, weight: float) -> str:
        """Why the loss of `phase`, of which this rank has `loss_sum` and the global batch the `weight`, must not be learned from; "" if it may."""
        loss = self.world.sum(loss_sum.detach().double().cpu().view(1)).item() / weight
        if not math.isfinite(loss):
            return f"the loss is {loss}" + self._of(phase)
        losses = self.losses[phase]
        if self.config.spike is not None and len(losses) >= _FEWEST_LOSSES:
            middle = median(losses)
            spread = max(1.4826 * median(abs(each - middle) for each in losses), 0.01 * abs(middle))
            if loss > middle + self.config.spike * spread:
                return (
                    f"the loss is {loss:.4g} after a median of {middle:.4g}, {(loss - middle) / spread:.1f} standard deviations above it"
                    + self._of(phase)
                )
        losses.append(loss)
        return ""

    def objection_to_norm(self, phase: str, norm: Tensor | float) -> str:
        """The same for the gradient's norm; the engine has not updated where it is not finite."""
        return "" if math.isfinite(float(norm)) else "the gradient is not finite" + self._of(phase)

    def _of(self, phase: str) -> str:
        return f" ({phase})" if len(self.losses) > 1 else ""

    def act(self, reason: str, step: int) -> tuple[Literal["skip", "rollback", "stop"], str]:
        """What is to be done about step number `step` (as logged), and in words."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.kept)
        saved = self.newest_checkpoint()
        action = "skip" if self.config.action == "rollback" and saved < 0 else self.config.action
        if action == "stop" or len(self.found) >= self.config.budget:
            more = "" if action == "stop" else f", and anomaly.budget is {self.config.budget}"
            return (
                "stop",
                f"step {step}: {reason}{more}; look at the data and the learning rate, or raise the budget and use --resume",
            )
        first = step
        if action == "rollback":
            first = saved + 1 if self.config.back is None else max(saved + 1, step - self.config.back)
        anomaly = Anomaly(step=step, reason=reason, first=first, last=step)
        self.found.append(anomaly)
        self.note(anomaly, len(self.found))
        return action, reason

    def skips(self, step: int) -> bool:
        """Whether step number `step` (as logged) is one without an update."""
        return any(anomaly["first"] <= step <= anomaly["last"] for anomaly in self.found)

    def state(self) -> GuardState:
        """For a checkpoint."""
        return GuardState(losses={phase: list(losses) for phase, losses in self.losses.items()}, found=self.found)

    def load(self, state: GuardState | None, found: Iterable[Anomaly] = ()) -> None:
        """Continue from a checkpoint's state; `found` is what the run folder knows: more, where the checkpoint is older than an anomaly."""
        state = state or GuardState(losses={}, found=[])
        for phase, losses in state.get("losses", {}).items():
            self.losses[phase] = deque(losses, maxlen=self.config.window)
        self.found = max(self.found, state.get("found", []), list(found), key=len)
