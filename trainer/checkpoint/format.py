"""The format of a checkpoint on disk.

    checkpoints/step-00000100/
        rank-00000.safetensors  the pieces of tensors that rank 0 owns, 1-D, under `KEY@START`
        rank-00001.safetensors  those of rank 1, and so on
        manifest.json           a `Manifest`; it is written last and makes the folder a checkpoint

It holds safetensors and JSON, and no code. A tensor of training state has a key,
`KIND/NETWORK/NAME`, such as `exp_avg/model/blocks.0.attention.q.weight`. The ranks cut it into
pieces that cover each of its elements once; `start` is the offset of a piece in the whole tensor,
flattened. A checkpoint can therefore be loaded into any layout: another number of ranks, another
ZeRO stage, other ranks for the experts.

While a checkpoint is written, each rank also leaves a `RankPart` (rank-00000.json), or an empty
rank-00000.failed if it could not write. Rank 0 builds the manifest from the parts and removes them.

Three digests protect a checkpoint. `FileEntry.digest` covers the bytes of a file, `Manifest.digest`
covers the rest of the manifest, and `TensorEntry.receipt` covers a tensor's values at their
offsets, however the tensor is cut (see `trainer.checkpoint.fragments.receipt`).

    root = Folder("runs/demo/checkpoints")
    folder = root / step_name(max(steps_in(root)))
    manifest = read_manifest(folder)                        # ValueError if it is missing or damaged
    problems = damage(folder, manifest, Path("scratch"))    # [] if all files are intact
    print(manifest["state"]["samples"])
    print(manifest["tensors"]["weight/model/embedding.weight"]["shape"])

trainer/checkpoint/save.py writes checkpoints, and trainer/checkpoint/load.py reads them.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from data.share import RunState
from trainer.run_rows import Anomaly
from trainer.storage import Folder

FORMAT = 1
MANIFEST = "manifest.json"
PieceEntry = tuple[str, int, int]
"""A piece: its file, its offset in the whole tensor, and its number of elements. A list in JSON."""


class FileEntry(TypedDict):
    """A file of pieces, in the manifest."""

    size: int
    """Size of the file in bytes."""
    digest: str
    """BLAKE2b of the file's bytes, in hexadecimal digits."""


class TensorEntry(TypedDict):
    """A tensor of training state, in the manifest."""

    shape: list[int]
    dtype: str
    """Name of the torch dtype, such as `float32`."""
    receipt: str
    """Receipt of the whole tensor, as 16 hexadecimal digits."""
    pieces: list[PieceEntry]
    """The pieces that the ranks saved; together they cover the tensor once."""


class GuardState(TypedDict):
    """State of the anomaly guard (see trainer/core/anomaly.py)."""

    losses: dict[str, list[float]]
    """The most recent losses of each phase."""
    found: list[Anomaly]
    """Every anomaly of the run so far."""


class State(TypedDict):
    """Progress of the run at the checkpoint."""

    step: int
    """Number of optimiser steps done."""
    samples: int
    """Number of samples trained on."""
    data: RunState
    """State of the data streams, merged across the ranks."""
    world: int
    """Number of ranks that saved the checkpoint."""
    guard: NotRequired[GuardState]
    """State of the anomaly guard, if it was saved."""


class Manifest(TypedDict):
    """The content of manifest.json."""

    format: int
    """Version of this format; `FORMAT`."""
    step: int
    state: State
    files: dict[str, FileEntry]
    """The files of pieces, by name."""
    tensors: dict[str, TensorEntry]
    """The tensors of training state, by key."""
    digest: str
    """BLAKE2b of the rest of the manifest, in hexadecimal digits."""


class OwnedPiece(TypedDict):
    """The owning rank's description of a piece."""

    key: str
    """Key of the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dtype: str
    """Name of the torch dtype, such as `float32`."""
    start: int
    """Offset of the piece in the whole tensor, flattened."""
    numel: int
    """Number of elements of the piece."""
    receipt: str
    """Receipt of the piece, as 16 hexadecimal digits."""


class RankPart(TypedDict):
    """One rank's report of the file that it has written."""

    size: int
    """Size of the file in bytes."""
    digest: str
    """BLAKE2b of the file's bytes, in hexadecimal digits."""
    pieces: list[OwnedPiece]
    """The pieces in the file."""


