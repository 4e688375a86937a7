"""The mixture-of-experts layer, forward and backward, beside its peers and the floor: a dense SwiGLU of the same active FLOPs.

    python tests/bench/moe_layer.py [--json FILE] [--quick] [--profile] [--device cuda]

Peers: DeepSpeed's MoE (capacity 1.25: it pads and drops, all others are dropless), Hugging Face's Qwen3-MoE block with grouped_mm and
its Switch block (k = 1 only; its two-matrix experts are half as wide again, for equal FLOPs). All sides run in turn in every round;
ratios are medians over rounds of ours / theirs within the round, so that a busy machine strikes all sides alike.
`--profile` prints what the layer's time is spent on instead.
"""

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu" if "cuda" not in sys.argv else "cuda")
sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3MoeConfig, SwitchTransformersConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from models.feedforward import SwiGLU
from models.moe import MoEConfig, MoELayer, router_loss
from models.routing import SwitchRouter, TopKRouter

D_MODEL, FFN, EXPERTS, SEQ_LEN = 256, 1024, 8, 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Loss = tuple[Tensor, Tensor | None]
Side = tuple[nn.Module, Callable[[Tensor], Loss]]


def sides(k: int, tokens: int) -> dict[str, Side]:
    """Name -> (module, its output and auxiliary loss as a function of the input)."""
    layer = MoELayer(MoEConfig(experts=EXPERTS, ffn=FFN, router=SwitchRouter() if k == 1 else TopKRouter(k=k)), D_MODEL)
    keys_B = torch.arange(tokens // SEQ_LEN)

    def ours(x_BTD: Tensor) -> Loss:
        y_BTD, stats = layer(x_BTD, keys_B.to(x_BTD.device))
        return y_BTD, router_loss(layer.config, [stats]).mean()

    floor = SwiGLU(D_MODEL, k * FFN)
    made: dict[str, Side] = {"ours": (layer, ours), "floor": (floor, lambda x_BTD: (floor(x_BTD), None))}
    made |= {"deepspeed": deepspeed_side(k), "qwen3_moe": qwen3_side(k)}
    return made | {"switch": switch_side(tokens)} if k == 1 else made


def deepspeed_side(k: int) -> Side:
    module = DeepSpeedMoE(D_MODEL, SwiGLU(D_MODEL, FFN), num_experts=EXPERTS, k=k, capacity_factor=1.25)
    module.set_deepspeed_parallelism()

    def run(x_BTD: Tensor) -> Loss:
        y_BTD, balance, _ = module(x_BTD)
        return y_BTD, 0.01 * balance

    return module, run


def qwen3_side(k: int) -> Side:
    config = Qwen3MoeConfig(hidden_size=D_MODEL, moe_intermediate_size=FFN, num_experts=EXPERTS, num_experts_per_tok=k, norm_topk_prob=k > 1)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeSparseMoeBlock(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module, lambda x_BTD: (module(x_BTD), None)


def switch_side(tokens: int) -> Side:
    config = SwitchTransformersConfig(
        hidden_size=D_MODEL, d_model=D_MODEL, d_ff=3 * FFN // 2, num_experts=EXPERTS, expert_capacity=tokens, dropout_rate=0.0, router_jitter_noise=0.0
    )
    module = SwitchTransformersSparseMLP(config)
    return module, lambda x_BTD: (module(x_BTD), None)


def milliseconds(side: Side, x_BTD: Tensor, grad_BTD: Tensor) -> float:
    """Time of one forward and backward pass, gradients of input and weights included."""
    module, run = side
    module.zero_grad(set_to_none=True)
    x_BTD = x_BTD.clone().requires_grad_()
    wait(x_BTD.device)
    start = time.perf_counter()
    y_BTD, auxiliary = run(x_BTD)
    roots = [(y_BTD, grad_BTD)] if auxiliary is None else [(y_BTD, grad_BTD), (auxiliary, None)]
    torch.autograd.backward(*map(list, zip(*roots)))  # type: ignore[arg-type]
    wait(x_BTD.device)
    return 1000 * (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(dtype: str, threads: int, k: int, tokens: int, rounds: int, device: str) -> dict[str, object]:
    """One row: medians in ms, paired ratios, all samples."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    all_sides = {name: (module.to(device, DTYPES[dtype]), run) for name, (module, run) in sides(k, tokens).items()}
    x_BTD = torch.randn(tokens // SEQ_LEN, SEQ_LEN, D_MODEL).to(device, DTYPES[dtype])
    grad_BTD, samples = torch.randn_like(x_BTD), defaultdict(list)
    names = list(all_sides)
    for turn in range(rounds + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = milliseconds(all_sides[name], x_BTD, grad_BTD)
            if turn >= 2:
                samples[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(samples["ours"], samples[name])) for name in names if name != "ours"}
    return {
        "dtype": dtype,
        "threads": threads,
        "k": k,
        "tokens": tokens,
        "ours_ms": medians["ours"],
        "floor_ms": medians["floor"],
        "peers": {name: medians[name] for name in names if name not in ("ours", "floor")},
        "ratios": ratios,
        "samples_ms": dict(samples),
    }


def show(row: dict[str, object]) -> None:
    """One line: each side's median, half its interquartile range, and ours / theirs."""
    cells = [f"{row['dtype']:8} {row['threads']} threads k={row['k']} {row['tokens']:5} tokens"]
    for name, values in row["samples_ms"].items():  # type: ignore[attr-defined]
        first, median, third = statistics.quantiles(values, n=4)
        ratio = "" if name == "ours" else f" x{row['ratios'][name]:.2f}"  # type: ignore[index]
        cells.append(f"{name} {median:7.1f} ± {(third - first) / 2:4.1f} ms{ratio}")
    print(" | ".join(cells), flush=True)


PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::bmm"),
    "SwiGLU": ("aten::silu", "aten::silu_backward", "aten::mul", "aten::mul_"),
    "moving rows": ("aten::index_select", "aten::gather", "aten::scatter_", "aten::sort", "aten::add_"),
}


def show_profile(dtype: str, threads: int, k: int, tokens: int, device: str) -> None:
    """Where the layer's time goes, by operator; the multiplications of the router and of combining count as SwiGLU's."""
    torch.set_num_threads(threads)
    side = sides(k, tokens)["ours"]
    side[0].to(device, DTYPES[dtype])
    x_BTD = torch.randn(tokens // SEQ_LEN, SEQ_LEN, D_MODEL).to(device, DTYPES[dtype])
    for _ in range(3):
        milliseconds(side, x_BTD, x_BTD)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as profiler:
        for _ in range(10):
            milliseconds(side, x_BTD, x_BTD)
    share: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        part = next((part for part, names in PARTS.items() if event.key in names), "routing, losses, statistics, Python")
        share[part] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    total = sum(share.values())
    parts = ", ".join(f"{part} {value / total:.1%}" for part, value in sorted(share.items(), key=lambda item: -item[1]))
    print(f"{dtype:8} {threads} threads k={k} {tokens} tokens: {total / 10000:.1f} ms: {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="512 tokens and 3 rounds only")
    parser.add_argument("--profile", action="store_true", help="print what the layer's time is spent on, at the largest size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo" if args.device == "cpu" else "nccl")
    sizes, rounds = ([512], 3) if args.quick else (args.tokens, args.rounds)
    rows = []
    for dtype, threads, k, tokens in itertools.product(DTYPES, args.threads, (1, 2), sizes):
        if args.profile:
            if tokens == max(sizes):
                show_profile(dtype, threads, k, tokens, args.device)
            continue
        rows.append(measure(dtype, threads, k, tokens, rounds, args.device))
        show(rows[-1])
    if args.json and not args.profile:
        args.json.write_text(json.dumps(rows, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
