"""`switchwork diff`: the differences between two runs in config, code, data and results."""

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeGuard

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.console.tables import table
from trainer.checkout import CHECKOUT
from trainer.run_files import RunFiles
from trainer.settle import find_run

_SAME_FOR_NO_RUN = ("run.name", "run.source")
_ABSENT = "-"
_LONGEST = 200
Pair = tuple[object, object]
"""The values of the first and of the second run; None stands for a missing value."""


def compare(first: str, second: str) -> dict[str, dict[str, Pair]]:
    """The values that differ, by name, for config, code, data and results."""
    ours = RunFiles(find_run(first))
    theirs = RunFiles(find_run(second))
    return {
        "config": differences(_config(ours), _config(theirs), leave_out=_SAME_FOR_NO_RUN),
        "code": differences(_code(ours), _code(theirs)),
        "data": differences(_data(ours), _data(theirs)),
        "results": differences(_results(ours), _results(theirs)),
    }


def show(console: Console, first: str, second: str, parts: Mapping[str, Mapping[str, Pair]]) -> None:
    """Print the result of `compare` as tables, with the files that changed between the commits."""
    for part, differing in parts.items():
        if differing:
            console.print(_table(part, [first, second], differing))
        else:
            console.print(f"{part}: the same")
        if part == "code" and (changed := _files_between(differing.get("commit"))):
            console.print(changed, markup=False)


def _table(part: str, runs: Sequence[str], differing: Mapping[str, Pair]) -> Table:
    """A table of the values side by side; numbers among the results also get their difference."""
    headings = ["", *(run.rstrip("/").rsplit("/", 1)[-1] for run in runs)]
    rows = []
    for name, (ours, theirs) in differing.items():
        cells = [name, _shown(ours), _shown(theirs)]
        if part == "results":
            cells.append(_change(ours, theirs))
        rows.append([escape(cell) for cell in cells])
    if part == "results":
        return table(part, [*headings, "second - first"], rows, bold=True, cells="fold")
    return table(part, headings, rows, left=range(len(headings)), bold=True, cells="fold")


def _config(files: RunFiles) -> dict[str, object]:
    return dict(flat("", files.job()))


def _code(files: RunFiles) -> dict[str, object]:
    """The commit that the last attempt ran, and whether it had uncommitted changes."""
    begun = files.attempts_begun()
    return {"commit": begun[-1].commit, "dirty": begun[-1].dirty} if begun else {}


def _data(files: RunFiles) -> dict[str, object]:
    """The data manifest, with one entry per file."""
    return dict(flat("", files.data_manifest() or {}))


def _results(files: RunFiles) -> dict[str, object]:
    """The summary's metrics, without the loads of single experts, of which there are hundreds."""
    left_out = ("name", "samples", "attempt", "ending")  # `stopped` tells the ending
    summary = {name: value for name, value in (files.summary() or {}).items() if name not in left_out}
    return {name: value for name, value in flat("", summary) if "/expert" not in name}


def flat(prefix: str, node: object) -> Iterator[tuple[str, object]]:
    """Yield the leaves with their paths.

    Files in a list are named by their names instead of their positions, so that each file is
    compared with itself.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flat(f"{prefix}.{key}" if prefix else str(key), value)
    elif isinstance(node, list) and node and all(isinstance(file, dict) and "name" in file for file in node):
        for file in node:
            yield f"{prefix}[{file['name']}]", " ".join(str(value) for key, value in file.items() if key != "name")
    else:
        yield prefix, node


def differences(
    ours: Mapping[str, object], theirs: Mapping[str, object], leave_out: tuple[str, ...] = ()
) -> dict[str, Pair]:
    """The values that differ between two flat mappings, by name."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    return {
        name: (ours.get(name), theirs.get(name))
        for name in names
        if name not in leave_out and ours.get(name) != theirs.get(name)
    }


def _shown(value: object) -> str:
    if value is None:
        return _ABSENT
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:_LONGEST]


def _change(ours: object, theirs: object) -> str:
    return f"{theirs - ours:+.4g}" if _is_number(ours) and _is_number(theirs) else ""


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _files_between(commits: Pair | None) -> str:
    """The output of `git diff --stat` for the two commits; "" if this checkout lacks one."""
    if commits is None or None in commits:
        return ""
    command = ["git", "-C", str(CHECKOUT), "diff", "--stat", *map(str, commits)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return ""
