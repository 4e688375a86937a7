"""Reading checkpoints back: into any layout, checked on the way; what is damaged is refused by name.

A fragment asks for a range of a flattened global tensor, whoever wrote it, so world size, EP size and ZeRO stage may differ
between saving and loading.
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
    """The files of a checkpoint's pieces, each opened when it is first read; those of a URL are copied to `scratch`."""

    def __init__(self, folder: Folder, scratch: Path):
        self.folder, self.scratch = folder, scratch
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
        """The elements `wanted` of that piece."""
        values: Tensor = self._file(name).get_slice(piece_key(key, start))[wanted]
        return values


def newest(root: Folder, say: Callable[[str], None] = print) -> tuple[Folder, Manifest] | None:
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
        files = PieceFiles(folder, Path(scratch))
        for key, tensor in manifest["tensors"].items():
            try:
                total = sum(receipt(files.piece(key, name, start), start) for name, start, _ in tensor["pieces"])
            except (SafetensorError, OSError) as error:
                problems.append(f"{key}: cannot be read ({error})")
                continue
            if receipt_text(total) != tensor["receipt"]:
                problems.append(f"{key}: its receipt is not the one written")
    return problems


def load(folder: Folder, manifest: Manifest, fragments: Sequence[Fragment], world: World) -> None:
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
        files = PieceFiles(folder, Path(scratch))
        try:
            for fragment in fragments:
                fill(fragment, tensors[fragment.key]["pieces"], files)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {folder}: {error}; use an earlier one") from None
    check_receipts(folder, tensors, fragments, world)


def _misfit(fragment: Fragment, tensor: TensorEntry | None) -> str:
    if tensor is None:
        return f"it has no {fragment.key}"
    if tuple(tensor["shape"]) != fragment.global_shape:
        return f"{fragment.key} is {tuple(tensor['shape'])} there and {fragment.global_shape} here"
    return ""


def fill(fragment: Fragment, pieces: Iterable[PieceEntry], files: PieceFiles) -> None:
    """Copy into `fragment` what the `pieces` of its tensor have of it."""
    begin, end = fragment.start, fragment.start + fragment.values.numel()
    for name, start, numel in pieces:
        low, high = max(begin, start), min(end, start + numel)
        if low < high:
            fragment.values[low - begin : high - begin] = files.part(
                fragment.key, name, start, slice(low - start, high - start)
            )


def check_receipts(
    folder: Folder, tensors: Mapping[str, TensorEntry], fragments: Sequence[Fragment], world: World
) -> None:
    """Raises ValueError, naming the tensors, unless the state that the ranks own together is bit for bit what was saved."""
    sums: dict[str, int] = {}
    for fragment in fragments:
        value = receipt(fragment.values[fragment.owned], fragment.start + fragment.owned.start)
        sums[fragment.key] = sums.get(fragment.key, 0) + value
    totals: dict[str, int] = {}
    for part in world.gather(sums):
        for key, value in part.items():
            totals[key] = totals.get(key, 0) + value
    wrong = [key for key, total in totals.items() if receipt_text(total) != tensors[key]["receipt"]]
    if wrong:
        raise ValueError(
            f"checkpoint {folder}: {len(wrong)} of {len(totals)} tensors are not what was saved ({', '.join(sorted(wrong)[:5])}); use an earlier one"
        )
