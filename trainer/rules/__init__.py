"""Rules over candidates.

Rules in predicate logic judge what a network generates, and every decision gives its reasons.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """Rules that judge the texts that the network generates."""

    file: str
    """File of rules in clingo's language. A candidate is refused if `flag_conflict` follows."""
    graph: str | None = None
    """Knowledge graph (.csv or .nt) of facts `triple(subject, predicate, object)`."""
    time_limit_s: float = 10.0
    """Seconds for all candidates that are judged together."""

    def __post_init__(self) -> None:
        if not self.time_limit_s > 0:
            raise ValueError(f"time_limit_s is {self.time_limit_s}; it must be above 0")
