"""Rules over candidates: what a network generates is judged by predicate-logic rules in a file, and every decision says why."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """Rules that judge what the network generates."""

    file: str
    """Rules in clingo's language; whatever derives `flag_conflict` refuses the candidate."""
    graph: str | None = None
    """Knowledge graph, .csv or .nt: facts `triple(subject, predicate, object)`."""
    time_limit_s: float = 10.0
    """For all candidates judged at once."""

    def __post_init__(self) -> None:
        if not self.time_limit_s > 0:
            raise ValueError(f"time_limit_s is {self.time_limit_s}; it must be above 0")
