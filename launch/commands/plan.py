"""`switchwork plan`: whether a job fits, divides and ends in time, before any GPU is requested."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from launch.config import JobConfig
from launch.console.progress import clock
from launch.console.tables import table
from trainer.parsing import parse, read_job
from trainer.planning.estimate import Candidate, CheckpointPlan, Forecast, ParameterCounts, Plan, Rates, estimate
from trainer.planning.gpus import by_device_name, find_gpu, gpus, this_cpu
from trainer.planning.layout import Machine, MemoryPlan, Part
from trainer.planning.step_time import Exchange, StepTime

PARTS: Mapping[Part, tuple[str, str]] = {
    Part.PARAMETERS: ("weights", "flat row of the optimiser's group; at ZeRO 3 its part and what is gathered"),
    Part.GRADIENTS: ("gradients", "with DeepSpeed's bucket and its copy around a collective"),
    Part.MASTER: ("fp32 weights", "the partition that ZeRO >= 1 updates"),
    Part.MOMENTS: ("Adam's moments", "2 x 4 bytes a parameter (ZeRO, section 3.1)"),
    Part.AVERAGES: ("moving averages", "4 bytes a parameter that this rank updates"),
    Part.TEACHER: ("the teacher", "4 bytes a parameter, whole on each rank"),
    Part.ACTIVATIONS: ("activations", "operation by operation (Korthikanti et al. 2022, section 4.1)"),
    Part.RECOMPUTED: ("one block again", "activation checkpointing: the largest block's activations"),
    Part.BF16_COPIES: ("bf16 weights", "autocast's copies, kept until the backward pass"),
    Part.LOSS: ("logits' gradients", "while the loss's backward pass runs"),
    Part.ALL_TO_ALL: ("all-to-all", "rows sent and received (GShard, section 3.2)"),
}
"""The name of a part in tables and pictures, and the formula behind its bytes."""


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """The machine, as the options of the command describe it."""

    gpu: str | None
    """Key of the GPU in the table; None for this machine's device."""
    per_node: int | None
    """GPUs per node; None for the usual number of that GPU."""
    efficiency: float
    """Share of the peak FLOPs that kernels reach."""
    notice_s: float
    """Seconds between the notice of a preemption and the end."""
    storage_gb: float
    """Rate at which checkpoints are written, in GB/s."""


def machine_of(options: MachineOptions, count: int) -> Machine:
    """The machine with `count` GPUs that the options describe.

    Raises ValueError for an unknown GPU or a number that is out of range.
    """
    _check_bounds(options, count)
    key = options.gpu or _this_gpu() or "cpu"
    gpu = this_cpu(count) if key == "cpu" else find_gpu(key)
    return Machine(
        key=key,
        gpu=gpu,
        gpus=count,
        per_node=min(options.per_node or gpu.per_node, count),
        efficiency=options.efficiency,
        notice_s=options.notice_s,
        storage=options.storage_gb * 1e9,
    )


def _check_bounds(options: MachineOptions, count: int) -> None:
    bounds = (("--gpus", count, 1), ("--per-node", options.per_node or 1, 1), ("--notice", options.notice_s, 0))
    for name, value, least in bounds:
        if value < least:
            raise ValueError(f"{name}: {value} is below {least}; use {least} or more")
    if not 0 < options.efficiency <= 1 or not options.storage_gb > 0:
        values = f"--efficiency {options.efficiency} and --storage {options.storage_gb}"
        raise ValueError(f"{values}: the first is a share in (0, 1], the second is above 0")


def _this_gpu() -> str | None:
    """The key of this machine's GPU in the table; None without a GPU, or if the table lacks it."""
    known = by_device_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return next((key for key, gpu in gpus().items() if gpu == known), None)


def plan(
    console: Console,
    path: str,
    overrides: Sequence[str],
    workers: int | None,
    options: MachineOptions,
    as_json: bool,
    picture: str | None,
) -> bool:
    """Print the plan of the job at `path`, as tables or as JSON; True if the job can run.

    `picture` is a file for a chart of its memory.
    """
    job = parse(JobConfig, read_job(path, overrides))
    machine = machine_of(options, job.cluster.max_workers if workers is None else workers)
    name = job.run.name or Path(path).stem
    planned = estimate(replace(job.run, name=name), machine)
    if picture:
        file = Path(picture)
        draw_memory(planned, file, name)
        if not as_json:
            console.print(f"wrote {file}")
    if as_json:
        print(json.dumps(plan_as_json(planned), indent=1))
    else:
        show(console, name, planned)
    return planned.verdict


def plan_as_json(planned: Plan) -> dict[str, object]:
    """The plan for programs; the plan of a job that would be refused has no forecast."""
    machine = planned.machine
    divisions = [asdict(division) | {"good": division.good} for division in planned.divisions]
    parameters: dict[str, object] = {"networks": planned.parameters.networks}
    if planned.parameters.transformer is not None:
        parameters |= asdict(planned.parameters.transformer)
    return {
        "divides": divisions,
        "machine": asdict(machine.gpu) | {"key": machine.key, "gpus": machine.gpus, "per_node": machine.per_node},
        "parameters": parameters,
        **({} if planned.forecast is None else _forecast_as_json(planned.forecast, machine)),
        "reasons": planned.reasons,
        "verdict": planned.verdict,
        "unknown": planned.unknown,
    }


