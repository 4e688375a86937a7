"""Stops bad losses and gradients from reaching the weights: skip, roll back or stop.

All ranks notice a bad batch together, before the update, and `Guard` decides what follows. The
worker carries out a rollback with trainer/recovery/resume.py. Skipping a batch makes a step without
an update. Step number, schedule, sample count and data advance; weights, moments and buffers stay.
Its loss enters no metric. Hooks are called as after any step, so a moving average keeps moving
towards the weights. With several networks, networks already updated in this step keep their update.
The steps that were skipped are written into the run folder at once (anomalies.jsonl) and into every
checkpoint, with the losses that a spike is measured against: a resumed run skips the same steps.
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

_MIN_LOSSES = 16
"""Number of losses from which a spread can be estimated."""

Action = Literal["skip", "rollback", "stop"]


@dataclass(frozen=True, kw_only=True)
class AnomalyConfig:
    """The reaction to a non-finite loss or gradient, or to a loss spike."""

    action: Action = "skip"
    """skip: skip the batch. rollback: go back to the newest checkpoint and skip the batches since
    then (before the first checkpoint: skip). stop: end the run, with a checkpoint of the step
    before."""
    budget: int = 10
    """Number of anomalies that the whole run may have; one more ends it."""
    spike: float | None = None
    """A loss that lies this many robust standard deviations above the median of the last `window`
    losses is a spike; 6 to 10 are usual. A robust standard deviation is 1.4826 times the median
    absolute deviation, and at least 1 % of the median. null: no loss is a spike."""
    window: int = 64
    """Number of losses that a spike is measured against; no loss is a spike before there are 16."""
    back: int | None = None
    """With rollback, the number of steps before the anomaly that are skipped too; null: all steps
    since the checkpoint."""

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"budget is {self.budget}; it must be at least 0")
        if self.spike is not None and self.spike <= 0:
            raise ValueError(f"spike is {self.spike}; it must be above 0, such as 8, or null for none")
        if self.window < _MIN_LOSSES:
            raise ValueError(f"window is {self.window}; it must be at least {_MIN_LOSSES}")
        if self.back is not None and (self.back < 0 or self.action != "rollback"):
            raise ValueError(
                f"back is {self.back} with the action {self.action}; it must be at least 0, and needs rollback"
            )


RecordAnomaly = Callable[[Anomaly, int], None]
"""Writes down an anomaly, the nth of the run, before the run continues; called on every rank."""


def record_nothing(anomaly: Anomaly, nth: int) -> None:
    """The recorder of a training without a run folder."""


def no_checkpoint() -> int:
    """The newest checkpoint of a training that saves nothing."""
    return -1


class Guard:
    """Decides whether a network may be updated, from sums over all ranks, so alike on all."""

    def __init__(
        self,
        config: AnomalyConfig,
        world: World,
        networks: Mapping[str, nn.Module],
        record: RecordAnomaly = record_nothing,
        newest_checkpoint: Callable[[], int] = no_checkpoint,
    ):
        self.config = config
        self.world = world
        self.record = record
        self.newest_checkpoint = newest_checkpoint
        self.buffers: list[Tensor] = []
        for network in networks.values():
            self.buffers += [buffer.data for _, buffer in persistent_buffers(network)]
        self.kept_buffers = [torch.empty_like(buffer) for buffer in self.buffers]
        self.losses = {phase: deque[float](maxlen=config.window) for phase in networks}
        self.anomalies: list[Anomaly] = []
        """Every anomaly of the run."""

    def keep_buffers(self) -> None:
        """Remember the networks' buffers.

        The forward pass of a poisoned batch writes into running statistics.
        """
        if self.buffers:
            torch._foreach_copy_(self.kept_buffers, self.buffers)

    def check_loss(self, phase: str, loss_sum: Tensor, weight: float) -> str:
        """Return why the loss of `phase` must not be learned from; "" if it may be.

        `loss_sum` is this rank's part of the loss, `weight` the weight of the global batch.
        """
        loss = self.world.sum(loss_sum.detach().double().cpu().view(1)).item() / weight
        if not math.isfinite(loss):
            return f"the loss is {loss}" + self._of(phase)
        losses = self.losses[phase]
        if self.config.spike is not None and len(losses) >= _MIN_LOSSES:
            middle = median(losses)
            spread = max(1.4826 * median(abs(past - middle) for past in losses), 0.01 * abs(middle))
            if loss > middle + self.config.spike * spread:
                distance = f"{(loss - middle) / spread:.1f} standard deviations above it"
                return f"the loss is {loss:.4g} after a median of {middle:.4g}, {distance}" + self._of(phase)
        losses.append(loss)
        return ""

    def check_gradient_norm(self, phase: str, norm: Tensor | float) -> str:
        """Return why the gradient of `phase` was not learned from; "" if it was.

        The engine itself does not update when the norm is not finite.
        """
        return "" if math.isfinite(float(norm)) else "the gradient is not finite" + self._of(phase)

    def _of(self, phase: str) -> str:
        return f" ({phase})" if len(self.losses) > 1 else ""

    def decide(self, reason: str, step: int) -> tuple[Action, str]:
        """Restore the buffers; return the action for step `step` (as logged) and its reason."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.kept_buffers)
        saved = self.newest_checkpoint()
        action = "skip" if self.config.action == "rollback" and saved < 0 else self.config.action
        if action == "stop" or len(self.anomalies) >= self.config.budget:
            spent = "" if action == "stop" else f", and anomaly.budget is {self.config.budget}"
            advice = "look at the data and the learning rate, or raise the budget and use --resume"
            return "stop", f"step {step}: {reason}{spent}; {advice}"
        first = step
        if action == "rollback":
            first = saved + 1 if self.config.back is None else max(saved + 1, step - self.config.back)
        anomaly = Anomaly(step=step, reason=reason, first=first, last=step)
        self.anomalies.append(anomaly)
        self.record(anomaly, len(self.anomalies))
        return action, reason

    def skips(self, step: int) -> bool:
        """Whether step `step` (as logged) is one without an update."""
        return any(anomaly["first"] <= step <= anomaly["last"] for anomaly in self.anomalies)

    def state(self) -> GuardState:
        """Return the state for a checkpoint."""
        losses = {phase: list(losses) for phase, losses in self.losses.items()}
        return GuardState(losses=losses, found=self.anomalies)

    def load(self, state: GuardState | None, recorded: Iterable[Anomaly] = ()) -> None:
        """Continue from the state of a checkpoint; `recorded` are the anomalies in the run folder.

        They are more than the checkpoint's if the checkpoint is older than an anomaly.
        """
        state = state or GuardState(losses={}, found=[])
        for phase, losses in state.get("losses", {}).items():
            self.losses[phase] = deque(losses, maxlen=self.config.window)
        self.anomalies = max(self.anomalies, state.get("found", []), list(recorded), key=len)
