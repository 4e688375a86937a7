"""Loads checkpoints into any layout, and refuses damaged ones by name.

A fragment asks for a range of a flattened global tensor, whichever ranks wrote it. World size, EP
size and ZeRO stage may therefore differ between saving and loading.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoint.format import (
    Manifest,
    PieceEntry,
    TensorEntry,
    damage,
    piece_key,
    read_manifest,
    receipt_text,
    step_name,
    steps_in,
)
from trainer.checkpoint.fragments import Fragment, receipt
from trainer.storage import Folder
from trainer.world import World


class PieceFiles:
    """The files of a checkpoint's pieces, each opened when it is first read.

    The files of a checkpoint at a URL are copied to `scratch`.
    """

    def __init__(self, folder: Folder, scratch: Path):
        self.folder = folder
        self.scratch = scratch
        self.opened: dict[str, safe_open] = {}

    def _file(self, name: str) -> safe_open:
        if name not in self.opened:
            self.opened[name] = safe_open(self.folder.fetch(name, self.scratch), framework="pt")
        return self.opened[name]

    def piece(self, key: str, name: str, start: int) -> Tensor:
        """The piece of the tensor `key` that begins at `start`, from the file `name`."""
        values: Tensor = self._file(name).get_tensor(piece_key(key, start))
        return values

    def part(self, key: str, name: str, start: int, wanted: slice) -> Tensor:
        """The elements `wanted` of the piece that `piece` would return."""
        values: Tensor = self._file(name).get_slice(piece_key(key, start))[wanted]
        return values


def newest(root: Folder, say: Callable[[str], None] = print) -> tuple[Folder, Manifest] | None:
    """The newest intact checkpoint in `root` with its manifest, or None if there is none.

    Reports with `say` each damaged checkpoint that it skips, and why.
    """
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
        say(f"{step_name(step)} is damaged ({'; '.join(problems)}); trying the one before")
    return None


def verify(folder: Folder) -> list[str]:
    """A line for each file or tensor of the checkpoint `folder` that differs from its manifest."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    with tempfile.TemporaryDirectory() as scratch:
        problems = damage(folder, manifest, Path(scratch))
        files = PieceFiles(folder, Path(scratch))
        for key, tensor in manifest["tensors"].items():
            try:
                total = sum(receipt(files.piece(key, name, start), start) for name, start, _ in tensor["pieces"])
            except (SafetensorError, OSError) as error:
                problems.append(f"{key} cannot be read ({error})")
                continue
            if receipt_text(total) != tensor["receipt"]:
                problems.append(f"{key} has another receipt than was written")
    return problems


def load(folder: Folder, manifest: Manifest, fragments: Sequence[Fragment], world: World) -> None:
    """Fill `fragments`, in any layout, from the checkpoint, and check their receipts.

    Raises ValueError, naming the tensors, if some are missing, have another shape or have changed.
    """
    tensors = manifest["tensors"]
    misfits = [_misfit(fragment, tensors.get(fragment.key)) for fragment in fragments]
    problems = [misfit for misfit in misfits if misfit]
    if problems:
        raise ValueError(
            f"checkpoint {folder} does not fit this job: {'; '.join(problems[:5])}; "
            "resume with the model and the objective that it was saved with"
        )
    with tempfile.TemporaryDirectory() as scratch:
        files = PieceFiles(folder, Path(scratch))
        try:
            for fragment in fragments:
                fill(fragment, tensors[fragment.key]["pieces"], files)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {folder}: {error}; use an earlier checkpoint") from None
    check_receipts(folder, tensors, fragments, world)


def _misfit(fragment: Fragment, tensor: TensorEntry | None) -> str:
    """The reason why `fragment` cannot be filled from `tensor`, or ""."""
    if tensor is None:
        return f"it has no {fragment.key}"
    shape = tuple(tensor["shape"])
    if shape != fragment.global_shape:
        return f"{fragment.key} has shape {shape} in the checkpoint and {fragment.global_shape} in this job"
    return ""


def fill(fragment: Fragment, pieces: Iterable[PieceEntry], files: PieceFiles) -> None:
    """Copy the elements of `fragment` from the `pieces` of its tensor."""
    begin = fragment.start
    end = begin + fragment.values.numel()
    for name, start, numel in pieces:
        low = max(begin, start)
        high = min(end, start + numel)
        if low < high:
            wanted = slice(low - start, high - start)
            fragment.values[low - begin : high - begin] = files.part(fragment.key, name, start, wanted)


def check_receipts(
    folder: Folder, tensors: Mapping[str, TensorEntry], fragments: Sequence[Fragment], world: World
) -> None:
    """Raises ValueError, naming the tensors, unless the ranks own bit for bit the state saved."""
    sums: dict[str, int] = {}
    for fragment in fragments:
        value = receipt(fragment.values[fragment.owned], fragment.start + fragment.owned.start)
        sums[fragment.key] = sums.get(fragment.key, 0) + value
    totals: dict[str, int] = {}
    for part in world.gather(sums):
        for key, value in part.items():
            totals[key] = totals.get(key, 0) + value
    wrong = sorted(key for key, total in totals.items() if receipt_text(total) != tensors[key]["receipt"])
    if wrong:
        raise ValueError(
            f"checkpoint {folder}: {len(wrong)} of {len(totals)} tensors differ from the values saved "
            f"({', '.join(wrong[:5])}); use an earlier checkpoint"
        )
