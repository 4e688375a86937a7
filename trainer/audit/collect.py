"""What each worker of an audit does: two real optimiser steps, watched.

The gradient is read from AdamW's first moment, which with betas[0] = 0 is the gradient itself: summed over micro-batches, reduced over
ranks, cut into shards and clipped, as the optimiser was given it at any ZeRO stage. The second step begins with weights that were updated and spread.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.steps import Share
from models.experts import Experts
from models.router import Router
from trainer.audit.decisions import Recorded, deciding
from trainer.audit.evidence import AuditedStep, Evidence, RouterCall, to_bytes
from trainer.audit.rounding import arithmetic
from trainer.config import RunConfig, check
from trainer.hooks import fragments
from trainer.loop import Training, train_step
from trainer.memory import out_of_memory
from trainer.parsing import parse
from trainer.run_files import run_files
from trainer.shards import receipt
from trainer.worker import build_training
from trainer.world import World, joined

_FAR = 1000


def audit_worker(values: Mapping[str, Any]) -> None:
    """Collect the evidence of the plain RunConfig `values` with the ranks that the environment names; rank 0 writes it into the run's folder."""
    run = parse(RunConfig, values, "run")
    with joined(run.device, run.threads, run.collective_timeout_s) as world:
        check(run, world.size)
        with out_of_memory(run, world.rank):
            evidence = collect(run, world)
        if world.is_main:
            run_files(run.root, run.name).write_evidence(to_bytes(evidence))


def collect(run: RunConfig, world: World) -> Evidence:
    """Two audited steps of `run`, on its first two global batches; complete on rank 0 only."""
    optimizer = replace(run.optimizer, betas=(0.0, run.optimizer.betas[1]))
    training = build_training(replace(run, optimizer=optimizer, ema=None), world)
    if (start := run.objective.start) is not None:
        start.fill(fragments(training), lambda line: None)
        for engine in training.engines.values():
            engine.refresh()
    objective = training.objective
    share = Share(rank=world.rank, world=world.size, global_batch=run.batch.global_batch, micro_batch=run.batch.micro_batch, group=objective.group)
    stream = objective.stream(share, None)
    steps = []
    for number, data in zip((0, _next_whole(training)), stream):
        training.progress.step = number
        steps.append(_audited(training, data.micro_batches, optimizer.clip, recording=not run.compile))
    stream.close()
    convolutions = any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for network in objective.networks.values() for module in network.modules())
    return Evidence(world.size, str(world.device), arithmetic(run.is_bf16(world.device.type == "cuda"), world.device, convolutions), steps)


def _next_whole(training: Training) -> int:
    """The first step after step 0 in which every network is due."""
    return next(step for step in range(1, _FAR) if all(training.objective.is_due(phase, step) for phase in training.objective.phases))


def _audited(training: Training, micro_batches: list[dict[str, Tensor]], clip: float | None, recording: bool) -> AuditedStep:
    step, world = AuditedStep(training.step), training.world
    training.norms = {}
    state = whole(training)
    step.weights, step.buffers = state["weight"], state["buffer"]
    watch = _Watch(training, recording)
    with watch:
        train_step(training, micro_batches)
    # Each rank undoes its own clipping: where a reduction is missing, ranks may clip by different norms.
    clipped = {phase: 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6)) for phase, norm in training.norms.items()}  # 1e-6: as all engines do
    state = whole(training, clipped)
    step.updated, step.buffers_after = state["weight"], state["buffer"]
    step.refused = str(training.stopped or "") or next((anomaly["reason"] for anomaly in training.guard.found), "")
    step.losses = {phase: training.guard.losses[phase][-1] for phase in training.norms if training.guard.losses[phase]}
    step.norms = {phase: float(norm) for phase, norm in training.norms.items()}
    step.gradients = {name: moment for name, moment in state["exp_avg"].items() if name.partition("/")[0] in step.norms}
    step.batches = [batch for rank in _to_main(micro_batches, world) for batch in rank]
    step.decisions = [decision for rank in _to_main(watch.decisions(), world) for decision in rank]
    step.routers = watch.routers
    for rank, seen in enumerate(_to_main(watch.seen, world)):
        for name, (start, size, bits) in seen.items():
            if receipt(step.weights[name].flatten()[start : start + size], start) != bits:
                step.strangers.append(f"{name} on rank {rank}")
    return step


