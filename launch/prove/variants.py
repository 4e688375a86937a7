"""The variants of a language model that proofs compare, and their outcomes.

The variants are a dense model, several numbers of experts, and two controls.
"""

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
"""Default numbers of experts.

The variant that costs most per token sets the width of the dense model.
"""
CURVE = 8
"""Number of evaluations of a run, and so of points of its loss curve."""


@dataclass(frozen=True, kw_only=True)
class VariantOutcome:
    """The outcome of one variant over all seeds."""

    name: str
    experts: int
    parameters: int
    flops_per_token: float
    losses: list[float]
    """Held-out cross-entropy at the last step in nats per token, by seed."""
    curve: list[tuple[int, float]]
    """Held-out cross-entropy by step, the mean over the seeds."""


@dataclass(frozen=True, kw_only=True)
class Lead:
    """A row of `results.json`: how far one variant is ahead of another, in nats per token.

    `low` and `high` are the ends of the confidence interval.
    """

    of: str
    over: str
    mean: float
    low: float
    high: float
    n: int
    """Number of paired seeds."""
    verdict: Verdict


Leads = Mapping[tuple[str, str], Difference]
"""The lead of `ours` over `theirs`, by the pair of names (ours, theirs)."""


def leads_between(outcomes: Sequence[VariantOutcome], pairs: Sequence[tuple[str, str]]) -> Leads:
    """Return the lead of the first variant of each pair of names over the second."""
    losses = {outcome.name: outcome.losses for outcome in outcomes}
    return {(ours, theirs): lead(losses[theirs], losses[ours]) for ours, theirs in pairs}


def rows_of(leads: Leads) -> list[Lead]:
    """Return the leads as rows of `results.json`."""
    return [
        Lead(of=ours, over=theirs, mean=lead.mean, low=lead.low, high=lead.high, n=lead.n, verdict=lead.verdict)
        for (ours, theirs), lead in leads.items()
    ]


def checked(run: RunConfig, path: str) -> MoEConfig:
    """Return the job's experts; raise ValueError if the job at `path` cannot serve a proof."""
    if not isinstance(run.objective, LanguageConfig):
        raise ValueError(
            f"run.objective.name: {run.objective.name} in {path}; the proof compares language models, use moe_lm"
        )
    check(run, 1)
    moe = run.objective.model.moe
    if moe is None or moe.control != "none":
        value = f"the control {moe.control}" if moe else "none"
        raise ValueError(
            f"run.objective.model.moe: {value} in {path}; "
            "the proof makes the dense model and the controls itself, give it experts with a router"
        )
    if run.stop.steps is None:
        raise ValueError(
            f"run.stop.steps: not set in {path}; all runs of the proof take the same number of steps, set it"
        )
    if run.objective.data.held_out == 0 and run.objective.data.eval_source is None:
        raise ValueError(
            "run.objective.data.held_out: 0, but the proof compares held-out losses; set a share such as 0.05"
        )
    return moe


def language_of(run: RunConfig) -> LanguageConfig:
    """Return the objective of a run that `checked` has accepted."""
    assert isinstance(run.objective, LanguageConfig), "checked() accepts no other objective"
    return run.objective


def switch_name(experts: int) -> str:
    """Return the name of the variant with `experts` experts."""
    return f"{experts} experts"


def variants(run: RunConfig, moe: MoEConfig, experts: Sequence[int]) -> dict[str, RunConfig]:
    """Return the run of each variant by name.

    The order is: dense, the numbers of experts in ascending order, and the two controls with the
    job's own number of experts.
    """
    objective = language_of(run)
    model = objective.model
    routed = {switch_name(count): replace(moe, experts=count) for count in sorted({moe.experts, *experts})}
    routed |= {"frozen router": replace(moe, control="frozen"), "permuted router": replace(moe, control="permuted")}
    models = {name: replace(model, moe=layer) for name, layer in routed.items()}
    vocab_size = load_tokenizer(objective.data.tokenizer).vocab_size
    models = {"dense": dense_of(list(models.values()), vocab_size)} | models
    every = max(1, -(-(run.stop.steps or 1) // CURVE))
    base = replace(run, evaluate=replace(run.evaluate, every=every, samples=0))
    return {name: replace(base, objective=replace(objective, model=variant)) for name, variant in models.items()}


def dense_of(models: Sequence[TransformerConfig], vocab_size: int) -> TransformerConfig:
    """Return the smallest dense model whose FLOPs per token reach those of all `models`.

    The FLOPs of a model include its routers. The width of the feed-forward layers is adjusted.
    """
    target = max(parameters(model, vocab_size).matmul for model in models)
    dense = replace(models[0], moe=None, moe_layers="all", ffn=1)
    width = 1 + math.ceil((target - parameters(dense, vocab_size).matmul) / (3 * dense.layers * dense.d_model))
    return replace(dense, ffn=width)


def slug(name: str) -> str:
    """Return a variant's name in the form that folder names contain."""
    return name.replace(" ", "-")


def seeded(run: RunConfig, name: str, seed: int, root: str) -> RunConfig:
    """Return the run of the variant `name` with `seed`, in a folder below `root`."""
    return named(replace(run, seed=seed), f"{slug(name)}-seed{seed}", root)


def outcome_of(name: str, run: RunConfig, runs: Sequence[RunConfig]) -> VariantOutcome:
    """Read the outcome of one variant from the folders of its `runs`, one run per seed."""
    assert isinstance(run.objective, CausalConfig), "checked() accepts no other objective"
    model = run.objective.model
    data = run.objective.data
    vocab_size = load_tokenizer(data.tokenizer).vocab_size
    curves = [curve(seed_run) for seed_run in runs]
    by_step = zip(*curves, strict=True)
    return VariantOutcome(
        name=name,
        experts=model.moe.experts if model.moe else 1,
        parameters=parameters(model, vocab_size).total,
        flops_per_token=flops_per_token(model, vocab_size, data.seq_len),
        losses=[points[-1][1] for points in curves],
        curve=[_mean_point(points) for points in by_step],
    )


def _mean_point(points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Return the step of `points`, the same in all of them, and the mean of their losses."""
    return points[0][0], sum(loss for _, loss in points) / len(points)
