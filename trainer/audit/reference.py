"""The same batches in float64: one process, plain networks, no ranks, no shards, no engine, with the workers' routing decisions."""

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
        self.step, self.objective = step, build_objective(run.objective, run.seed)
        for name, network in self.objective.networks.items():
            network.double().train()
            network.register_forward_pre_hook(_doubled)
            self._load(name, network)
        self.weight = {
            phase: float(sum(self.objective.weight(phase, batch) for batch in step.batches))
            for phase in self.objective.phases
        }

    @torch.no_grad()
    def _load(self, name: str, network: nn.Module) -> None:
        for path, parameter in network.named_parameters():
            parameter.copy_(self.step.weights[f"{name}/{path}"])
        for path, buffer in network.named_buffers():
            if (key := f"{name}/{path}") in self.step.buffers:
                buffer.copy_(self.step.buffers[key])
        for path, module in network.named_modules():
            if isinstance(
                module, SpectralNorm
            ):  # iterated in the step's first forward pass, without a gradient: given, like the weights
                module.due = False
                module.u.copy_(self.step.buffers_after[f"{name}/{path}.u"])
                module.v.copy_(self.step.buffers_after[f"{name}/{path}.v"])

    def phases(self) -> Iterable[str]:
        """The phases that were due, each with the networks of those before it updated, as the workers had them."""
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
        """`batches` as if they were the whole step."""
        precise = [{key: _at_least(value) for key, value in batch.items()} for batch in batches]
        return self.objective.prepare(phase, self.objective.networks[phase], precise, lambda rows: rows)

    def loss_as_decided(self, phase: str, batch: dict[str, Tensor]) -> Tensor:
        """The same of the step's first batch, with the workers' routing decisions."""
        with deciding(self.objective.networks[phase], Replayed(self.step.decisions)):
            return self.loss(phase, self._prepared(phase, [batch])[0])

    def gradients(self, phase: str, batches: Sequence[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor], Replayed]:
        """Loss and gradients of `batches`, the first ones of the step, and what routing would have decided otherwise."""
        network, replay, total = self.objective.networks[phase], Replayed(self.step.decisions), 0.0
        network.zero_grad(set_to_none=True)
        with deciding(network, replay):
            for batch in self._prepared(phase, batches):
                loss = self.loss(phase, batch)
                loss.backward()
                total += float(loss.detach())
        found = {}
        for path, parameter in network.named_parameters():
            found[f"{phase}/{path}"] = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
            )
        return total, found, replay


def _doubled(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in args)


def _at_least(value: Tensor) -> Tensor:
    """Numbers that are computed with in float64: images too, which come as bytes."""
    return value.double() if value.is_floating_point() or value.dtype == torch.uint8 else value