def step_name(step: int) -> str:
    """The name of the folder of the checkpoint at `step`."""
    return f"step-{step:08d}"


def rank_name(rank: int) -> str:
    """The name of a rank's files without the suffix."""
    return f"rank-{rank:05d}"


def steps_in(root: Folder) -> list[int]:
    """The steps of the published checkpoints in `root`, intact or damaged, in no fixed order."""
    numbers = [name.removeprefix("step-") for name in root.names() if name.startswith("step-")]
    return [int(number) for number in numbers if number.isdigit()]


def remove_unfinished(root: Folder) -> None:
    """Remove from `root` the files of saves that did not finish. Call it while no rank is saving.

    An object store has no rename, so a save is written in its final folder. Parts that a killed
    save left there would count as parts of the next save of the same step.
    """
    for name in root.names():
        folder = root / name
        if name.startswith(".step-"):
            folder.remove()
        elif name.startswith("step-") and not root.is_local:
            files = folder.names()
            if MANIFEST not in files:
                folder.remove()
                continue
            for file in files:
                if file.startswith("rank-") and file.endswith((".json", ".failed")):
                    folder.delete(file)


def piece_key(key: str, start: int) -> str:
    """The key of a piece in its file."""
    return f"{key}@{start}"


def build_manifest(step: int, parts: Mapping[str, RankPart], state: State) -> Manifest:
    """The manifest of a checkpoint, built from the `parts` by `rank_name`, in rank order."""
    tensors: dict[str, TensorEntry] = {}
    for name, part in parts.items():
        for piece in part["pieces"]:
            entry = TensorEntry(shape=list(piece["shape"]), dtype=piece["dtype"], receipt=receipt_text(0), pieces=[])
            tensor = tensors.setdefault(piece["key"], entry)
            tensor["receipt"] = receipt_text(int(tensor["receipt"], 16) + int(piece["receipt"], 16))
            tensor["pieces"].append((f"{name}.safetensors", piece["start"], piece["numel"]))
    for key, tensor in tensors.items():
        written = sum(numel for _, _, numel in tensor["pieces"])
        numel = math.prod(tensor["shape"])
        assert written == numel, f"{key}: the ranks wrote {written} of {numel} elements"
    files = {f"{name}.safetensors": FileEntry(size=part["size"], digest=part["digest"]) for name, part in parts.items()}
    manifest = Manifest(format=FORMAT, step=step, state=state, files=files, tensors=tensors, digest="")
    manifest["digest"] = digest_of_manifest(manifest)
    return manifest


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of the checkpoint `folder`. Raises ValueError if it is missing or damaged."""
    if not folder.exists(MANIFEST):
        raise ValueError(f"checkpoint {folder}: no {MANIFEST}, so it was never completed; use an earlier checkpoint")
    try:
        manifest: Manifest = json.loads(folder.read(MANIFEST))
        intact = manifest["format"] == FORMAT and manifest["digest"] == digest_of_manifest(manifest)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        intact = False
    if not intact:
        raise ValueError(f"checkpoint {folder}: {MANIFEST} is damaged; use an earlier checkpoint")
    return manifest


def damage(folder: Folder, manifest: Manifest, scratch: Path) -> list[str]:
    """A line for each file of the checkpoint that is missing, truncated or altered."""
    lines = []
    for name, entry in manifest["files"].items():
        if not folder.exists(name):
            lines.append(f"{name} is missing")
            continue
        file = folder.fetch(name, scratch)
        size = file.stat().st_size
        if size != entry["size"]:
            lines.append(f"{name} has {size} bytes, but {entry['size']} were written")
        elif digest_of_file(file) != entry["digest"]:
            lines.append(f"{name} has another digest than was written")
    return lines


def receipt_text(receipt: int) -> str:
    """A sum of receipts modulo 2^64, in the manifest's notation."""
    return f"{receipt % (1 << 64):016x}"


def digest_of_manifest(manifest: Mapping[str, object]) -> str:
    """BLAKE2b of the manifest without its own digest."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def digest_of_file(file: Path) -> str:
    """BLAKE2b of the file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
