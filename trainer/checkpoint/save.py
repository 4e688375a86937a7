"""Saves checkpoints: each rank writes the pieces that it owns, in the background.

A finished checkpoint appears by one rename. trainer/checkpoint/format.py describes its files, and
trainer/checkpoint/load.py reads them into any layout.
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
_COPY_THREADS = 4  # training waits for the copies, and one thread does not use the full memory bandwidth
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True)
class _Piece:
    """The part of a fragment that this rank owns."""

    fragment: Fragment
    """The fragment, which lies in the live state."""
    start: int
    """Offset of the piece in the whole tensor, flattened."""
    values: Tensor
    """A copy of the values."""

    @property
    def key(self) -> str:
        """The key of the piece in its file."""
        return piece_key(self.fragment.key, self.start)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save a checkpoint, and which checkpoints to keep."""

    every: int = 0
    """Number of steps between checkpoints. 0: save only at the end of the run."""
    keep: int = 3
    """Number of newest checkpoints to keep. 0: keep all."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this number are never removed. 0: none."""

    def __post_init__(self) -> None:
        if min(self.every, self.keep, self.keep_every) < 0:
            raise ValueError(
                f"every is {self.every}, keep {self.keep} and keep_every {self.keep_every}; "
                "give each of them a value of at least 0"
            )


class _PeerFailed(OSError):
    """Another rank could not write its part; it reports the reason itself."""


