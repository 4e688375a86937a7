"""The gate: candidates in, decisions out.

The solver runs in a process of its own, with limited time and memory.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkout import CHECKOUT
from trainer.rules import RulesConfig
from trainer.rules.graph import Fact, read_graph
from trainer.rules.judge import Request
from trainer.rules.program import read_program

_LARGEST = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A text, facts, or both, to be judged."""

    text: str = ""
    facts: tuple[Fact, ...] = ()

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.text, self.facts]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The conflicts of a candidate, none if it is accepted, and the reasons in words."""

    conflicts: tuple[str, ...]
    derivation: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        return not self.conflicts

    @property
    def reasons(self) -> tuple[str, ...]:
        """The first line of each conflict's derivation."""
        return tuple(line for line in self.derivation if not line.startswith(" "))


class Gate:
    """Rules and knowledge graph, read and checked.

    Raises ValueError for rules that are not understood, unsafe, or never end.
    """

    def __init__(self, config: RulesConfig):
        file = Path(config.file)
        if not file.is_file():
            raise ValueError(f"--rules: no file {config.file}; name a file of rules (.lp)")
        self.config = config
        content = file.read_bytes()
        self.program = read_program(content.decode("utf-8", errors="replace"), file.name)
        self.graph = read_graph(config.graph) if config.graph else []
        self.rules_digest = hashlib.sha256(content).hexdigest()
        self.graph_digest = hashlib.sha256(Path(config.graph).read_bytes()).hexdigest() if config.graph else ""
        self.judge([Candidate()])

    def judge(self, candidates: Sequence[Candidate]) -> list[Decision]:
        """A decision per candidate, in order."""
        request: Request = {
            "name": self.program.name,
            "text": self.program.text,
            "graph": self.graph,
            "candidates": [{"text": candidate.text, "facts": candidate.facts} for candidate in candidates],
        }
        limit = self.config.time_limit_s
        command = [sys.executable, "-m", "trainer.rules.judge"]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=limit,
                cwd=CHECKOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(self._endless(f"after {limit:g} s")) from None
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        for row in rows:
            if "error" in row:
                raise ValueError(row["error"])
            if "endless" in row:
                raise ValueError(self._endless(f"within {row['endless']}"))
        if len(rows) < len(candidates):
            if "alloc" in done.stderr or "Memory" in done.stderr or done.returncode < 0:
                raise ValueError(self._endless("within the memory it may use"))
            raise AssertionError(f"the solver ended with code {done.returncode}: {done.stderr[-500:]}")
        return [Decision(conflicts=tuple(row["conflicts"]), derivation=tuple(row["derivation"])) for row in rows]

    def _endless(self, when: str) -> str:
        lines = self.program.suspects
        where = f", line {', '.join(map(str, lines))}" if lines else ""
        fix = "raise the time limit, or make the rules smaller"
        if lines:
            fix = "it makes new terms of its own conclusions: bound them"
        return f"{self.program.name}{where}: no conclusion {when}; {fix}"


def measures(name: str, figures: Mapping[str, float]) -> tuple[Fact, ...]:
    """`name(key, value)` for each finite metric, in rounded thousandths.

    The solver knows whole numbers only.
    """
    finite = {key: value for key, value in figures.items() if abs(value) * 1000 <= _LARGEST}
    return tuple((name, key, round(1000 * value)) for key, value in sorted(finite.items()))


def labels(predictions: Sequence[tuple[str, float]]) -> tuple[Fact, ...]:
    """`label(class, percent)` for each (class, confidence in [0, 1]) of a classifier."""
    return tuple(("label", name, round(100 * confidence)) for name, confidence in predictions)
