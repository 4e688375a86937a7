"""What a checkpoint is on disk.

    checkpoints/step-00000100/
        rank-00000.safetensors, ...     the pieces of tensors that each rank owns, 1-D, each under the key `KEY@START`
        manifest.json                   a `Manifest`, written last: it makes the folder a checkpoint

Nothing in it is code: safetensors and JSON. A tensor of training state has a key, `KIND/NETWORK/NAME`, such as
`exp_avg/model/blocks.0.attention.q.weight`. The ranks cut it into pieces, which cover each of its elements once; `start` is the
offset of a piece in the whole tensor, flattened. So a checkpoint can be read into any layout: another number of ranks, another
ZeRO stage, other ranks for the experts. While it is written, each rank also leaves a `RankPart` (rank-00000.json), or an empty
rank-00000.failed where it could not write; rank 0 makes the manifest of the parts and removes them.

Three digests protect it. `FileEntry.digest` is of the bytes of a file, `Manifest.digest` of the manifest without it, and
`TensorEntry.receipt` of the tensor's values at their offsets, whatever the pieces (see `trainer.shards.receipt`).

    folder = Folder("runs/demo/checkpoints") / step_name(max(steps_in(Folder("runs/demo/checkpoints"))))
    manifest = read_manifest(folder)                        # ValueError: it is missing, or not what was written
    problems = damage(folder, manifest, Path("scratch"))    # []: the files are whole
    print(manifest["state"]["samples"], manifest["tensors"]["weight/model/embedding.weight"]["shape"])

trainer/checkpoint/save.py writes checkpoints, and trainer/checkpoint/load.py loads them.
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
"""The file of a piece, where it begins in the whole tensor, and its number of elements; a list in JSON."""


class FileEntry(TypedDict):
    """A file of pieces."""

    size: int
    """Bytes."""
    digest: str
    """BLAKE2b of the bytes."""


class TensorEntry(TypedDict):
    """A tensor of training state."""

    shape: list[int]
    dtype: str
    """As in torch: `float32`."""
    receipt: str
    """16 hexadecimal digits."""
    pieces: list[PieceEntry]


class GuardState(TypedDict):
    """What the guard knows (see trainer/core/anomaly.py)."""

    losses: dict[str, list[float]]
    """The last losses of each phase."""
    found: list[Anomaly]
    """Every anomaly of the run."""


class State(TypedDict):
    """Where the run stands."""

    step: int
    samples: int
    data: RunState
    """Where the data stand, merged over the ranks."""
    world: int
    """Ranks that saved it."""
    guard: NotRequired[GuardState]


class Manifest(TypedDict):
    """The content of manifest.json."""

    format: int
    step: int
    state: State
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    digest: str


class OwnedPiece(TypedDict):
    """A piece as the rank that owns it describes it."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    numel: int
    receipt: str


class RankPart(TypedDict):
    """What one rank has written."""

    size: int
    digest: str
    pieces: list[OwnedPiece]


def step_name(step: int) -> str:
    """The name of the checkpoint's folder."""
    return f"step-{step:08d}"


def rank_name(rank: int) -> str:
    """The name of a rank's files, without their suffix."""
    return f"rank-{rank:05d}"


def steps_in(root: Folder) -> list[int]:
    """The steps of the published checkpoints in `root`, whether good or damaged."""
    numbers = [name.removeprefix("step-") for name in root.names() if name.startswith("step-")]
    return [int(number) for number in numbers if number.isdigit()]


def remove_unfinished(root: Folder) -> None:
    """Remove from `root` the files of saves that did not finish. Call it while no rank is saving.

    An object store has no rename, so a save is written in its final folder. Parts that a killed save left there
    would count as parts of the next save of the same step.
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
    """The name of a piece in its file."""
    return f"{key}@{start}"


def build_manifest(step: int, parts: Mapping[str, RankPart], state: State) -> Manifest:
    """The manifest of what the ranks have written; `parts` are by `rank_name`, in the order of the ranks."""
    tensors: dict[str, TensorEntry] = {}
    for name, part in parts.items():
        for piece in part["pieces"]:
            entry = TensorEntry(shape=list(piece["shape"]), dtype=piece["dtype"], receipt=receipt_text(0), pieces=[])
            tensor = tensors.setdefault(piece["key"], entry)
            tensor["receipt"] = receipt_text(int(tensor["receipt"], 16) + int(piece["receipt"], 16))
            tensor["pieces"].append((f"{name}.safetensors", piece["start"], piece["numel"]))
    for key, tensor in tensors.items():
        written, numel = sum(numel for _, _, numel in tensor["pieces"]), math.prod(tensor["shape"])
        assert written == numel, f"{key}: the ranks own {written} of {numel} elements"
    files = {f"{name}.safetensors": FileEntry(size=part["size"], digest=part["digest"]) for name, part in parts.items()}
    manifest = Manifest(format=FORMAT, step=step, state=state, files=files, tensors=tensors, digest="")
    manifest["digest"] = digest_of_manifest(manifest)
    return manifest


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of the checkpoint `folder`. Raises ValueError if it is missing or not what was written."""
    if not folder.exists(MANIFEST):
        raise ValueError(f"checkpoint {folder}: no {MANIFEST}; it was cut off while being written, use an earlier one")
    try:
        manifest: Manifest = json.loads(folder.read(MANIFEST))
        intact = manifest["format"] == FORMAT and manifest["digest"] == digest_of_manifest(manifest)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        intact = False
    if not intact:
        raise ValueError(f"checkpoint {folder}: {MANIFEST} is damaged; use an earlier checkpoint")
    return manifest


def damage(folder: Folder, manifest: Manifest, scratch: Path) -> list[str]:
    """A line for each file of the checkpoint that is missing, cut off, or has another digest than was written."""
    lines = []
    for name, entry in manifest["files"].items():
        if not folder.exists(name):
            lines.append(f"{name}: missing")
            continue
        file = folder.fetch(name, scratch)
        if file.stat().st_size != entry["size"]:
            lines.append(f"{name}: {file.stat().st_size} bytes, written were {entry['size']}")
        elif digest_of_file(file) != entry["digest"]:
            lines.append(f"{name}: its digest is not the one written")
    return lines


def receipt_text(receipt: int) -> str:
    """A sum of receipts, modulo 2^64, as the manifest has it."""
    return f"{receipt % (1 << 64):016x}"


def digest_of_manifest(manifest: Mapping[str, object]) -> str:
    """BLAKE2b of all of the manifest but its own digest."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def digest_of_file(file: Path) -> str:
    """BLAKE2b of the file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
