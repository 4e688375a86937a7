"""Saving checkpoints: every rank writes what it owns, in the background; a folder appears by one rename.

trainer/checkpoint/format.py says what lies in it, and trainer/checkpoint/load.py reads it back, into any layout.
"""

import json
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint.format import (
    MANIFEST,
    OwnedPiece,
    RankPart,
    State,
    build_manifest,
    digest_of_file,
    piece_key,
    rank_name,
    receipt_text,
    step_name,
    steps_in,
)
from trainer.checkpoint.fragments import Fragment, receipt
from trainer.parsing import one_line
from trainer.storage import Folder
from trainer.world import World

_WAIT_FOR_RANKS_S = 600.0
_COPIERS = 4  # threads, while training waits: one alone does not use the memory's bandwidth
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True)
class _Piece:
    """What this rank owns of a fragment."""

    fragment: Fragment
    start: int
    """Where it begins in the whole tensor."""
    values: Tensor
    """A copy."""

    @property
    def key(self) -> str:
        return piece_key(self.fragment.key, self.start)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 3
    """How many of the newest checkpoints stay; 0: all."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for good; 0: none."""

    def __post_init__(self) -> None:
        if min(self.every, self.keep, self.keep_every) < 0:
            raise ValueError(
                f"every is {self.every}, keep {self.keep} and keep_every {self.keep_every}; none may be below 0"
            )


class _PeerFailed(OSError):
    """Another rank could not write its part, and says itself why."""


