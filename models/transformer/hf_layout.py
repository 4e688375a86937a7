"""The layout of Hugging Face transformers for one of our transformers, and its config.json, in both
directions.

The tensors' names are in models/transformer/hf_names.py.
"""

from collections.abc import Mapping
from typing import Literal

from models.moe.layer import MoEConfig
from models.moe.policies import (
    BiasBalancedRouting,
    ExpertChoiceRouting,
    NoisyTopKRouting,
    RoutingConfig,
    SwitchRouting,
    TopKRouting,
)
from models.transformer.model import TransformerConfig

Layout = Literal["llama", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"]
"""A `model_type` of transformers."""

ARCHITECTURES: dict[Layout, str] = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def layout(config: TransformerConfig) -> Layout:
    """Return the layout that gives the same logits in evaluation.

    Raises ValueError, naming the field and the possible values, if there is none.
    """
    if not config.causal:
        raise ValueError(
            "model.causal: false has no layout in transformers, whose decoders are causal; "
            "export a model with causal: true"
        )
    if config.moe is None or not config.moe_indices:
        return "qwen3" if config.qk_norm else "llama"
    if config.moe.control == "permuted":
        raise ValueError("model.moe.control: permuted has no layout in transformers; use none or frozen")
    _, normalised = gates(config.moe.router)
    shared = config.moe.shared_expert
    if config.qk_norm and shared:
        raise ValueError(
            f"model.moe.shared_expert: {shared} together with qk_norm: true has no layout in transformers; "
            "use shared_expert: 0 or qk_norm: false"
        )
    if config.qk_norm:
        return "qwen3_moe"
    return "mixtral" if normalised and not shared and len(config.moe_indices) == config.layers else "qwen2_moe"


def gates(router: RoutingConfig) -> tuple[int, bool]:
    """Return the number of experts per token, and whether their softmax gates are divided by their
    sum, in evaluation.

    Raises ValueError for gates of another kind.
    """
    match router:
        case SwitchRouting():
            return 1, False
        case TopKRouting(k=k, normalise=normalise):
            return k, normalise
        case NoisyTopKRouting(k=k):
            return k, True  # without the noise, a softmax over the chosen
        case BiasBalancedRouting() | ExpertChoiceRouting():
            raise ValueError(
                f"model.moe.router: {router.name} has no fitting layout in transformers; "
                "use switch, top_k or noisy_top_k"
            )


def to_config(config: TransformerConfig, vocab_size: int, positions: int, end_of_text: int) -> dict[str, object]:
    """Return the config.json for weights named by models/transformer/hf_names.py. `positions` is
    the length that the model was trained on."""
    kind = layout(config)
    values: dict[str, object] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_head_count,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "initializer_range": config.weight_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "torch_dtype": "float32",
    }
    if config.moe is None or kind in ("llama", "qwen3"):
        return values
    return values | _moe_values(kind, config, config.moe)


def _moe_values(kind: Layout, config: TransformerConfig, moe: MoEConfig) -> dict[str, object]:
    """Return the entries of config.json that describe the mixture of experts."""
    k, normalised = gates(moe.router)
    values: dict[str, object] = {"num_experts_per_tok": k, "router_aux_loss_coef": moe.balance_loss}
    if kind == "mixtral":
        return values | {"intermediate_size": moe.ffn, "num_local_experts": moe.experts}
    dense = [index for index in range(config.layers) if index not in config.moe_indices]
    values |= {
        "num_experts": moe.experts,
        "moe_intermediate_size": moe.ffn,
        "norm_topk_prob": normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }
    if kind == "qwen2_moe":
        values |= {"qkv_bias": False, "shared_expert_intermediate_size": moe.shared_expert}
    return values


