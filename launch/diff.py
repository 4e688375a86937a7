"""`switchwork diff RUN RUN`: what two runs differ in: config, code, data, results, side by side."""

import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.checkout import CHECKOUT
from trainer.run_files import RunFiles
from trainer.run_folder import find_run

_SAME_FOR_NO_RUN = ("run.name", "run.source")
_ABSENT = "-"
_LONGEST = 200
Pair = tuple[Any, Any]


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
        table = Table(title=part, title_justify="left", box=None, pad_edge=False, title_style="bold")
        for heading in ("", first.rstrip("/").rsplit("/", 1)[-1], second.rstrip("/").rsplit("/", 1)[-1], *(["second - first"] if part == "results" else [])):
            table.add_column(heading, justify="right" if part == "results" and heading else "left", overflow="fold")
        for name, (ours, theirs) in differing.items():
            cells = (name, _shown(ours), _shown(theirs), *([_change(ours, theirs)] if part == "results" else []))
            table.add_row(*map(escape, cells))
        if differing:
            console.print(table)
        else:
            console.print(f"{part}: the same", highlight=False)
        if part == "code" and (changed := _files_between(differing.get("commit"))):
            console.print(changed, markup=False, highlight=False)


def _config(files: RunFiles) -> dict[str, Any]:
    return dict(flat("", files.job()))


def _code(files: RunFiles) -> dict[str, Any]:
    """What the last attempt ran."""
    begun = files.attempts_begun()
    return {"commit": begun[-1].commit, "dirty": begun[-1].dirty} if begun else {}


def _data(files: RunFiles) -> dict[str, Any]:
    """The manifest, its files one by one."""
    return dict(flat("", files.data_manifest() or {}))


def _results(files: RunFiles) -> dict[str, Any]:
    """Figures of the summary; of the experts' load only its summary, for there are hundreds."""
    left_out = ("name", "samples", "attempt", "ending")  # `stopped` tells the ending
    summary = {name: value for name, value in (files.summary() or {}).items() if name not in left_out}
    return {name: value for name, value in flat("", summary) if "/expert" not in name}


def flat(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Leaves by their path; a file in a list goes by its name, so that files are compared with themselves."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flat(f"{prefix}.{key}" if prefix else str(key), value)
    elif isinstance(node, list) and node and all(isinstance(each, dict) and "name" in each for each in node):
        for each in node:
            yield f"{prefix}[{each['name']}]", " ".join(str(value) for key, value in each.items() if key != "name")
    else:
        yield prefix, node


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], leave_out: tuple[str, ...] = ()) -> dict[str, Pair]:
    """What differs between two flat mappings: name to the two values."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    return {name: (ours.get(name), theirs.get(name)) for name in names if name not in leave_out and ours.get(name) != theirs.get(name)}


def _shown(value: Any) -> str:
    if value is None:
        return _ABSENT
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:_LONGEST]


def _change(ours: Any, theirs: Any) -> str:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (ours, theirs))
    return f"{theirs - ours:+.4g}" if numbers else ""


def _files_between(commits: Pair | None) -> str:
    """`git diff --stat` of the two commits, where this checkout has both."""
    if commits is None or None in commits:
        return ""
    command = ["git", "-C", str(CHECKOUT), "diff", "--stat", *map(str, commits)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return ""