def whole(training: Training, clipped: Mapping[str, float] = MappingProxyType({})) -> dict[str, dict[str, Tensor]]:
    """On rank 0: weights, first moments and buffers, whole, by kind and name; first moments divided by what this rank `clipped` their network by."""
    state: dict[str, dict[str, Tensor]] = {"weight": {}, "exp_avg": {}, "buffer": {}}
    mine = []
    for f in fragments(training):
        if f.kind in state:
            factor = clipped.get(f.name.partition("/")[0], 1.0) if f.kind == "exp_avg" else 1.0
            values = f.values[f.owned].cpu()
            mine.append((f.kind, f.name, f.global_shape, f.start + f.owned.start, values.clone() if factor == 1.0 else values / factor))
    for rank in _to_main(mine, training.world):
        for kind, name, shape, start, values in rank:
            flat = state[kind].setdefault(name, torch.zeros(shape, dtype=values.dtype)).view(-1)
            flat[start : start + len(values)] = values
    return state


def _to_main(thing: Any, world: World) -> list[Any]:
    """`thing` of each rank on rank 0; nothing elsewhere."""
    if world.size == 1:
        return [thing]
    things = [None] * world.size if world.is_main else None
    dist.gather_object(thing, things)
    return things or []


class _Watch:
    """For a block: which weights the forward passes use, what routing decides, and what the routers of rank 0 are given and give."""

    def __init__(self, training: Training, recording: bool):
        self.networks, self.main = training.objective.networks, training.world.is_main
        self.record = {name: Recorded() for name in self.networks if recording}
        self.seen: dict[str, tuple[int, int, int]] = {}
        """Start, length and receipt of each parameter, as it was in its module's first forward pass."""
        self.routers: dict[str, RouterCall] = {}
        self.closing: list[Any] = []

    def decisions(self) -> list[Tensor]:
        return [decision for record in self.record.values() for decision in record.found]

    def __enter__(self) -> None:
        for network, module in self.networks.items():
            if network in self.record:
                block = deciding(module, self.record[network])
                block.__enter__()
                self.closing.append(lambda block=block: block.__exit__(None, None, None))
            for path, part in module.named_modules():
                # After the engine's own hooks: at ZeRO 3 these gather the weights just before.
                self.closing.append(part.register_forward_pre_hook(self._note(network, path)).remove)
                if isinstance(part, Router) and self.main and network in self.record:
                    self.closing.append(part.register_forward_hook(self._note_router(f"{network}/{path}", self.record[network])).remove)

    def __exit__(self, *problem: Any) -> None:
        for close in self.closing:
            close()

    def _note(self, network: str, path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any) -> None:
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{network}/{path}.{leaf}" if path else f"{network}/{leaf}"
                if name not in self.seen and parameter.numel():
                    start = module.first_expert * parameter[0].numel() if isinstance(module, Experts) else 0
                    self.seen[name] = (start, parameter.numel(), receipt(parameter.detach().flatten(), start))

        return note

    def _note_router(self, name: str, record: Recorded) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, routing: Any) -> None:
            if name not in self.routers:
                x_GND, keys_B = (each.detach().cpu().clone() for each in args)
                log_z_GN, gate_GA = (each.detach().float().cpu().clone() for each in (routing.log_z_GN, routing.gate_GA))
                self.routers[name] = RouterCall(x_GND, keys_B, record.found[-1], log_z_GN, gate_GA)

        return note
