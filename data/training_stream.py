"""The training stream of one rank: the part that text and images share."""

from threading import Event

from data.batches import Collate, LaneSource, LaneStream, RunState, Share, number_of_lanes
from data.open_lanes import Config, LaneJob
from data.prefetch.processes import ProcessLanes


class RunStream(LaneStream):
    """The training batches of one rank, step after step.

    With `state` it continues from there, to the byte; `state` is merged over the ranks that saved
    it (steps.merge_states).

    Raises ValueError for numbers that do not divide and for problems with the source. Iterating
    raises OSError for a source that has stopped answering for good.
    """

    def __init__(
        self, config: Config, collate: Collate, share: Share, *, seed: int, state: RunState | None = None
    ) -> None:
        total = number_of_lanes(config.lanes, share.world, state)
        names = [str(number) for number in range(share.rank, total, share.world)]
        job = LaneJob(
            config=config,
            share=share,
            seed=seed,
            total=total,
            step=share.first_step(state),
            states={name: state["lanes"][name] if state else None for name in names},
        )
        closing = Event()
        source: LaneSource = ProcessLanes(job, closing) if config.processes else job.open(closing)
        super().__init__(
            source,
            collate,
            share,
            states=job.states,
            total=total,
            prefetch=config.prefetch,
            step=job.step,
            closing=closing,
        )
