"""The types of the rows and documents in a run folder; trainer/run_files.py lists the files."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from trainer.endings import Ending, Stopped

Plain = dict[str, Any]
"""Plain values of a config, as YAML holds them."""

Row = Mapping[str, Any]
"""A row as it was read from a file."""

Spent = Literal["step", "data", "evaluation", "checkpoint", "replayed", "restart", "start-up", "other"]
"""Purposes of a run's wall-clock time; `other` is the rest, so that they sum to the whole."""


class EventKind(StrEnum):
    """The subject of an event."""

    NOTE = "note"
    """A message for people; also every event from before there were kinds."""
    RESUMED = "resumed"
    """Training continues from a checkpoint."""
    ANOMALY = "anomaly"
    """The batch of a step is skipped."""
    CHECKPOINT = "checkpoint"
    """A checkpoint is damaged, or could not be written."""
    COLLAPSE = "collapse"
    """The routing of a layer collapsed."""
    QUALITY = "quality"
    """A quality metric of the run's own samples is alarming."""
    TRACKING_AWAY = "tracking_away"
    """The tracking server is not accepting metrics."""

    @property
    def is_alarm(self) -> bool:
        """Whether the event shows that a fault was noticed while training went on."""
        return self in (EventKind.ANOMALY, EventKind.TRACKING_AWAY)


class Say(Protocol):
    """Reports an event to people and to the run's `events.jsonl`."""

    def __call__(self, kind: EventKind, text: str, step: int | None = None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Event:
    """A row of `events.jsonl`."""

    kind: EventKind
    text: str
    time: float
    attempt: int
    step: int | None
    """The step that the event belongs to, if any."""

    def to_row(self) -> dict[str, object]:
        """Return the row, as JSON."""
        row: dict[str, object] = {"time": self.time, "attempt": self.attempt, "kind": self.kind, "event": self.text}
        return row if self.step is None else row | {"step": self.step}

    @staticmethod
    def from_row(row: Row) -> "Event":
        """Read a row; rows without a kind are notes."""
        kind = EventKind(row.get("kind", EventKind.NOTE))
        return Event(kind=kind, text=row["event"], time=row["time"], attempt=row["attempt"], step=row.get("step"))


@dataclass(frozen=True, kw_only=True)
class AttemptBegan:
    """A row of `attempts.jsonl`: the beginning of an attempt."""

    attempt: int
    time: float
    world: int | None
    """Number of workers; None if unknown."""
    host: str | None
    pid: int | None
    """Process id of rank 0."""
    commit: str | None
    """Commit of the code; None if unknown."""
    dirty: bool | None
    """Whether the code had changes that were not committed; None if unknown."""

    def to_row(self) -> dict[str, object]:
        """Return the row, as JSON."""
        return vars(self).copy()

    @staticmethod
    def from_row(row: Row) -> "AttemptBegan":
        """Read a row."""
        return AttemptBegan(
            attempt=row.get("attempt", 0),
            time=row.get("time", 0.0),
            world=row.get("world"),
            host=row.get("host"),
            pid=row.get("pid"),
            commit=row.get("commit"),
            dirty=row.get("dirty"),
        )


@dataclass(frozen=True, kw_only=True)
class AttemptEnded:
    """A row of `attempts.jsonl`, or a file of `ends/`: the end of an attempt."""

    attempt: int
    time: float
    by: str
    """The reporter, such as `rank 0`."""
    stopped: Stopped

    def to_row(self) -> dict[str, object]:
        """Return the row, as JSON."""
        row: dict[str, object] = {"attempt": self.attempt, "time": self.time, "ended": str(self.stopped), "by": self.by}
        return row | {"ending": self.stopped.ending}

    @staticmethod
    def from_row(row: Row) -> "AttemptEnded":
        """Read a row."""
        stopped = Stopped.read(row["ended"], row.get("ending"))
        return AttemptEnded(
            attempt=row["attempt"], time=row.get("time", 0.0), by=row.get("by", "nobody"), stopped=stopped
        )


@dataclass(frozen=True, kw_only=True)
class MetricsRow:
    """A row of `metrics.jsonl`: the metrics that were logged after a step."""

    step: int
    time: float
    attempt: int
    metrics: Mapping[str, float]

    @staticmethod
    def from_row(row: Row) -> "MetricsRow":
        """Read a row, in which a number that is not finite is a string."""
        metrics = {name: float(value) for name, value in row.items() if name not in ("step", "time", "attempt")}
        return MetricsRow(step=row["step"], time=row.get("time", 0.0), attempt=row.get("attempt", 0), metrics=metrics)


class Anomaly(TypedDict):
    """A row of `anomalies.jsonl`, also kept in checkpoints; steps count as they are logged."""

    step: int
    reason: str
    first: int
    """The first step without an update."""
    last: int


class Fault(TypedDict):
    """A row of `faults.jsonl`: a fault that was injected."""

    fault: int
    """Number of the fault in the job; -1 for a fault from outside the worker."""
    name: str
    step: int
    rank: NotRequired[int]
    time: float


class GoodputRow(TypedDict):
    """The time of an attempt, in `goodput.json`."""

    attempt: int
    begin: float
    """When the attempt's time begins, as time.time()."""
    until: float
    """The time until which it is booked, as time.time()."""
    step: int
    ended: bool
    seconds: dict[Spent, float]


class Sent(TypedDict):
    """`mlflow.json`: how far MLflow has the rows of `metrics.jsonl`."""

    sent_bytes: int
    attempt: int
    step: NotRequired[int]
    last_step: int
    replayed_until: int


class Job(TypedDict):
    """`resolved.yaml`: the plain values of a RunConfig and, if there is one, a ClusterConfig."""

    run: Plain
    cluster: NotRequired[Plain]


class Summary(TypedDict):
    """`summary.json`: the results of a run. Only rank 0 has the keys that are not required."""

    name: str
    step: int
    tokens_seen: int
    samples_seen: int
    stopped: str
    """Why the run stopped, for people."""
    ending: Ending
    """Why the run stopped, for programs."""
    failed: bool
    anomalies: list[Anomaly]
    world: int
    attempt: int
    train_seconds: float
    steps_this_attempt: int
    seconds: dict[Spent, float]
    """Wall-clock seconds of this attempt, by purpose."""
    training: dict[str, float]
    """The last logged metrics of training steps."""
    eval: dict[str, float]
    quality: dict[str, float]
    samples: dict[str, str]
    goodput: NotRequired[dict[Spent, float]]
    """Wall-clock seconds of all attempts, by purpose."""
    baselines: NotRequired[dict[str, float]]
    seconds_to_first_step: NotRequired[float]
