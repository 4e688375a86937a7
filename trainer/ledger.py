"""What a run writes down about its data, in its folder.

data_manifest.json      frozen at the run's start; an attempt with other data is refused by name
ledger.jsonl            a line at the start of each attempt and at each checkpoint (data/ledger.py says of what)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from data.ledger import Line, entry
from data.manifest import check_manifest
from data.steps import RunState, Share
from trainer.objectives import Objective
from trainer.storage import Folder
from trainer.world import World

MANIFEST = "data_manifest.json"
LEDGER = "ledger.jsonl"


def frozen_manifest(folder: Folder, objective: Objective, world: World) -> dict[str, Any]:
    """The manifest of the run's data. Raises ValueError on every rank where an earlier attempt of the run had other data."""
    manifest: dict[str, Any] = {}
    problem = ""
    if world.is_main:
        try:
            manifest = objective.manifest()
            if folder.exists(MANIFEST):
                check_manifest(json.loads(folder.read(MANIFEST)), json.loads(json.dumps(manifest)))
            else:
                folder.write(MANIFEST, json.dumps(manifest, indent=1).encode())
        except ValueError as error:
            problem = str(error)
    problem = world.gather(problem)[0]
    if problem:
        raise ValueError(problem)
    return manifest


@dataclass
class Ledger:
    """Appends to the run's ledger, from rank 0."""

    folder: Folder
    attempt: int
    tokens_per_sample: int
    world: World

    def begin(self, state: Mapping[str, Any], share: Share) -> None:
        """An attempt begins from the data state of a checkpoint, or from the start where it is empty."""
        start = entry(cast(RunState, state), tokens_per_sample=self.tokens_per_sample) if state else {"step": 0, "lanes": {}}
        self._append({"global_batch": share.global_batch, "group": share.group, **start})

    def saved(self, state: Mapping[str, Any]) -> None:
        """A checkpoint is written with this data state, merged over the ranks."""
        self._append(entry(cast(RunState, state), tokens_per_sample=self.tokens_per_sample))

    def _append(self, line: Mapping[str, object]) -> None:
        if self.world.is_main:
            self.folder.append(LEDGER, json.dumps({"attempt": self.attempt, **line}).encode() + b"\n")


def read_ledger(folder: Folder) -> list[Line]:
    """The lines of a run's ledger; none where it has none."""
    return [json.loads(line) for line in folder.read(LEDGER).splitlines()] if folder.exists(LEDGER) else []
