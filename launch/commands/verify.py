"""`switchwork verify`: a run's or a checkpoint's receipts, and a run's data, derived again offline."""

import json

from rich.console import Console

from data.ledger import verify as verify_ledger
from data.manifest import check_manifest
from trainer.checkpoint import load as restore
from trainer.checkpoint.format import step_name, steps_in
from trainer.objectives import build_objective
from trainer.parsing import one_line
from trainer.rules import log as audit
from trainer.run_files import DATA_MANIFEST, RULES_LOG, RunFiles
from trainer.settle import find_run, read_run
from trainer.storage import Folder, absolute


def verify(console: Console, target: str) -> bool:
    """Check every file and every receipt of a checkpoint, or of all checkpoints of a run and its data as well; True if all are as written."""
    folder = Folder(absolute(target))
    is_checkpoint = not RunFiles(folder).has_job and (
        folder.exists("manifest.json") or any(name.endswith(".safetensors") for name in folder.names())
    )
    if is_checkpoint:
        return verify_checkpoint(console, folder)
    run = find_run(target)
    saved = RunFiles(run).checkpoints
    steps = sorted(steps_in(saved))
    if not steps:
        raise ValueError(f"run {run}: it has no checkpoint yet; nothing to verify")
    good = [verify_checkpoint(console, saved / step_name(step)) for step in steps]
    return all([*good, verify_data(console, run, steps[-1]), verify_audit_log(console, run)])


def verify_checkpoint(console: Console, folder: Folder) -> bool:
    """Check the files and receipts of one checkpoint."""
    problems = restore.verify(folder)
    verdict = "good: every file and every receipt is as written" if not problems else "DAMAGED"
    console.print(f"{folder.name}  {verdict}")
    for problem in problems:
        console.print(f"  {problem}")
    return not problems


def verify_data(console: Console, folder: Folder, step: int) -> bool:
    """Read again all that the weights of checkpoint `step` have seen, and compare with the run's ledger."""
    run = read_run(folder)
    files, data = RunFiles(folder), run.objective.stored_data
    if data is None:
        console.print("data  made from the seed and the samples' numbers: nothing to read again")
        return True
    try:
        now = json.loads(json.dumps(build_objective(run.objective, run.seed).manifest()))
        frozen = files.data_manifest()
        if frozen is None:
            raise FileNotFoundError(f"no {DATA_MANIFEST} in {files}")
        check_manifest(frozen, now)
        found = verify_ledger(data, files.ledger(), seed=run.seed, last_step=step)
    except (ValueError, OSError) as error:
        console.print(f"data  cannot be derived again: {one_line(error)}")
        return False
    seen = f"{found.samples:,} samples, {found.tokens:,} tokens up to step {step}"
    kept = f"lost {found.lost}, repeated {found.repeated}"
    rest = f"attempts {found.attempts}, saved steps done again {found.replayed}, unreadable documents {found.unreadable} and shards {found.skipped} left out"
    console.print(f"data  {'good' if not found.problems else 'NOT AS IT SHOULD BE'}: {seen}; {kept}; {rest}")
    for problem in found.problems:
        console.print(f"  {problem}")
    return not found.problems


def verify_audit_log(console: Console, folder: Folder) -> bool:
    """Check the chain of the run's audit log of rules, if it has one."""
    problems = audit.verify(folder)
    if problems:
        console.print(f"audit log  BROKEN: {problems[0]}")
    elif folder.exists(RULES_LOG):
        console.print("audit log  good: every decision follows from the one before")
    return not problems
