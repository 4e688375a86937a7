"""DeepSpeed as an engine, which accumulates and applies gradients when the loop says so.

DeepSpeed's own accumulation is off, and at ZeRO 0 its clipping is replaced.
"""

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint.fragments import Fragment
from trainer.engines import state
from trainer.engines.config import LARGEST_BUCKET, DeepSpeedConfig
from trainer.engines.lean_deepspeed import deepspeed
from trainer.engines.optim import OptimizerConfig, adamw

deepspeed.utils.logger.setLevel(logging.WARNING)

_ALIGNMENT = 8
_Norm = TypeVar("_Norm")


def deepspeed_config(
    config: DeepSpeedConfig, optimizer: OptimizerConfig, bf16: bool, parameters: int
) -> dict[str, object]:
    """DeepSpeed's configuration; its batch size is a placeholder, as the loop accumulates."""
    # DeepSpeed allocates whole buckets, by default 2 GB for any network. It rejects sizes that are
    # not multiples of its alignment.
    bucket = min(-(-parameters // _ALIGNMENT) * _ALIGNMENT, LARGEST_BUCKET)
    zero: dict[str, object] = {
        "stage": config.zero,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        # At ZeRO 0 a limit makes DeepSpeed call `clip_fp32_gradients`, which we replace. That call
        # is needed even without clipping, because it computes the norm.
        "gradient_clipping": optimizer.clip or (1.0 if config.zero == 0 else 0.0),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Weights stay fp32 under autocast; an empty list keeps the all-reduce of gradients fp32.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


class DeepSpeedEngine:
    """Updates one network with DeepSpeed."""

    def __init__(self, config: DeepSpeedConfig, network: nn.Module, optimizer: OptimizerConfig, bf16: bool):
        self.network = network
        self.zero = config.zero
        self.clip = optimizer.clip
        self.norm: Tensor | float = 0.0
        self.refused = False
        parameters = sum(parameter.numel() for parameter in network.parameters())
        self.engine = deepspeed.initialize(
            model=network,
            optimizer=adamw(network, optimizer),
            config=deepspeed_config(config, optimizer, bf16, parameters),
            dist_init_required=False,
        )[0]
        self.module = self.engine
        inner = self.engine.optimizer
        match self.zero:
            case 0:
                self.engine.clip_fp32_gradients = self._clip
            case 3:
                inner._get_norm_groups = self._infinite_if_refused(inner._get_norm_groups, [float("inf")])
            case _:
                inner.scaled_global_norm = self._infinite_if_refused(inner.scaled_global_norm, float("inf"))

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, update: bool = True) -> Tensor | float:
        self.refused = not update
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return self.norm if self.zero == 0 else self.engine.get_global_grad_norm()

    def _clip(self) -> None:
        """Clip by the norm of the whole network.

        At ZeRO 0, DeepSpeed's own norm counts only the experts of this rank.
        """
        parameters = list(self.network.parameters())
        dense = [p.grad for p in parameters if p.grad is not None and not hasattr(p, "group_name")]
        # A dict, for the same order of all-reduces on every rank.
        expert_groups = dict.fromkeys(p.group_name for p in parameters if hasattr(p, "group_name"))
        squared = torch.stack([g.float().pow(2).sum() for g in dense]).sum()
        for name in expert_groups:
            members = [p for p in parameters if getattr(p, "group_name", "") == name]
            local = [p.grad for p in members if p.grad is not None]
            part = torch.stack([g.float().pow(2).sum() for g in local]).sum()
            dist.all_reduce(part, group=deepspeed.utils.groups._get_expert_parallel_group(name))
            squared = squared + part
        self.norm = squared.sqrt()
        if self.refused or not math.isfinite(float(self.norm)):
            self.network.zero_grad(set_to_none=True)  # AdamW skips parameters without a gradient
        elif self.clip is not None:
            factor = (self.clip / (self.norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

    def _infinite_if_refused(self, norm: Callable[[], _Norm], infinite: _Norm) -> Callable[[], _Norm]:
        """Wrap `norm` so that a refused update has an infinite norm.

        ZeRO drops an update on all ranks if its norm is not finite.
        """
        return lambda: infinite if self.refused else norm()

    def fragments(self) -> list[Fragment]:
        match self.zero:
            case 0:
                return state.replicated(self.network, self.engine.optimizer)
            case 3:
                return state.zero3(self.network, self.engine.optimizer)
            case _:
                return state.zero12(self.network, self.engine.optimizer)

    def refresh(self) -> None:
        if self.zero in (1, 2):
            self.engine.optimizer.update_lp_params()
        elif self.zero == 3:
            state.refresh_zero3(self.engine.optimizer)
