"""`switchwork plan`: verdicts, arithmetic done by hand, and the real size of a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_job
from machines import GPU, MACHINE

from models.moe.layer import MoEConfig
from models.moe.policies import TopKRouting
from models.transformer.cost import flops_per_token, forward_flops_per_token, parameters
from models.transformer.model import TransformerConfig
from trainer.config import RunConfig
from trainer.parsing import parse
from trainer.planning.estimate import estimate
from trainer.planning.footprint import groups_of, on_meta
from trainer.planning.gpus import by_device_name, find_gpu, gpus
from trainer.planning.layout import Machine, Part
from trainer.planning.state_bytes import Group, training_state
from trainer.planning.step_time import exchanges, expert_exchange

MIXTRAL = {
    "layers": 32,
    "d_model": 4096,
    "heads": 32,
    "kv_heads": 8,
    "ffn": 14336,
    "moe": {"experts": 8, "ffn": 14336, "router": {"name": "top_k", "k": 2}},
}


def run_of(corpus: Path, **fields: Any) -> RunConfig:
    return parse(RunConfig, tiny_job(corpus, **fields), "run")


def large(corpus: Path, model: dict[str, Any], **fields: Any) -> RunConfig:
    values = tiny_job(corpus, **({"device": "auto", "batch": {"global_batch": 64, "micro_batch": 1}} | fields))
    values["objective"]["model"] = model
    values["objective"]["data"]["seq_len"] = 1024
    values["objective"]["data"]["lanes"] = 64
    return parse(RunConfig, values, "run")


def test_a_small_job_fits_and_a_large_one_does_not(corpus: Path) -> None:
    small = estimate(run_of(corpus, batch={"global_batch": 16, "micro_batch": 2}), MACHINE)
    assert small.verdict
    assert small.forecast is not None
    assert small.forecast.layout.memory.fits_worst
    # Mixtral 8x7B: 46.7e9 parameters of 4 bytes do not fit into 80 GB, whatever is sharded but the
    # weights; ZeRO 3 over 8 keeps 12/8 + 4 bytes ... too many.
    big = estimate(large(corpus, MIXTRAL), MACHINE)
    assert not big.verdict
    assert big.forecast is not None
    assert big.forecast.layout.memory.parts[Part.PARAMETERS] == pytest.approx(4 * 46.6e9, rel=0.01)
    assert any("does not fit" in reason for reason in big.reasons)


def test_the_choice_fits_where_the_job_as_written_does_not(corpus: Path) -> None:
    machine = Machine(key="g", gpu=GPU, gpus=64, per_node=8, efficiency=0.5, notice_s=30, storage=2e9)
    plan = estimate(
        large(corpus, MIXTRAL | {"activation_checkpointing": True}, engine={"name": "deepspeed", "zero": 1, "ep": 1}),
        machine,
    )
    assert not plan.verdict
    forecast = plan.forecast
    assert forecast is not None
    chosen = forecast.choice
    assert chosen is not None
    assert (chosen.zero, chosen.ep) != (1, 1)
    assert chosen.memory.balanced <= forecast.layout.memory.usable
    assert f"zero {chosen.zero} and ep {chosen.ep} would fit" in plan.reasons
    layouts = {(candidate.zero, candidate.ep) for candidate in forecast.candidates}
    assert layouts == {(0, 1), (1, 1), (2, 1), (3, 1)} | {(z, e) for z in (0, 1, 2) for e in (2, 4, 8)}


@pytest.mark.parametrize(
    ("fields", "workers", "words"),
    [
        ({"batch": {"global_batch": 12, "micro_batch": 4}}, 2, ["global_batch", "12", "2 workers x micro_batch 4 = 8"]),
        ({"engine": {"name": "deepspeed", "ep": 3}}, 2, ["ep", "3", "4 experts"]),
        ({"engine": {"name": "deepspeed", "ep": 2, "zero": 3}}, 2, ["zero", "3", "ep 2"]),
    ],
)
def test_what_does_not_divide_is_said(fields: dict[str, Any], workers: int, words: list[str], corpus: Path) -> None:
    plan = estimate(
        run_of(corpus, **fields),
        Machine(key="g", gpu=GPU, gpus=workers, per_node=8, efficiency=0.5, notice_s=30, storage=2e9),
    )
    assert not plan.verdict
    assert plan.forecast is None
    assert all(word in plan.reasons[0] for word in words)


def test_divisions_are_listed_with_both_numbers(corpus: Path) -> None:
    plan = estimate(run_of(corpus, engine={"name": "deepspeed", "ep": 3}), MACHINE)
    rows = {
        (division.what, division.by): (division.number, division.divisor, division.good) for division in plan.divisions
    }
    assert rows["experts", "EP"] == (4, 3, False)
    assert rows["workers", "EP"] == (8, 3, False)
    assert rows["lanes", "workers"] == (8, 8, True)
    assert rows["global batch", "8 workers x micro-batch 4"] == (16, 32, False)


def test_zero_partitions_by_hand() -> None:
    # ZeRO's own example (Rajbhandari et al. 2020, section 5.4) in our bytes: 7.5e9 parameters over
    # 64 ranks; master 4, moments 8, divided by the ranks.
    groups = [Group((7_500_000_000,), 64)]
    from trainer.engines.config import DeepSpeedConfig

    states = {zero: training_state(DeepSpeedConfig(zero=zero), groups, 1) for zero in (0, 1, 2, 3)}
    assert states[0].parameters == 30e9
    assert states[0].moments == 60e9
    for zero in (1, 2, 3):
        assert states[zero].master == pytest.approx(30e9 / 64)
        assert states[zero].moments == pytest.approx(60e9 / 64)
    assert states[1].parameters == states[2].parameters == pytest.approx(30e9)
    assert states[3].parameters == pytest.approx(30e9 / 64 + 4e9)
    offloaded = training_state(DeepSpeedConfig(zero=2, offload_optimizer=True), groups, 1)
    assert offloaded.master == offloaded.moments == 0
    assert offloaded.host == pytest.approx((30e9 + 60e9 + 30e9) / 64)


def test_exchanges_by_hand(corpus: Path) -> None:
    run = run_of(corpus, engine={"name": "deepspeed", "zero": 1, "ep": 2})
    objective = on_meta(run)
    groups = groups_of(run, objective, 4)["model"]
    total = sum(p.numel() for p in objective.networks["model"].parameters())
    experts = 2 * 4 * 3 * 32 * 64
    moving = {(each.what, each.kind): each for each in exchanges(run.engine, groups, 2, 4, 8)}
    assert moving["gradients, dense", "all-reduce"].size == 4 * (total - experts)
    assert moving["gradients, experts", "all-reduce"].size == 4 * experts / 2
    assert moving["gradients, experts", "all-reduce"].ranks == 2
    assert moving["gradients, dense", "all-reduce"].moved == 2 * 3 / 4 * 4 * (total - experts)
    assert (
        moving["gradients, dense", "all-reduce"].seconds(GPU) == moving["gradients, dense", "all-reduce"].moved / 400e9
    )
    rows = expert_exchange(objective.networks["model"].config, 100, 2, 4, 8)[0]  # type: ignore[arg-type]
    # Forward to the experts and back, backward the same; 2 layers, 100 tokens, 1 expert per token,
    # 32 numbers of 4 bytes.
    assert rows.size == 4 * 2 * 100 * 32 * 4
    assert (
        exchanges(run.engine, groups, 2, 4, 2)[0].seconds(GPU) == moving["gradients, dense", "all-reduce"].moved / 50e9
    )


def test_step_time_and_mfu_by_hand(corpus: Path) -> None:
    plan = estimate(run_of(corpus, batch={"global_batch": 32, "micro_batch": 4}), MACHINE)
    forecast = plan.forecast
    cost = plan.parameters.transformer
    assert forecast is not None
    assert cost is not None
    step = forecast.layout.step
    rates = forecast.rates
    target = forecast.target
    assert step is not None
    assert rates is not None
    assert target is not None
    flops = cost.flops_per_token * 32 * 32 / 8
    assert step.arithmetic == pytest.approx(flops / (1000e12 * 0.5))
    assert step.mfu == pytest.approx(flops / 1000e12 / step.total)
    assert rates.tokens_per_day == pytest.approx(86400 * 32 * 32 / step.total)
    assert target.steps == 10
    assert target.gpu_hours == pytest.approx(8 * 10 * step.total / 3600)
    assert forecast.checkpoint.size == pytest.approx(12 * cost.total, rel=0.01)


def test_published_models() -> None:
    mixtral = TransformerConfig(
        layers=32,
        d_model=4096,
        heads=32,
        kv_heads=8,
        ffn=14336,
        moe=MoEConfig(experts=8, ffn=14336, router=TopKRouting(k=2)),
    )
    counted = parameters(mixtral, 32000)
    # Jiang et al. 2024, section 2 and table 2: 47B parameters in all, 13B of them active.
    assert round(counted.total / 1e9) == 47
    assert round(counted.active / 1e9) == 13
    # 2 FLOPs per active parameter but the embedding's look-up, and 4 L H C T of attention (Kaplan
    # et al. 2020, table 1).
    expected = 2 * (counted.active - 32000 * 4096 - 65 * 4096) + 4 * 32 * 4096 * 4096
    assert forward_flops_per_token(mixtral, 32000, 4096) == pytest.approx(expected)
    # Fedus et al. 2021: 1.6 trillion parameters, and a token's FLOPs do not grow with the experts,
    # their router aside.
    switch_c = TransformerConfig(
        layers=30,
        d_model=2080,
        heads=32,
        head_dim=64,
        ffn=4096,
        tie_embeddings=True,
        moe=MoEConfig(experts=2048, ffn=4096),
    )
    assert parameters(switch_c, 32128).total == pytest.approx(1.6e12, rel=0.02)
    dense = TransformerConfig(layers=30, d_model=2080, heads=32, head_dim=64, ffn=4096, tie_embeddings=True)
    router = 6 * 30 * 2080 * 2048
    assert flops_per_token(switch_c, 32128, 512) == flops_per_token(dense, 32128, 512) + router


def test_the_table_of_gpus() -> None:
    assert find_gpu("h100-80gb").bf16 == 989e12
    for device, key in (
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA L4", "l4-24gb"),
    ):
        assert by_device_name(device) == gpus()[key]
    assert by_device_name("NVIDIA A100-SXM4-80GB") == gpus()["a100-80gb"]
    assert by_device_name("NVIDIA A100-SXM4-40GB") == gpus()["a100-40gb"]
    assert by_device_name("Voodoo 2") is None
    for gpu in gpus().values():
        assert gpu.fp32 < gpu.bf16 < 1e16
        assert gpu.network <= gpu.link
        assert "datasheet" in gpu.source


@pytest.fixture
def switchwork(
    switchwork: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The command, in the folder of this test."""
    monkeypatch.chdir(tmp_path)
    return switchwork


