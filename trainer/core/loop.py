"""The loop: one training step and one `fit`, for every objective, engine and number of ranks.

A step has seven moments, in this order. `fit` takes the next micro-batches from the stream (1).
`train_step` makes all ranks agree on the weight of the global batch, and on whether to stop (2).
For each network that is due, it adds up the gradients of the micro-batches (3), asks the guard
whether to learn from this loss (4), and has the engine clip and update (5). After the last network,
the state that changes by a rule rather than a gradient is updated (6). Finally, `fit` counts the
step and calls the hooks that are due (7). A step that the guard skips goes from 1 directly to 7.

Side effects (tracking, evaluation, samples, checkpoints, profiler) are hooks: the loop has no other
extension point.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from data.batches import Step
from data.share import Batch
from trainer.core.protocols import Objective, Stream, Sums
from trainer.core.training import Hook, Training, add, to_device
from trainer.endings import ALL_STEPS_DONE, Ending, Stopped


def train_step(training: Training, micro_batches: Sequence[Batch]) -> None:
    """Update every network that is due, in the order of the phases.

    `micro_batches` are this rank's part of the global batch.
    """
    weights = global_weights(training, micro_batches)
    if training.stopped:
        return
    objective, guard = training.objective, training.guard
    batches = [to_device(batch, training.world.device) for batch in micro_batches]
    step_sums: Sums = {}
    for phase, weight in zip(objective.phases, weights.tolist(), strict=True):
        if not objective.is_due(phase, training.step):
            continue
        freeze_others(objective, phase)
        guard.keep_buffers()
        loss_sum = accumulate_gradients(training, phase, batches, weight, step_sums)
        reason = guard.check_loss(phase, loss_sum, weight)
        learning_rate = training.learning_rate(phase, training.step)
        norm = training.engines[phase].step(learning_rate, update=not reason)
        reason = reason or guard.check_gradient_norm(phase, norm)
        if reason:
            handle_bad_update(training, reason)
            return
        training.norms[phase] = norm
    objective.after_step(step_sums, training.world.sum)
    add(training.sums, step_sums)


def accumulate_gradients(
    training: Training, phase: str, batches: Sequence[Batch], weight: float, step_sums: Sums
) -> Tensor:
    """Run `batches` forward and backward; returns this rank's summed loss.

    `weight` is that of the global batch. The metrics are added to `step_sums`.
    """
    objective, engine, world = training.objective, training.engines[phase], training.world
    loss_sum = torch.zeros((), device=world.device)
    for batch in objective.prepare(phase, engine.module, batches, world.rows):
        loss, sums = objective.loss(phase, engine.module, batch, training.step)
        # Engines average across ranks; the loss is divided by the weight of the whole global batch.
        engine.backward(loss * (world.size / weight))
        add(step_sums, sums)
        loss_sum += loss.detach()
    return loss_sum


def handle_bad_update(training: Training, reason: str) -> None:
    """Record why this update was discarded, and skip, roll back or stop, as the guard decides."""
    action, why = training.guard.decide(reason, training.step + 1)
    match action:
        case "stop":
            training.stopped = Stopped(Ending.ANOMALY, why)
        case "rollback":
            training.progress.must_roll_back = True


def global_weights(training: Training, micro_batches: Sequence[Batch]) -> Tensor:
    """Return the weight of the global batch for each phase, and agree on whether to stop.

    One small all-reduce on the CPU carries both.
    """
    phases = training.objective.phases
    message = torch.zeros(len(phases) + 1, dtype=torch.float64)
    for index, phase in enumerate(phases):
        message[index] = sum(training.objective.weight(phase, batch) for batch in micro_batches)
    message[-1] = training.wants_stop is not None
    training.world.sum(message)
    if message[-1] > 0:
        reasons = training.world.gather(training.wants_stop)
        training.stopped = next(reason for reason in reasons if reason is not None)
    return message[:-1]


def fit(training: Training, stream: Stream, steps: int | None, hooks: Sequence[Hook]) -> None:
    """Train until step `steps` (None: without end), until a rank asks to stop, or until a rollback.

    Each hook is called every `hook.every` steps and, unless the run rolls back, once at the end.
    """
    progress = training.progress
    mark = time.perf_counter()
    last_calls = [progress.step] * len(hooks)
    steps_of_data = iter(stream)
    while not training.stopped and (steps is None or progress.step < steps):
        replaying = progress.step < progress.replay_until
        data = next(steps_of_data)
        mark = training.spend("replayed" if replaying else "data", mark)
        if not training.guard.skips(progress.step + 1):
            train_step(training, data.micro_batches)
        mark = training.spend("replayed" if replaying else "step", mark)
        if progress.must_roll_back:
            return
        if training.stopped:
            break
        count(training, data)
        for index, hook in enumerate(hooks):
            if hook.every and progress.step % hook.every == 0:
                hook.call(training)
                last_calls[index] = progress.step
                mark = training.spend(hook.books_as, mark)
        mark = training.spend("other", mark)
    training.stopped = training.stopped or ALL_STEPS_DONE
    for hook, last_call in zip(hooks, last_calls, strict=True):
        if last_call != progress.step:
            hook.call(training)
            mark = training.spend(hook.books_as, mark)
    training.spend("other", mark)


def count(training: Training, data: Step) -> None:
    """Count the step that was done with `data`, even if its update was skipped."""
    training.progress.step += 1
    training.progress.samples += training.world.size * sum(len(batch["sample"]) for batch in data.micro_batches)
    training.data_state = data.state


def freeze_others(objective: Objective, phase: str) -> None:
    """Let gradients reach the network of this phase alone; with one network nothing changes."""
    if len(objective.networks) > 1:
        for name, network in objective.networks.items():
            network.requires_grad_(name == phase)
