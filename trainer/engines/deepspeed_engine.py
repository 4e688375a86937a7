"""DeepSpeed as an engine: gradients are accumulated and applied when the loop says so, as in PyTorch."""

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
    """What DeepSpeed is told. The accumulation is ours, so its batch sizes are placeholders."""
    # DeepSpeed allocates whole buckets, and its default is 2 GB, whatever the network; it refuses sizes that its alignment does not divide.
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
        # At ZeRO 0 a finite limit makes DeepSpeed call `clip_fp32_gradients`, which we replace: also where nothing is to be clipped.
        "gradient_clipping": optimizer.clip or (1.0 if config.zero == 0 else 0.0),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Autocast over fp32 weights; an empty list keeps the gradients' all-reduce in fp32.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


class DeepSpeedEngine:
    """One network under DeepSpeed."""

    def __init__(self, config: DeepSpeedConfig, network: nn.Module, optimizer: OptimizerConfig, bf16: bool):
        self.network, self.zero, self.clip = network, config.zero, optimizer.clip
        self.norm: Tensor | float = 0.0
        self.refused = False
        told = deepspeed_config(config, optimizer, bf16, sum(parameter.numel() for parameter in network.parameters()))
        self.engine = deepspeed.initialize(
            model=network, optimizer=adamw(network, optimizer), config=told, dist_init_required=False
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
        """Clip by the norm of the whole network: DeepSpeed's own, at ZeRO 0, counts only the experts of this rank."""
        dense = [p.grad for p in self.network.parameters() if p.grad is not None and not hasattr(p, "group_name")]
        expert = {p.group_name: p.group_name for p in self.network.parameters() if hasattr(p, "group_name")}
        squared = torch.stack([g.float().pow(2).sum() for g in dense]).sum()
        for name in expert:
            local = [
                p.grad for p in self.network.parameters() if p.grad is not None and getattr(p, "group_name", "") == name
            ]
            part = torch.stack([g.float().pow(2).sum() for g in local]).sum()
            dist.all_reduce(part, group=deepspeed.utils.groups._get_expert_parallel_group(name))
            squared = squared + part
        self.norm = squared.sqrt()
        if self.refused or not math.isfinite(float(self.norm)):
            self.network.zero_grad(set_to_none=True)  # AdamW does nothing to a parameter without a gradient
        elif self.clip is not None:
            factor = (self.clip / (self.norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([p.grad for p in self.network.parameters() if p.grad is not None], factor)

    def _infinite_if_refused(self, norm: Callable[[], _Norm], infinite: _Norm) -> Callable[[], _Norm]:
        """ZeRO drops an update, on all ranks, when the norm is not finite: the norm of one that is refused is infinite."""
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
