"""The reference: the workers' batches, computed in float64 by one process on plain networks.

It has no ranks, shards or engine, and it takes the workers' routing decisions.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from models.gan.spectral import SpectralNorm
from trainer.audit.decisions import Replayed, deciding
from trainer.audit.evidence import AuditedStep
from trainer.config import RunConfig
from trainer.core.loop import freeze_others
from trainer.objectives import build_objective


class Reference:
    """The networks of `run` in float64 as they stood in one audited step."""

    def __init__(self, run: RunConfig, step: AuditedStep):
        self.step = step
        self.objective = build_objective(run.objective, run.seed)
        for name, network in self.objective.networks.items():
            network.double().train()
            network.register_forward_pre_hook(_doubled)
            self._load(name, network)
        self.weight: dict[str, float] = {}
        """The weight of the global batch in the loss of each phase."""
        for phase in self.objective.phases:
            self.weight[phase] = float(sum(self.objective.weight(phase, batch) for batch in step.batches))

    @torch.no_grad()
    def _load(self, name: str, network: nn.Module) -> None:
        for path, parameter in network.named_parameters():
            parameter.copy_(self.step.weights[f"{name}/{path}"])
        for path, buffer in network.named_buffers():
            if (key := f"{name}/{path}") in self.step.buffers:
                buffer.copy_(self.step.buffers[key])
        for path, module in network.named_modules():
            if isinstance(module, SpectralNorm):
                # Its vectors were iterated without a gradient in the step's first forward pass, so
                # they are given, like the weights.
                module.due = False
                module.u.copy_(self.step.buffers_after[f"{name}/{path}.u"])
                module.v.copy_(self.step.buffers_after[f"{name}/{path}.v"])

    def phases(self) -> Iterable[str]:
        """The phases that were due in the step.

        At each phase the networks of the phases before it are updated, as on the workers.
        """
        for phase in self.objective.phases:
            if phase in self.step.facts.norms:
                freeze_others(self.objective, phase)
                yield phase
                with torch.no_grad():
                    for path, parameter in self.objective.networks[phase].named_parameters():
                        parameter.copy_(self.step.updated[f"{phase}/{path}"])

    def loss(self, phase: str, batch: dict[str, Tensor]) -> Tensor:
        """The share of `batch` in the mean loss of the global batch."""
        network = self.objective.networks[phase]
        loss, _ = self.objective.loss(phase, network, batch, self.step.facts.number)
        return loss / self.weight[phase]

    def _prepared(self, phase: str, batches: Sequence[dict[str, Tensor]]) -> Sequence[dict[str, Tensor]]:
        """The `batches`, prepared as if they were the whole step."""
        precise = [{key: _in_double(value) for key, value in batch.items()} for batch in batches]
        return self.objective.prepare(phase, self.objective.networks[phase], precise, lambda rows: rows)

    def loss_as_decided(self, phase: str, batch: dict[str, Tensor]) -> Tensor:
        """The loss of `batch`, the first one of the step, with the workers' routing decisions."""
        with deciding(self.objective.networks[phase], Replayed(self.step.decisions)):
            return self.loss(phase, self._prepared(phase, [batch])[0])

    def gradients(self, phase: str, batches: Sequence[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor], Replayed]:
        """The loss and the gradients of `batches`, which are the first ones of the step.

        The replay counts the routing decisions that float64 would have made otherwise.
        """
        network = self.objective.networks[phase]
        replay = Replayed(self.step.decisions)
        total = 0.0
        network.zero_grad(set_to_none=True)
        with deciding(network, replay):
            for batch in self._prepared(phase, batches):
                loss = self.loss(phase, batch)
                loss.backward()
                total += float(loss.detach())
        gradients: dict[str, Tensor] = {}
        for path, parameter in network.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
            gradients[f"{phase}/{path}"] = gradient
        return total, gradients, replay


def _doubled(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
    """The arguments of a forward pass with all floating-point tensors in float64."""
    return tuple(arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def _in_double(value: Tensor) -> Tensor:
    """The `value` in float64 if it is used in arithmetic, as images are, which come as bytes."""
    return value.double() if value.is_floating_point() or value.dtype == torch.uint8 else value
