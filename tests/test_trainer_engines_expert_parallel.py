"""Experts across ranks equal experts in one process, for every routing, with drops and without.

Outputs, statistics and gradients are compared. Legend: B samples, T positions, V vocabulary, E
experts, L layers.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_job
from distributed import run_distributed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from models.init import initialise
from models.moe.layer import MoEConfig, RouteStats, router_loss
from models.moe.policies import (
    BiasBalancedRouting,
    ExpertChoiceRouting,
    NoisyTopKRouting,
    RoutingConfig,
    SwitchRouting,
    TopKRouting,
)
from models.transformer.model import Transformer, TransformerConfig

EXPERTS = 8
SAMPLES = 16
TOKENS = 12
VOCABULARY = 50
GROUP = 2
ROUTERS: list[RoutingConfig] = [
    SwitchRouting(),
    TopKRouting(k=2),
    NoisyTopKRouting(k=2),
    ExpertChoiceRouting(),
    BiasBalancedRouting(k=2, bias_rate=0.01),
]
LAYOUTS = {2: [2], 4: [2, 4]}
"""EP sizes for each world."""


def build(moe: MoEConfig, planted: bool, ep: int = 1, rank: int = 0, **options: Any) -> Transformer:
    """A bidirectional transformer with experts in both blocks.

    With `planted`, all tokens go to the experts 0 and 1.
    """
    from trainer.engines.expert_parallel import ShardedExperts, shard_experts

    config = TransformerConfig(layers=2, d_model=16, heads=2, ffn=32, causal=False, init_std=0.3, moe=moe, **options)
    network = Transformer(config, VOCABULARY)
    shard_experts(network, ep, rank)
    initialise(network, 0)
    with torch.no_grad():
        if planted:
            network.embedding.weight[:, 0] = 10.0
        for layer in network.moe_layers:
            if planted:
                layer.router.weight[:, 0] = torch.tensor([2.0, 2.0] + [0.0] * (EXPERTS - 2))
            if isinstance(moe.router, BiasBalancedRouting):
                layer.router.bias_E.copy_(torch.linspace(0, 0.1, EXPERTS))
    for module in network.modules():
        if isinstance(module, ShardedExperts):
            module.set_deepspeed_parallelism()
    return network


def run(
    network: Transformer, moe: MoEConfig, samples: range, micro_batch: int
) -> tuple[Tensor, list[list[RouteStats]]]:
    """Return the logits of `samples` and the statistics of each micro-batch.

    The gradients of the summed losses stay in the network.
    """
    tokens_BT = torch.randint(VOCABULARY, (SAMPLES, TOKENS + 1), generator=torch.Generator().manual_seed(3))
    logits = []
    statistics = []
    for first in range(samples.start, samples.stop, micro_batch):
        rows = slice(first, first + micro_batch)
        logits_BTV, stats = network(tokens_BT[rows, :-1], torch.arange(SAMPLES)[rows], seed=7)
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), tokens_BT[rows, 1:].flatten(), reduction="sum"
        )
        (loss + TOKENS * GROUP * router_loss(moe, stats).sum()).backward()
        logits.append(logits_BTV.detach())
        statistics.append(list(stats))
    return torch.cat(logits), statistics


def total(statistics: list[list[RouteStats]], name: str) -> Tensor:
    """What `name` adds up to over micro-batches (and groups), for each layer."""
    over_groups = name.endswith("_G")
    each = [torch.stack([getattr(layer, name).detach() for layer in stats]) for stats in statistics]
    return torch.stack([values.sum(-1) if over_groups else values for values in each]).sum(0)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def compare(world: Any, sizes: list[int], cases: list[tuple[MoEConfig, bool, bool]]) -> dict[int, list[dict[str, Any]]]:
    """Return the largest error of each kind, and the facts of the case, per EP size and case.

    A case is (config, planted, accumulate and recompute); its facts show that it is the case it
    claims.
    """
    import deepspeed

    deepspeed.init_distributed("gloo", dist_init_required=False)
    return {ep: [compare_case(world, ep, *case) for case in cases] for ep in sizes}


def compare_case(world: Any, ep: int, moe: MoEConfig, planted: bool, frugal: bool) -> dict[str, Any]:
    whole = build(moe, planted)
    expected_BTV, expected_stats = run(whole, moe, range(SAMPLES), SAMPLES)
    mine = range(world.rank * SAMPLES // world.size, (world.rank + 1) * SAMPLES // world.size)
    network = build(moe, planted, ep, world.rank, activation_checkpointing=frugal)
    logits_BTV, stats = run(network, moe, mine, GROUP if frugal else len(mine))
    errors: dict[str, float] = {"outputs": error(logits_BTV, expected_BTV[mine.start : mine.stop])}
    for name in set(RouteStats._fields) - {"max_rows"}:  # that one is of each micro-batch by itself
        errors[name] = error(world.sum(total(stats, name)), total(expected_stats, name))
    reference = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    for name, parameter in network.named_parameters():
        kind, value = gradient_error(world, ep, name, parameter, reference[name])
        errors[kind] = max(errors.get(kind, 0.0), value)
    load_LE = total(expected_stats, "load_E")
    return {
        "errors": errors,
        "dropped": float(total(expected_stats, "dropped").sum()),
        "empty_ranks": int((load_LE.view(len(load_LE), ep, -1).sum(-1) == 0).sum()),
        "gradients": {
            kind: max(float(reference[n].abs().max()) for n in reference if kind in n)
            for kind in ("router.weight", "gate_up", "embedding")
        },
    }


def gradient_error(
    world: Any, ep: int, name: str, parameter: torch.nn.Parameter, expected: Tensor
) -> tuple[str, float]:
    """The kind of a gradient, and its error once summed over the ranks that hold the parameter."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    gradient = parameter.grad
    assert gradient is not None
    if ".experts." in name:
        dist.all_reduce(gradient, group=groups._get_expert_data_parallel_group(f"ep_size_{ep}"))
        whole = torch.zeros_like(expected)
        local = EXPERTS // ep
        whole[world.rank % ep * local :][:local] = gradient
        others = expected.clone()
        others[world.rank % ep * local :][:local] = 0
        return "expert gradients", error(whole + others, expected)
    return "router gradients" if ".router." in name else "dense gradients", error(world.sum(gradient), expected)


