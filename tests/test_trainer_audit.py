"""The gradient audit: it passes what is right, in every layout, and names what is wrong; six faults, each planted in real workers."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradient_faults
import pytest
import torch
from conftest import tiny_job
from distributed import run_distributed
from torch import nn

from launch.audit.report import likely_causes
from trainer.audit import differences
from trainer.audit.evidence import Evidence, StaleWeight, from_bytes, to_bytes
from trainer.audit.rounding import FP32, rounded
from trainer.audit.verdict import Findings, judge
from trainer.config import RunConfig
from trainer.parsing import parse

ZERO1 = {"name": "deepspeed", "zero": 1, "ep": 2}
ZERO0 = {"name": "deepspeed", "zero": 0, "ep": 2}
CASES: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "right, zero 0": (ZERO0, gradient_faults.none),
    "right, zero 1": (ZERO1, gradient_faults.none),
    "renormalised top-1 gate": (ZERO1, gradient_faults.renormalised_gate),
    "missing all-reduce of one expert group": (ZERO0, gradient_faults.missing_all_reduce),
    "wrong accumulation factor": (ZERO1, gradient_faults.wrong_accumulation),
    "detached branch": (ZERO1, gradient_faults.detached_branch),
    "stale shard": (ZERO1, gradient_faults.stale_shard),
    "bf16 router": (ZERO1, gradient_faults.bf16_router),
}


def job_of(corpus: Path, engine: dict[str, Any], **run: Any) -> RunConfig:
    return parse(RunConfig, tiny_job(corpus, engine=engine, batch={"global_batch": 8, "micro_batch": 1}, **run), "run")


def collected(world: Any, corpus: Path) -> dict[str, Evidence]:
    """The evidence of every case, one after the other in the same processes."""
    from trainer.audit.collect import collect

    found = {}
    for name, (engine, fault) in CASES.items():
        with fault():
            found[name] = collect(job_of(corpus, engine), world)
    return found


@cache
def evidence(corpus: Path) -> dict[str, Evidence]:
    return run_distributed(collected, 4, corpus)[0]


@cache
def judged(corpus: Path, case: str, directions: int = 0) -> Findings:
    return judge(job_of(corpus, CASES[case][0]), from_bytes(to_bytes(evidence(corpus)[case])), directions)


@pytest.mark.parametrize("case", ["right, zero 0", "right, zero 1"])
def test_what_is_right_passes(case: str, corpus: Path) -> None:
    findings = judged(corpus, case, directions=1)
    assert findings.good, likely_causes(findings)
    kinds = {each.what for each in findings.judged}
    assert kinds >= {"samples", "router", "recursion", "differences", "gradient", "norm", "loss"}
    gradients = [each for each in findings.judged if each.what == "gradient" and each.size]
    assert {each.step for each in gradients} == {0, 1}
    assert max(each.error for each in gradients) < 1e-4, "what is allowed is far from any fault"
    assert max(each.error for each in gradients) > 0, "float32 cannot be float64"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("renormalised top-1 gate", ["model/blocks.0.ffn.router.weight", "gates"]),
        (
            "missing all-reduce of one expert group",
            ["model/blocks.1.ffn.experts.down[1], model/blocks.1.ffn.experts.down[0]"],
        ),
        ("wrong accumulation factor", ["every parameter", "0.5 times"]),
        ("detached branch", ["model/blocks.1.attention.out.weight", "no gradient arrives"]),
        ("stale shard", ["step 1", "stale shard"]),
        ("bf16 router", ["model/blocks.0.ffn.router.weight", "scores"]),
    ],
)
def test_a_fault_is_found_and_the_first_suspect_is_the_right_one(case: str, words: list[str], corpus: Path) -> None:
    findings = judged(corpus, case)
    assert not findings.good
    first = likely_causes(findings)[0]
    for word in words:
        assert word in first, likely_causes(findings)


def test_a_missing_all_reduce_is_blamed_on_its_experts_alone(corpus: Path) -> None:
    wrong = {
        each.name
        for each in judged(corpus, "missing all-reduce of one expert group").judged
        if each.what == "gradient" and each.step == 0 and not each.good
    }
    assert wrong == {
        f"model/blocks.{block}.ffn.experts.{leaf}[{expert}]"
        for block in (0, 1)
        for leaf in ("gate_up", "down")
        for expert in (0, 1)
    }


def test_a_stale_shard_is_named_with_its_rank_and_only_after_an_update(corpus: Path) -> None:
    first, second = evidence(corpus)["stale shard"].steps
    assert not first.facts.stale
    assert {stale.rank for stale in second.facts.stale} <= {0, 1, 2}
    # The last rank's shard is the end of the rows of weights: norms at their end, and the output matrix.
    assert StaleWeight(name="model/head.weight", rank=0) in second.facts.stale
    assert not any("embedding" in stale.name for stale in second.facts.stale)


def test_a_branch_that_is_detached_in_the_source_contradicts_finite_differences(corpus: Path) -> None:
    """Reference and workers have the same fault then, and agree."""
    with gradient_faults.detached_branch():
        findings = judged(
            corpus, "detached branch", directions=1
        )  # and not from the cache, which has it without directions
    wrong = {each.name for each in findings.judged if not each.good}
    assert {each.what for each in findings.judged if not each.good} == {"differences"}
    assert "model/blocks.*.attention.out.weight" in wrong


def test_rounding_is_by_as_much_as_float32_rounds() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 100)).double()
    x, errors = torch.randn(50, 300, dtype=torch.float64), []

    def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        return [each.double() for each in torch.autograd.grad(net(x).logsumexp(1).sum(), list(net.parameters()))]

    right = gradients(network, x)
    with rounded(network, FP32, seed=0):
        moved = gradients(network, x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.float())
    exact, single = gradients(network, x.float().double()), gradients(network.float(), x.float())
    for wanted, given, same, off in zip(exact, single, right, moved, strict=True):
        errors.append(float((given - wanted).norm() / (off - same).norm()))
    assert all(0.02 < error < 2 for error in errors), errors


def test_a_bias_before_a_batch_norm_has_no_gradient_and_may_have_what_rounding_makes_of_it() -> None:
    """Relative to the right gradient, which is 0, any error would be infinite."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    x = torch.randn(64, 8, dtype=torch.float64)

    def bias_gradient(net: nn.Module, x: torch.Tensor) -> float:
        return float(torch.autograd.grad(net(x).square().mul(torch.arange(64)[:, None]).sum(), [net[0].bias])[0].norm())  # type: ignore[index]

    with rounded(network, FP32, seed=0):
        allowed = bias_gradient(network, x)
    right = bias_gradient(network, x)
    assert right < 1e-10 < bias_gradient(network.float(), x.float()) < 8 * allowed < 1e-2


