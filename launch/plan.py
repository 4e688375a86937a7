"""`switchwork plan`: will the job fit, divide and end in time? Before any GPU is asked for."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from launch.config import JobConfig
from launch.estimate import Machine, estimate
from launch.progress import clock
from trainer.gpus import by_device_name, find_gpu, gpus, this_cpu
from trainer.parsing import parse, read_job

PARTS = {
    "parameters": ("weights", "flat row of the optimiser's group; at ZeRO 3 its part and what is gathered"),
    "gradients": ("gradients", "with DeepSpeed's bucket and its copy around a collective"),
    "master": ("fp32 weights", "the partition that ZeRO >= 1 updates"),
    "moments": ("Adam's moments", "2 x 4 bytes a parameter (ZeRO, section 3.1)"),
    "averages": ("moving averages", "4 bytes a parameter that this rank updates"),
    "teacher": ("the teacher", "4 bytes a parameter, whole on each rank"),
    "activations": ("activations", "operation by operation (Korthikanti et al. 2022, section 4.1)"),
    "recomputed": ("one block again", "activation checkpointing: the largest block's activations"),
    "bf16_copies": ("bf16 weights", "autocast's copies, kept until the backward pass"),
    "loss": ("logits' gradients", "while the loss's backward pass runs"),
    "all_to_all": ("all-to-all", "rows sent and received (GShard, section 3.2)"),
}


def machine_of(gpu: str | None, count: int, per_node: int | None, efficiency: float, notice_s: float, storage_gb: float) -> Machine:
    """What the options mean; without --gpu the device of this machine. Raises ValueError for what is not in the table or out of range."""
    for name, value, least in (("--gpus", count, 1), ("--per-node", per_node or 1, 1), ("--notice", notice_s, 0)):
        if value < least:
            raise ValueError(f"{name}: {value} is below {least}; use {least} or more")
    if not 0 < efficiency <= 1 or not storage_gb > 0:
        raise ValueError(f"--efficiency {efficiency} and --storage {storage_gb}: the first is a share in (0, 1], the second is above 0")
    here = by_device_name(torch.cuda.get_device_name()) if gpu is None and torch.cuda.is_available() else None
    if here is not None:
        gpu = next(key for key, each in gpus().items() if each == here)
    found = this_cpu(count) if gpu in (None, "cpu") else find_gpu(str(gpu))
    nodes = min(per_node or found.per_node, count)
    return Machine(key=gpu or "cpu", gpu=found, gpus=count, per_node=nodes, efficiency=efficiency, notice_s=notice_s, storage=storage_gb * 1e9)


def plan(console: Console, path: str, overrides: Sequence[str], workers: int | None, options: dict[str, Any], as_json: bool, picture: str | None) -> bool:
    """Print the plan of the job at `path`; True if it can run."""
    job = parse(JobConfig, read_job(path, overrides))
    machine = machine_of(count=job.cluster.max_workers if workers is None else workers, **options)
    run = replace(job.run, name=job.run.name or Path(path).stem)
    found = estimate(run, machine)
    if picture:
        from launch.plan_picture import draw

        console.print(f"wrote {draw(found, Path(picture), run.name or '')}") if not as_json else draw(found, Path(picture), run.name or "")
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(console, run.name or "", found)
    return bool(found["verdict"])


def show(console: Console, name: str, found: dict[str, Any]) -> None:
    """The plan as tables."""
    machine = found["machine"]
    console.print(f"{'YES' if found['verdict'] else 'NO'}: {name} on {machine['gpus']} x {machine['key']}", style="bold", highlight=False)
    for reason in found["reasons"]:
        console.print(f"  {reason}", highlight=False, markup=False)
    _show_counts(console, found)
    if "memory" in found:
        _show_memory(console, found["memory"])
        _show_time(console, found)
        _show_choice(console, found)
    console.print("What it cannot know", style="bold")
    for line in found["unknown"]:
        console.print(f"  {line}", highlight=False, markup=False)


def _table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in (1, 2) else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _show_counts(console: Console, found: dict[str, Any]) -> None:
    rows = [[each["what"], str(each["number"]), str(each["divisor"]), each["by"], "yes" if each["good"] else "NO"] for each in found["divides"]]
    _table(console, "What must divide", ("", "number", "by", "", "divides"), rows)
    counted = found["parameters"]
    sizes = ", ".join(f"{name} {size:,}" for name, size in counted["networks"].items())
    active = f"; {counted['active']:,.0f} active for a token, {counted['flops_per_token']:.3g} FLOPs a token in training" if "active" in counted else ""
    console.print(f"Parameters: {sizes}{active}", highlight=False)


def _show_memory(console: Console, memory: dict[str, Any]) -> None:
    rows = []
    for key, (name, source) in PARTS.items():
        if memory["parts"].get(key) or memory["parts_worst"].get(key):
            rows.append([name, f"{memory['parts'][key] / 1e9:.3f}", f"{memory['parts_worst'][key] / 1e9:.3f}", source])
    rows.append(["sum", f"{memory['balanced'] / 1e9:.3f}", f"{memory['worst'] / 1e9:.3f}", f"of {memory['usable'] / 1e9:.2f} GB usable"])
    _table(console, "Memory of a GPU, GB", ("part", "balanced", "worst load", "formula"), rows)
    console.print(f"CPU memory for each GPU (offloaded state, staged checkpoint): {memory['host'] / 1e9:.3f} GB", highlight=False)


def _show_time(console: Console, found: dict[str, Any]) -> None:
    if found["exchanges"]:
        rows = [
            [
                f"{each['what']}: {each['kind']}",
                f"{each['moved'] / 1e9:.3f}",
                f"{each['seconds']:.4f}",
                f"{each['ranks']} ranks, {'inside a node' if each['inside'] else 'over the network'}",
            ]
            for each in found["exchanges"]
        ]
        _table(console, "Communication of a step", ("", "GB sent", "seconds", "ring over the slowest link"), rows)
    step, target, checkpoint = found["step"], found["target"], found["checkpoint"]
    if step:
        parts = f"arithmetic {step['arithmetic']:.4f} + exchange {step['exchange']:.4f} + update {step['update']:.4f}"
        console.print(f"Step: {step['total']:.4f} s ({parts}), MFU {step['mfu']:.1%}", highlight=False)
        rate = f"{step['tokens_per_day']:.3g} tokens a day" if "tokens_per_day" in step else f"{step['samples_per_s']:.3g} samples/s"
        seen = f"{target['tokens']:.3g} tokens" if target["tokens"] else f"{target['samples']:.3g} samples"
        console.print(f"Target: {seen} in {clock(target['hours'] * 3600)}, {target['gpu_hours']:.2f} GPU hours, at {rate}", highlight=False)
    seconds = f"{checkpoint['copy_s']:.2f} s to copy, {checkpoint['write_s']:.1f} s to write in the background"
    late = "in time" if checkpoint["in_time"] else "NOT in time"
    console.print(f"Checkpoint: {checkpoint['bytes'] / 1e9:.3f} GB, {seconds}; {late} for a notice of {checkpoint['notice_s']:.0f} s", highlight=False)


def _show_choice(console: Console, found: dict[str, Any]) -> None:
    if not found["candidates"]:
        return
    rows = [
        [
            f"zero {each['zero']}, ep {each['ep']}",
            f"{each['balanced'] / 1e9:.2f}",
            f"{each['worst'] / 1e9:.2f}",
            _fit(each),
            f"{each['seconds']:.4f}" if each["seconds"] else "",
        ]
        for each in found["candidates"]
    ]
    _table(console, "Layouts", ("", "GB balanced", "GB worst", "fits", "s a step"), rows)
    choice = found["choice"]
    chosen = f"zero {choice['zero']}, ep {choice['ep']}" if choice else "none: nothing fits"
    console.print(f"It would choose {chosen}", style="bold", highlight=False)


def _fit(each: dict[str, Any]) -> str:
    return "yes" if each["fits_worst"] else "balanced only" if each["fits_balanced"] else "no"
