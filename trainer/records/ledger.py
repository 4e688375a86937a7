"""The records of a run's data: the manifest, frozen when the run begins, and the ledger.

An attempt with other data is refused by name. The ledger has a row at the start of each attempt and
at each checkpoint.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from data.ledger import entry
from data.manifest import check_manifest
from data.share import RunState, Share
from trainer.core.protocols import Objective
from trainer.run_files import RunFiles
from trainer.world import World


def frozen_manifest(files: RunFiles, objective: Objective, world: World) -> Mapping[str, object]:
    """The manifest of the run's data.

    Raises ValueError, on every rank, if an earlier attempt of the run had other data.
    """
    manifest: Mapping[str, object] = {}
    problem = ""
    if world.is_main:
        try:
            manifest = objective.manifest()
            if frozen := files.data_manifest():
                check_manifest(frozen, json.loads(json.dumps(manifest)))
            else:
                files.write_data_manifest(manifest)
        except ValueError as error:
            problem = str(error)
    problem = world.gather(problem)[0]
    if problem:
        raise ValueError(problem)
    return manifest


@dataclass
class Ledger:
    """Appends to the ledger of the run, from rank 0."""

    files: RunFiles
    attempt: int
    tokens_per_sample: int
    world: World

    def begin(self, state: RunState | None, share: Share) -> None:
        """Record that an attempt begins from the data state of a checkpoint, or from the start."""
        start: Mapping[str, object] = {"step": 0, "lanes": {}}
        if state is not None:
            start = entry(state, tokens_per_sample=self.tokens_per_sample)
        self._append({"global_batch": share.global_batch, "group": share.group, **start})

    def saved(self, state: RunState) -> None:
        """Record that a checkpoint holds this data state, merged across the ranks."""
        self._append(entry(state, tokens_per_sample=self.tokens_per_sample))

    def _append(self, line: Mapping[str, object]) -> None:
        if self.world.is_main:
            self.files.add_to_ledger({"attempt": self.attempt, **line})
