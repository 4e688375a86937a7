"""The variants of a language model that proofs compare (dense, numbers of experts, controls), and what became of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from data.text.tokenizers import load_tokenizer
from launch.prove.paired import Difference, Verdict, lead
from launch.prove.side_by_side import curve, named
from models.moe.layer import MoEConfig
from models.transformer.cost import flops_per_token, parameters
from models.transformer.model import TransformerConfig
from trainer.config import RunConfig, check
from trainer.objectives.language.config import CausalConfig, LanguageConfig

EXPERTS = "4,8,16"
"""What is compared, unless the command line says otherwise; the widest router decides how wide the dense model is."""
CURVE = 8
"""Evaluations of a run: the points of its loss curve."""


@dataclass(frozen=True, kw_only=True)
class VariantOutcome:
    """One variant, over all seeds."""

    name: str
    experts: int
    parameters: int
    flops_per_token: float
    losses: list[float]
    """Held-out cross-entropy in nats a token at the last step, by seed."""
    curve: list[tuple[int, float]]
    """Held-out cross-entropy, the mean over the seeds, by step."""


@dataclass(frozen=True, kw_only=True)
class Lead:
    """How far one variant is ahead of another, as `results.json` has it: nats per token, with the confidence interval."""

    of: str
    over: str
    mean: float
    low: float
    high: float
    n: int
    """Paired seeds."""
    verdict: Verdict


Leads = Mapping[tuple[str, str], Difference]
"""(ours, theirs) -> the lead of ours."""


def leads_between(outcomes: Sequence[VariantOutcome], pairs: Sequence[tuple[str, str]]) -> Leads:
    """The lead of the first of each pair of names over the second."""
    losses = {outcome.name: outcome.losses for outcome in outcomes}
    return {(ours, theirs): lead(losses[theirs], losses[ours]) for ours, theirs in pairs}


def rows_of(leads: Leads) -> list[Lead]:
    """The leads as rows of `results.json`."""
    return [
        Lead(of=ours, over=theirs, mean=lead.mean, low=lead.low, high=lead.high, n=lead.n, verdict=lead.verdict)
        for (ours, theirs), lead in leads.items()
    ]


def checked(run: RunConfig, path: str) -> MoEConfig:
    """The job's experts, if it can serve a proof."""
    if not isinstance(run.objective, LanguageConfig):
        raise ValueError(
            f"run.objective.name: {run.objective.name} in {path}; the proof is about language models, use moe_lm"
        )
    check(run, 1)
    moe = run.objective.model.moe
    if moe is None or moe.control != "none":
        control = f"the control {moe.control}" if moe else "none"
        raise ValueError(
            f"run.objective.model.moe: {control} in {path}; the proof needs experts with a router, and makes dense model and controls itself"
        )
    if run.stop.steps is None:
        raise ValueError(
            f"run.stop.steps: not set in {path}; every run of the proof takes equally many steps, set them"
        )
    if run.objective.data.held_out == 0 and run.objective.data.eval_source is None:
        raise ValueError(
            "run.objective.data.held_out: 0, but the proof compares held-out losses; set a share such as 0.05"
        )
    return moe


def language_of(run: RunConfig) -> LanguageConfig:
    """The objective of a run that `checked` has accepted."""
    assert isinstance(run.objective, LanguageConfig), "refused before"
    return run.objective


def switch_name(experts: int) -> str:
    """The variant with so many experts."""
    return f"{experts} experts"


def variants(run: RunConfig, moe: MoEConfig, experts: Sequence[int]) -> dict[str, RunConfig]:
    """Name -> run: dense, each number of experts in ascending order, and the two controls with the job's own number."""
    objective = language_of(run)
    model = objective.model
    routed = {switch_name(count): replace(moe, experts=count) for count in sorted({moe.experts, *experts})}
    routed |= {"frozen router": replace(moe, control="frozen"), "permuted router": replace(moe, control="permuted")}
    models = {name: replace(model, moe=experts_of_variant) for name, experts_of_variant in routed.items()}
    vocab_size = load_tokenizer(objective.data.tokenizer).vocab_size
    models = {"dense": dense_of(list(models.values()), vocab_size)} | models
    every = max(1, -(-(run.stop.steps or 1) // CURVE))
    base = replace(run, evaluate=replace(run.evaluate, every=every, samples=0))
    return {name: replace(base, objective=replace(objective, model=variant)) for name, variant in models.items()}


def dense_of(models: Sequence[TransformerConfig], vocab_size: int) -> TransformerConfig:
    """The dense model whose feed-forward layers are just so wide that a token costs it no less than any of `models`, routers included."""
    most = max(parameters(model, vocab_size).matmul for model in models)
    dense = replace(models[0], moe=None, moe_layers="all", ffn=1)
    width = 1 + math.ceil((most - parameters(dense, vocab_size).matmul) / (3 * dense.layers * dense.d_model))
    return replace(dense, ffn=width)


def slug(name: str) -> str:
    """A variant's name as a part of a folder's name."""
    return name.replace(" ", "-")


def seeded(run: RunConfig, name: str, seed: int, root: str) -> RunConfig:
    """The run of the variant `name` with `seed`, in a folder below `root`."""
    return named(replace(run, seed=seed), f"{slug(name)}-seed{seed}", root)


def outcome_of(name: str, run: RunConfig, runs: Sequence[RunConfig]) -> VariantOutcome:
    """What the `runs` of one variant, by seed, have left in their folders."""
    assert isinstance(run.objective, CausalConfig), "refused before"
    model = run.objective.model
    data = run.objective.data
    vocab_size = load_tokenizer(data.tokenizer).vocab_size
    curves = [curve(seeded) for seeded in runs]
    means = [(points[0][0], sum(loss for _, loss in points) / len(points)) for points in zip(*curves, strict=True)]
    return VariantOutcome(
        name=name,
        experts=model.moe.experts if model.moe else 1,
        parameters=parameters(model, vocab_size).total,
        flops_per_token=flops_per_token(model, vocab_size, data.seq_len),
        losses=[points[-1][1] for points in curves],
        curve=means,
    )
