"""What a job needs before it starts: the figures of `switchwork plan`, as data that JSON can hold."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import gcd, lcm
from typing import Any

from models.flops import parameters
from trainer.config import RunConfig, check
from trainer.core.protocols import Objective
from trainer.engines import DeepSpeedConfig
from trainer.footprint import Activations, Footprint, footprint, groups_of, on_meta, parameter_count, transformer_config
from trainer.gpus import Gpu
from trainer.throughput import StepTime, exchanges, expert_exchange, step_time

USABLE = 0.92
"""Share of the memory that tensors may take: the rest is for the driver, NCCL and the allocator's gaps."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the job is planned for."""

    key: str
    gpu: Gpu
    gpus: int
    per_node: int
    efficiency: float
    """Share of the peak that matrix products reach."""
    notice_s: float
    """From the notice of a preemption to its end."""
    storage: float
    """Bytes/s that all ranks together write to `run.root`."""


def estimate(run: RunConfig, machine: Machine) -> dict[str, Any]:
    """The whole plan. Raises ValueError for a job that cannot be built at all."""
    objective = on_meta(run)
    refusal = _refusal(run, machine.gpus)
    plan: dict[str, Any] = {
        "divides": list(_divisions(run, objective, machine)),
        "machine": asdict(machine.gpu) | {"key": machine.key, "gpus": machine.gpus, "per_node": machine.per_node},
        "parameters": _parameters(objective),
    }
    if refusal is None:
        plan |= _layout(run, objective, machine)
        plan["checkpoint"] = _checkpoint(run, objective, machine)
        plan["candidates"] = list(_candidates(run, objective, machine))
        plan["choice"] = _choice(plan["candidates"])
    plan["reasons"] = _reasons(plan, refusal, machine)
    plan["verdict"] = refusal is None and plan["memory"]["fits_balanced"]
    plan["unknown"] = _unknown(run, objective, machine)
    return plan


def _refusal(run: RunConfig, workers: int) -> str | None:
    """What the command would say of the job on so many workers."""
    try:
        check(run, workers)
    except ValueError as error:
        return str(error)
    return None


def _divisions(run: RunConfig, objective: Objective, machine: Machine) -> Iterator[dict[str, Any]]:
    """Everything that must divide."""
    config, each = transformer_config(objective), machine.gpus * run.batch.micro_batch
    rows = [
        ("global batch", run.batch.global_batch, f"{machine.gpus} workers x micro-batch {run.batch.micro_batch}", each),
        ("micro-batch", run.batch.micro_batch, "routing group", objective.group),
        ("lanes", run.objective.lanes or lcm(8, machine.gpus), "workers", machine.gpus),
    ]
    if config is not None and config.moe is not None:
        rows += [("experts", config.moe.experts, "EP", run.ep(machine.gpus)), ("workers", machine.gpus, "EP", run.ep(machine.gpus))]
    for what, number, by, divisor in rows:
        yield {"what": what, "number": number, "by": by, "divisor": divisor, "good": number % divisor == 0}


def _parameters(objective: Objective) -> dict[str, Any]:
    config, network = transformer_config(objective), objective.networks.get("model")
    found: dict[str, Any] = {"networks": {name: parameter_count(each) for name, each in objective.networks.items()}}
    if config is not None:
        counted = parameters(config, network.vocab_size)  # type: ignore[union-attr, arg-type]
        found |= {"total": counted.total, "active": counted.active}
        found["flops_per_token"] = objective.flops_per_sample / objective.tokens_per_sample
    return found


