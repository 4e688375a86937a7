"""Reading checkpoints back: into any layout, checked on the way; what is damaged is refused by name.

A fragment asks for a range of a flattened global tensor, whoever wrote it, so world size, EP size and ZeRO stage may differ
between saving and loading.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoint import FORMAT, digest_of_file, digest_of_manifest, step_name, steps_in
from trainer.shards import Fragment, receipt
from trainer.storage import Folder
from trainer.world import World


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of the checkpoint `folder`. Raises ValueError if it is missing or not what was written."""
    if not folder.exists("manifest.json"):
        raise ValueError(f"checkpoint {folder}: no manifest.json; it was cut off while being written, use an earlier one")
    try:
        manifest = json.loads(folder.read("manifest.json"))
        intact = manifest["format"] == FORMAT and manifest["digest"] == digest_of_manifest(manifest)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        intact = False
    if not intact:
        raise ValueError(f"checkpoint {folder}: manifest.json is damaged; use an earlier checkpoint")
    return dict(manifest)


def damage(folder: Folder, manifest: dict[str, Any], scratch: Path) -> list[str]:
    """What is wrong with the files of the checkpoint, a line each: missing, cut off, or another digest than written."""
    lines = []
    for name, expected in manifest["files"].items():
        if not folder.exists(name):
            lines.append(f"{name}: missing")
            continue
        file = folder.fetch(name, scratch)
        if file.stat().st_size != expected["size"]:
            lines.append(f"{name}: {file.stat().st_size} bytes, written were {expected['size']}")
        elif digest_of_file(file) != expected["digest"]:
            lines.append(f"{name}: its digest is not the one written")
    return lines


def newest(root: Folder, say: Any = print) -> tuple[Folder, dict[str, Any]] | None:
    """The newest checkpoint in `root` that is whole, with its manifest; says which ones were passed over, and why."""
    for step in sorted(steps_in(root), reverse=True):
        folder = root / step_name(step)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                manifest = read_manifest(folder)
                problems = damage(folder, manifest, Path(scratch))
            except ValueError as error:
                problems = [str(error)]
        if not problems:
            return folder, manifest
        say(f"{step_name(step)} is damaged ({'; '.join(problems)}); going back to the one before")
    return None


def verify(folder: Folder) -> list[str]:
    """Everything that is wrong with the checkpoint `folder`, a line each: files against their digests, tensors against their receipts."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    with tempfile.TemporaryDirectory() as scratch:
        problems = damage(folder, manifest, Path(scratch))
        readers: dict[str, Any] = {}
        for key, tensor in manifest["tensors"].items():
            try:
                total = sum(receipt(_piece(readers, folder, Path(scratch), key, name, start), start) for name, start, _ in tensor["pieces"])
            except (SafetensorError, OSError) as error:
                problems.append(f"{key}: cannot be read ({error})")
                continue
            if f"{total % (1 << 64):016x}" != tensor["receipt"]:
                problems.append(f"{key}: its receipt is not the one written")
    return problems


def _piece(readers: dict[str, Any], folder: Folder, scratch: Path, key: str, name: str, start: int) -> Tensor:
    if name not in readers:
        readers[name] = safe_open(folder.fetch(name, scratch), framework="pt")
    return readers[name].get_tensor(f"{key}@{start}")


def load(folder: Folder, manifest: dict[str, Any], fragments: Sequence[Fragment], world: World) -> None:
    """Fill `fragments`, in any layout, from the checkpoint, and compare the receipts of what was filled with those written.

    Raises ValueError that names each tensor that is missing, of another shape, or not what was saved.
    """
    tensors = manifest["tensors"]
    wrong = [_misfit(fragment, tensors.get(fragment.key)) for fragment in fragments]
    if any(wrong):
        raise ValueError(
            f"checkpoint {folder} does not fit this job: {'; '.join(filter(None, wrong[:5]))}; resume with the model and the objective it was saved with"
        )
    with tempfile.TemporaryDirectory() as scratch:
        readers: dict[str, Any] = {}
        try:
            for fragment in fragments:
                fill(fragment, tensors[fragment.key]["pieces"], readers, folder, Path(scratch))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {folder}: {error}; use an earlier one") from None
    check_receipts(folder, tensors, fragments, world)


def _misfit(fragment: Fragment, tensor: dict[str, Any] | None) -> str:
    if tensor is None:
        return f"it has no {fragment.key}"
    if tuple(tensor["shape"]) != fragment.global_shape:
        return f"{fragment.key} is {tuple(tensor['shape'])} there and {fragment.global_shape} here"
    return ""


def fill(fragment: Fragment, pieces: Iterable[Any], readers: dict[str, Any], folder: Folder, scratch: Path) -> None:
    """Copy into `fragment` what the `pieces` (file, start, number of elements) of its tensor have of it; `readers` are the files opened so far."""
    begin, end = fragment.start, fragment.start + fragment.values.numel()
    for name, start, numel in pieces:
        low, high = max(begin, start), min(end, start + numel)
        if low < high:
            if name not in readers:
                readers[name] = safe_open(folder.fetch(name, scratch), framework="pt")
            values = readers[name].get_slice(f"{fragment.key}@{start}")[low - start : high - start]
            fragment.values[low - begin : high - begin] = values


def check_receipts(folder: Folder, tensors: dict[str, Any], fragments: Sequence[Fragment], world: World) -> None:
    """Raises ValueError, naming the tensors, unless the state that the ranks own together is bit for bit what was saved."""
    sums: dict[str, int] = {}
    for fragment in fragments:
        value = receipt(fragment.values[fragment.owned], fragment.start + fragment.owned.start)
        sums[fragment.key] = sums.get(fragment.key, 0) + value
    totals: dict[str, int] = {}
    for part in world.gather(sums):
        for key, value in part.items():
            totals[key] = (totals.get(key, 0) + value) % (1 << 64)
    wrong = [key for key, total in totals.items() if f"{total:016x}" != tensors[key]["receipt"]]
    if wrong:
        raise ValueError(
            f"checkpoint {folder}: {len(wrong)} of {len(totals)} tensors are not what was saved ({', '.join(sorted(wrong)[:5])}); use an earlier one"
        )
