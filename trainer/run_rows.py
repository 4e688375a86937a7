"""The rows and documents of a run folder, typed; trainer/run_files.py says which file holds what."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from trainer.endings import Ending, Stopped

Spent = Literal["step", "data", "evaluation", "checkpoint", "replayed", "restart", "start-up", "other"]
"""What the wall-clock time of a run is spent on; `other` is what is left of the whole."""


class EventKind(StrEnum):
    """What an event is about."""

    NOTE = "note"
    """Nothing that a program acts on; also every event of a folder that was written before there were kinds."""
    RESUMED = "resumed"
    """Training continues from a checkpoint."""
    ANOMALY = "anomaly"
    """A batch is not learned from."""
    CHECKPOINT = "checkpoint"
    """A checkpoint is damaged, or could not be written."""
    COLLAPSE = "collapse"
    """The routing of a layer collapsed."""
    QUALITY = "quality"
    """A measure of the run's own samples looks wrong."""
    TRACKING_AWAY = "tracking_away"
    """The tracking server takes no metrics for now."""

    @property
    def is_alarm(self) -> bool:
        """Whether the event shows that a fault was noticed while training went on."""
        return self in (EventKind.ANOMALY, EventKind.TRACKING_AWAY)


class Say(Protocol):
    """Tells people, and the run's `events.jsonl`, that something happened."""

    def __call__(self, kind: EventKind, text: str, step: int | None = None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Event:
    """A row of `events.jsonl`."""

    kind: EventKind
    text: str
    time: float
    attempt: int
    step: int | None
    """The step that it belongs to, where there is one."""

    def to_row(self) -> dict[str, Any]:
        """As JSON."""
        row = {"time": self.time, "attempt": self.attempt, "kind": self.kind, "event": self.text}
        return row if self.step is None else row | {"step": self.step}

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "Event":
        """From JSON; a row of old has no kind."""
        kind = EventKind(row.get("kind", EventKind.NOTE))
        return Event(kind=kind, text=row["event"], time=row["time"], attempt=row["attempt"], step=row.get("step"))


@dataclass(frozen=True, kw_only=True)
class AttemptBegan:
    """A row of `attempts.jsonl`: an attempt begins."""

    attempt: int
    time: float
    world: int | None
    """Number of workers."""
    host: str | None
    pid: int | None
    """Of rank 0."""
    commit: str | None
    """Version of the code; None where it is not known."""
    dirty: bool | None

    def to_row(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self).copy()

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "AttemptBegan":
        """From JSON."""
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
    """A row of `attempts.jsonl`, and a file of `ends/`: an attempt ended."""

    attempt: int
    time: float
    by: str
    """Who says so."""
    stopped: Stopped

    def to_row(self) -> dict[str, Any]:
        """As JSON."""
        row = {"attempt": self.attempt, "time": self.time, "ended": str(self.stopped), "by": self.by}
        return row | {"ending": self.stopped.ending}

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "AttemptEnded":
        """From JSON."""
        stopped = Stopped.read(row["ended"], row.get("ending"))
        return AttemptEnded(
            attempt=row["attempt"], time=row.get("time", 0.0), by=row.get("by", "nobody"), stopped=stopped
        )


@dataclass(frozen=True, kw_only=True)
class MetricsRow:
    """A row of `metrics.jsonl`: metrics that were logged after a step."""

    step: int
    time: float
    attempt: int
    metrics: Mapping[str, float]

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> "MetricsRow":
        """From JSON, in which a number that is not finite is a text."""
        metrics = {name: float(value) for name, value in row.items() if name not in ("step", "time", "attempt")}
        return MetricsRow(step=row["step"], time=row.get("time", 0.0), attempt=row.get("attempt", 0), metrics=metrics)


class Anomaly(TypedDict):
    """A row of `anomalies.jsonl`, also kept in checkpoints; steps as they are logged."""

    step: int
    reason: str
    first: int
    """The first step without an update."""
    last: int


class Fault(TypedDict):
    """A row of `faults.jsonl`: a fault that was made on purpose."""

    fault: int
    """Its number in the job; -1: made from outside the worker."""
    name: str
    step: int
    rank: NotRequired[int]
    time: float


class GoodputRow(TypedDict):
    """An attempt in `goodput.json`."""

    attempt: int
    begin: float
    """When its time begins and until when it is booked, as time.time()."""
    until: float
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
    """`resolved.yaml`: plain values of a RunConfig, and of a ClusterConfig where the run has one."""

    run: dict[str, Any]
    cluster: NotRequired[dict[str, Any]]


class Summary(TypedDict):
    """`summary.json`: what a run came to. Ranks other than 0 do not have what is marked as NotRequired."""

    name: str
    step: int
    tokens_seen: int
    samples_seen: int
    stopped: str
    """Why the run stopped, for people."""
    ending: Ending
    """The same for programs."""
    failed: bool
    anomalies: list[Anomaly]
    world: int
    attempt: int
    train_seconds: float
    steps_this_attempt: int
    seconds: dict[Spent, float]
    """Of this attempt."""
    training: dict[str, float]
    """The last metrics of training."""
    eval: dict[str, float]
    quality: dict[str, float]
    samples: dict[str, str]
    goodput: NotRequired[dict[Spent, float]]
    """Seconds of all attempts."""
    baselines: NotRequired[dict[str, float]]
    seconds_to_first_step: NotRequired[float]
