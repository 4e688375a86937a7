"""The log of decisions: one JSON line per decision, each with the hash of the line before.

`rules_audit.head` keeps the number of lines and the last hash. Changing, dropping, adding or
reordering lines breaks the chain. An attacker who can write both files can forge a whole log, so
keep its head elsewhere too.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from trainer.rules.gate import Candidate, Decision, Gate
from trainer.run_files import RULES_HEAD, RULES_LOG
from trainer.storage import Folder

_START = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One decision as a line of the log, without the line's own hash."""

    line: int
    """Number of the line, from 1."""
    time: float
    purpose: str
    rules: str
    """Digest of the file of rules."""
    graph: str
    """Digest of the knowledge graph; empty without one."""
    checkpoint: str
    """Digest of the checkpoint's manifest."""
    candidate: str
    """Digest of the candidate."""
    accepted: bool
    conflicts: tuple[str, ...]
    derivation: tuple[str, ...]
    previous: str
    """Hash of the line before."""


def digest(row: Mapping[str, object]) -> str:
    """SHA-256 of a line without its own hash."""
    body = {key: value for key, value in row.items() if key != "hash"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class DecisionLog:
    """Appends to the log of a run; it must have one writer at a time."""

    def __init__(self, folder: Folder):
        self.folder = folder
        problems = verify(folder)
        if problems:
            raise ValueError(f"audit log of {folder}: {problems[0]}; nothing more is written to it: put it aside")
        self.lines = 0
        self.last = _START
        if folder.exists(RULES_HEAD):
            head = json.loads(folder.read(RULES_HEAD))
            self.lines = int(head["lines"])
            self.last = str(head["hash"])

    def add(self, gate: Gate, candidate: Candidate, decision: Decision, purpose: str, checkpoint: str) -> None:
        """Append one decision; `checkpoint` is the digest of the checkpoint's manifest."""
        entry = Entry(
            line=self.lines + 1,
            time=round(time.time(), 3),
            purpose=purpose,
            rules=gate.rules_digest,
            graph=gate.graph_digest,
            checkpoint=checkpoint,
            candidate=candidate.digest,
            accepted=decision.accepted,
            conflicts=decision.conflicts,
            derivation=decision.derivation,
            previous=self.last,
        )
        row = asdict(entry)
        own = digest(row)
        self.folder.append_line(RULES_LOG, row | {"hash": own})
        self.lines += 1
        self.last = own
        self.folder.write(RULES_HEAD, json.dumps({"lines": self.lines, "hash": self.last}).encode())


def verify(folder: Folder) -> list[str]:
    """The problems of the chain; none if it is intact, or if there is no log."""
    if not folder.exists(RULES_LOG):
        return [f"{RULES_LOG} is missing, but {RULES_HEAD} is there"] if folder.exists(RULES_HEAD) else []
    last = _START
    lines = folder.read(RULES_LOG).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            return [f"{RULES_LOG}, line {number}: not JSON"]
        if row.get("line") != number or row.get("previous") != last:
            return [f"{RULES_LOG}, line {number}: does not follow the line before"]
        if digest(row) != row.get("hash"):
            return [f"{RULES_LOG}, line {number}: was changed"]
        last = row["hash"]
    head = json.loads(folder.read(RULES_HEAD)) if folder.exists(RULES_HEAD) else {}
    if head != {"lines": len(lines), "hash": last}:
        recorded = head.get("lines", "none")
        return [f"{RULES_LOG}: {len(lines)} lines, but {RULES_HEAD} knows {recorded}: lines were dropped or added"]
    return []
