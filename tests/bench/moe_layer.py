"""The mixture-of-experts layer, forward and backward, next to its peers and a dense SwiGLU.

    python tests/bench/moe_layer.py [--json FILE] [--rounds 9] [--profile] [--device cuda]
        [--dtype float32 bfloat16] [--threads 1 2] [--tokens 512 1024 4096]

The dense SwiGLU of the same active FLOPs is the floor. Peers are DeepSpeed's MoE (capacity 1.25: it
pads and drops, all others are dropless), Hugging Face's Qwen3-MoE block with grouped_mm, and its
Switch block (k = 1 only; its two-matrix experts are half as wide again, for equal FLOPs). A time is
one forward and backward pass, with the gradients of input and weights made anew. `--profile` prints
the shares of the layer's time instead.
"""

import itertools
import logging
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu" if "cuda" not in sys.argv else "cuda")
sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from paired import arguments, in_turn, ratio, write
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3MoeConfig, SwitchTransformersConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from models.layers import SwiGLU
from models.moe.layer import MoEConfig, MoELayer, router_loss
from models.moe.policies import SwitchRouting, TopKRouting

D_MODEL = 256
FFN = 1024
EXPERTS = 8
SEQ_LEN = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Loss = tuple[Tensor, Tensor | None]
Side = tuple[nn.Module, Callable[[Tensor], Loss]]


def sides(k: int, tokens: int) -> dict[str, Side]:
    """Name -> (module, its output and auxiliary loss as a function of the input)."""
    layer = MoELayer(
        MoEConfig(experts=EXPERTS, ffn=FFN, router=SwitchRouting() if k == 1 else TopKRouting(k=k)), D_MODEL
    )
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
    config = Qwen3MoeConfig(
        hidden_size=D_MODEL, moe_intermediate_size=FFN, num_experts=EXPERTS, num_experts_per_tok=k, norm_topk_prob=k > 1
    )
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeSparseMoeBlock(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module, lambda x_BTD: (module(x_BTD), None)


def switch_side(tokens: int) -> Side:
    config = SwitchTransformersConfig(
        hidden_size=D_MODEL,
        d_model=D_MODEL,
        d_ff=3 * FFN // 2,
        num_experts=EXPERTS,
        expert_capacity=tokens,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    module = SwitchTransformersSparseMLP(config)
    return module, lambda x_BTD: (module(x_BTD), None)


def pass_through(side: Side, x_BTD: Tensor, grad_BTD: Tensor) -> Callable[[], None]:
    """One forward and backward pass, from no gradients to all of them."""
    module, run = side
    leaf_BTD = x_BTD.clone().requires_grad_()

    def once() -> None:
        module.zero_grad(set_to_none=True)
        leaf_BTD.grad = None
        y_BTD, auxiliary = run(leaf_BTD)
        roots = [(y_BTD, grad_BTD)] if auxiliary is None else [(y_BTD, grad_BTD), (auxiliary, None)]
        torch.autograd.backward(*map(list, zip(*roots)))  # type: ignore[arg-type]
        wait(x_BTD.device)

    return once


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(dtype: str, threads: int, k: int, tokens: int, rounds: int, device: str) -> dict[str, object]:
    """One row: medians in ms, paired ratios, all samples."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x_BTD = torch.randn(tokens // SEQ_LEN, SEQ_LEN, D_MODEL).to(device, DTYPES[dtype])
    grad_BTD = torch.randn_like(x_BTD)
    passes = {
        name: pass_through((module.to(device, DTYPES[dtype]), run), x_BTD, grad_BTD)
        for name, (module, run) in sides(k, tokens).items()
    }
    samples = {name: [1e3 * value for value in values] for name, values in in_turn(passes, rounds).items()}
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "dtype": dtype,
        "threads": threads,
        "k": k,
        "tokens": tokens,
        "ours_ms": medians["ours"],
        "floor_ms": medians["floor"],
        "peers": {name: value for name, value in medians.items() if name not in ("ours", "floor")},
        "ratios": {name: ratio(samples["ours"], values) for name, values in samples.items() if name != "ours"},
        "samples_ms": samples,
    }


def show(row: dict[str, object]) -> None:
    """One line: each side's median, half its interquartile range, and ours / theirs."""
    cells = [f"{row['dtype']:8} {row['threads']} threads k={row['k']} {row['tokens']:5} tokens"]
    for name, values in row["samples_ms"].items():  # type: ignore[attr-defined]
        first, median, third = statistics.quantiles(values, n=4)
        beside = "" if name == "ours" else f" x{row['ratios'][name]:.2f}"  # type: ignore[index]
        cells.append(f"{name} {median:7.1f} ± {(third - first) / 2:4.1f} ms{beside}")
    print(" | ".join(cells), flush=True)


PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::bmm"),
    "SwiGLU": ("aten::silu", "aten::silu_backward", "aten::mul", "aten::mul_"),
    "moving rows": ("aten::index_select", "aten::gather", "aten::scatter_", "aten::sort", "aten::add_"),
}


def show_profile(dtype: str, threads: int, k: int, tokens: int, device: str) -> None:
    """Print the shares of the layer's time by operator.

    The multiplications of the router and of combining count as SwiGLU's.
    """
    torch.set_num_threads(threads)
    side = sides(k, tokens)["ours"]
    side[0].to(device, DTYPES[dtype])
    x_BTD = torch.randn(tokens // SEQ_LEN, SEQ_LEN, D_MODEL).to(device, DTYPES[dtype])
    once = pass_through(side, x_BTD, x_BTD)
    for _ in range(3):
        once()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as profiler:
        for _ in range(10):
            once()
    share: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        part = next(
            (part for part, names in PARTS.items() if event.key in names), "routing, losses, statistics, Python"
        )
        share[part] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    total = sum(share.values())
    parts = ", ".join(f"{part} {value / total:.1%}" for part, value in sorted(share.items(), key=lambda item: -item[1]))
    print(f"{dtype:8} {threads} threads k={k} {tokens} tokens: {total / 10000:.1f} ms: {parts}")


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument(
        "--profile", action="store_true", help="print what the layer's time is spent on, at the largest size"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 4096])
    args = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo" if args.device == "cpu" else "nccl")
    if args.profile:
        for dtype, threads, k in itertools.product(args.dtype, args.threads, (1, 2)):
            show_profile(dtype, threads, k, max(args.tokens), args.device)
    else:
        rows = []
        for dtype, threads, k, tokens in itertools.product(args.dtype, args.threads, (1, 2), args.tokens):
            rows.append(measure(dtype, threads, k, tokens, args.rounds, args.device))
            show(rows[-1])
        write(args.json, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