class Checkpointer:
    """Saves all ranks' fragments in `root`, one checkpoint at a time, while training continues."""

    def __init__(self, root: Folder, world: World, config: CheckpointConfig, attempt: int):
        self.root = root
        self.world = world
        self.config = config
        self.attempt = attempt
        self.staged: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.published = -1
        """Step of the newest checkpoint that is known to be complete; -1: none."""
        self.under_way: int | None = None
        """Step of the save that `wait_for_all` has not confirmed yet; None: no such save."""

    @property
    def newest(self) -> int:
        """Step of the newest checkpoint, assuming that the current save succeeds; -1: none."""
        return self.published if self.under_way is None else self.under_way

    def save(self, step: int, fragments: Sequence[Fragment], state: State) -> None:
        """Copy the elements that this rank owns, and write the copies in a thread.

        The caller must have waited for the previous save.
        """
        assert self.error is None, "call wait() before the next save()"
        with ThreadPoolExecutor(_COPY_THREADS) as pool:
            staged = pool.map(self._stage, fragments)
        pieces = [piece for piece in staged if piece]
        self.thread = threading.Thread(target=self._write, args=(step, pieces, state), name="checkpoint", daemon=True)
        self.thread.start()
        self.under_way = step

    def wait(self) -> None:
        """Wait for this rank's part of the current save; raises the error that stopped it.

        On rank 0 the part includes publishing the checkpoint.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error = self.error
            self.error = None
            raise error

    def wait_for_all(self) -> str:
        """Wait for the current save on every rank.

        Returns "" or the first rank's error; the answer is the same on all ranks.
        """
        step = self.under_way
        if step is None:
            return ""
        try:
            self.wait()
            outcome = (True, "")
        except OSError as error:  # storage: no space left, no permission, no answer
            outcome = (isinstance(error, _PeerFailed), f"checkpoint {step_name(step)}: {one_line(error)}")
        problem = _first_cause(self.world.gather(outcome))
        self.under_way = None
        if not problem:
            self.published = step
        elif self.world.is_main:  # every rank has stopped writing to the folder
            folder = self._unpublished(step)
            with suppress(OSError):
                if not folder.exists(MANIFEST):
                    folder.remove()
        return problem

    def _unpublished(self, step: int) -> Folder:
        """The folder to which a checkpoint is written before it is published.

        An object store has no rename, so there it is the final folder, and only the manifest makes
        it a checkpoint.
        """
        return self.root / (f".{step_name(step)}-{self.attempt}" if self.root.is_local else step_name(step))

    def _stage(self, fragment: Fragment) -> _Piece | None:
        """A copy of the elements of `fragment` that this rank owns, or None if it owns none."""
        owned = fragment.values[fragment.owned]
        start = fragment.start + fragment.owned.start
        if not owned.numel():
            return None
        key = piece_key(fragment.key, start)
        buffer = self.staged.get(key)
        if buffer is None or buffer.shape != owned.shape:
            buffer = torch.empty(owned.shape, dtype=owned.dtype, pin_memory=owned.is_cuda)
            self.staged[key] = buffer
        return _Piece(fragment, start, buffer.copy_(owned))

    def _write(self, step: int, pieces: list[_Piece], state: State) -> None:
        """Write this rank's part, and publish the checkpoint if this is rank 0."""
        try:
            folder = self._unpublished(step)
            try:
                self._write_rank(folder.make(), pieces)
            except OSError as error:
                self._give_up(folder, error)
            if self.world.is_main:
                self._publish(folder, step, state)
        except BaseException as error:  # wait() raises it again in the training thread
            self.error = error

    def _give_up(self, folder: Folder, error: OSError) -> None:
        """Tell rank 0 that this rank's part will not come, free its space, and raise `error`."""
        name = rank_name(self.world.rank)
        with suppress(OSError):
            folder.delete(f"{name}.safetensors")
            folder.write(f"{name}.failed", b"")
        raise error

    def _write_rank(self, folder: Folder, pieces: list[_Piece]) -> None:
        """Write this rank's pieces, then its `RankPart`, which tells rank 0 that they are there."""
        name = rank_name(self.world.rank)
        tensors = {piece.key: piece.values for piece in pieces}
        with tempfile.TemporaryDirectory(dir=folder.path if folder.is_local else None, prefix=".write-") as scratch:
            file = Path(scratch) / f"{name}.safetensors"
            try:
                save_file(tensors, file)
            except SafetensorError as error:  # safetensors raises it in place of an OSError
                raise OSError(str(error)) from error
            digest = digest_of_file(file)
            size = file.stat().st_size
            if folder.is_local:
                file.rename(Path(folder.path) / file.name)
            else:
                folder.put(file, file.name)
        part = RankPart(size=size, digest=digest, pieces=[_describe(piece) for piece in pieces])
        folder.write(f"{name}.json", json.dumps(part).encode())

    def _publish(self, folder: Folder, step: int, state: State) -> None:
        """Wait for all ranks, write the manifest, rename the folder, and remove old checkpoints."""
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
        """Wait until the folder holds the files `expected`.

        It polls the folder because this is a thread: while it waits, the ranks' collectives belong
        to training.
        """
        deadline = time.monotonic() + _WAIT_FOR_RANKS_S
        pause_s = _FIRST_PAUSE_S
        while missing := expected - set(names := folder.names()):
            if failed := [name for name in names if name.endswith(".failed")]:
                raise _PeerFailed(f"{failed[0].removesuffix('.failed')} could not be written")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"checkpoint {step_name(step)}: no {', '.join(sorted(missing))} after {_WAIT_FOR_RANKS_S:.0f} s; "
                    f"check that all nodes share {folder}"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _prune(self) -> None:
        """Remove the checkpoints that `keep` and `keep_every` do not keep."""
        steps = sorted(steps_in(self.root))
        old = steps[: -self.config.keep] if self.config.keep else []
        for step in old:
            if not (self.config.keep_every and step % self.config.keep_every == 0):
                (self.root / step_name(step)).remove()


def _describe(piece: _Piece) -> OwnedPiece:
    """The description of a piece for the manifest."""
    return OwnedPiece(
        key=piece.fragment.key,
        shape=piece.fragment.global_shape,
        dtype=str(piece.values.dtype).removeprefix("torch."),
        start=piece.start,
        numel=piece.values.numel(),
        receipt=receipt_text(receipt(piece.values, piece.start)),
    )


def _first_cause(problems: Iterable[tuple[bool, str]]) -> str:
    """The first problem of all ranks, or "" if there is none; a cause goes before its consequences.

    `problems` has a pair per rank: whether its problem only followed from another rank's, and the
    text.
    """
    in_order = sorted(problems, key=lambda problem: problem[0])
    return next((text for _, text in in_order if text), "")
