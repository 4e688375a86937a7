"""A transformer over tokens, dense or with mixture-of-experts layers: decoder-only, or
bidirectional with `causal: false`.

Norms, positions and order of operations are those of Qwen3 and Qwen3-MoE, so that weights can be
exchanged with Hugging Face. The objectives are in trainer/objectives/language/.

Legend: B samples, T positions, D model width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import Linear, RMSNorm, SwiGLU
from models.moe.layer import MoEConfig, MoELayer, RouteStats
from models.moe.policies import ExpertChoiceRouting
from models.random import derive, sample_keys
from models.transformer.attention import Attention, KVCache, rotary_table


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and variants of the transformer."""

    layers: int
    """Number of blocks."""
    d_model: int
    """Width of the residual stream."""
    heads: int
    """Query heads."""
    kv_heads: int | None = None
    """Key-value heads (grouped-query attention, Ainslie et al. 2023); null: as many as query
    heads."""
    head_dim: int | None = None
    """Width of a head; null: d_model / heads."""
    ffn: int
    """Inner width of the dense SwiGLU layers."""
    qk_norm: bool = False
    """Whether the queries and keys of each head pass through RMSNorm (Qwen3)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Constant added to the mean square in RMSNorm."""
    init_std: float | None = None
    """Standard deviation of initial weights; null: sqrt(2 / (5 d_model)) (Nguyen & Salazar 2019),
    which is 0.02 at d_model 1000. For output projections it is divided by sqrt(2 layers)."""
    tie_embeddings: bool = False
    """Whether the token embedding is also the output matrix."""
    causal: bool = True
    """Whether a position sees only itself and the past."""
    moe: MoEConfig | None = None
    """The mixture-of-experts layers; null: dense."""
    moe_layers: Literal["all", "alternate"] | tuple[int, ...] = "all"
    """Blocks with a mixture of experts: all, every second block (1, 3, ...) as in GShard and
    Switch, or a list counted from 0."""
    activation_checkpointing: bool = False
    """Whether only the blocks' inputs are kept and the rest is recomputed in the backward pass: a
    third more work, far less memory."""

    def __post_init__(self) -> None:
        if min(self.layers, self.d_model, self.heads, self.ffn) < 1:
            raise ValueError(
                f"model: layers {self.layers}, d_model {self.d_model}, "
                f"heads {self.heads} and ffn {self.ffn} must all be at least 1"
            )
        if self.head_dim is None and self.d_model % self.heads:
            raise ValueError(
                f"model.heads: {self.heads} does not divide d_model {self.d_model}; choose a divisor, or set head_dim"
            )
        if self.head_width % 2:
            raise ValueError(
                f"model.head_dim: {self.head_width} is odd, but rotary positions rotate pairs; choose an even number"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"model.kv_heads: {self.kv_heads} does not divide heads {self.heads}; choose a divisor")
        if isinstance(self.moe_layers, tuple) and any(not 0 <= index < self.layers for index in self.moe_layers):
            raise ValueError(
                f"model.moe_layers: {list(self.moe_layers)} must lie between 0 and {self.layers - 1}, "
                f"as there are {self.layers} layers"
            )
        if self.moe is not None and self.causal and isinstance(self.moe.router, ExpertChoiceRouting):
            raise ValueError(
                "model.moe.router: expert_choice leaks the future, as experts choose among all tokens; "
                "use causal: false or another router"
            )

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.d_model // self.heads

    @property
    def weight_std(self) -> float:
        """Standard deviation of initial weights."""
        return math.sqrt(2 / (5 * self.d_model)) if self.init_std is None else self.init_std

    @property
    def kv_head_count(self) -> int:
        """Number of key-value heads."""
        return self.kv_heads or self.heads

    @property
    def moe_indices(self) -> tuple[int, ...]:
        """Indices of the blocks with a mixture of experts, ascending."""
        match self.moe_layers:
            case _ if self.moe is None:
                return ()
            case "all":
                return tuple(range(self.layers))
            case "alternate":
                return tuple(range(1, self.layers, 2))
            case indices:
                return tuple(sorted(set(indices)))


class Embedding(nn.Embedding):
    """A token embedding with normal initial weights of standard deviation `std`."""

    def __init__(self, vocab_size: int, d_model: int, std: float):
        self.std = std
        super().__init__(vocab_size, d_model)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(0, self.std)


