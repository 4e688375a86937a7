"""Saving checkpoints: every rank writes what it owns, in the background; a folder appears by one rename.

    checkpoints/step-00000100/
        rank-00000.safetensors, ...     the owned fragments of each rank, as 1-D tensors
        manifest.json                   written last: every tensor, its receipt, its pieces, the digest of every file and of itself

Nothing in it is code: safetensors and JSON. trainer/restore.py reads it back, into any layout.
"""

import hashlib
import json
import math
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.parsing import one_line
from trainer.shards import Fragment, receipt
from trainer.storage import Folder
from trainer.world import World

FORMAT = 1
_WAIT_FOR_RANKS_S = 600.0
_COPIERS = 4  # threads, while training waits: one alone does not use the memory's bandwidth
_Piece = tuple[Fragment, int, Tensor]
"""What a rank owns of a fragment, where that begins in the whole tensor, and a copy of it."""


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
            raise ValueError(f"every is {self.every}, keep {self.keep} and keep_every {self.keep_every}; none may be below 0")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


class _PeerFailed(OSError):
    """Another rank could not write its part, and says itself why."""


class Checkpointer:
    """Saves the fragments of all ranks into `root`, one checkpoint at a time, while training goes on."""

    def __init__(self, root: Folder, world: World, config: CheckpointConfig, attempt: int):
        self.root, self.world, self.config, self.attempt = root, world, config, attempt
        self.staged: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.last_step = -1
        self.stall_s = 0.0

    def save(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> None:
        """Copy what this rank owns into buffers of its own, and write them in a thread, once the save before is over."""
        begin = time.perf_counter()
        assert self.error is None, "whoever saves has waited for the save before"
        with ThreadPoolExecutor(_COPIERS) as pool:
            staged = pool.map(self._stage, fragments)
        pieces = [piece for piece in staged if piece]
        self.thread = threading.Thread(target=self._write, args=(step, pieces, state), name="checkpoint", daemon=True)
        self.thread.start()
        self.last_step, self.stall_s = step, time.perf_counter() - begin

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
        try:
            self.wait()
            problem, by_peer = "", True
        except OSError as error:  # no room, no right, no answer: what storage does
            problem, by_peer = f"checkpoint {step_name(self.last_step)}: {one_line(error)}", isinstance(error, _PeerFailed)
        problems = sorted(self.world.gather((by_peer, problem)), key=lambda each: each[0])  # the cause before what followed from it
        problem = next((text for _, text in problems if text), "")
        if problem and self.world.is_main:  # now nobody writes into it any more
            folder = self._unpublished(self.last_step)
            with suppress(OSError):
                if not folder.exists("manifest.json"):
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
        key = f"{fragment.key}@{start}"
        buffer = self.staged.get(key)
        if buffer is None or buffer.shape != owned.shape:
            buffer = self.staged[key] = torch.empty(owned.shape, dtype=owned.dtype, pin_memory=owned.is_cuda)
        return fragment, start, buffer.copy_(owned)

    def _write(self, step: int, pieces: list[_Piece], state: dict[str, Any]) -> None:
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
        name = f"rank-{self.world.rank:05d}"
        with suppress(OSError):
            if folder.exists(f"{name}.safetensors"):
                folder.fs.rm_file(f"{folder.path}/{name}.safetensors")
            folder.write(f"{name}.failed", b"")
        raise error

    def _write_rank(self, folder: Folder, pieces: list[_Piece]) -> None:
        name = f"rank-{self.world.rank:05d}"
        tensors = {f"{fragment.key}@{start}": values for fragment, start, values in pieces}
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
        entries = [
            {
                "key": f.key,
                "shape": f.global_shape,
                "dtype": str(v.dtype).removeprefix("torch."),
                "start": s,
                "numel": v.numel(),
                "receipt": f"{receipt(v, s):016x}",
            }
            for f, s, v in pieces
        ]
        folder.write(f"{name}.json", json.dumps({"size": size, "digest": digest, "pieces": entries}).encode())

    def _publish(self, folder: Folder, step: int, state: dict[str, Any]) -> None:
        """Once every rank has written: the manifest, the rename, and the end of what is too old."""
        deadline = time.monotonic() + _WAIT_FOR_RANKS_S
        expected = {f"rank-{rank:05d}.json" for rank in range(self.world.size)}
        while missing := expected - set(names := folder.names()):
            if failed := [name for name in names if name.endswith(".failed")]:
                raise _PeerFailed(f"{failed[0].removesuffix('.failed')} could not be written")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"checkpoint {step_name(step)}: no {', '.join(sorted(missing))} after {_WAIT_FOR_RANKS_S:.0f} s; is {folder} shared by all nodes?"
                )
            time.sleep(0.02)
        parts = {name.removesuffix(".json"): json.loads(folder.read(name)) for name in sorted(expected)}
        folder.write("manifest.json", json.dumps(_manifest(step, parts, state), indent=1).encode())
        for name in expected:
            folder.fs.rm_file(f"{folder.path}/{name}")
        final = self.root / step_name(step)
        if folder.is_local and final.exists():
            final.remove()
        folder.rename_to(final)
        self._prune()

    def _prune(self) -> None:
        steps = sorted(steps_in(self.root))
        old = steps[: -self.config.keep] if self.config.keep else []
        for step in old:
            if not (self.config.keep_every and step % self.config.keep_every == 0):
                (self.root / step_name(step)).remove()


def _manifest(step: int, parts: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name, part in parts.items():
        for piece in part["pieces"]:
            tensor = tensors.setdefault(piece["key"], {"shape": piece["shape"], "dtype": piece["dtype"], "receipt": 0, "pieces": []})
            tensor["receipt"] = (tensor["receipt"] + int(piece["receipt"], 16)) % (1 << 64)
            tensor["pieces"].append([f"{name}.safetensors", piece["start"], piece["numel"]])
    for key, tensor in tensors.items():
        written = sum(numel for _, _, numel in tensor["pieces"])
        assert written == math.prod(tensor["shape"]), f"{key}: the ranks own {written} of {math.prod(tensor['shape'])} elements"
        tensor["receipt"] = f"{tensor['receipt']:016x}"
    files = {f"{name}.safetensors": {"size": part["size"], "digest": part["digest"]} for name, part in parts.items()}
    manifest = {"format": FORMAT, "step": step, "state": state, "files": files, "tensors": tensors}
    return manifest | {"digest": digest_of_manifest(manifest)}


def digest_of_manifest(manifest: dict[str, Any]) -> str:
    """Of all of the manifest but its own digest."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def digest_of_file(file: Path) -> str:
    """BLAKE2b of the file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def steps_in(root: Folder) -> list[int]:
    """The steps of the published checkpoints in `root`, whether good or damaged."""
    return [int(name.removeprefix("step-")) for name in root.names() if name.startswith("step-") and name.removeprefix("step-").isdigit()]
