"""Resolves a config and makes the folder of its run; finds the folder of a run that exists."""

import re
from dataclasses import replace

from trainer.config import RunConfig
from trainer.parsing import parse, plain
from trainer.rules import RulesConfig
from trainer.run_files import RESOLVED, RunFiles, run_files
from trainer.run_rows import Job, Plain
from trainer.storage import Folder, absolute, check_writable
from trainer.tracking.config import tracking_uri


def resolve_run(run: RunConfig, stem: str, workers: int, resume: bool, numbered: bool = True) -> RunConfig:
    """Return `run` with a name, absolute paths and a number of lanes, as the workers need it.

    Nothing in the result depends on the current folder or the time. An unnamed run is named after
    its job file: `<stem>-<next free number>`, or with `resume` the newest run with such a name; if
    `numbered` is False, `<stem>`.
    """
    root = absolute(run.root)
    tracking = replace(run.tracking, uri=tracking_uri(run.tracking))
    name = run.name or (_numbered(Folder(root), stem, resume) if numbered else stem)
    objective = run.objective.resolved(workers, resume)
    evaluate = replace(run.evaluate, rules=run.evaluate.rules and _resolve_rules(run.evaluate.rules))
    return replace(run, root=root, tracking=tracking, name=name, source=stem, evaluate=evaluate, objective=objective)


def _resolve_rules(rules: RulesConfig) -> RulesConfig:
    """Return `rules` with absolute paths, after checking that they can be read and end."""
    from trainer.rules.gate import Gate

    Gate(rules)
    return replace(rules, file=absolute(rules.file), graph=rules.graph and absolute(rules.graph))


def _numbered(root: Folder, stem: str, resume: bool) -> str:
    matches = [re.fullmatch(rf"{re.escape(stem)}-(\d+)", entry) for entry in root.names()]
    numbers = [int(match[1]) for match in matches if match]
    if resume and not numbers:
        raise ValueError(f"--resume: no run of {stem} in {root}; leave --resume out, or set run.name or run.root")
    return f"{stem}-{max(numbers, default=0) + (0 if resume else 1):03d}"


def prepare(run: RunConfig, resume: bool, cluster: Plain | None = None) -> RunFiles:
    """Make the run folder, and write the resolved job into it.

    Raises ValueError if the folder is not writable, or holds another run.
    """
    files = run_files(run.root, run.name)
    started = files.has_begun
    if started and not resume:
        raise ValueError(f"run.name: {files} exists already; use --resume to continue it, or another run.name")
    if resume and not started:
        raise ValueError(f"--resume: there is no run {files}; leave --resume out, or set run.name or run.root")
    check_writable(files.folder.url, "run.root")
    files.delete_stop_request()  # a request to an earlier attempt
    job = Job(run=plain(run))
    if cluster is not None:
        job["cluster"] = cluster
    files.write_job(job)
    return files


def find_run(text: str, root: str = "runs") -> Folder:
    """Return the folder of a run, from its folder, its URL, or its name in `root`."""
    candidates = [text] if "://" in text else [text, f"{root}/{text}"]
    for candidate in candidates:
        folder = Folder(absolute(candidate))
        if RunFiles(folder).has_job:
            return folder
    raise ValueError(f"run {text}: no {RESOLVED} in it nor in {root}/{text}; name the folder of a run")


def read_run(folder: Folder) -> RunConfig:
    """Return the resolved config of a run."""
    return parse(RunConfig, RunFiles(folder).job()["run"], "run")