class Block(nn.Module):
    """Computes x + attention(norm(x)), then x + feed-forward(norm(x)): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TransformerConfig, index: int):
        super().__init__()
        self.index = index
        d_model = config.d_model
        std = config.weight_std
        out_std = config.weight_std / math.sqrt(2 * config.layers)
        self.attention_norm = RMSNorm(d_model, config.norm_eps)
        self.attention = Attention(
            d_model,
            config.heads,
            config.kv_head_count,
            config.head_width,
            config.causal,
            config.qk_norm,
            config.norm_eps,
            std,
            out_std,
        )
        self.ffn_norm = RMSNorm(d_model, config.norm_eps)
        self.ffn: MoELayer | SwiGLU
        if config.moe is not None and index in config.moe_indices:
            self.ffn = MoELayer(config.moe, d_model, std, out_std)
        else:
            self.ffn = SwiGLU(d_model, config.ffn, std, out_std)

    def forward(
        self,
        x_BTD: Tensor,
        rotary_T1C: tuple[Tensor, Tensor],
        keys_B: Tensor,
        mask_BTT: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, RouteStats | None]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary_T1C, mask_BTT, cache)
        if isinstance(self.ffn, MoELayer):
            y_BTD, stats = self.ffn(self.ffn_norm(x_BTD), derive(keys_B, self.index))
            return x_BTD + y_BTD, stats
        return x_BTD + self.ffn(self.ffn_norm(x_BTD)), None


class Transformer(nn.Module):
    """Token embedding, blocks, norm, output matrix."""

    def __init__(self, config: TransformerConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.embedding = Embedding(vocab_size, config.d_model, config.weight_std)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.d_model, vocab_size, config.weight_std)

    @property
    def moe_layers(self) -> tuple[MoELayer, ...]:
        """Mixture-of-experts layers, in the order of `forward`'s statistics."""
        return tuple(block.ffn for block in self.blocks if isinstance(block.ffn, MoELayer))

    def forward(
        self,
        tokens_BT: Tensor,
        samples_B: Tensor | None = None,
        segments_BT: Tensor | None = None,
        seed: int = 0,
        caches: list[KVCache] | None = None,
    ) -> tuple[Tensor, tuple[RouteStats, ...]]:
        """Return the logits (B, T, V) and the statistics of each mixture-of-experts layer. The
        arguments are those of `hidden`."""
        x_BTD, stats = self.hidden(tokens_BT, samples_B, segments_BT, seed, caches)
        return F.linear(x_BTD, self.embedding.weight) if self.head is None else self.head(x_BTD), stats

    def hidden(
        self,
        tokens_BT: Tensor,
        samples_B: Tensor | None = None,
        segments_BT: Tensor | None = None,
        seed: int = 0,
        caches: list[KVCache] | None = None,
    ) -> tuple[Tensor, tuple[RouteStats, ...]]:
        """Return the output matrix's input (B, T, D), and the statistics of each mixture-of-experts
        layer.

        `samples_B` are the samples' numbers in the run (int64; default 0, 1, ...); with `seed` they
        determine jitter and noise. `segments_BT` numbers the documents in a sample: positions see
        only their own document. `caches`, one per block, hold the previous positions; `tokens_BT`
        is then one more position, or the whole prompt if the caches are empty.
        """
        samples_B = torch.arange(len(tokens_BT), device=tokens_BT.device) if samples_B is None else samples_B
        keys_B = sample_keys(seed, samples_B, "transformer")
        start = len(caches[0]) if caches else 0
        rotary_T1C = rotary_table(
            start, start + tokens_BT.shape[1], self.config.head_width, self.config.rope_theta, tokens_BT.device
        )
        mask_BTT = None if segments_BT is None else self._mask(segments_BT)
        x_BTD = self.embedding(tokens_BT)
        stats = []
        for index, block in enumerate(self.blocks):
            inputs = (x_BTD, rotary_T1C, keys_B, mask_BTT, caches[index] if caches else None)
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x_BTD, layer = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD, layer = block(*inputs)
            if layer is not None:
                stats.append(layer)
        return self.norm(x_BTD), tuple(stats)

    def _mask(self, segments_BT: Tensor) -> Tensor:
        """Return a mask (B, T, T) that is true where a position may see another of its document."""
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        return same_BTT.tril() if self.config.causal else same_BTT
