"""The evidence that the workers of an audit send back, as one safetensors file.

It holds the batches, weights, gradients and routing decisions of each audited step.
"""

import json
import re
from dataclasses import asdict, dataclass, field

import safetensors.torch
import torch
from torch import Tensor

from trainer.parsing import parse


@dataclass(frozen=True, kw_only=True)
class StaleWeight:
    """A parameter whose values in the forward pass differed from those of the optimiser."""

    name: str
    """The parameter, as `network/parameter`."""
    rank: int
    """The rank whose forward pass used the other values."""

    def __str__(self) -> str:
        return f"{self.name} on rank {self.rank}"


@dataclass(frozen=True, kw_only=True)
class RouterCall:
    """The inputs and outputs of one router in its first call of a step, on rank 0."""

    x_GND: Tensor
    keys_B: Tensor
    decision: Tensor
    log_z_GN: Tensor
    gate_GA: Tensor


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """The parts of an audited step that are not tensors."""

    number: int
    """The number of the step, as the objective received it."""
    losses: dict[str, float]
    """The mean loss of each phase."""
    norms: dict[str, float]
    """The gradient norm of each phase, as the engine reported it."""
    stale: list[StaleWeight]
    """The parameters that a rank used with other values than the optimiser's."""
    refused: str
    """The reason why the loop refused the batch; empty if it accepted it."""


@dataclass(frozen=True, kw_only=True)
class AuditedStep:
    """One optimiser step.

    Tensors are whole, put together from all ranks, and named `network/parameter`.
    """

    facts: StepFacts
    """The parts of the step that are not tensors."""
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    """The micro-batches of all ranks, rank after rank."""
    decisions: list[Tensor] = field(default_factory=list)
    """The indices that routing chose, call after call, in the order of `batches`."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The fp32 weights before the step."""
    updated: dict[str, Tensor] = field(default_factory=dict)
    """The fp32 weights after the step.

    A second network's gradients are computed after the first network has been updated.
    """
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """The buffers before the step."""
    buffers_after: dict[str, Tensor] = field(default_factory=dict)
    """The buffers after the step."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """The gradients that the optimiser received, with clipping undone."""
    routers: dict[str, RouterCall] = field(default_factory=dict)
    """The first call of each router on rank 0, by `network/module`."""

    @property
    def by_name(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that have a name, by kind."""
        return {
            "weights": self.weights,
            "updated": self.updated,
            "buffers": self.buffers,
            "buffers_after": self.buffers_after,
            "gradients": self.gradients,
        }


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All audited steps, with the machine and the arithmetic of the job."""

    world: int
    """The number of ranks."""
    device: str
    """The torch device of rank 0."""
    roundoff: float
    """The unit roundoff of the coarsest arithmetic that the job allows."""
    steps: list[AuditedStep]
    """The audited steps, in their order."""


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The evidence without its tensors, written as JSON into the head of the file."""

    world: int
    device: str
    roundoff: float
    steps: list[StepFacts]


def to_bytes(evidence: Evidence) -> bytes:
    """The content of a safetensors file that holds the `evidence`."""
    tensors: dict[str, Tensor] = {}
    for index, step in enumerate(evidence.steps):
        for kind, by_name in step.by_name.items():
            tensors |= {f"{index}/{kind}/{name}": value for name, value in by_name.items()}
        for position, batch in enumerate(step.batches):
            tensors |= {f"{index}/batches/{position:06d}/{name}": value for name, value in batch.items()}
        tensors |= {f"{index}/decisions/{position:06d}": value for position, value in enumerate(step.decisions)}
        for name, call in step.routers.items():
            tensors |= {f"{index}/routers/{name}/{part}": value for part, value in vars(call).items()}
    head = _Head(
        world=evidence.world,
        device=evidence.device,
        roundoff=evidence.roundoff,
        steps=[step.facts for step in evidence.steps],
    )
    contiguous = {key: value.contiguous().clone() for key, value in tensors.items()}
    return safetensors.torch.save(contiguous, {"evidence": json.dumps(asdict(head))})


def from_bytes(content: bytes) -> Evidence:
    """The evidence in the `content` of a file that `to_bytes` made."""
    length = int.from_bytes(content[:8], "little")
    head = parse(_Head, json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["evidence"]))
    steps = [AuditedStep(facts=facts) for facts in head.steps]
    calls: list[dict[str, dict[str, Tensor]]] = [{} for _ in steps]
    for key, value in sorted(safetensors.torch.load(content).items()):
        index, kind, name = key.split("/", 2)
        step = steps[int(index)]
        match kind:
            case "batches":
                position, part = name.split("/")
                step.batches.extend({} for _ in range(int(position) + 1 - len(step.batches)))
                step.batches[int(position)][part] = value
            case "decisions":
                step.decisions.append(value)
            case "routers":
                router, part = name.rsplit("/", 1)
                calls[int(index)].setdefault(router, {})[part] = value
            case _:
                step.by_name[kind][name] = value
    for step, by_router in zip(steps, calls, strict=True):
        step.routers.update({name: RouterCall(**parts) for name, parts in by_router.items()})
    return Evidence(world=head.world, device=head.device, roundoff=head.roundoff, steps=steps)


def experts_of(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """The parts of a parameter that are judged by themselves, each with its name.

    A stack of experts is split into its experts; any other parameter is one part.
    """
    if name.rpartition(".")[0].endswith("experts") and value.ndim == 3:
        return [(f"{name}[{expert}]", part) for expert, part in enumerate(value)]
    return [(name, value)]


def relative(error: float, size: float) -> float:
    """The quotient `error` / `size`, where 0 / 0 is 0."""
    if size:
        return error / size
    return 0.0 if error == 0 else float("inf")


def norm_of(value: Tensor) -> float:
    """The Euclidean norm, computed in float64."""
    return float(torch.linalg.vector_norm(value.double()))


def group_of(name: str) -> str:
    """The group of a parameter, such as `model/blocks.*.attention.qkv.weight`.

    Parameters whose names differ only in a number, of a block or a layer, form one group.
    """
    return re.sub(r"(?<=[./\[])\d+(?=[.\]]|$)", "*", name)
