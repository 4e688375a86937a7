"""The ledger of a run: what its weights have seen of the data, and the proof that it is what an unbroken run would have seen.

At the start of each attempt and at each checkpoint a line says how many samples each lane has given and what the digest of
all of them is, in their order (mixture.Counted). `verify` follows the attempts back from the last checkpoint, derives the
digests again from the source, and so shows that nothing was lost, repeated or exchanged; or says in which lane, and where.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from data.lane_set import Config, open_lanes
from data.lanes import State
from data.mixture import FIRST, chained
from data.steps import Share

Line = dict[str, Any]

SHIFTS = 4  # an explanation of a wrong digest is looked for among so many steps' samples, skipped or given again


def entry(state: State, *, tokens_per_sample: int) -> Line:
    """The line for a merged state of the data (steps.merge_states)."""
    lanes, parts = {}, {}
    for name, lane in state["lanes"].items():
        lane = lane or {**FIRST, "parts": []}
        lanes[name] = {key: lane[key] for key in FIRST}
        parts[name] = lane.get("parts", [lane])
    every = [part for lane in parts.values() for part in lane]
    return {
        "step": state["step"],
        "samples": state["samples"],
        "tokens": state["samples"] * tokens_per_sample,
        "documents": sum(part["documents"] for part in every),
        "unreadable": sum(part["unreadable"] for part in every),
        "skipped": {name: [part["skipped"] for part in lane] for name, lane in parts.items() if any(part["skipped"] for part in lane)},
        "lanes": lanes,
    }


@dataclass
class Verdict:
    """What `verify` found."""

    samples: int = 0
    tokens: int = 0
    documents: int = 0
    """Finished ones; those under way in a lane do not count yet."""
    unreadable: int = 0
    """Documents that were skipped because they cannot be read."""
    skipped: int = 0
    """Shards that were, from some row on."""
    attempts: int = 1
    replayed: int = 0
    """Steps that an attempt had saved, and a later one did again."""
    lost: int = 0
    repeated: int = 0
    problems: list[str] = field(default_factory=list)
    """All that is not as it should be, a line each."""


def verify(config: Config, lines: Sequence[Line], *, seed: int, last_step: int) -> Verdict:
    """Whether the samples behind the checkpoint of `last_step` are those of an unbroken run. Reads all of them again.

    Raises ValueError or OSError where the source cannot be read.
    """
    kept, verdict = _kept(lines, last_step)
    if not kept:
        return verdict
    last, first = kept[-1], lines[0]
    for key in ("samples", "tokens", "documents", "unreadable"):
        setattr(verdict, key, last[key])
    verdict.skipped = sum(len(part) for lane in last["skipped"].values() for part in lane)
    share = Share(rank=0, world=1, global_batch=first["global_batch"], micro_batch=first["global_batch"], group=first["group"])
    check = _Check(config, seed, share, kept)
    for lane in last["lanes"]:
        check.lane(lane, verdict)
    return verdict


def _kept(lines: Sequence[Line], last_step: int) -> tuple[list[Line], Verdict]:
    """The lines that the weights of `last_step` come from, in order, over all attempts."""
    verdict = Verdict(attempts=len({line["attempt"] for line in lines}))
    place = _last(lines, len(lines), last_step)
    kept: list[Line] = []
    while place is not None:
        attempt = lines[place]["attempt"]
        begin = next(i for i in reversed(range(place)) if "global_batch" in lines[i] and lines[i]["attempt"] == attempt)  # it may have gone back
        kept[:0] = [line for line in lines[begin + 1 : place + 1] if line["attempt"] == attempt]
        start = lines[begin]["step"]
        if start == 0:
            break
        place = _last(lines, begin, start)
        if place is None:
            verdict.problems.append(f"attempt {attempt} began at step {start}, which no attempt before it saved")
        else:
            moved = [lane for lane, there in lines[place]["lanes"].items() if lines[begin]["lanes"].get(lane) != there]
            verdict.problems += [f"lane {lane}: attempt {attempt} began at step {start} in another place than was saved" for lane in moved]
            verdict.replayed += max(0, max(line["step"] for line in lines[:begin]) - start)
    if not kept:
        verdict.problems.append(f"the ledger has no line for step {last_step}")
    return kept, verdict


def _last(lines: Sequence[Line], before: int, step: int) -> int | None:
    """The place of the last line that a checkpoint at `step` wrote before the line `before`."""
    return next((i for i in reversed(range(before)) if lines[i]["step"] == step and "global_batch" not in lines[i]), None)


class _Check:
    """Derives the digests of lanes again."""

    def __init__(self, config: Config, seed: int, share: Share, kept: Sequence[Line]) -> None:
        self._share = share
        self._kept = kept
        self._lanes = kept[-1]["lanes"]
        counts = [share.counts(step, len(self._lanes)) for step in range(kept[-1]["step"])]
        self._counts = {lane: [count.get(int(lane), 0) for count in counts] for lane in self._lanes}
        self._open = lambda lane: open_lanes(
            config, seed=seed, states={lane: None}, total=len(self._lanes), closing=Event(), skipped=kept[-1]["skipped"].get(lane)
        )[int(lane)]

    def lane(self, lane: str, verdict: Verdict) -> None:
        """Compare it with each line, up to the first that differs."""
        stream, step = self._open(lane), 0
        before = {"step": 0, "lanes": {lane: FIRST}}
        for line in self._kept:
            for count in self._counts[lane][step : line["step"]]:
                if count:
                    stream.take(count)
            step = line["step"]
            state = stream.state()
            if line["lanes"][lane] != {key: state[key] for key in FIRST}:
                self._explain(lane, before, line, verdict)
                return
            before = line

    def _explain(self, lane: str, before: Line, line: Line, verdict: Verdict) -> None:
        """Whether samples were passed over, or given again, between two lines."""
        begin, counts = before["lanes"][lane], [count for count in self._counts[lane][before["step"] : line["step"]] if count]
        reach = min(SHIFTS * max(counts), begin["samples"])
        stream = self._open(lane)
        if begin["samples"] > reach:
            stream.take(begin["samples"] - reach)
        near = stream.take(reach + sum(counts) + SHIFTS * max(counts))
        where = f"lane {lane}: between steps {before['step']} and {line['step']}"
        for shift in sorted(range(-reach, SHIFTS * max(counts) + 1), key=abs):
            place, digest = reach + shift, int(begin["digest"], 16)
            for count in counts:
                digest = chained(digest, near[place : place + count])
                place += count
            if f"{digest:016x}" == line["lanes"][lane]["digest"]:
                verdict.lost += max(shift, 0)
                verdict.repeated += max(-shift, 0)
                verdict.problems.append(f"{where} {f'{shift} samples were lost' if shift > 0 else f'{-shift} samples were repeated'}")
                return
        verdict.problems.append(f"{where} its {sum(counts)} samples are not those of the source in its order")
