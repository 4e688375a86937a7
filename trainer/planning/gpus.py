"""GPUs and what they can do: the table of gpus.yaml, or this machine's devices, measured."""

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch
import yaml


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator, and what connects it; see gpus.yaml for the units."""

    name: str
    memory: float
    bf16: float
    fp32: float
    hbm: float
    link: float
    network: float
    host: float
    per_node: int
    source: str

    @property
    def is_cuda(self) -> bool:
        return self.name != "cpu"


@cache
def gpus() -> dict[str, Gpu]:
    """The table; a GPU whose name holds another's comes before it."""
    rows = yaml.safe_load((Path(__file__).parent / "gpus.yaml").read_text())
    return {key: Gpu(**row) for key, row in rows.items()}


def find_gpu(key: str) -> Gpu:
    """The GPU that a person names. Raises ValueError if the table has none."""
    if key not in gpus():
        raise ValueError(f"--gpu: {key} is not in the table; use one of {', '.join(gpus())}, or cpu for this machine")
    return gpus()[key]


def by_device_name(device: str) -> Gpu | None:
    """The GPU that torch calls `device`."""
    return next((gpu for gpu in gpus().values() if gpu.name in device), None)


def this_cpu(workers: int) -> Gpu:
    """The share of this machine that each of `workers` has.

    Measures one thread's matrix products and copies, in a quarter of a second.
    """
    flops = peak_flops(torch.device("cpu"), "fp32")
    source = torch.ones(1 << 24)
    begin = time.perf_counter()
    for _ in range(4):
        source.clone()
    copied = 8 * source.nbytes / (time.perf_counter() - begin)
    return Gpu(
        name="cpu",
        memory=psutil.virtual_memory().total / workers,
        bf16=flops,
        fp32=flops,
        hbm=copied,
        link=copied / 4,
        network=1e9,
        host=copied,
        per_node=workers,
        source="measured just now",
    )


def peak_flops(device: torch.device, precision: str) -> float:
    """The peak FLOP/s of one rank, against which model FLOPs utilisation is measured.

    For bf16 on a known GPU it is the datasheet's; elsewhere it is the best of a few matrix products
    on this rank's threads.
    """
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