def _forecast_as_json(forecast: Forecast, machine: Machine) -> dict[str, object]:
    choice = forecast.choice
    exchanges = [
        asdict(exchange) | {"moved": exchange.moved, "seconds": exchange.seconds(machine.gpu)}
        for exchange in forecast.layout.exchanges
    ]
    return {
        "memory": _memory_as_json(forecast.layout.memory),
        "exchanges": exchanges,
        "step": _step_as_json(forecast.layout.step, forecast.rates),
        "target": None if forecast.target is None else asdict(forecast.target),
        "checkpoint": _checkpoint_as_json(forecast.checkpoint),
        "candidates": [_candidate_as_json(candidate) for candidate in forecast.candidates],
        "choice": None if choice is None else _choice_as_json(choice),
    }


def _memory_as_json(memory: MemoryPlan) -> dict[str, object]:
    return {
        "parts": memory.parts,
        "parts_worst": memory.parts_worst,
        "balanced": memory.balanced,
        "worst": memory.worst,
        "usable": memory.usable,
        "fits_balanced": memory.fits_balanced,
        "fits_worst": memory.fits_worst,
        "host": memory.host,
    }


def _step_as_json(step: StepTime | None, rates: Rates | None) -> dict[str, object] | None:
    if step is None or rates is None:
        return None
    known = {name: rate for name, rate in asdict(rates).items() if rate is not None}
    return asdict(step) | {"total": step.total} | known


def _checkpoint_as_json(checkpoint: CheckpointPlan) -> dict[str, object]:
    return {
        "bytes": checkpoint.size,
        "copy_s": checkpoint.copy_s,
        "write_s": checkpoint.write_s,
        "notice_s": checkpoint.notice_s,
        "in_time": checkpoint.in_time,
    }


def _candidate_as_json(candidate: Candidate) -> dict[str, object]:
    memory = candidate.memory
    return {
        "zero": candidate.zero,
        "ep": candidate.ep,
        "seconds": candidate.seconds,
        "balanced": memory.balanced,
        "worst": memory.worst,
        "fits_balanced": memory.fits_balanced,
        "fits_worst": memory.fits_worst,
        "parts": memory.parts,
    }


def _choice_as_json(choice: Candidate) -> dict[str, object]:
    values = _candidate_as_json(choice)
    return {name: values[name] for name in ("zero", "ep", "seconds", "balanced", "worst", "fits_worst")}


def show(console: Console, name: str, planned: Plan) -> None:
    """Print the plan as tables."""
    machine = planned.machine
    forecast = planned.forecast
    console.print(f"{'YES' if planned.verdict else 'NO'}: {name} on {machine.gpus} x {machine.key}", style="bold")
    for reason in planned.reasons:
        console.print(f"  {reason}", markup=False)
    rows = [
        [row.what, str(row.number), str(row.divisor), row.by, "yes" if row.good else "NO"] for row in planned.divisions
    ]
    _print_table(console, "What must divide", ("", "number", "by", "", "divides"), rows)
    _show_parameters(console, planned.parameters)
    if forecast is not None:
        _show_memory(console, forecast.layout.memory)
        _show_exchanges(console, forecast.layout.exchanges, machine)
        _show_step(console, forecast)
        _show_checkpoint(console, forecast.checkpoint)
        _show_choice(console, forecast)
    console.print("What it cannot know", style="bold")
    for line in planned.unknown:
        console.print(f"  {line}", markup=False)


