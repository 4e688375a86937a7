"""`switchwork verify`: recompute, offline, the receipts of checkpoints and the data of a run."""

import json

from rich.console import Console

from data.ledger import Verdict
from data.ledger import verify as verify_ledger
from data.manifest import check_manifest
from trainer.checkpoint.format import step_name, steps_in
from trainer.checkpoint.load import verify as verify_files
from trainer.objectives import build_objective
from trainer.parsing import one_line
from trainer.rules.log import verify as verify_chain
from trainer.run_files import DATA_MANIFEST, RULES_LOG, RunFiles
from trainer.settle import find_run, read_run
from trainer.storage import Folder, absolute


def verify(console: Console, target: str) -> bool:
    """Check every file and receipt of a checkpoint, or of all checkpoints of a run.

    For a run, its data and its log of decisions are checked as well. Returns True if all are as
    written.
    """
    folder = Folder(absolute(target))
    is_checkpoint = not RunFiles(folder).has_job and (
        folder.exists("manifest.json") or any(name.endswith(".safetensors") for name in folder.names())
    )
    if is_checkpoint:
        return verify_checkpoint(console, folder)
    run = find_run(target)
    checkpoints = RunFiles(run).checkpoints
    steps = sorted(steps_in(checkpoints))
    if not steps:
        raise ValueError(f"run {run}: it has no checkpoint yet; nothing to verify")
    good = [verify_checkpoint(console, checkpoints / step_name(step)) for step in steps]
    return all([*good, verify_data(console, run, steps[-1]), verify_audit_log(console, run)])


def verify_checkpoint(console: Console, folder: Folder) -> bool:
    """Check the files and receipts of one checkpoint."""
    problems = verify_files(folder)
    verdict = "good: every file and every receipt is as written" if not problems else "DAMAGED"
    console.print(f"{folder.name}  {verdict}")
    for problem in problems:
        console.print(f"  {problem}")
    return not problems


def verify_data(console: Console, folder: Folder, step: int) -> bool:
    """Read again all data that the weights of checkpoint `step` have seen, and check the ledger."""
    run = read_run(folder)
    files = RunFiles(folder)
    data = run.objective.stored_data
    if data is None:
        console.print("data  made from the seed and the samples' numbers: nothing to read again")
        return True
    try:
        now = json.loads(json.dumps(build_objective(run.objective, run.seed).manifest()))
        frozen = files.data_manifest()
        if frozen is None:
            raise FileNotFoundError(f"no {DATA_MANIFEST} in {files}")
        check_manifest(frozen, now)
        verdict = verify_ledger(data, files.ledger(), seed=run.seed, last_step=step)
    except (ValueError, OSError) as error:
        console.print(f"data  cannot be derived again: {one_line(error)}")
        return False
    _print_verdict(console, verdict, step)
    return not verdict.problems


def _print_verdict(console: Console, verdict: Verdict, step: int) -> None:
    state = "good" if not verdict.problems else "NOT AS IT SHOULD BE"
    seen = f"{verdict.samples:,} samples, {verdict.tokens:,} tokens up to step {step}"
    kept = f"lost {verdict.lost}, repeated {verdict.repeated}"
    repeats = f"attempts {verdict.attempts}, saved steps done again {verdict.replayed}"
    unread = f"unreadable documents {verdict.unreadable} and shards {verdict.skipped} left out"
    console.print(f"data  {state}: {seen}; {kept}; {repeats}, {unread}")
    for problem in verdict.problems:
        console.print(f"  {problem}")


def verify_audit_log(console: Console, folder: Folder) -> bool:
    """Check the chain of the run's log of decisions, if it has one."""
    problems = verify_chain(folder)
    if problems:
        console.print(f"audit log  BROKEN: {problems[0]}")
    elif folder.exists(RULES_LOG):
        console.print("audit log  good: every decision follows from the one before")
    return not problems
