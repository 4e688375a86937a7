"""`switchwork audit`: are the gradients of this job right?

The audit compares the job as it will run, with its sharding, precision, kernels and machine, with
float64. It takes minutes, and belongs before a long run.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from rich.console import Console

from launch.audit.report import draw_signal, likely_causes, show, unusual_signals
from launch.config import JobConfig, expert_ranks, load
from launch.start import prepare_data
from trainer.audit.evidence import Evidence, from_bytes
from trainer.audit.verdict import Findings, judge
from trainer.parsing import plain, read_job
from trainer.run_files import AUDIT, RunFiles
from trainer.settle import prepare
from trainer.world import choose_device


def audit(console: Console, path: str, overrides: Sequence[str], as_json: bool) -> bool:
    """Run two steps on the job's workers and in float64 in this process, and print the comparison.

    Returns whether every comparison is within its allowance.
    """
    root = (read_job(path, overrides).get("run") or {}).get("root", "runs")
    job = load(path, [*overrides, f"run.root={json.dumps(f'{root}/audits')}"])
    files = prepare(job.run, resume=False, cluster=plain(job.cluster))
    if not as_json:
        workers = job.cluster.max_workers
        console.print(f"{job.run.name}: two steps on {workers} worker{'s' * (workers > 1)}, then the same in float64")
    evidence = _evidence(console, job, files)
    findings = judge(job.run, evidence)
    report = _report(findings, evidence)
    files.write_audit(report)
    picture = _draw_signal(findings, files, str(job.run.name))
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        show(console, str(job.run.name), findings, evidence, f"{files}/{AUDIT}", picture)
    return findings.good


def _evidence(console: Console, job: JobConfig, files: RunFiles) -> Evidence:
    """Run the workers, and return what they send back; its file is large, and is deleted."""
    from cluster.on_ray import train as ray_train

    if not (job.cluster.address or os.environ.get("RAY_ADDRESS")):
        choose_device(job.run.device, 0)  # the workers will be on this machine
    prepare_data(job)
    ray_train.connect(job.cluster)
    ray_train.check_room(job.cluster)
    try:
        ray_train.audit(plain(job.run), job.cluster, expert_ranks(job))
        return from_bytes(files.evidence())
    except ray_train.WorkersFailed as error:
        console.print(str(error), markup=False)
        raise typer.Exit(1) from None
    finally:
        ray_train.leave()
        files.delete_evidence()


def _report(findings: Findings, evidence: Evidence) -> dict[str, object]:
    """All comparisons, for audit.json."""
    return {
        "verdict": findings.good,
        "suspects": likely_causes(findings),
        "world": evidence.world,
        "device": evidence.device,
        "roundoff": evidence.roundoff,
        "steps": [step.facts.number for step in evidence.steps],
        "routing": {"decisions": findings.decisions, "near_ties_decided_otherwise": findings.flips},
        "signals": {
            phase: {layer: signal.norm for layer, signal in signals.items()}
            for phase, signals in findings.signals.items()
        },
        "unusual_signals": unusual_signals(findings),
        "judged": [asdict(judged) | {"good": judged.good} for judged in findings.judged],
    }


def _draw_signal(findings: Findings, files: RunFiles, title: str) -> str:
    """Put the picture of the error signal into the run folder; returns its path."""
    with TemporaryDirectory() as scratch:
        file = draw_signal(findings, Path(scratch) / "signal.png", title)
        files.put_picture(file)
    return f"{files}/{file.name}"
