"""What each worker of an audit does: two real optimiser steps, watched.

The gradient is read from AdamW's first moment, which with betas[0] = 0 is the gradient itself: summed over micro-batches, reduced over
ranks, cut into shards and clipped, as the optimiser was given it at any ZeRO stage. The second step begins with weights that were updated and spread.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.share import Share
from models.moe.experts import Experts
from models.moe.policies import Assignments
from models.moe.router import Router
from trainer.audit.decisions import Recorded, deciding
from trainer.audit.evidence import AuditedStep, Evidence, RouterCall, StaleWeight, StepFacts, to_bytes
from trainer.audit.rounding import arithmetic
from trainer.checkpoint.fragments import receipt
from trainer.config import RunConfig, check
from trainer.core.loop import train_step
from trainer.core.training import Training, fragments
from trainer.parsing import parse
from trainer.run_files import run_files
from trainer.worker.main import build_training
from trainer.worker.memory import out_of_memory
from trainer.world import World, joined

_FAR = 1000
T = TypeVar("T")


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
    share = Share(
        rank=world.rank,
        world=world.size,
        global_batch=run.batch.global_batch,
        micro_batch=run.batch.micro_batch,
        group=objective.group,
    )
    stream = objective.stream(share, None)
    steps = []
    for number, data in zip((0, _next_whole(training)), stream):
        training.progress.step = number
        steps.append(_audited(training, data.micro_batches, optimizer.clip, recording=not run.compile))
    stream.close()
    bf16 = run.is_bf16(world.device.type == "cuda")
    convolutions = any(_convolves(network) for network in objective.networks.values())
    roundoff = arithmetic(bf16, world.device, convolutions)
    return Evidence(world=world.size, device=str(world.device), roundoff=roundoff, steps=steps)


def _convolves(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in network.modules())


def _next_whole(training: Training) -> int:
    """The first step after step 0 in which every network is due."""
    return next(
        step
        for step in range(1, _FAR)
        if all(training.objective.is_due(phase, step) for phase in training.objective.phases)
    )


def _audited(
    training: Training, micro_batches: list[dict[str, Tensor]], clip: float | None, recording: bool
) -> AuditedStep:
    training.norms = {}
    before, watch = whole(training), _Watch(training, recording)
    with watch.watching():
        train_step(training, micro_batches)
    norms = {phase: float(norm) for phase, norm in training.norms.items()}
    # Each rank undoes its own clipping: where a reduction is missing, ranks may clip by different norms.
    clipped = {
        phase: 1.0 if clip is None else min(1.0, clip / (norm + 1e-6)) for phase, norm in norms.items()
    }  # 1e-6: as all engines do
    after = whole(training, clipped)
    batches = chain.from_iterable(_to_main(micro_batches, training.world))
    decisions = chain.from_iterable(_to_main(watch.decisions(), training.world))
    return AuditedStep(
        facts=StepFacts(
            number=training.step,
            losses={phase: training.guard.losses[phase][-1] for phase in norms if training.guard.losses[phase]},
            norms=norms,
            stale=_stale(before.weights, _to_main(watch.seen, training.world)),
            refused=str(training.stopped or "") or next((anomaly["reason"] for anomaly in training.guard.anomalies), ""),
        ),
        batches=list(batches),
        decisions=list(decisions),
        weights=before.weights,
        updated=after.weights,
        buffers=before.buffers,
        buffers_after=after.buffers,
        gradients={name: moment for name, moment in after.moments.items() if name.partition("/")[0] in norms},
        routers=watch.routers,
    )


class _Seen(NamedTuple):
    """The part of a parameter that a rank's forward pass used."""

    start: int
    size: int
    receipt: int


