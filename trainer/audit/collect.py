"""The work of each worker of an audit: two real optimiser steps, watched.

The gradient is read from AdamW's first moment, which is the gradient itself where betas[0] = 0. It
is summed over micro-batches, reduced across ranks, cut into shards and clipped, as the optimiser
receives it at any ZeRO stage. The second step begins with weights that the first one updated and
that were then spread over the ranks.
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
"""The number of steps within which every network must be due once."""
T = TypeVar("T")


def audit_worker(values: Mapping[str, Any]) -> None:
    """Collects the evidence of the plain RunConfig `values`.

    It works with the ranks that the environment names; rank 0 writes the run's folder.
    """
    run = parse(RunConfig, values, "run")
    with joined(run.device, run.threads, run.collective_timeout_s) as world:
        check(run, world.size)
        with out_of_memory(run, world.rank):
            evidence = collect(run, world)
        if world.is_main:
            run_files(run.root, run.name).write_evidence(to_bytes(evidence))


def collect(run: RunConfig, world: World) -> Evidence:
    """Two audited steps of `run` on its first two global batches, complete on rank 0 only."""
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
    steps: list[AuditedStep] = []
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
    objective = training.objective
    return next(step for step in range(1, _FAR) if all(objective.is_due(phase, step) for phase in objective.phases))


def _audited(
    training: Training, micro_batches: list[dict[str, Tensor]], clip: float | None, recording: bool
) -> AuditedStep:
    training.norms = {}
    before = whole(training)
    watch = _Watch(training, recording)
    with watch.watching():
        train_step(training, micro_batches)
    norms = {phase: float(norm) for phase, norm in training.norms.items()}
    after = whole(training, _clip_factors(norms, clip))
    batches = chain.from_iterable(_to_main(micro_batches, training.world))
    decisions = chain.from_iterable(_to_main(watch.decisions(), training.world))
    return AuditedStep(
        facts=_facts(training, norms, _stale(before.weights, _to_main(watch.seen, training.world))),
        batches=list(batches),
        decisions=list(decisions),
        weights=before.weights,
        updated=after.weights,
        buffers=before.buffers,
        buffers_after=after.buffers,
        gradients={name: moment for name, moment in after.moments.items() if name.partition("/")[0] in norms},
        routers=watch.routers,
    )


def _clip_factors(norms: Mapping[str, float], clip: float | None) -> dict[str, float]:
    """The factor by which clipping scaled the gradient of each phase on this rank.

    Each rank undoes its own clipping: where a reduction is missing, ranks may clip by different
    norms. All engines add 1e-6 to the norm.
    """
    if clip is None:
        return dict.fromkeys(norms, 1.0)
    return {phase: min(1.0, clip / (norm + 1e-6)) for phase, norm in norms.items()}


def _facts(training: Training, norms: dict[str, float], stale: list[StaleWeight]) -> StepFacts:
    guard = training.guard
    anomaly = next((anomaly["reason"] for anomaly in guard.anomalies), "")
    return StepFacts(
        number=training.step,
        losses={phase: guard.losses[phase][-1] for phase in norms if guard.losses[phase]},
        norms=norms,
        stale=stale,
        refused=str(training.stopped or "") or anomaly,
    )


class _Seen(NamedTuple):
    """The part of a parameter that a rank's forward pass used."""

    start: int
    size: int
    receipt: int


def _stale(weights: Mapping[str, Tensor], ranks: Iterable[Mapping[str, _Seen]]) -> list[StaleWeight]:
    """The parameters whose values on a rank differed from the optimiser's `weights`."""
    stale = []
    for rank, seen in enumerate(ranks):
        for name, used in seen.items():
            if receipt(weights[name].flatten()[used.start : used.start + used.size], used.start) != used.receipt:
                stale.append(StaleWeight(name=name, rank=rank))
    return stale


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Whole tensors by `network/parameter`, gathered on rank 0 and empty on all other ranks."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    """The first moments of the optimiser."""
    buffers: dict[str, Tensor] = field(default_factory=dict)


class _Piece(NamedTuple):
    """The part of one tensor that a rank owns."""

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


def whole(training: Training, clipped: Mapping[str, float] = MappingProxyType({})) -> Whole:
    """The weights, first moments and buffers of all ranks, on rank 0.

    The first moments are divided by the factor by which this rank `clipped` the gradient of their
    network.
    """
    state = Whole()
    by_kind = {"weight": state.weights, "exp_avg": state.moments, "buffer": state.buffers}
    mine: list[_Piece] = []
    for fragment in fragments(training):
        if fragment.kind in by_kind:
            factor = clipped.get(fragment.name.partition("/")[0], 1.0) if fragment.kind == "exp_avg" else 1.0
            values = fragment.values[fragment.owned].cpu()
            values = values.clone() if factor == 1.0 else values / factor
            start = fragment.start + fragment.owned.start
            mine.append(_Piece(fragment.kind, fragment.name, fragment.global_shape, start, values))
    for piece in chain.from_iterable(_to_main(mine, training.world)):
        flat = by_kind[piece.kind].setdefault(piece.name, torch.zeros(piece.shape, dtype=piece.values.dtype)).view(-1)
        flat[piece.start : piece.start + len(piece.values)] = piece.values
    return state


def _to_main(value: T, world: World) -> list[T]:
    """The `value` of each rank, in the order of ranks, on rank 0; an empty list elsewhere."""
    if world.size == 1:
        return [value]
    values: list[T] | None = [value] * world.size if world.is_main else None
    dist.gather_object(value, values)
    return values or []


class _Watch:
    """Notes the weights that forward passes use and the decisions of routing.

    On rank 0 it also notes the inputs and outputs of the routers.
    """

    def __init__(self, training: Training, recording: bool):
        self.networks = training.objective.networks
        self.main = training.world.is_main
        self.record = {name: Recorded() for name in self.networks if recording}
        self.seen: dict[str, _Seen] = {}
        """Each parameter as it stood in its module's first forward pass."""
        self.routers: dict[str, RouterCall] = {}

    def decisions(self) -> list[Tensor]:
        """All decisions of routing, network after network, in the order of the calls."""
        return list(chain.from_iterable(record.decisions for record in self.record.values()))

    def watching(self) -> ExitStack:
        """Watches until the returned stack is closed."""
        watched = ExitStack()
        for network, module in self.networks.items():
            if network in self.record:
                watched.enter_context(deciding(module, self.record[network]))
            for path, part in module.named_modules():
                # Registered after the engine's own hooks, which at ZeRO 3 gather the weights first.
                watched.callback(part.register_forward_pre_hook(self._note(network, path)).remove)
                if isinstance(part, Router) and self.main and network in self.record:
                    note = self._note_router(f"{network}/{path}", self.record[network])
                    watched.callback(part.register_forward_hook(note).remove)
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
                x_GND, keys_B = args
                self.routers[name] = RouterCall(
                    x_GND=x_GND.detach().cpu().clone(),
                    keys_B=keys_B.detach().cpu().clone(),
                    decision=record.decisions[-1],
                    log_z_GN=routing.log_z_GN.detach().float().cpu().clone(),
                    gate_GA=routing.gate_GA.detach().float().cpu().clone(),
                )

        return note
