"""The training stream of one rank: what text and images have in common."""

from threading import Event

from data.lane_set import Config, open_lanes
from data.lanes import State
from data.process_lanes import ProcessLanes
from data.steps import Collate, LaneSource, LaneStream, OwnLanes, Share, number_of_lanes


class RunStream(LaneStream):
    """The training batches of one rank, step after step; with `state` (merged over ranks) from there on, to the byte.

    Raises ValueError for numbers that do not divide and for what is wrong with the source; OSError, when iterating, for a
    source that stopped answering for good.
    """

    def __init__(
        self,
        config: Config,
        collate: Collate,
        *,
        seed: int,
        rank: int,
        world: int,
        global_batch: int,
        micro_batch: int,
        group: int = 1,
        state: State | None = None,
    ) -> None:
        share = Share(rank=rank, world=world, global_batch=global_batch, micro_batch=micro_batch, group=group)
        total = number_of_lanes(config.lanes, world, state)
        step = share.first_step(state)
        closing = Event()
        numbers = range(rank, total, world)
        states = {str(number): (state["lanes"][str(number)] if state else None) for number in numbers}
        source: LaneSource
        if config.processes:
            source = ProcessLanes(config, seed=seed, share=share, total=total, step=step, states=states, closing=closing)
        else:
            source = OwnLanes(open_lanes(config, seed=seed, states=states, total=total, closing=closing), share, total=total, step=step)
        super().__init__(source, collate, share, states=states, total=total, prefetch=config.prefetch, step=step, closing=closing)