def _layout(run: RunConfig, objective: Objective, machine: Machine) -> dict[str, Any]:
    """Memory, exchanges, step time and rates of one layout."""
    needs = footprint(run, objective, machine.gpus, run.is_bf16(machine.gpu.is_cuda), machine.gpu.is_cuda)
    usable = USABLE * machine.gpu.memory
    found: dict[str, Any] = {
        "memory": {
            "parts": _parts(needs, needs.balanced),
            "parts_worst": _parts(needs, needs.worst),
            "balanced": needs.total(False),
            "worst": needs.total(True),
            "usable": usable,
            "fits_balanced": needs.total(False) <= usable,
            "fits_worst": needs.total(True) <= usable,
            "host": sum(state.host for state in needs.states.values()) + _checkpoint(run, objective, machine)["bytes"] / machine.gpus,
        }
    }
    if not objective.flops_per_sample:
        return found | {"exchanges": [], "step": None, "target": None}
    accumulation = run.batch.global_batch // (machine.gpus * run.batch.micro_batch)
    moving = [
        each
        for groups in groups_of(run, objective, machine.gpus).values()
        for each in exchanges(run.engine, groups, accumulation, machine.gpus, machine.per_node)
    ]
    config, samples = transformer_config(objective), run.batch.global_batch // machine.gpus
    bf16, again, copied = run.is_bf16(machine.gpu.is_cuda), 1.0, 0.0
    if config is not None:
        moving += expert_exchange(config, samples * objective.tokens_per_sample, run.ep(machine.gpus), 2 if bf16 else 4, machine.per_node)
        again = 4 / 3 if config.activation_checkpointing else 1.0
        again += objective.frozen_flops_per_sample / objective.flops_per_sample
        copied = accumulation * (needs.balanced.kept.weight_copies / 2 if needs.balanced else 0.0)
    owned = sum(state.owned for state in needs.states.values())
    step = step_time(objective.flops_per_sample * samples, again, moving, owned, copied, machine.gpu, bf16, machine.efficiency)
    moved = [asdict(each) | {"moved": each.moved, "seconds": each.seconds(machine.gpu)} for each in moving]
    return found | {"exchanges": moved, "step": asdict(step) | _rates(run, objective, step), "target": _target(run, objective, machine, step)}


def _parts(needs: Footprint, activations: Activations | None) -> dict[str, float]:
    """Bytes by part, summed over networks."""
    states = needs.states.values()
    parts: dict[str, float] = {name: sum(getattr(state, name) for state in states) for name in ("parameters", "gradients", "master", "moments")}
    parts |= {"averages": needs.averages, "teacher": needs.teacher}
    if activations is not None:
        kept = activations.kept
        parts |= {"activations": kept.activations, "recomputed": kept.recomputed, "bf16_copies": kept.weight_copies}
        parts |= {"loss": activations.loss, "all_to_all": activations.all_to_all}
    return parts


def _rates(run: RunConfig, objective: Objective, step: StepTime) -> dict[str, float]:
    samples = run.batch.global_batch / step.total
    rates = {"total": step.total, "samples_per_s": samples}
    if objective.tokens_per_sample:
        rates |= {"tokens_per_s": samples * objective.tokens_per_sample, "tokens_per_day": 86400 * samples * objective.tokens_per_sample}
    return rates


def _target(run: RunConfig, objective: Objective, machine: Machine, step: StepTime) -> dict[str, float]:
    """Until what stops the run first."""
    bounds = [] if run.stop.hours is None else [run.stop.hours * 3600 / step.total]
    steps = run.steps(objective.tokens_per_sample)
    total = min([*bounds, *([] if steps is None else [steps])])
    hours = total * step.total / 3600
    tokens = total * run.batch.global_batch * objective.tokens_per_sample
    return {"steps": total, "samples": total * run.batch.global_batch, "tokens": tokens, "hours": hours, "gpu_hours": hours * machine.gpus}


def _checkpoint(run: RunConfig, objective: Objective, machine: Machine) -> dict[str, Any]:
    """Its size, and whether one that begins at the notice is whole before the end."""
    counts = {name: parameter_count(network) for name, network in objective.networks.items()}
    averaged = sum(counts[name] for name in objective.averaged) if run.ema else 0
    buffers = sum(buffer.nbytes for network in objective.networks.values() for buffer in network.buffers())
    size = 12 * sum(counts.values()) + 4 * averaged + buffers
    copy_s = size / machine.gpus / machine.gpu.host
    write_s = size / machine.storage
    return {"bytes": size, "copy_s": copy_s, "write_s": write_s, "notice_s": machine.notice_s, "in_time": copy_s + write_s <= machine.notice_s}


