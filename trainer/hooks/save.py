"""Saves checkpoints, and reports the saves that failed."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.share import RunState
from trainer.checkpoint.format import State
from trainer.checkpoint.save import Checkpointer
from trainer.core.training import Training, fragments
from trainer.records.ledger import Ledger
from trainer.run_rows import EventKind, Say
from trainer.tracking.tracker import Tracker


@dataclass
class Save:
    """Saves all networks and optimisers, the step, and the state of the data."""

    checkpointer: Checkpointer
    tracker: Tracker
    merge: Callable[[Sequence[RunState]], RunState]
    """Merges the data states of all ranks into one."""
    ledger: Ledger
    say: Say

    def __call__(self, training: Training) -> None:
        if training.step == self.checkpointer.newest:
            return
        begin = time.perf_counter()
        self.wait(training)
        assert training.data_state is not None, "a step was done"
        data = self.merge(training.world.gather(training.data_state))
        state = State(
            step=training.step,
            samples=training.samples,
            data=data,
            world=training.world.size,
            guard=training.guard.state(),
        )
        frozen_state = json.loads(json.dumps(state))  # a copy, because it is written later
        self.checkpointer.save(training.step, fragments(training), frozen_state)
        self.ledger.saved(data)
        self.tracker.log(training.step, {"checkpoint_stall_s": time.perf_counter() - begin})

    def wait(self, training: Training) -> str:
        """Wait for the current save; returns "" or why it failed, after reporting it.

        The run continues without that checkpoint, and the next save tries again.
        """
        problem = self.checkpointer.wait_for_all()
        if problem:
            self.say(EventKind.CHECKPOINT, f"{problem}; keeping the previous checkpoint", training.step)
        return problem
