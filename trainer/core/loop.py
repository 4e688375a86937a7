"""The loop: one training step and one `fit`, for every objective, engine and number of ranks.

A step has seven moments, in this order. `fit` takes the next micro-batches from the stream (1), unless the step is one to skip.
`train_step` then has all ranks agree on the weight of the global batch, and on whether to stop (2); for each network that is due,
it adds up the gradients of the micro-batches (3), asks the guard whether they may be learned from (4), and has the engine clip and
update (5); after the last network, what changes by a rule changes (6). Last, `fit` counts the step and calls the hooks that are due (7).

Side effects (tracking, evaluation, samples, checkpoints, profiler) are hooks: there is no other place for them.
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
    """Update every network that is due, in the order of the phases, on one global batch of which this rank has `micro_batches`."""
    weights = global_weights(training, micro_batches)
    if training.stopped:
        return
    objective, device, guard = training.objective, training.world.device, training.guard
    batches = [to_device(batch, device) for batch in micro_batches]
    step_sums: Sums = {}
    for phase, weight in zip(objective.phases, weights.tolist(), strict=True):
        if not objective.is_due(phase, training.step):
            continue
        freeze_others(objective, phase)
        engine, loss_sum = training.engines[phase], torch.zeros((), device=device)
        guard.keep_buffers()
        for batch in objective.prepare(phase, engine.module, batches, training.world.rows):
            loss, sums = objective.loss(phase, engine.module, batch, training.step)
            # Engines average over the ranks; the loss is divided by the weight of the whole global batch.
            engine.backward(loss * (training.world.size / weight))
            add(step_sums, sums)
            loss_sum += loss.detach()
        reason = guard.objection(phase, loss_sum, weight)
        norm = engine.step(training.learning_rate(phase, training.step), update=not reason)
        if reason := reason or guard.objection_to_norm(phase, norm):
            handle_bad_update(training, reason)
            return
        training.norms[phase] = norm
    objective.after_step(step_sums, training.world.sum)
    add(training.sums, step_sums)


def handle_bad_update(training: Training, reason: str) -> None:
    """Skip the update of this batch, or roll back or stop, as the job says."""
    action, why = training.guard.act(reason, training.step + 1)
    match action:
        case "stop":
            training.stopped = Stopped(Ending.ANOMALY, why)
        case "rollback":
            training.progress.must_roll_back = True


def global_weights(training: Training, micro_batches: Sequence[Batch]) -> Tensor:
    """Weight of the global batch for each phase, and whether any rank asks to stop: one small all-reduce over the CPU."""
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
    """Train until `steps`, or until a rank asks to stop, or until the run must roll back.

    Each hook is called every so many steps, and once at the end.
    """
    progress = training.progress
    mark = time.perf_counter()
    called = [progress.step] * len(hooks)
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
                called[index] = progress.step
                mark = training.spend(hook.books_as, mark)
        mark = training.spend("other", mark)
    training.stopped = training.stopped or ALL_STEPS_DONE
    for index, hook in enumerate(hooks):
        if called[index] != progress.step:
            hook.call(training)
            mark = training.spend(hook.books_as, mark)
    training.spend("other", mark)


def count(training: Training, data: Step) -> None:
    """Count the step that was done with `data`, also where its update was skipped."""
    training.progress.step += 1
    training.progress.samples += training.world.size * sum(len(batch["sample"]) for batch in data.micro_batches)
    training.data_state = data.state


def freeze_others(objective: Objective, phase: str) -> None:
    """Only the network of this phase gets gradients; with one network there is nothing to do."""
    if len(objective.networks) > 1:
        for name, network in objective.networks.items():
            network.requires_grad_(name == phase)
