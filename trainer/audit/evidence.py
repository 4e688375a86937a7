"""What the workers of an audit hand over: their batches, weights, gradients and routing decisions of each audited step, as one safetensors file."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor


@dataclass
class RouterCall:
    """What one router was given in its first call of a step, on rank 0, and what it gave."""

    x_GND: Tensor
    keys_B: Tensor
    decision: Tensor
    log_z_GN: Tensor
    gate_GA: Tensor


@dataclass
class AuditedStep:
    """One optimiser step. Tensors are whole, put together from all ranks, and named `network/parameter`."""

    number: int
    """Which step the objective was told it is."""
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    """The micro-batches of all ranks, rank after rank."""
    decisions: list[Tensor] = field(default_factory=list)
    """What routing chose (indices), call after call, in the order of `batches`."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """fp32 weights before the step."""
    updated: dict[str, Tensor] = field(default_factory=dict)
    """And after it: a second network's gradients are taken when the first is updated."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Before the step."""
    buffers_after: dict[str, Tensor] = field(default_factory=dict)
    """After the step."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """What the optimiser was given, clipping undone."""
    routers: dict[str, RouterCall] = field(default_factory=dict)
    """By `network/module`."""
    losses: dict[str, float] = field(default_factory=dict)
    """Mean loss of each phase."""
    norms: dict[str, float] = field(default_factory=dict)
    """Gradient norm of each phase, as the engine gave it."""
    strangers: list[str] = field(default_factory=list)
    """Parameters whose values in the forward pass were not those that the optimiser keeps: `network/parameter on rank 1`."""
    refused: str = ""
    """Why the loop passed over the batch; empty: it did not."""


@dataclass
class Evidence:
    """All audited steps, and what the arithmetic was."""

    world: int
    device: str
    roundoff: float
    """Unit roundoff of the coarsest arithmetic that the job allows."""
    steps: list[AuditedStep]


_TENSORS = ("weights", "updated", "buffers", "buffers_after", "gradients")
_FACTS = ("number", "losses", "norms", "strangers", "refused")


def to_bytes(evidence: Evidence) -> bytes:
    """As a safetensors file."""
    tensors: dict[str, Tensor] = {}
    for index, step in enumerate(evidence.steps):
        for kind in _TENSORS:
            tensors |= {f"{index}/{kind}/{name}": value for name, value in getattr(step, kind).items()}
        for place, batch in enumerate(step.batches):
            tensors |= {f"{index}/batches/{place:06d}/{name}": value for name, value in batch.items()}
        tensors |= {f"{index}/decisions/{place:06d}": value for place, value in enumerate(step.decisions)}
        for name, call in step.routers.items():
            tensors |= {f"{index}/routers/{name}/{part}": value for part, value in vars(call).items()}
    facts = [{name: getattr(step, name) for name in _FACTS} for step in evidence.steps]
    head = {"world": evidence.world, "device": evidence.device, "roundoff": evidence.roundoff, "steps": facts}
    return safetensors.torch.save({key: value.contiguous().clone() for key, value in tensors.items()}, {"evidence": json.dumps(head)})


def from_bytes(content: bytes) -> Evidence:
    """The evidence in a file that `to_bytes` made."""
    length = int.from_bytes(content[:8], "little")
    head = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["evidence"])
    steps = [AuditedStep(**facts) for facts in head["steps"]]
    routers: list[dict[str, dict[str, Any]]] = [{} for _ in steps]
    for key, value in sorted(safetensors.torch.load(content).items()):
        index, kind, name = key.split("/", 2)
        step = steps[int(index)]
        match kind:
            case "batches":
                place, part = name.split("/")
                step.batches += [{} for _ in range(int(place) + 1 - len(step.batches))]
                step.batches[int(place)][part] = value
            case "decisions":
                step.decisions.append(value)
            case "routers":
                router, part = name.rsplit("/", 1)
                routers[int(index)].setdefault(router, {})[part] = value
            case _:
                getattr(step, kind)[name] = value
    for step, found in zip(steps, routers, strict=True):
        for name, parts in found.items():
            step.routers[name] = RouterCall(**parts)
    return Evidence(head["world"], head["device"], head["roundoff"], steps)


def experts_of(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """A stack of experts as its experts, any other parameter as itself: what is judged by itself, under its name."""
    if name.rpartition(".")[0].endswith("experts") and value.ndim == 3:
        return [(f"{name}[{expert}]", part) for expert, part in enumerate(value)]
    return [(name, value)]


def relative(error: float, size: float) -> float:
    """error / size, where 0 / 0 is 0."""
    return error / size if size else (0.0 if error == 0 else float("inf"))


def norm_of(value: Tensor) -> float:
    """Euclidean norm, in float64."""
    return float(torch.linalg.vector_norm(value.double()))


def group_of(name: str) -> str:
    """Parameters that differ only in a number (of a block, a layer) form a group: `model/blocks.*.attention.qkv.weight`."""
    return re.sub(r"(?<=[./\[])\d+(?=[.\]]|$)", "*", name)
