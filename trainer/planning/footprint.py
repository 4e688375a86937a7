"""Memory of one rank, part by part, for a job that has not started.

Parameters are counted on networks on the `meta` device; activations come from formulas. Language
objectives are estimated in full. For other objectives only the state of the networks is, without
the memory that their forward passes keep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from models.moe.layer import MoEConfig
from models.moe.policies import experts_per_token
from models.transformer.cost import Kept, Kernels, kept
from models.transformer.model import Transformer, TransformerConfig
from trainer.config import RunConfig
from trainer.core.protocols import Objective
from trainer.engines.config import DeepSpeedConfig
from trainer.objectives import build_objective
from trainer.planning.state_bytes import Group, State, optimizer_groups, training_state


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch of a language objective."""

    kept: Kept
    loss: float
    """Gradients of the logits while the cross-entropy's backward pass runs."""
    all_to_all: float
    """What an exchange of rows sends and receives; 0 without experts over ranks."""

    @property
    def total(self) -> float:
        return sum(self.kept) + self.loss + self.all_to_all


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory that one rank needs."""

    states: dict[str, State]
    """Training state by network."""
    averages: int
    """Bytes of the moving averages of the weights."""
    balanced: Activations | None
    """Activations with every expert at its equal share; None if the objective has no formula."""
    worst: Activations | None
    """Activations with one rank's experts as full as they can be: with all tokens of the group, or
    up to their capacity."""
    teacher: int = 0
    """Bytes of a teacher's weights, which are not sharded."""

    def total(self, worst: bool) -> float:
        """Bytes on the device."""
        activations = self.worst if worst else self.balanced
        return (
            sum(state.device for state in self.states.values())
            + self.averages
            + self.teacher
            + (activations.total if activations else 0.0)
        )


def on_meta(run: RunConfig) -> Objective:
    """The objective with its whole networks on the `meta` device, without memory or numbers."""
    # A transformer may be larger than any memory and must never be made. Other objectives read data
    # while they are built, so they need real tensors.
    device = torch.device("meta") if run.objective.builds_on_meta else weightless()
    with device:
        return build_objective(run.objective, run.seed)


@contextmanager
def weightless() -> Iterator[None]:
    """Build the modules of a `with` block on the `meta` device.

    Parameters and buffers are moved there as soon as a module registers them.
    """
    # torch's annotations leave out the value that its documentation describes.
    handles = (
        register_module_parameter_registration_hook(_empty_parameter),  # type: ignore[arg-type]
        register_module_buffer_registration_hook(_empty_buffer),  # type: ignore[arg-type]
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _empty_parameter(module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
    if value is None or value.is_meta:
        return value
    empty = nn.Parameter(value.to("meta"), value.requires_grad)
    empty.__dict__.update(value.__dict__)  # the optimiser's tags
    return empty


def _empty_buffer(module: nn.Module, name: str, value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.to("meta")


def groups_of(run: RunConfig, objective: Objective, world: int) -> dict[str, list[Group]]:
    """The optimiser's rows of each network on one of `world` ranks."""
    return {
        name: optimizer_groups(network, run.optimizer, world, run.ep(world))
        for name, network in objective.networks.items()
    }


def footprint(run: RunConfig, objective: Objective, world: int, bf16: bool, cuda: bool) -> Footprint:
    """Memory of a rank of `world`, for `objective` from `on_meta(run)`."""
    kernels = Kernels(bf16=bf16, cuda=cuda, zero3=zero_stage(run) == 3)
    accumulation = run.batch.global_batch // (world * run.batch.micro_batch)
    states = {
        name: training_state(run.engine, groups, accumulation)
        for name, groups in groups_of(run, objective, world).items()
    }
    averages = 4 * sum(states[name].owned for name in objective.averaged) if run.ema else 0
    network = objective.networks.get("model")
    if not isinstance(network, Transformer):
        return Footprint(states=states, averages=averages, balanced=None, worst=None)
    moe, ep, batch = network.config.moe, run.ep(world), run.batch.micro_batch
    length, mask = objective.tokens_per_sample, run.objective.masks_documents
    worst = _worst_load(moe, ep, batch, length) if moe else 1.0
    balanced, fullest = (_activations(network, batch, length, kernels, ep, load, mask) for load in (1.0, worst))
    return Footprint(states=states, averages=averages, balanced=balanced, worst=fullest, teacher=objective.frozen_bytes)


def _activations(
    network: Transformer, samples: int, length: int, kernels: Kernels, ep: int, load: float, mask: bool
) -> Activations:
    config, tokens = network.config, samples * length
    logits = tokens * network.vocab_size * (4 + (2 if kernels.bf16 else 0))
    exchanged = 0.0
    if config.moe is not None and ep > 1:
        exchanged = tokens * experts_per_token(config.moe.router) * config.d_model * kernels.size * (1 + load)
    return Activations(
        kept=kept(config, network.vocab_size, samples, length, kernels, ep, load, mask),
        loss=logits,
        all_to_all=exchanged,
    )


def _worst_load(moe: MoEConfig, ep: int, samples: int, length: int) -> float:
    """Rows that one rank's experts may get, divided by their equal share.

    These are all rows of the group, unless capacity limits them.
    """
    if ep == 1:
        return 1.0
    if moe.capacity_factor is None:
        return float(ep)
    assignments = moe.group * length * experts_per_token(moe.router)
    capacity = ceil(moe.capacity_factor * assignments / moe.experts - 1e-6)
    return min(float(ep), capacity * moe.experts / assignments)


def parameter_count(network: nn.Module) -> int:
    """Parameters of a whole network."""
    return sum(parameter.numel() for parameter in network.parameters())


def zero_stage(run: RunConfig) -> int:
    """0 where Accelerate keeps whole copies."""
    return run.engine.zero if isinstance(run.engine, DeepSpeedConfig) else 0


def transformer_config(objective: Objective) -> TransformerConfig | None:
    """Sizes of the network of a language objective; None for the others."""
    network = objective.networks.get("model")
    return network.config if isinstance(network, Transformer) else None
