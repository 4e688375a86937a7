"""Rules at the command: samples that pass, and `switchwork promote`."""

import math

import torch
from rich.console import Console

from trainer.checkpoint import load as restore
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


def judged(config: RulesConfig, folder: Folder, candidates: list[Candidate], purpose: str) -> list[Decision]:
    """Decisions on `candidates`, each written to the audit log of the run in `folder`."""
    gate, log = Gate(config), DecisionLog(folder)
    decisions = gate.judge(candidates)
    found = restore.newest(RunFiles(folder).checkpoints, lambda line: None)
    checkpoint = found[1]["digest"] if found else ""
    for candidate, decision in zip(candidates, decisions, strict=True):
        log.add(gate, candidate, decision, purpose, checkpoint)
    return decisions


def passing(console: Console, config: RulesConfig, folder: Folder, texts: dict[str, str]) -> dict[str, str]:
    """Those of `texts` that the rules accept; prints how many they refuse, and why."""
    decisions = judged(config, folder, [Candidate(text=text) for text in texts.values()], "sample")
    for name, decision in zip(texts, decisions, strict=True):
        if not decision.accepted:
            console.print(f"{name} is refused:")
            _print_derivation(console, decision)
    accepted = {
        name: text for (name, text), decision in zip(texts.items(), decisions, strict=True) if decision.accepted
    }
    console.print(f"{len(texts) - len(accepted)} of {len(texts)} samples refused by {config.file}")
    return accepted


def _print_derivation(console: Console, decision: Decision) -> None:
    from launch.console.summary import printable

    for line in decision.derivation:
        console.print(f"  {printable(line)}", markup=False)


def promote(
    console: Console, folder: Folder, run: RunConfig, config: RulesConfig, name: str, samples: int, seed: int
) -> bool:
    """Register the run's last checkpoint as a version of `name`; it becomes champion only if the rules hold. True if it did."""
    objective, step = load_objective(run, folder, console.print)
    figures = _figures(run, folder, objective, step)
    registry = Registry(run.tracking, name)
    champion = registry.champion()
    facts = (*measures("metric", figures), *measures("champion_metric", champion[1] if champion else {}))
    candidates = [Candidate(facts=(("candidate", "run"), *facts))]
    candidates += [
        Candidate(text=text, facts=(("candidate", "text"), *facts)) for text in _texts(objective, samples, seed)
    ]
    decisions = judged(config, folder, candidates, "promote")
    refused = [decision for decision in decisions if not decision.accepted]
    found = restore.newest(RunFiles(folder).checkpoints, lambda line: None)
    assert found is not None, "load_objective read it"
    digest = found[1]["digest"]
    gate_tags = {"step": str(step), "checkpoint": digest, "rules": config.file, "accepted": str(not refused).lower()}
    version = registry.register(folder, {"step": step, "digest": digest}, figures, gate_tags)
    before = f"version {champion[0]}" if champion else "none"
    if refused:
        console.print(
            f"{name} version {version} is registered, and does NOT become champion (still {before}): rules failed"
        )
        for decision in refused:
            _print_derivation(console, decision)
        return False
    registry.crown(version)
    console.print(f"{name} version {version} is champion (before: {before}): {len(decisions)} decisions, no conflict")
    return True


def _figures(run: RunConfig, folder: Folder, objective: Objective, step: int) -> dict[str, float]:
    """The held-out measures of this checkpoint: as the run's end wrote them down, else measured now."""
    summary = RunFiles(folder).summary()
    if summary is not None and summary["step"] == step and summary["eval"]:
        figures = summary["eval"]
    else:
        figures = measure(objective, list(objective.held_out(run.evaluation_share(ALONE))))
    return {
        key: value
        for key, value in figures.items()
        if "/expert" not in key and isinstance(value, float | int) and math.isfinite(value)
    }


def _texts(objective: Objective, samples: int, seed: int) -> list[str]:
    if not samples:
        return []
    with evaluating(objective.networks):
        found = objective.sample(objective.networks, samples, torch.Generator().manual_seed(seed))
    if not found.text:
        raise ValueError("--samples: this objective makes images, and rules read text and measures; use --samples 0")
    return list(found.text.values())