def _candidates(run: RunConfig, objective: Objective, machine: Machine) -> Iterator[dict[str, Any]]:
    """Every ZeRO stage and EP size that the job could run with on this machine."""
    if not isinstance(run.engine, DeepSpeedConfig):
        return
    config = transformer_config(objective)
    experts = config.moe.experts if config is not None and config.moe is not None else 1
    common = gcd(experts, machine.gpus)
    for ep in [ep for ep in range(1, common + 1) if common % ep == 0]:
        for zero in (0, 1, 2, 3):
            layout = replace(run, engine=replace(run.engine, zero=zero, ep=ep, offload_optimizer=run.engine.offload_optimizer and zero > 0))
            if _refusal(layout, machine.gpus) is None:
                found = _layout(layout, objective, machine)
                memory, step = found["memory"], found["step"]
                yield {
                    "zero": zero,
                    "ep": ep,
                    "seconds": step["total"] if step else None,
                    **{key: memory[key] for key in ("balanced", "worst", "fits_balanced", "fits_worst")},
                    "parts": memory["parts"],
                }


def _choice(candidates: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest that fits at the worst load, else at the balanced one; among equals the lowest stage, then the smallest EP."""
    fitting = [each for each in candidates if each["fits_worst"]] or [each for each in candidates if each["fits_balanced"]]
    best = min(fitting, key=lambda each: (round(each["seconds"] or 0.0, 6), each["zero"], each["ep"]), default=None)
    return best and {key: best[key] for key in ("zero", "ep", "seconds", "balanced", "worst", "fits_worst")}


def _reasons(plan: Mapping[str, Any], refusal: str | None, machine: Machine) -> list[str]:
    """Why yes or no, in words."""
    if refusal is not None:
        return [refusal]
    memory, checkpoint, choice = plan["memory"], plan["checkpoint"], plan["choice"]
    reasons = []
    for load in ("balanced", "worst"):
        fits = "fits into" if memory[f"fits_{load}"] else "does not fit into"
        reasons.append(f"{memory[load] / 1e9:.2f} GB at {load} load {fits} {memory['usable'] / 1e9:.2f} GB, {USABLE:.0%} of a {machine.key}")
    if not memory["fits_balanced"]:
        where = (
            f"zero {choice['zero']} and ep {choice['ep']} would fit"
            if choice
            else "no ZeRO stage and EP size fits: use more GPUs, a smaller micro-batch or activation_checkpointing"
        )
        reasons.append(where)
    if not checkpoint["in_time"]:
        seconds = checkpoint["copy_s"] + checkpoint["write_s"]
        reasons.append(f"a checkpoint takes {seconds:.0f} s, the notice of a preemption {machine.notice_s:.0f} s: what was done since the last one is lost")
    return reasons


def _unknown(run: RunConfig, objective: Objective, machine: Machine) -> list[str]:
    """What the plan cannot know."""
    config = transformer_config(objective)
    lines = [f"the share of the peak that kernels reach: {machine.efficiency:.0%} is assumed (--efficiency); a short run on one node tells"]
    lines.append("gaps of the memory allocator, NCCL's buffers and CUDA graphs: the 8 % left free stand for them")
    lines.append("whether the data keep up, and what else uses the network and the storage")
    if config is None:
        lines.append(
            f"what the forward and backward passes of {run.objective.name} keep in memory: only weights, gradients, optimiser and checkpoint are counted"
        )
    if config is not None and config.moe is not None:
        lines.append("how unevenly tokens choose experts: the step time is that of the balanced load")
    if objective.frozen_bytes:
        lines.append("what the teacher's forward pass and the softened distributions hold for a moment: of the teacher only the weights are counted")
    if run.compile:
        lines.append("what torch.compile saves: the activations are those of eager mode")
    if not objective.flops_per_sample:
        lines.append(f"the FLOPs of {run.objective.name}: its objective states no formula, so there is no step time")
    return lines