def test_the_command(switchwork: Callable[..., tuple[int, str, str]], corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"run": tiny_job(corpus), "cluster": {"workers": 2}}))
    code, printed, said = switchwork("plan", "job.yaml", "--gpu", "h100-80gb", "--picture", "memory.png")
    assert code == 0, said
    for words in (
        "YES",
        "What must divide",
        "Memory of a GPU",
        "all-reduce",
        "MFU",
        "Checkpoint",
        "It would choose",
        "What it cannot know",
    ):
        assert words in printed
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "runs").exists()
    code, printed, _ = switchwork("plan", "job.yaml", "--gpus", "3", "--gpu", "a100-80gb", "--json")
    assert code == 1
    found = json.loads(printed)
    assert found["verdict"] is False
    assert "3 workers x micro_batch 4" in found["reasons"][0]
    assert {"divides", "machine", "parameters", "unknown"} < set(found)
    assert "memory" not in found
    figures = json.loads(switchwork("plan", "job.yaml", "--gpu", "h100-80gb", "--json")[1])
    assert set(figures["memory"]["parts"]) == set(Part)
    assert (
        figures["step"]["total"]
        == figures["step"]["arithmetic"] + figures["step"]["exchange"] + figures["step"]["update"]
    )
    assert figures["step"]["tokens_per_day"] == pytest.approx(86400 * figures["step"]["tokens_per_s"])
    fastest = min(candidate["seconds"] for candidate in figures["candidates"] if candidate["fits_worst"])
    assert figures["choice"]["seconds"] == pytest.approx(fastest, abs=1e-6)
    for wrong, word in (
        (["--gpu", "riva-128"], "riva-128"),
        (["--gpus", "0"], "--gpus"),
        (["--efficiency", "2"], "--efficiency"),
    ):
        code, _, complaint = switchwork("plan", "job.yaml", *wrong)
        assert (code, complaint.count("\n"), word in complaint) == (2, 1, True)


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_image_objectives_are_planned_as_far_as_they_can_be(name: str) -> None:
    file = Path(__file__).parents[1] / "launch" / "configs" / f"{name}_digits_quickstart.yaml"
    run = parse(RunConfig, yaml.safe_load(file.read_text())["run"], "run")
    plan = estimate(run, Machine(key="g", gpu=GPU, gpus=2, per_node=8, efficiency=0.5, notice_s=30, storage=2e9))
    assert plan.verdict
    assert plan.forecast is not None
    layout = plan.forecast.layout
    assert layout.step is None
    total = sum(plan.parameters.networks.values())
    assert total > 50_000
    assert layout.memory.parts[Part.PARAMETERS] == pytest.approx(4 * total, rel=0.01)
    assert Part.ACTIVATIONS not in layout.memory.parts
    assert 12 * total <= plan.forecast.checkpoint.size <= 17 * total
    assert any("only weights, gradients, optimiser and checkpoint" in line for line in plan.unknown)
