"""Hugging Face Accelerate as an engine: one device, DDP or Apple's MPS.

Every rank holds a whole copy of the network.
"""

import math

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from trainer.checkpoint.fragments import Fragment
from trainer.engines import state
from trainer.engines.optim import OptimizerConfig, adamw
from trainer.world import World


class AccelerateEngine:
    """Updates one network with Accelerate."""

    def __init__(self, network: nn.Module, optimizer: OptimizerConfig, bf16: bool, world: World):
        # A parameter may have no gradient in a step: an expert may receive no token.
        ddp = DistributedDataParallelKwargs(find_unused_parameters=world.size > 1)
        self.accelerator = Accelerator(
            cpu=world.device.type == "cpu", mixed_precision="bf16" if bf16 else "no", kwargs_handlers=[ddp]
        )
        self.network = network
        self.clip = optimizer.clip
        self.optimizer = adamw(network, optimizer)
        self.module, self.prepared = self.accelerator.prepare(network, self.optimizer)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, lr: float, update: bool = True) -> Tensor | float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        limit = float("inf") if self.clip is None else self.clip
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        if update and math.isfinite(float(norm)):
            self.prepared.step()
        self.prepared.zero_grad()
        return norm

    def fragments(self) -> list[Fragment]:
        return state.replicated(self.network, self.optimizer)

    def refresh(self) -> None:
        pass
