"""The ledger of a run: which samples its weights have seen, and the proof that these are right.

The start of each attempt and each checkpoint add a line with the number of samples that each lane
has given and their digest, in order (mixture.Counted). `verify` follows the attempts back from the
last checkpoint and derives the digests again from the source. So it shows that nothing was lost,
repeated or exchanged, or says in which lane it was, and when.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import NotRequired, TypedDict, final

from data.lanes.lane import LaneState
from data.lanes.mixture import Counted, CountedState, Counts, chained, counts_of
from data.open_lanes import Config, open_lanes
from data.share import RunState, Share

# A wrong digest is explained by samples lost or repeated, up to the samples of so many steps.
MAX_SHIFT_STEPS = 4


class Entry(TypedDict):
    """The part of a line that tells what was seen."""

    step: int
    samples: int
    tokens: int
    documents: int
    """Number of finished documents; those under way in a lane do not count yet."""
    unreadable: int
    """How many of these documents could not be read."""
    skipped: dict[str, list[list[list[int]]]]
    """Shards skipped, by lane and then by part of the source (rows.RowsState)."""
    lanes: dict[str, Counts]


@final
class SavedLine(Entry):
    """The line of a checkpoint."""

    attempt: int


@final
class AttemptLine(TypedDict):
    """The line of an attempt's start; from a checkpoint, with the rest of its `Entry`."""

    attempt: int
    global_batch: int
    group: int
    step: int
    lanes: dict[str, Counts]
    samples: NotRequired[int]
    tokens: NotRequired[int]
    documents: NotRequired[int]
    unreadable: NotRequired[int]
    skipped: NotRequired[dict[str, list[list[list[int]]]]]


Line = AttemptLine | SavedLine


def entry(state: RunState, *, tokens_per_sample: int) -> Entry:
    """What a run has seen, from the merged state of its data (steps.merge_states)."""
    parts = {name: _parts_of(lane) for name, lane in state["lanes"].items()}
    every: list[LaneState] = []
    for lane in parts.values():
        every += lane
    return {
        "step": state["step"],
        "samples": state["samples"],
        "tokens": state["samples"] * tokens_per_sample,
        "documents": sum(part["documents"] for part in every),
        "unreadable": sum(part["unreadable"] for part in every),
        "skipped": {
            name: [part["skipped"] for part in lane]
            for name, lane in parts.items()
            if any(part["skipped"] for part in lane)
        },
        "lanes": {name: counts_of(lane) for name, lane in state["lanes"].items()},
    }


def _parts_of(state: CountedState | None) -> list[LaneState]:
    if state is None:
        return []
    if "parts" in state:
        return state["parts"]
    return [state]


@dataclass
class Verdict:
    """What `verify` has found out."""

    samples: int = 0
    tokens: int = 0
    documents: int = 0
    """Number of finished documents; those under way in a lane do not count yet."""
    unreadable: int = 0
    """Number of documents skipped because they cannot be read."""
    skipped: int = 0
    """Number of shards skipped from some row on."""
    attempts: int = 1
    replayed: int = 0
    """Number of steps that one attempt had saved and a later one repeated."""
    lost: int = 0
    """Number of samples that were passed over."""
    repeated: int = 0
    """Number of samples that were given twice."""
    problems: list[str] = field(default_factory=list)
    """Everything that is wrong, one line each."""


def verify(config: Config, lines: Sequence[Line], *, seed: int, last_step: int) -> Verdict:
    """Check that the samples up to the checkpoint of `last_step` are those of an unbroken run.

    Reads all of them again.

    Raises ValueError or OSError if the source cannot be read.
    """
    verdict = Verdict(attempts=len({line["attempt"] for line in lines}))
    kept = _kept(lines, last_step, verdict)
    if not kept:
        return verdict
    last = kept[-1]
    verdict.samples = last["samples"]
    verdict.tokens = last["tokens"]
    verdict.documents = last["documents"]
    verdict.unreadable = last["unreadable"]
    for parts in last["skipped"].values():
        verdict.skipped += sum(map(len, parts))
    first = lines[0]
    assert "global_batch" in first, "the first line is that of an attempt"
    batch = first["global_batch"]
    share = Share(rank=0, world=1, global_batch=batch, micro_batch=batch, group=first["group"])
    check = _Check(config, share, kept, seed=seed)
    for lane in last["lanes"]:
        check.lane(lane, verdict)
    return verdict