def config(router: RoutingConfig, capacity: float | None, policy: str) -> MoEConfig:
    return MoEConfig(
        experts=EXPERTS,
        ffn=24,
        router=router,
        capacity_factor=capacity,
        drop_policy=policy,
        jitter=0.1,
        shared_expert=8,
        group=GROUP,
    )  # type: ignore[arg-type]


def cases() -> dict[str, tuple[MoEConfig, bool, bool]]:
    table: dict[str, tuple[MoEConfig, bool, bool]] = {}
    for router in ROUTERS:
        chooses = isinstance(router, ExpertChoiceRouting)
        for drops, capacity, policy in (
            ("dropless", None, "position"),
            ("position", 0.75, "position"),
            ("probability", 0.75, "probability"),
        ):
            if capacity is not None and chooses:
                continue  # its room is the routing itself
            for frugal in (False, True):
                table[f"{router.name}, {drops}{', accumulated and recomputed' * frugal}"] = (
                    config(router, capacity, policy),
                    False,
                    frugal,
                )
        if not chooses:  # there every expert takes as many tokens as any other
            table[f"{router.name}, all tokens to one rank"] = (config(router, None, "position"), True, True)
    return table


@pytest.mark.parametrize("world", LAYOUTS)
def test_sharded_equals_one_process(world: int) -> None:
    table = cases()
    for rank, by_ep in enumerate(run_distributed(compare, world, LAYOUTS[world], list(table.values()))):
        for ep, results in by_ep.items():
            for (name, (moe, planted, _)), result in zip(table.items(), results, strict=True):
                too_large = {kind: value for kind, value in result["errors"].items() if not value <= 1e-5}
                assert not too_large, (name, ep, rank, too_large)
                assert (result["dropped"] > 0) == (
                    moe.capacity_factor is not None or isinstance(moe.router, ExpertChoiceRouting)
                ), name
                assert result["empty_ranks"] == (2 * (ep - 1) if planted else 0), name
                assert all(value > 1e-3 for value in result["gradients"].values()), (name, result["gradients"])


