"""`switchwork diff RUN RUN`: what two runs differ in: config, code, data, results, side by side."""

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
"""A value of the first run and of the second; None is a value that a run does not have."""


def compare(first: str, second: str) -> dict[str, dict[str, Pair]]:
    """For each of config, code, data and results, what differs: name to the two values; None is a value that one does not have."""
    ours, theirs = RunFiles(find_run(first)), RunFiles(find_run(second))
    return {
        "config": differences(_config(ours), _config(theirs), leave_out=_SAME_FOR_NO_RUN),
        "code": differences(_code(ours), _code(theirs)),
        "data": differences(_data(ours), _data(theirs)),
        "results": differences(_results(ours), _results(theirs)),
    }


def show(console: Console, first: str, second: str, found: Mapping[str, Mapping[str, Pair]]) -> None:
    """Print the tables."""
    for part, differing in found.items():
        if differing:
            console.print(_table(part, [first, second], differing))
        else:
            console.print(f"{part}: the same")
        if part == "code" and (changed := _files_between(differing.get("commit"))):
            console.print(changed, markup=False)


def _table(part: str, runs: Sequence[str], differing: Mapping[str, Pair]) -> Table:
    """The values side by side; results are numbers, and have their difference beside them."""
    headings, rows = ["", *(run.rstrip("/").rsplit("/", 1)[-1] for run in runs)], []
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
    """What the last attempt ran."""
    begun = files.attempts_begun()
    return {"commit": begun[-1].commit, "dirty": begun[-1].dirty} if begun else {}


def _data(files: RunFiles) -> dict[str, object]:
    """The manifest, its files one by one."""
    return dict(flat("", files.data_manifest() or {}))


def _results(files: RunFiles) -> dict[str, object]:
    """Figures of the summary; of the experts' load only its summary, for there are hundreds."""
    left_out = ("name", "samples", "attempt", "ending")  # `stopped` tells the ending
    summary = {name: value for name, value in (files.summary() or {}).items() if name not in left_out}
    return {name: value for name, value in flat("", summary) if "/expert" not in name}


def flat(prefix: str, node: object) -> Iterator[tuple[str, object]]:
    """Leaves by their path; a file in a list goes by its name, so that files are compared with themselves."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flat(f"{prefix}.{key}" if prefix else str(key), value)
    elif isinstance(node, list) and node and all(isinstance(each, dict) and "name" in each for each in node):
        for each in node:
            yield f"{prefix}[{each['name']}]", " ".join(str(value) for key, value in each.items() if key != "name")
    else:
        yield prefix, node


def differences(
    ours: Mapping[str, object], theirs: Mapping[str, object], leave_out: tuple[str, ...] = ()
) -> dict[str, Pair]:
    """What differs between two flat mappings: name to the two values."""
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
    """`git diff --stat` of the two commits, where this checkout has both."""
    if commits is None or None in commits:
        return ""
    command = ["git", "-C", str(CHECKOUT), "diff", "--stat", *map(str, commits)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return ""
