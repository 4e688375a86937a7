"""The peak that model FLOPs utilisation is measured against: the datasheet's on known GPUs, a measured matmul elsewhere."""

import time

import torch

# Dense bf16 with fp32 accumulation, NVIDIA's datasheets, FLOP/s.
DATASHEET_BF16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "B200": 2250e12}


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak FLOP/s of one rank: from the datasheet for bf16 on a known GPU, else the best of a few matmuls on this rank's threads."""
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        known = [flops for part, flops in DATASHEET_BF16.items() if part in name]
        if known:
            return known[0]
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