def _print_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose second and third columns hold numbers."""
    left = [position for position in range(len(headings)) if position not in (1, 2)]
    console.print(table(title, headings, rows, left=left, bold=True))


def _show_parameters(console: Console, counted: ParameterCounts) -> None:
    line = "Parameters: " + ", ".join(f"{name} {size:,}" for name, size in counted.networks.items())
    cost = counted.transformer
    if cost is not None:
        line += f"; {cost.active:,.0f} active for a token, {cost.flops_per_token:.3g} FLOPs a token in training"
    console.print(line)


def _show_memory(console: Console, memory: MemoryPlan) -> None:
    rows = []
    for part, (name, source) in PARTS.items():
        balanced = memory.parts.get(part, 0.0)
        worst = memory.parts_worst.get(part, 0.0)
        if balanced or worst:
            rows.append([name, _gb(balanced), _gb(worst), source])
    rows.append(["sum", _gb(memory.balanced), _gb(memory.worst), f"of {memory.usable / 1e9:.2f} GB usable"])
    _print_table(console, "Memory of a GPU, GB", ("part", "balanced", "worst load", "formula"), rows)
    console.print(f"CPU memory for each GPU (offloaded state, staged checkpoint): {_gb(memory.host)} GB")


def _gb(size: float) -> str:
    """`size` bytes in GB."""
    return f"{size / 1e9:.3f}"


def _show_exchanges(console: Console, exchanges: Sequence[Exchange], machine: Machine) -> None:
    if not exchanges:
        return
    rows = []
    for exchange in exchanges:
        ring = f"{exchange.ranks} ranks, {'inside a node' if exchange.inside else 'over the network'}"
        name = f"{exchange.what}: {exchange.kind}"
        rows.append([name, _gb(exchange.moved), f"{exchange.seconds(machine.gpu):.4f}", ring])
    _print_table(console, "Communication of a step", ("", "GB sent", "seconds", "ring over the slowest link"), rows)


def _show_step(console: Console, forecast: Forecast) -> None:
    step = forecast.layout.step
    rates = forecast.rates
    target = forecast.target
    if step is None or rates is None or target is None:
        return
    parts = f"arithmetic {step.arithmetic:.4f} + exchange {step.exchange:.4f} + update {step.update:.4f}"
    console.print(f"Step: {step.total:.4f} s ({parts}), MFU {step.mfu:.1%}")
    if rates.tokens_per_day is None:
        rate = f"{rates.samples_per_s:.3g} samples/s"
    else:
        rate = f"{rates.tokens_per_day:.3g} tokens a day"
    seen = f"{target.tokens:.3g} tokens" if target.tokens else f"{target.samples:.3g} samples"
    console.print(f"Target: {seen} in {clock(target.hours * 3600)}, {target.gpu_hours:.2f} GPU hours, at {rate}")


def _show_checkpoint(console: Console, checkpoint: CheckpointPlan) -> None:
    seconds = f"{checkpoint.copy_s:.2f} s to copy, {checkpoint.write_s:.1f} s to write in the background"
    late = "in time" if checkpoint.in_time else "NOT in time"
    notice = f"{late} for a notice of {checkpoint.notice_s:.0f} s"
    console.print(f"Checkpoint: {_gb(checkpoint.size)} GB, {seconds}; {notice}")


def _show_choice(console: Console, forecast: Forecast) -> None:
    if not forecast.candidates:
        return
    rows = []
    for candidate in forecast.candidates:
        memory = candidate.memory
        name = f"zero {candidate.zero}, ep {candidate.ep}"
        seconds = f"{candidate.seconds:.4f}" if candidate.seconds else ""
        rows.append([name, f"{memory.balanced / 1e9:.2f}", f"{memory.worst / 1e9:.2f}", _fit(memory), seconds])
    _print_table(console, "Layouts", ("", "GB balanced", "GB worst", "fits", "s a step"), rows)
    choice = forecast.choice
    chosen = f"zero {choice.zero}, ep {choice.ep}" if choice else "none: nothing fits"
    console.print(f"It would choose {chosen}", style="bold")


def _fit(memory: MemoryPlan) -> str:
    if memory.fits_worst:
        return "yes"
    return "balanced only" if memory.fits_balanced else "no"


_COLOURS = "#1f4e79 #2e86c1 #85c1e9 #aed6f1 #d6dbdf #ca6f1e #e59866 #f5cba7 #a9dfbf #27ae60 #7d6608".split()
"""A colour per part of PARTS."""


def draw_memory(planned: Plan, file: Path, title: str) -> None:
    """Draw the memory of every layout at balanced load, as stacked bars.

    Raises ValueError for a plan without layouts.
    """
    # Importing matplotlib takes a second, and only --picture needs it.
    from trainer.records.charts import INK, PLAIN, plt

    forecast = planned.forecast
    if forecast is None or not forecast.candidates:
        raise ValueError(f"--picture {file}: the plan has no layout to draw ({planned.reasons[0]})")
    layouts = forecast.candidates
    names = [f"ZeRO {layout.zero}\nEP {layout.ep}" for layout in layouts]
    with plt.rc_context(PLAIN):
        figure, axis = plt.subplots(figsize=(max(6.0, 1.1 * len(layouts) + 3), 4.2), layout="constrained")
        floor = [0.0] * len(layouts)
        for colour, (part, (name, _)) in zip(_COLOURS, PARTS.items(), strict=True):
            heights = [layout.memory.parts.get(part, 0.0) / 1e9 for layout in layouts]
            if any(heights):
                axis.bar(names, heights, bottom=floor, color=colour, label=name, width=0.7)
                floor = [low + height for low, height in zip(floor, heights, strict=True)]
        usable = forecast.layout.memory.usable / 1e9
        key = planned.machine.key
        if usable < 3 * max(floor):  # a line far above the bars would press them flat
            axis.axhline(usable, color=INK, linestyle="--", linewidth=1, label=f"usable of a {key}")
        axis.set_ylabel("GB of a GPU")
        axis.set_title(f"{title}: memory by part at balanced load; {usable:.1f} GB of a {key} are usable")
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(file)
        plt.close(figure)