def traffic(world: Any, jobs: list[dict[str, Any]]) -> list[list[tuple[str, int]]]:
    """Type and bytes of everything that goes through an all-to-all in one step of each job."""
    import torch.distributed as dist

    from data.share import Share
    from trainer.config import RunConfig
    from trainer.core.loop import fit
    from trainer.parsing import parse
    from trainer.worker.main import build_training

    real = dist.all_to_all_single
    found = []
    for job in jobs:
        run = parse(RunConfig, job, "run")
        sent = []

        def noted(output: Tensor, input: Tensor, *parts: Any, sent: Any = sent, **options: Any) -> Any:
            assert output.dtype == input.dtype
            sent.append((str(input.dtype).removeprefix("torch."), input.nbytes))
            return real(output, input, *parts, **options)

        dist.all_to_all_single = noted
        training = build_training(run, world)
        share = Share(
            rank=world.rank, world=world.size, global_batch=run.batch.global_batch, micro_batch=run.batch.micro_batch
        )
        stream = training.objective.stream(share, None)
        fit(training, stream, 1, [])
        stream.close()
        found.append(sent)
    return found


def test_tokens_and_their_gradients_travel_in_bf16(corpus: Path) -> None:
    """In each of two layers the sizes go once; rows and gradients go to the experts and back."""
    job = tiny_job(
        corpus, batch={"global_batch": 8, "micro_batch": 4}, engine={"name": "deepspeed", "zero": 1, "ep": 2}
    )
    job["objective"]["model"]["moe"]["capacity_factor"] = None
    jobs = [job | {"precision": precision} for precision in ("bf16", "fp32")]
    ranks = run_distributed(traffic, 2, copy.deepcopy(jobs))
    for index, (dtype, size) in enumerate((("bfloat16", 2), ("float32", 4))):
        for rank in ranks:
            kinds = [kind for kind, _ in rank[index]]
            assert sorted(kinds) == sorted(["int64"] * 2 + [dtype] * 8)
            assert all(nbytes == 4 * 8 for kind, nbytes in rank[index] if kind == "int64")
        rows = sum(nbytes for rank in ranks for kind, nbytes in rank[index] if kind == dtype)
        assert rows == 8 * (8 * 32) * 32 * size  # 8 exchanges of 8 x 32 tokens of width 32


def test_the_host_waits_once_for_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: any reading by the host raises, but for the one given here."""
    from models.moe.experts import Experts
    from trainer.engines import expert_parallel

    readings: list[list[list[int]]] = [[[30, 18], [30, 10]]]
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: readings.pop())
    monkeypatch.setattr(expert_parallel.dist, "all_to_all_single", lambda *parts, **options: None)
    monkeypatch.setattr(expert_parallel.groups, "_get_expert_parallel_group", lambda name: None)
    monkeypatch.setattr("models.moe.experts._grouped_kernel", lambda *tensors: True)
    with torch.device("meta"):
        sharded = expert_parallel.ShardedExperts(Experts(EXPERTS, 16, 24), 2, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        sharded.to_empty(device="cpu")
        with torch.autocast("cpu", torch.bfloat16):
            y_ND = sharded(torch.randn(50, 16, requires_grad=True), torch.ones(EXPERTS, dtype=torch.int64))
        y_ND.sum().backward()
    assert not readings
    assert y_ND.shape == (50, 16)
    assert sharded.gate_up.grad is not None
