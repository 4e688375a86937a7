"""The audit passes every engine, precision, router and objective that is right; a router in bfloat16 is found out in a bfloat16 job as well."""

from functools import cache
from pathlib import Path
from typing import Any

import gradient_faults
import pytest
from conftest import tiny_job
from distributed import run_distributed

from launch.audit.report import likely_causes
from trainer.audit.evidence import Evidence
from trainer.audit.rounding import BF16
from trainer.audit.verdict import judge
from trainer.config import RunConfig
from trainer.parsing import parse


def changed(
    corpus: Path, engine: dict[str, Any], model: dict[str, Any], objective: dict[str, Any], **run: Any
) -> RunConfig:
    job = tiny_job(corpus, engine=engine, batch={"global_batch": 8, "micro_batch": 2}, **run)
    job["objective"] |= objective
    job["objective"]["model"] |= model
    if objective:
        del job["objective"]["sample_tokens"]
    return parse(RunConfig, job, "run")


MOE = {"experts": 4, "ffn": 64}
MASKED = {"name": "masked_lm"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "accelerate": ({"name": "accelerate"}, {}, {}, {}),
    "zero 2, ep 2": ({"name": "deepspeed", "zero": 2, "ep": 2}, {}, {}, {}),
    "zero 3": ({"name": "deepspeed", "zero": 3}, {"tie_embeddings": True}, {}, {}),
    "bf16": ({"name": "deepspeed", "zero": 1, "ep": 2}, {}, {}, {"precision": "bf16"}),
    "dense, clipped": ({"name": "deepspeed", "zero": 1}, {"moe": None}, {}, {"optimizer": {"clip": 0.01}}),
    "checkpointed, top 2": (
        {"name": "deepspeed", "zero": 1},
        {"activation_checkpointing": True, "moe": MOE | {"router": {"name": "top_k"}}},
        {},
        {},
    ),
    "noisy, dropping by probability": (
        {"name": "deepspeed", "zero": 1, "ep": 2},
        {
            "moe": MOE
            | {"router": {"name": "noisy_top_k"}, "capacity_factor": 1.0, "drop_policy": "probability", "jitter": 0.01}
        },
        {},
        {},
    ),
    "balanced by bias": (
        {"name": "deepspeed", "zero": 2},
        {"moe": MOE | {"router": {"name": "bias_balanced"}, "shared_expert": 32}},
        {},
        {},
    ),
    "masked, expert choice": (
        {"name": "deepspeed", "zero": 2, "ep": 2},
        {"causal": False, "moe": MOE | {"router": {"name": "expert_choice"}}},
        MASKED,
        {},
    ),
}


def collected(world: Any, corpus: Path) -> dict[str, Evidence]:
    from trainer.audit.collect import collect

    found = {}
    for name, (engine, model, objective, run) in CASES.items():
        found[name] = collect(changed(corpus, engine, model, objective, **run), world)
    engine, model, objective, run = CASES["bf16"]
    with gradient_faults.bf16_router():
        found["bf16 router"] = collect(changed(corpus, engine, model, objective, **run), world)
    return found


@cache
def evidence(corpus: Path) -> dict[str, Evidence]:
    return run_distributed(collected, 2, corpus)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_right_passes(case: str, corpus: Path) -> None:
    engine, model, objective, run = CASES[case]
    found = evidence(corpus)[case]
    findings = judge(changed(corpus, engine, model, objective, **run), found, directions=1)
    assert findings.good, likely_causes(findings)
    assert (found.roundoff == BF16) == (case == "bf16")


@pytest.mark.slow
def test_a_bf16_router_is_found_out_in_a_bf16_job(corpus: Path) -> None:
    engine, model, objective, run = CASES["bf16"]
    findings = judge(changed(corpus, engine, model, objective, **run), evidence(corpus)["bf16 router"], directions=0)
    assert "model/blocks.0.ffn.router.weight: its scores" in likely_causes(findings)[0]
