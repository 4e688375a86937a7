"""Number of parameters of a transformer, and FLOPs per token, computed from the config without
making weights.

Legend: L layers, D model width, H query heads, J key-value heads, C head width, F inner width, E
experts, T positions, V vocabulary.
"""

from typing import NamedTuple

from models.moe import MoEConfig
from models.routing import NoisyTopKRouting, experts_per_token
from models.transformer import TransformerConfig


class Parameters(NamedTuple):
    """Numbers of parameters."""

    total: int
    """All parameters."""
    active: float
    """Parameters that one token uses, including embeddings and norms. Of the routed experts only
    the token's own count (on average, for expert_choice)."""
    matmul: float
    """Active parameters that a matrix product uses: N in 6 N. Excludes norms and embedding look-up,
    includes the output matrix."""


def parameters(config: TransformerConfig, vocab_size: int) -> Parameters:
    """Count the parameters of `Transformer(config, vocab_size)`."""
    layers = config.layers
    moe_layers = len(config.moe_indices)
    width = config.d_model
    head_width = config.head_width
    # D (H + 2J) C for query, key and value, H C D for the output.
    attention = layers * width * head_width * (2 * config.heads + 2 * config.kv_head_count)
    norms = (2 * layers + 1) * width + 2 * layers * head_width * config.qk_norm
    dense = (layers - moe_layers) * 3 * width * config.ffn
    used, held = _moe_parameters(config.moe, width) if config.moe else (0, 0)
    vocabulary = vocab_size * width
    shared = attention + dense + vocabulary
    matmul = shared + moe_layers * used
    unused = norms + (0 if config.tie_embeddings else vocabulary)
    return Parameters(round(shared + moe_layers * held + unused), matmul + unused, matmul)


def non_embedding(config: TransformerConfig) -> int:
    """Count the parameters without the token embedding and the output matrix: N of Kaplan et al.
    2020, section 2.1."""
    return parameters(config, vocab_size=0).total


def _moe_parameters(moe: MoEConfig, width: int) -> tuple[float, float]:
    """Count the parameters of one mixture-of-experts layer: (used per token, all)."""
    expert = 3 * width * moe.ffn
    matrices = 2 if isinstance(moe.router, NoisyTopKRouting) else 1
    always = width * moe.experts * matrices + 3 * width * moe.shared_expert
    return always + experts_per_token(moe.router) * expert, always + moe.experts * expert


def forward_flops_per_token(config: TransformerConfig, vocab_size: int, seq_len: int) -> float:
    """Return the FLOPs per token of a forward pass, 2 N + 4 L H C T: a multiplication and an
    addition per parameter (Kaplan et al. 2020, table 1), and the two products of attention.

    Attention counts all T positions, masked or not, as is usual (Chowdhery et al. 2022, PaLM,
    appendix B). Drops are not subtracted.
    """
    attention = 4 * config.layers * config.heads * config.head_width * seq_len
    return 2 * parameters(config, vocab_size).matmul + attention


def flops_per_token(config: TransformerConfig, vocab_size: int, seq_len: int) -> float:
    """Return the model FLOPs per token in training, 6 N + 12 L H C T (PaLM, appendix B): the
    forward pass, and twice that for the backward pass.

    Recomputation by activation checkpointing does not count: divided by time and peak, this is
    model FLOPs utilisation.
    """
    return 3 * forward_flops_per_token(config, vocab_size, seq_len)