class Checkpointer:
    """Saves the fragments of all ranks into `root`, one checkpoint at a time, while training goes on."""

    def __init__(self, root: Folder, world: World, config: CheckpointConfig, attempt: int):
        self.root, self.world, self.config, self.attempt = root, world, config, attempt
        self.staged: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.published = -1
        """The step of the newest checkpoint that is known to be whole; -1: none."""
        self.under_way: int | None = None
        """The step of the save that nobody has waited for yet."""

    @property
    def newest(self) -> int:
        """The step of the newest checkpoint, counting on the save under way; -1: none."""
        return self.published if self.under_way is None else self.under_way

    def save(self, step: int, fragments: Sequence[Fragment], state: State) -> None:
        """Copy what this rank owns into buffers of its own, and write them in a thread, once the save before is over."""
        assert self.error is None, "whoever saves has waited for the save before"
        with ThreadPoolExecutor(_COPIERS) as pool:
            staged = pool.map(self._stage, fragments)
        pieces = [piece for piece in staged if piece]
        self.thread = threading.Thread(target=self._write, args=(step, pieces, state), name="checkpoint", daemon=True)
        self.thread.start()
        self.under_way = step

    def wait(self) -> None:
        """Until the save under way is published; raises what went wrong in it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait_for_all(self) -> str:
        """Until the save under way is over on all ranks: "", or what went wrong on the first of them where it did, the same on each."""
        step = self.under_way
        if step is None:
            return ""
        try:
            self.wait()
            by_peer, problem = True, ""
        except OSError as error:  # no room, no right, no answer: what storage does
            by_peer, problem = isinstance(error, _PeerFailed), f"checkpoint {step_name(step)}: {one_line(error)}"
        problem = _first_cause(self.world.gather((by_peer, problem)))
        self.under_way = None
        if not problem:
            self.published = step
        elif self.world.is_main:  # now nobody writes into it any more
            folder = self._unpublished(step)
            with suppress(OSError):
                if not folder.exists(MANIFEST):
                    folder.remove()
        return problem

    def _unpublished(self, step: int) -> Folder:
        """Where a checkpoint is written; object stores have no rename, so there it is the final place, and only the manifest makes it a checkpoint."""
        return self.root / (f".{step_name(step)}-{self.attempt}" if self.root.is_local else step_name(step))

    def _stage(self, fragment: Fragment) -> _Piece | None:
        """What this rank owns of `fragment`, copied."""
        owned, start = fragment.values[fragment.owned], fragment.start + fragment.owned.start
        if not owned.numel():
            return None
        key = piece_key(fragment.key, start)
        buffer = self.staged.get(key)
        if buffer is None or buffer.shape != owned.shape:
            buffer = self.staged[key] = torch.empty(owned.shape, dtype=owned.dtype, pin_memory=owned.is_cuda)
        return _Piece(fragment, start, buffer.copy_(owned))

    def _write(self, step: int, pieces: list[_Piece], state: State) -> None:
        try:
            folder = self._unpublished(step)
            try:
                self._write_rank(folder.make(), pieces)
            except OSError as error:
                self._give_up(folder, error)
            if self.world.is_main:
                self._publish(folder, step, state)
        except BaseException as error:  # it is raised again, in the training thread, by wait()
            self.error = error

    def _give_up(self, folder: Folder, error: OSError) -> None:
        """Tell rank 0 that this rank's part will not come, and make room."""
        name = rank_name(self.world.rank)
        with suppress(OSError):
            folder.delete(f"{name}.safetensors")
            folder.write(f"{name}.failed", b"")
        raise error

    def _write_rank(self, folder: Folder, pieces: list[_Piece]) -> None:
        name = rank_name(self.world.rank)
        tensors = {piece.key: piece.values for piece in pieces}
        with tempfile.TemporaryDirectory(dir=folder.path if folder.is_local else None, prefix=".write-") as scratch:
            file = Path(scratch) / f"{name}.safetensors"
            try:
                save_file(tensors, file)
            except SafetensorError as error:  # safetensors' own kind of OSError
                raise OSError(str(error)) from error
            digest, size = digest_of_file(file), file.stat().st_size
            if folder.is_local:
                file.rename(Path(folder.path) / file.name)
            else:
                folder.put(file, file.name)
        part = RankPart(size=size, digest=digest, pieces=[_described(piece) for piece in pieces])
        folder.write(f"{name}.json", json.dumps(part).encode())

    def _publish(self, folder: Folder, step: int, state: State) -> None:
        """Once every rank has written: the manifest, the rename, and the end of what is too old."""
        names = [rank_name(rank) for rank in range(self.world.size)]
        self._wait_for_parts(folder, step, {f"{name}.json" for name in names})
        parts: dict[str, RankPart] = {name: json.loads(folder.read(f"{name}.json")) for name in names}
        folder.write(MANIFEST, json.dumps(build_manifest(step, parts, state), indent=1).encode())
        for name in names:
            folder.delete(f"{name}.json")
        final = self.root / step_name(step)
        if folder.is_local and final.exists():
            final.remove()
        folder.rename_to(final)
        self._prune()

    def _wait_for_parts(self, folder: Folder, step: int, expected: set[str]) -> None:
        """Until the files `expected` are there. It lists the folder again and again: this is a thread, and while it waits the ranks'
        collectives belong to training."""
        deadline, pause_s = time.monotonic() + _WAIT_FOR_RANKS_S, _FIRST_PAUSE_S
        while missing := expected - set(names := folder.names()):
            if failed := [name for name in names if name.endswith(".failed")]:
                raise _PeerFailed(f"{failed[0].removesuffix('.failed')} could not be written")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"checkpoint {step_name(step)}: no {', '.join(sorted(missing))} after {_WAIT_FOR_RANKS_S:.0f} s; is {folder} shared by all nodes?"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _prune(self) -> None:
        steps = sorted(steps_in(self.root))
        old = steps[: -self.config.keep] if self.config.keep else []
        for step in old:
            if not (self.config.keep_every and step % self.config.keep_every == 0):
                (self.root / step_name(step)).remove()


def _described(piece: _Piece) -> OwnedPiece:
    return OwnedPiece(
        key=piece.fragment.key,
        shape=piece.fragment.global_shape,
        dtype=str(piece.values.dtype).removeprefix("torch."),
        start=piece.start,
        numel=piece.values.numel(),
        receipt=receipt_text(receipt(piece.values, piece.start)),
    )


def _first_cause(problems: Iterable[tuple[bool, str]]) -> str:
    """The first problem among those of all ranks ("": none), a cause before what only followed from another rank's."""
    in_order = sorted(problems, key=lambda problem: problem[0])
    return next((text for _, text in in_order if text), "")