def from_config(values: Mapping[str, object]) -> tuple[TransformerConfig, int]:
    """Return the transformer that a config.json describes, and the size of its vocabulary.

    Raises ValueError for a model that ours cannot compute.
    """
    kind = next((kind for kind in ARCHITECTURES if kind == values.get("model_type")), None)
    if kind is None:
        raise ValueError(
            f"config.json: model_type is {values.get('model_type')!r}; possible are {', '.join(ARCHITECTURES)}"
        )
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: rope_parameters is {rope!r}; it must be an object")
    fixed: list[tuple[str, object, object]] = [
        ("hidden_act", values.get("hidden_act", "silu"), "silu"),
        ("attention_bias", values.get("attention_bias", False), False),
        ("mlp_bias", values.get("mlp_bias", False), False),
        ("qkv_bias", values.get("qkv_bias", kind == "qwen2_moe"), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("use_sliding_window", values.get("use_sliding_window", False), False),
        ("sliding_window", values.get("sliding_window") if kind == "mixtral" else None, None),
    ]
    for name, value, possible in fixed:
        if value != possible:
            raise ValueError(f"config.json: {name} is {value!r}; only {possible!r} is possible")
    try:
        theta = _number(rope if rope.get("rope_theta") else values, "rope_theta")
        return _transformer(kind, values, theta), _integer(values, "vocab_size")
    except KeyError as missing:
        raise ValueError(
            f"config.json: no {missing.args[0]}; it must be the one that was saved with the weights"
        ) from None


def _transformer(kind: Layout, values: Mapping[str, object], rope_theta: float) -> TransformerConfig:
    layers = _integer(values, "num_hidden_layers")
    moe = None
    moe_layers: tuple[int, ...] = ()
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        moe = _moe(kind, values)
        step = _integer(values, "decoder_sparse_step", 1)
        dense = values.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise ValueError(f"config.json: mlp_only_layers is {dense!r}; it must be a list")
        moe_layers = tuple(index for index in range(layers) if index not in dense and (index + 1) % step == 0)
    return TransformerConfig(
        layers=layers,
        d_model=_integer(values, "hidden_size"),
        heads=_integer(values, "num_attention_heads"),
        kv_heads=_integer_or_none(values, "num_key_value_heads"),
        head_dim=_integer(values, "head_dim") if kind == "qwen3" else _integer_or_none(values, "head_dim"),
        ffn=_integer(values, "intermediate_size"),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        rope_theta=rope_theta,
        norm_eps=_number(values, "rms_norm_eps"),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        moe=moe,
        moe_layers=moe_layers,
    )


def _moe(kind: Layout, values: Mapping[str, object]) -> MoEConfig:
    k = _integer(values, "num_experts_per_tok")
    normalised = kind == "mixtral" or bool(values["norm_topk_prob"])
    router: RoutingConfig = SwitchRouting() if (k, normalised) == (1, False) else TopKRouting(k=k, normalise=normalised)
    return MoEConfig(
        experts=_integer(values, "num_experts" if "num_experts" in values else "num_local_experts"),
        ffn=_integer(values, "intermediate_size" if kind == "mixtral" else "moe_intermediate_size"),
        router=router,
        shared_expert=_integer(values, "shared_expert_intermediate_size") if kind == "qwen2_moe" else 0,
    )


def _integer(values: Mapping[str, object], name: str, default: int | None = None) -> int:
    """Return the integer `name`. Raises KeyError if it is missing without a default, ValueError for
    another type."""
    value = values[name] if default is None else values.get(name, default)
    if not isinstance(value, int):
        raise ValueError(f"config.json: {name} is {value!r}; it must be a whole number")
    return value


def _integer_or_none(values: Mapping[str, object], name: str) -> int | None:
    return None if values.get(name) is None else _integer(values, name)


def _number(values: Mapping[str, object], name: str) -> float:
    """Return the number `name`. Raises KeyError if it is missing, ValueError for another type."""
    value = values[name]
    if not isinstance(value, int | float):
        raise ValueError(f"config.json: {name} is {value!r}; it must be a number")
    return float(value)


def shape_of(config: TransformerConfig) -> dict[str, object]:
    """Return all fields of `config` that decide the shapes and the meaning of its weights, by their
    names in a job. Models with equal fields can exchange weights."""
    fields: dict[str, object] = {
        "layers": config.layers,
        "d_model": config.d_model,
        "heads": config.heads,
        "kv_heads": config.kv_head_count,
        "head_dim": config.head_width,
        "qk_norm": config.qk_norm,
        "rope_theta": config.rope_theta,
        "norm_eps": config.norm_eps,
        "tie_embeddings": config.tie_embeddings,
        "moe_layers": list(config.moe_indices),
    }
    if len(config.moe_indices) < config.layers:
        fields["ffn"] = config.ffn
    if config.moe is not None and config.moe_indices:
        moe = config.moe
        fields |= {
            "moe.experts": moe.experts,
            "moe.ffn": moe.ffn,
            "moe.shared_expert": moe.shared_expert,
            "moe.router": _meaning(moe.router),
        }
    return fields


def _meaning(router: RoutingConfig) -> str:
    """Describe a routing in evaluation; routings that choose alike have equal descriptions."""
    match router:
        case BiasBalancedRouting(k=k, normalise=normalise, scale=scale):
            return f"bias_balanced with k {k}, normalise {str(normalise).lower()}, scale {scale:g}"
        case ExpertChoiceRouting(experts_per_token=mean):
            return f"expert_choice with experts_per_token {mean:g}"
        case SwitchRouting() | TopKRouting(k=1):
            return "switch"
        case _:
            k, normalised = gates(router)
            return f"top_k with k {k}, normalise {str(normalised).lower()}"