def _stale(weights: Mapping[str, Tensor], ranks: Iterable[Mapping[str, _Seen]]) -> list[StaleWeight]:
    """The parameters that a rank used with other values than the optimiser's `weights`."""
    stale = []
    for rank, seen in enumerate(ranks):
        for name, used in seen.items():
            if receipt(weights[name].flatten()[used.start : used.start + used.size], used.start) != used.receipt:
                stale.append(StaleWeight(name=name, rank=rank))
    return stale


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Whole tensors by `network/parameter`; empty on all ranks but rank 0."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    """The first moments."""
    buffers: dict[str, Tensor] = field(default_factory=dict)


class _Piece(NamedTuple):
    """The part of one tensor that a rank owns."""

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


def whole(training: Training, clipped: Mapping[str, float] = MappingProxyType({})) -> Whole:
    """On rank 0: weights, first moments and buffers; first moments divided by the factor that this rank `clipped` their network's gradient by."""
    state = Whole()
    by_kind = {"weight": state.weights, "exp_avg": state.moments, "buffer": state.buffers}
    mine = []
    for fragment in fragments(training):
        if fragment.kind in by_kind:
            factor = clipped.get(fragment.name.partition("/")[0], 1.0) if fragment.kind == "exp_avg" else 1.0
            values = fragment.values[fragment.owned].cpu()
            values = values.clone() if factor == 1.0 else values / factor
            mine.append(
                _Piece(
                    fragment.kind, fragment.name, fragment.global_shape, fragment.start + fragment.owned.start, values
                )
            )
    for piece in chain.from_iterable(_to_main(mine, training.world)):
        flat = by_kind[piece.kind].setdefault(piece.name, torch.zeros(piece.shape, dtype=piece.values.dtype)).view(-1)
        flat[piece.start : piece.start + len(piece.values)] = piece.values
    return state


def _to_main(thing: T, world: World) -> list[T]:
    """`thing` of each rank on rank 0; nothing elsewhere."""
    if world.size == 1:
        return [thing]
    things: list[T] | None = [thing] * world.size if world.is_main else None
    dist.gather_object(thing, things)
    return things or []


class _Watch:
    """Notes which weights the forward passes use, what routing decides, and the inputs and outputs of rank 0's routers."""

    def __init__(self, training: Training, recording: bool):
        self.networks, self.main = training.objective.networks, training.world.is_main
        self.record = {name: Recorded() for name in self.networks if recording}
        self.seen: dict[str, _Seen] = {}
        """Each parameter as it was in its module's first forward pass."""
        self.routers: dict[str, RouterCall] = {}

    def decisions(self) -> list[Tensor]:
        return list(chain.from_iterable(record.found for record in self.record.values()))

    def watching(self) -> ExitStack:
        """Watch until the returned stack is closed."""
        watched = ExitStack()
        for network, module in self.networks.items():
            if network in self.record:
                watched.enter_context(deciding(module, self.record[network]))
            for path, part in module.named_modules():
                # After the engine's own hooks: at ZeRO 3 these gather the weights just before.
                watched.callback(part.register_forward_pre_hook(self._note(network, path)).remove)
                if isinstance(part, Router) and self.main and network in self.record:
                    watched.callback(
                        part.register_forward_hook(self._note_router(f"{network}/{path}", self.record[network])).remove
                    )
        return watched

    def _note(self, network: str, path: str) -> Callable[[nn.Module, object], None]:
        def note(module: nn.Module, args: object) -> None:
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{network}/{path}.{leaf}" if path else f"{network}/{leaf}"
                if name not in self.seen and parameter.numel():
                    start = module.first_expert * parameter[0].numel() if isinstance(module, Experts) else 0
                    self.seen[name] = _Seen(start, parameter.numel(), receipt(parameter.detach().flatten(), start))

        return note

    def _note_router(
        self, name: str, record: Recorded
    ) -> Callable[[nn.Module, tuple[Tensor, Tensor], Assignments], None]:
        def note(module: nn.Module, args: tuple[Tensor, Tensor], routing: Assignments) -> None:
            if name not in self.routers:
                x_GND, keys_B = (value.detach().cpu().clone() for value in args)
                log_z_GN, gate_GA = (
                    value.detach().float().cpu().clone() for value in (routing.log_z_GN, routing.gate_GA)
                )
                self.routers[name] = RouterCall(
                    x_GND=x_GND, keys_B=keys_B, decision=record.found[-1], log_z_GN=log_z_GN, gate_GA=gate_GA
                )

        return note
