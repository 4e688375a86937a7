"""Names of our weights in transformers' published files, for each layout of
models/transformer/hf_layout.py.

Each of our tensors, flattened, is one or more of theirs, flattened and concatenated. So any range
of ours is a list of ranges of theirs.

Legend: V vocabulary, D model width, C head width, E experts, F inner width.
"""

from collections.abc import Mapping
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from models.moe.layer import MoEConfig
from models.transformer.hf_layout import Layout, layout
from models.transformer.model import TransformerConfig


class Part(NamedTuple):
    """One of their tensors."""

    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """Its shape."""
    scale: float = 1.0
    """Ratio of their values to ours: a power of two, so that both directions are exact."""


def tensors(config: TransformerConfig, vocab_size: int, stacked: bool = False) -> dict[str, tuple[Part, ...]]:
    """Return, for each of our parameters used in evaluation, the tensors that make it up, in order.

    `stacked` puts experts in one tensor, as transformers 5 holds them in memory, instead of one by
    one, as all published files do. Raises ValueError if transformers has no layout for `config`.
    """
    kind = layout(config)
    width = config.d_model
    parts_of: dict[str, tuple[Part, ...]] = {
        "embedding.weight": (Part("model.embed_tokens.weight", (vocab_size, width)),),
        "norm.weight": (Part("model.norm.weight", (width,)),),
    }
    if not config.tie_embeddings:
        parts_of["head.weight"] = (Part("lm_head.weight", (vocab_size, width)),)
    for index in range(config.layers):
        block = _attention(config)
        if config.moe is not None and index in config.moe_indices:
            block |= _stacked(config.moe, width) if stacked else _experts(config.moe, width, kind)
            block |= _shared(config.moe, width)
        else:
            block |= _swiglu("ffn.", "mlp.", width, config.ffn)
        for name, parts in block.items():
            parts_of[f"blocks.{index}.{name}"] = tuple(
                part._replace(name=f"model.layers.{index}.{part.name}") for part in parts
            )
    return parts_of


def zeros(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the layout has in addition to ours and that must be
    zero: the gate of Qwen2-MoE's shared expert, sigmoid(0) = 1/2."""
    if config.moe is None or layout(config) != "qwen2_moe":
        return {}
    shapes: dict[str, tuple[int, ...]] = {"shared_expert_gate.weight": (1, config.d_model)}
    if not config.moe.shared_expert:
        shapes |= {
            part.name.removeprefix("mlp."): part.shape
            for (part,) in _swiglu("", "mlp.shared_expert.", config.d_model, 0).values()
        }
    return {f"model.layers.{index}.mlp.{name}": shapes[name] for index, name in product(config.moe_indices, shapes)}


def to_transformers(
    weights: Mapping[str, Tensor], config: TransformerConfig, vocab_size: int, stacked: bool = False
) -> dict[str, Tensor]:
    """Return copies of our `weights` under their names, each with memory of its own, as safetensors
    requires."""
    theirs = {name: torch.zeros(shape) for name, shape in zeros(config).items()}
    for name, parts in tensors(config, vocab_size, stacked).items():
        pieces = weights[name].detach().flatten().split([prod(part.shape) for part in parts])
        theirs |= {part.name: (part.scale * piece).view(part.shape) for part, piece in zip(parts, pieces, strict=True)}
    return theirs


def _attention(config: TransformerConfig) -> dict[str, tuple[Part, ...]]:
    width = config.d_model
    head = config.head_width
    rows = {"q": config.heads * head, "k": config.kv_head_count * head, "v": config.kv_head_count * head}
    parts_of: dict[str, tuple[Part, ...]] = {
        "attention_norm.weight": (Part("input_layernorm.weight", (width,)),),
        "ffn_norm.weight": (Part("post_attention_layernorm.weight", (width,)),),
        "attention.qkv.weight": tuple(
            Part(f"self_attn.{name}_proj.weight", (count, width)) for name, count in rows.items()
        ),
        "attention.out.weight": (Part("self_attn.o_proj.weight", (width, config.heads * head)),),
    }
    if config.qk_norm:
        parts_of |= {
            f"attention.{name}_norm.weight": (Part(f"self_attn.{name}_norm.weight", (head,)),) for name in "qk"
        }
    return parts_of


def _swiglu(ours: str, theirs: str, width: int, ffn: int, scale: float = 1.0) -> dict[str, tuple[Part, ...]]:
    return {
        f"{ours}gate.weight": (Part(f"{theirs}gate_proj.weight", (ffn, width)),),
        f"{ours}up.weight": (Part(f"{theirs}up_proj.weight", (ffn, width)),),
        f"{ours}down.weight": (Part(f"{theirs}down_proj.weight", (width, ffn), scale),),
    }


def _shared(moe: MoEConfig, width: int) -> dict[str, tuple[Part, ...]]:
    """Return the shared expert's tensors. Qwen2-MoE multiplies its output by a sigmoid, which
    `zeros` makes 1/2, so their output matrix is twice ours."""
    return (
        _swiglu("ffn.shared.", "mlp.shared_expert.", width, moe.shared_expert, scale=2.0) if moe.shared_expert else {}
    )


def _experts(moe: MoEConfig, width: int, kind: Layout) -> dict[str, tuple[Part, ...]]:
    """Return the router and the experts one by one: (F, D), (F, D) and (D, F) each."""
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    experts = [f"{block}.experts.{expert}" for expert in range(moe.experts)]
    return {
        "ffn.router.weight": (Part(f"{block}.gate.weight", (moe.experts, width)),),
        "ffn.experts.gate_up": tuple(
            Part(f"{expert}.{name}.weight", (moe.ffn, width)) for expert, name in product(experts, (gate, up))
        ),
        "ffn.experts.down": tuple(Part(f"{expert}.{down}.weight", (width, moe.ffn)) for expert in experts),
    }


def _stacked(moe: MoEConfig, width: int) -> dict[str, tuple[Part, ...]]:
    """Return the router and the experts in one tensor: (E, 2F, D) and (E, D, F), as ours."""
    return {
        "ffn.router.weight": (Part("mlp.gate.weight", (moe.experts, width)),),
        "ffn.experts.gate_up": (Part("mlp.experts.gate_up_proj", (moe.experts, 2 * moe.ffn, width)),),
        "ffn.experts.down": (Part("mlp.experts.down_proj", (moe.experts, width, moe.ffn)),),
    }