def test_a_kink_between_the_ends_is_passed_by_a_smaller_step_and_a_wrong_gradient_by_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """relu with its kink 3e-7 below the weight: within the first step, and outside of the second."""
    network = nn.Linear(1, 1, bias=False).double()
    network.weight.data.fill_(1.0)

    def loss() -> torch.Tensor:
        return network.weight.sum() + torch.relu(network.weight - (1 - 3e-7)).sum()

    def error(factor: float) -> float:
        reference: Any = SimpleNamespace(
            step=SimpleNamespace(batches=[{}]),
            objective=SimpleNamespace(networks={"model": network}),
            loss_as_decided=lambda phase, batch: loss(),
            gradients=lambda phase, batches: (
                0.0,
                {"model/weight": factor * torch.autograd.grad(loss(), network.weight)[0]},
                None,
            ),
        )
        ((slope,),) = differences.slopes(reference, "model", directions=1, seed=0).values()
        return slope.error

    assert error(1.0) < 1e-6
    assert error(1.01) > differences.SLOPE
    monkeypatch.setattr(differences, "_STEPS", (1e-6,))
    assert error(1.0) > differences.SLOPE, "the kink is between the ends of the larger step"


# All but the fire drill's faults, which are no job.
QUICKSTARTS = [
    file
    for file in sorted(Path(__file__).parents[1].glob("launch/configs/*quickstart*.yaml"))
    if not file.stem.startswith("chaos")
]


@pytest.mark.slow
@pytest.mark.parametrize("file", QUICKSTARTS, ids=lambda file: file.stem)
def test_the_command_passes_every_quickstart(file: Path, tmp_path: Path, switchwork: Any) -> None:
    code, printed, complaint = switchwork("audit", str(file), f"run.root={tmp_path}", "--json")
    assert code == 0, printed + complaint
    report = json.loads(printed[printed.index("{") :])
    assert report["verdict"]
    assert report["suspects"] == []
    assert (tmp_path / "audits" / f"{file.stem}-001" / "signal.png").stat().st_size > 10_000