def _kept(lines: Sequence[Line], last_step: int, verdict: Verdict) -> list[SavedLine]:
    """The checkpoints from which the weights of `last_step` come, in order, across all attempts."""
    index = _last(lines, len(lines), last_step)
    kept: list[SavedLine] = []
    while index is not None:
        attempt = lines[index]["attempt"]
        begin = _begin(lines, index)
        start = lines[begin]["step"]
        own = [line for line in lines[begin + 1 : index + 1] if line["attempt"] == attempt]
        kept[:0] = [line for line in own if "global_batch" not in line]
        if start == 0:
            break
        index = _last(lines, begin, start)
        if index is None:
            verdict.problems.append(f"attempt {attempt} began at step {start}, which no attempt before it saved")
            break
        began = lines[begin]["lanes"]
        for lane, saved in lines[index]["lanes"].items():
            if began.get(lane) != saved:
                problem = f"attempt {attempt} began at step {start} at another sample than was saved"
                verdict.problems.append(f"lane {lane}: {problem}")
        verdict.replayed += max(0, max(line["step"] for line in lines[:begin]) - start)
    if not kept:
        verdict.problems.append(f"the ledger has no line for step {last_step}")
    return kept


def _last(lines: Sequence[Line], before: int, step: int) -> int | None:
    """The index of the last line that a checkpoint at `step` wrote before the line `before`."""
    for index in reversed(range(before)):
        if lines[index]["step"] == step and "global_batch" not in lines[index]:
            return index
    return None


def _begin(lines: Sequence[Line], index: int) -> int:
    """The index of the line with which the attempt of line `index` began, or rolled back."""
    attempt = lines[index]["attempt"]
    starts = (i for i in reversed(range(index)) if "global_batch" in lines[i] and lines[i]["attempt"] == attempt)
    return next(starts)


class _Check:
    """Derives the digests of lanes again."""

    def __init__(self, config: Config, share: Share, kept: Sequence[SavedLine], *, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.kept = kept
        self.total = len(kept[-1]["lanes"])
        counts = [share.counts(step, self.total) for step in range(kept[-1]["step"])]
        self.counts = {lane: [count.get(int(lane), 0) for count in counts] for lane in kept[-1]["lanes"]}
        """Samples per step of each lane."""

    def open(self, lane: str) -> Counted:
        """The lane, from its start, with the shards skipped that the run skipped."""
        lanes = open_lanes(
            self.config,
            seed=self.seed,
            states={lane: None},
            total=self.total,
            closing=Event(),
            skipped=self.kept[-1]["skipped"].get(lane),
        )
        return lanes[int(lane)]

    def lane(self, lane: str, verdict: Verdict) -> None:
        """Compare the lane with each line, up to the first that differs."""
        stream = self.open(lane)
        step = 0
        before = counts_of(None)
        for line in self.kept:
            counts = [count for count in self.counts[lane][step : line["step"]] if count]
            for count in counts:
                stream.take(count)
            after = line["lanes"][lane]
            if after != counts_of(stream.state()):
                gap = _Gap(before, after, counts)
                steps = f"between steps {step} and {line['step']}"
                verdict.problems.append(f"lane {lane}: {steps} {self._explain(lane, gap, verdict)}")
                return
            step = line["step"]
            before = after

    def _explain(self, lane: str, gap: "_Gap", verdict: Verdict) -> str:
        """Look for samples lost or repeated between two lines, and add them to the verdict."""
        begin = gap.before["samples"]
        forward = MAX_SHIFT_STEPS * max(gap.counts)
        back = min(forward, begin)
        stream = self.open(lane)
        if begin > back:
            stream.take(begin - back)
        near = stream.take(back + sum(gap.counts) + forward)
        for shift in sorted(range(-back, forward + 1), key=abs):
            start = back + shift
            digest = int(gap.before["digest"], 16)
            for count in gap.counts:
                digest = chained(digest, near[start : start + count])
                start += count
            if f"{digest:016x}" == gap.after["digest"]:
                verdict.lost += max(shift, 0)
                verdict.repeated += max(-shift, 0)
                return f"{shift} samples were lost" if shift > 0 else f"{-shift} samples were repeated"
        return f"its {sum(gap.counts)} samples are not those of the source in its order"


@dataclass(frozen=True)
class _Gap:
    """A lane between two lines whose digests do not follow from each other."""

    before: Counts
    after: Counts
    counts: list[int]
    """Samples per step between them, without the steps in which the lane took no part."""
