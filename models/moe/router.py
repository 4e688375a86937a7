"""The router: scores of all tokens for all experts in float32, then one of the routings of
models/moe/policies.py.

Legend: B samples, G groups, N tokens per group, D model width, E experts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.init import no_decay
from models.moe.policies import (
    Assignments,
    BiasBalancedRouting,
    ExpertChoiceRouting,
    NoisyTopKRouting,
    RoutingConfig,
    SwitchRouting,
    TopKRouting,
    bias_balanced,
    expert_choice,
    noisy_top_k,
    switch,
    top_k,
)
from models.random import derive, normal, uniform


class Router(nn.Module):
    """Scores `x W^T`, and the choice of experts made from them. Computes in at least float32,
    whatever autocast or the module's dtype."""

    bias_E: Tensor
    last_load_E: Tensor

    def __init__(
        self,
        config: RoutingConfig,
        experts: int,
        d_model: int,
        jitter: float = 0.0,
        remembers: bool = False,
        std: float = 0.02,
        frozen: bool = False,
    ):
        super().__init__()
        self.config = config
        self.jitter = jitter
        self.remembers = remembers
        self.std = std
        self.frozen = frozen
        self.weight = nn.Parameter(torch.empty(experts, d_model))
        noisy = isinstance(config, NoisyTopKRouting)
        self.noise_weight = nn.Parameter(torch.empty(experts, d_model)) if noisy else None
        if isinstance(config, BiasBalancedRouting):
            self.register_buffer("bias_E", torch.empty(experts))
        if remembers:
            self.register_buffer("last_load_E", torch.empty(experts))
        # A zero gradient (see `_linear`) and no decay leave frozen weights unchanged; saving and
        # sharding need no exception.
        if frozen:
            for parameter in self.parameters():
                no_decay(parameter)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw small random weights; the noise's weights start at zero (Shazeer et al. 2017,
        appendix A)."""
        self.weight.normal_(0, self.std)
        if self.noise_weight is not None:
            self.noise_weight.zero_()
        if isinstance(self.config, BiasBalancedRouting):
            self.bias_E.zero_()
        if self.remembers:
            self.last_load_E.fill_(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Cast the module, but keep the buffers in float32: in bfloat16 the bias's small steps
        would be lost."""
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.float())
        return self

    def forward(self, x_GND: Tensor, keys_B: Tensor) -> Assignments:
        """Assign the tokens of `x_GND` to experts. `keys_B` are the random keys of the samples,
        which fill the groups in order."""
        with torch.autocast(x_GND.device.type, enabled=False):
            x_GND = x_GND.to(torch.promote_types(x_GND.dtype, torch.float32))
            if self.jitter and self.training:
                tokens = x_GND.shape[0] * x_GND.shape[1] // len(keys_B)
                noise_GND = uniform(derive(keys_B, "router jitter"), (tokens, x_GND.shape[2])).view_as(x_GND)
                x_GND = x_GND * (1 + self.jitter * (2 * noise_GND - 1))
            return self._choose(x_GND, self._linear(x_GND, self.weight), keys_B)

    def _linear(self, x_GND: Tensor, weight_ED: Tensor) -> Tensor:
        """Return x W^T. A frozen router's gradient must be zero rather than absent, because DDP
        waits for every parameter."""
        if self.frozen:
            weight_ED = weight_ED.detach() + 0 * weight_ED
        return F.linear(x_GND, weight_ED.to(x_GND.dtype))

    def _choose(self, x_GND: Tensor, logits_GNE: Tensor, keys_B: Tensor) -> Assignments:
        match self.config:
            case SwitchRouting():
                return switch(logits_GNE)
            case TopKRouting(k=k, normalise=normalise):
                return top_k(logits_GNE, k, normalise)
            case NoisyTopKRouting() as config:
                assert self.noise_weight is not None
                std_GNE = F.softplus(self._linear(x_GND, self.noise_weight))
                noise_GNE = None
                if self.training:
                    shape = (logits_GNE[..., 0].numel() // len(keys_B), logits_GNE.shape[-1])
                    noise_GNE = normal(derive(keys_B, "router noise"), shape).view_as(logits_GNE)
                return noisy_top_k(logits_GNE, noise_GNE, std_GNE, config)
            case ExpertChoiceRouting(experts_per_token=mean):
                return expert_choice(logits_GNE, mean)
            case BiasBalancedRouting() as config:
                return bias_balanced(logits_GNE, self.bias_E, config)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower it above (DeepSeek-V3, section
        2.1.2). `load_E` is the global batch's.

        Does nothing for the other routings, or if the router is frozen.
        """
        if isinstance(self.config, BiasBalancedRouting) and not self.frozen:
            load_E = load_E.to(self.bias_E)
            self.bias_E += self.config.bias_rate * (load_E.mean() - load_E).sign()

    @torch.no_grad()
    def remember_load(self, load_E: Tensor) -> None:
        """Keep the global batch's load for the next step's balance loss, if that loss is global."""
        if self.remembers:
            self.last_load_E.copy_(load_E)
