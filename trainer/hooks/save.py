"""Saves checkpoints."""

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
    """A checkpoint: all networks and optimisers, the step, and where the data stand."""

    checkpointer: Checkpointer
    tracker: Tracker
    merge: Callable[[Sequence[RunState]], RunState]
    """Makes one data state of all ranks' states."""
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
        self.checkpointer.save(
            training.step, fragments(training), json.loads(json.dumps(state))
        )  # a copy: it is written later
        self.ledger.saved(data)
        self.tracker.log(training.step, {"checkpoint_stall_s": time.perf_counter() - begin})

    def wait(self, training: Training) -> str:
        """Wait for the save under way. Where it failed, that is said and returned: the run goes on, and the next save tries again."""
        problem = self.checkpointer.wait_for_all()
        if problem:
            self.say(EventKind.CHECKPOINT, f"{problem}; it is not taken", training.step)
        return problem
