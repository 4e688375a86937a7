"""The peak that model FLOPs utilisation is measured against: the datasheet's on known GPUs, a measured matmul elsewhere."""

import time

import torch

from trainer.gpus import by_device_name


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak FLOP/s of one rank: from the datasheet for bf16 on a known GPU, else the best of a few matmuls on this rank's threads."""
    if device.type == "cuda" and precision != "fp32":
        known = by_device_name(torch.cuda.get_device_name(device))
        if known:
            return known.bf16
    size = 4096 if device.type == "cuda" else 768
    dtype = torch.float32 if device.type == "cpu" or precision == "fp32" else torch.bfloat16
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        _wait(device)
        begin = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
