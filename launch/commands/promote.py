"""`switchwork promote`, and the rules that refuse samples in `switchwork sample`."""

import math
from collections.abc import Sequence

import torch
from rich.console import Console

from launch.console.summary import printable
from trainer.checkpoint.load import newest
from trainer.config import RunConfig
from trainer.core.protocols import Objective
from trainer.hooks.evaluate import evaluating
from trainer.inference.load import ALONE, load_objective, measure
from trainer.rules import RulesConfig
from trainer.rules.gate import Candidate, Decision, Gate, measures
from trainer.rules.log import DecisionLog
from trainer.run_files import RunFiles
from trainer.storage import Folder
from trainer.tracking.registry import Registry


def passing(console: Console, config: RulesConfig, folder: Folder, texts: dict[str, str]) -> dict[str, str]:
    """Return the texts that the rules accept; print how many they refuse, and why."""
    candidates = [Candidate(text=text) for text in texts.values()]
    decisions = _judge(config, folder, candidates, "sample")
    accepted = {}
    for (name, text), decision in zip(texts.items(), decisions, strict=True):
        if decision.accepted:
            accepted[name] = text
        else:
            console.print(f"{name} is refused:")
            _print_derivation(console, decision)
    console.print(f"{len(texts) - len(accepted)} of {len(texts)} samples refused by {config.file}")
    return accepted


def promote(
    console: Console, folder: Folder, run: RunConfig, config: RulesConfig, name: str, samples: int, seed: int
) -> bool:
    """Register the run's last checkpoint as a version of the model `name`.

    The version becomes champion only if the rules accept the run and `samples` texts from it.
    Returns True if it did.
    """
    objective, step = load_objective(run, folder, console.print)
    metrics = _metrics(run, folder, objective, step)
    registry = Registry(run.tracking, name)
    champion = registry.champion()
    facts = (*measures("metric", metrics), *measures("champion_metric", champion[1] if champion else {}))
    candidates = [Candidate(facts=(("candidate", "run"), *facts))]
    for text in _texts(objective, samples, seed):
        candidates.append(Candidate(text=text, facts=(("candidate", "text"), *facts)))
    decisions = _judge(config, folder, candidates, "promote")
    refused = [decision for decision in decisions if not decision.accepted]
    digest = _checkpoint_digest(folder)
    assert digest, "load_objective has read the checkpoint"
    tags = {"step": str(step), "checkpoint": digest, "rules": config.file, "accepted": str(not refused).lower()}
    version = registry.register(folder, {"step": step, "digest": digest}, metrics, tags)
    before = f"version {champion[0]}" if champion else "none"
    if refused:
        refusal = f"does NOT become champion (still {before}): rules failed"
        console.print(f"{name} version {version} is registered, and {refusal}")
        for decision in refused:
            _print_derivation(console, decision)
        return False
    registry.crown(version)
    console.print(f"{name} version {version} is champion (before: {before}): {len(decisions)} decisions, no conflict")
    return True


def _judge(config: RulesConfig, folder: Folder, candidates: Sequence[Candidate], purpose: str) -> list[Decision]:
    """Judge the candidates, and write every decision to the log of the run in `folder`."""
    gate = Gate(config)
    log = DecisionLog(folder)
    decisions = gate.judge(candidates)
    checkpoint = _checkpoint_digest(folder)
    for candidate, decision in zip(candidates, decisions, strict=True):
        log.add(gate, candidate, decision, purpose, checkpoint)
    return decisions


def _checkpoint_digest(folder: Folder) -> str:
    """The digest of the run's newest intact checkpoint; empty without one."""
    checkpoint = newest(RunFiles(folder).checkpoints, lambda line: None)
    return "" if checkpoint is None else checkpoint[1]["digest"]


def _print_derivation(console: Console, decision: Decision) -> None:
    for line in decision.derivation:
        console.print(f"  {printable(line)}", markup=False)


def _metrics(run: RunConfig, folder: Folder, objective: Objective, step: int) -> dict[str, float]:
    """The checkpoint's held-out metrics, from the run's summary if it is of this step.

    Otherwise they are measured now.
    """
    summary = RunFiles(folder).summary()
    if summary is not None and summary["step"] == step and summary["eval"]:
        metrics = summary["eval"]
    else:
        metrics = measure(objective, list(objective.held_out(run.evaluation_share(ALONE))))
    return {
        key: value
        for key, value in metrics.items()
        if "/expert" not in key and isinstance(value, float | int) and math.isfinite(value)
    }


def _texts(objective: Objective, samples: int, seed: int) -> list[str]:
    """Generate `samples` texts. Raises ValueError if the objective makes no text."""
    if not samples:
        return []
    generator = torch.Generator().manual_seed(seed)
    with evaluating(objective.networks):
        texts = objective.sample(objective.networks, samples, generator).text
    if not texts:
        raise ValueError("--samples: this objective makes images, and rules read text and measures; use --samples 0")
    return list(texts.values())
