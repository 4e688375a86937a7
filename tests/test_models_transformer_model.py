"""The transformer against Hugging Face's models, masks, checkpointing, generation, and its
parameters and FLOPs against counts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from models.init import initialise
from models.layers import RMSNorm
from models.moe.layer import MoEConfig, router_loss
from models.moe.policies import BiasBalancedRouting, ExpertChoiceRouting, NoisyTopKRouting, SwitchRouting, TopKRouting
from models.transformer.attention import rotary_table, rotate
from models.transformer.cost import flops_per_token, forward_flops_per_token, parameters
from models.transformer.generate import choose, generate
from models.transformer.hf_layout import to_config
from models.transformer.hf_names import to_transformers
from models.transformer.model import Transformer, TransformerConfig

VOCAB = 50
LENGTH = 24
MOE = MoEConfig(experts=4, ffn=16, router=TopKRouting(k=2))
SMALL = TransformerConfig(layers=2, d_model=32, heads=4, kv_heads=2, head_dim=16, ffn=48, init_std=0.2)


def make(config: TransformerConfig) -> Transformer:
    model = Transformer(config, VOCAB)
    initialise(model, 0)
    return model


def tokens(samples: int = 3) -> Tensor:
    return torch.randint(VOCAB, (samples, LENGTH), generator=torch.Generator().manual_seed(1))


def loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def in_transformers(model: Transformer) -> PreTrainedModel:
    """The same model there: its config, and our weights under its names."""
    values = to_config(model.config, VOCAB, positions=LENGTH, end_of_text=0) | {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    weights = to_transformers(model.state_dict(), model.config, VOCAB, stacked=True)
    if model.config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights)
    return theirs.eval()


def check_equal(model: Transformer, theirs: PreTrainedModel) -> None:
    """Same loss to 1e-5, same logits, same gradients at the embedding."""
    ours = loss(model(tokens())[0], tokens())
    other = theirs(input_ids=tokens(), labels=tokens()).loss
    assert abs(ours.item() - other.item()) < 1e-5
    torch.testing.assert_close(model(tokens())[0], theirs(tokens()).logits, rtol=1e-4, atol=1e-5)
    ours.backward()
    other.backward()
    torch.testing.assert_close(model.embedding.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("layers", ["all", "alternate"])
@pytest.mark.parametrize(
    "router",
    [SwitchRouting(), TopKRouting(k=2, normalise=False), TopKRouting(k=2)],
    ids=["switch", "top_2", "normalised_top_2"],
)
def test_loss_is_qwen3_moe(router: TopKRouting, layers: str, tie: bool) -> None:
    moe = replace(MOE, router=router)
    model = make(replace(SMALL, qk_norm=True, moe=moe, moe_layers=layers, tie_embeddings=tie, rope_theta=5000.0))
    theirs = in_transformers(model)
    assert isinstance(theirs, Qwen3MoeForCausalLM)
    check_equal(model, theirs)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (replace(SMALL, moe=replace(MOE, ffn=48)), MixtralForCausalLM),
        (replace(SMALL, qk_norm=True), Qwen3ForCausalLM),
        (replace(SMALL, norm_eps=1e-4), LlamaForCausalLM),
        (
            replace(SMALL, moe=replace(MOE, router=SwitchRouting(), shared_expert=24), moe_layers=(1,)),
            Qwen2MoeForCausalLM,
        ),
    ],
    ids=["mixtral", "qwen3", "llama", "qwen2_moe"],
)
def test_loss_is_that_of_the_other_layouts(config: TransformerConfig, kind: type[PreTrainedModel]) -> None:
    model = make(config)
    theirs = in_transformers(model)
    assert isinstance(theirs, kind)
    check_equal(model, theirs)


def test_greedy_generation_is_hugging_face() -> None:
    model = make(replace(SMALL, qk_norm=True, moe=MOE))
    prompt = tokens(2)[:, :5]
    theirs = in_transformers(model).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=15, do_sample=False
    )
    assert torch.equal(generate(model, prompt, 15, temperature=0), theirs)


def test_cached_generation_equals_whole_passes() -> None:
    model = make(replace(SMALL, moe=MOE)).eval()
    whole = tokens(2)[:, :3]
    for _ in range(8):
        whole = torch.cat((whole, model(whole)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, tokens(2)[:, :3], 8, temperature=0), whole)


def test_sampling_follows_temperature_and_top_k() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20000, -1)
    counts = choose(logits_BV, 0.5, None, generator).flatten().bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([1.0, 4, 9, 16]) / 30, atol=0.015, rtol=0)
    counts = choose(logits_BV, 1.0, 2, generator).flatten().bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([0, 0, 3.0, 4]) / 7, atol=0.015, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_of_a_sample_do_not_see_each_other(causal: bool) -> None:
    model = make(replace(SMALL, moe=MOE, causal=causal))
    tokens_BT = tokens()
    segments_BT = (torch.arange(LENGTH) >= 10).long().expand(3, -1)
    together = model(tokens_BT, segments_BT=segments_BT)[0]
    apart = torch.cat([model(part)[0] for part in (tokens_BT[:, :10], tokens_BT[:, 10:])], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[:, 10:], model(tokens_BT)[0][:, 10:], atol=1e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_who_sees_the_future(causal: bool) -> None:
    model = make(replace(SMALL, moe=MOE, causal=causal))
    before = tokens()
    after = before.clone()
    after[:, -1] = (after[:, -1] + 1) % VOCAB
    change = (model(before)[0] - model(after)[0]).abs().amax((0, 2))
    assert change[-1] > 1e-3
    assert (change[:-1].max() < 1e-6) if causal else (change[:-1].min() > 1e-5)


def test_activation_checkpointing_changes_nothing() -> None:
    moe = MoEConfig(experts=4, ffn=16, router=NoisyTopKRouting(), capacity_factor=0.75, jitter=0.1)
    results = []
    for checkpointing in (False, True):
        model = make(replace(SMALL, moe=moe, activation_checkpointing=checkpointing))
        logits_BTV, stats = model(tokens(), samples_B=torch.arange(3), seed=4)
        (loss(logits_BTV, tokens()) + router_loss(moe, stats).mean()).backward()
        results.append((logits_BTV, *(parameter.grad for parameter in model.parameters())))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_random_routing_depends_on_seed_sample_and_layer_only() -> None:
    moe = MoEConfig(experts=4, ffn=16, jitter=0.3)
    model = make(replace(SMALL, moe=moe))
    samples_B = torch.tensor([8, 9, 10])
    whole = model(tokens(), samples_B=samples_B, seed=4)[0]
    parts = [
        model(part, samples_B=numbers, seed=4)[0]
        for part, numbers in zip(tokens().split((1, 2)), samples_B.split((1, 2)), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(whole, model(tokens(), samples_B=samples_B, seed=5)[0])
    assert not torch.allclose(whole, model(tokens(), samples_B=samples_B + 1, seed=4)[0])


def test_initial_weights_have_the_stated_spread() -> None:
    model = make(TransformerConfig(layers=2, d_model=128, heads=4, ffn=256, moe=MoEConfig(experts=4, ffn=128)))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            expected = (2 / 5 / 128) ** 0.5 / (4**0.5 if name.endswith(("out.weight", "down")) else 1)
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
    assert model(tokens())[0].std() < 1


def test_norm_is_torch_rms_norm() -> None:
    norm = RMSNorm(16, 1e-3)
    x = torch.randn(3, 5, 16)
    grad = torch.randn(3, 5, 16)
    torch.nn.init.normal_(norm.weight)
    results = []
    for function in (norm, lambda x: torch.nn.functional.rms_norm(x, (16,), norm.weight, 1e-3)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, norm.weight), grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_norm_and_rotation_gradcheck() -> None:
    norm = RMSNorm(6, 1e-6).double()
    rotary_T1C = rotary_table(3, 8, 6, 100.0, torch.device("cpu"))
    x_BTHC = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)), (x_BTHC, norm.weight)
    )
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotary_T1C), (x_BTHC,))


VARIANTS = [
    SMALL,
    replace(SMALL, tie_embeddings=True, qk_norm=True, moe=MOE, moe_layers="alternate"),
    replace(SMALL, moe=replace(MOE, router=NoisyTopKRouting(k=3), shared_expert=24)),
    replace(SMALL, moe=replace(MOE, router=BiasBalancedRouting(k=2)), moe_layers=(0,)),
    replace(SMALL, moe=replace(MOE, router=ExpertChoiceRouting(experts_per_token=2)), causal=False),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_counts_agree_with_the_model(config: TransformerConfig) -> None:
    model = make(config)
    counted = parameters(config, VOCAB)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        (layer.config.experts - counted_k(layer.config)) * 3 * config.d_model * layer.config.ffn
        for layer in model.moe_layers
    )
    assert counted.active == counted.total - idle
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused attention
        with FlopCounterMode(display=False) as forward:
            logits_BTV, _ = model(tokens())
        with FlopCounterMode(display=False) as backward:
            loss(logits_BTV, tokens()).backward()
    assert forward.get_total_flops() == tokens().numel() * forward_flops_per_token(config, VOCAB, LENGTH)
    assert forward.get_total_flops() + backward.get_total_flops() == tokens().numel() * flops_per_token(
        config, VOCAB, LENGTH
    )


def counted_k(moe: MoEConfig) -> int:
    return {"noisy_top_k": 3}.get(moe.router.name, 2)


def test_published_parameter_counts() -> None:
    mixtral = TransformerConfig(
        layers=32,
        d_model=4096,
        heads=32,
        kv_heads=8,
        ffn=14336,
        rope_theta=1e6,
        moe=MoEConfig(experts=8, ffn=14336, router=TopKRouting(k=2)),
    )
    counted = parameters(mixtral, 32000)
    assert round(counted.total / 1e9, 1) == 46.7
    assert round(counted.active / 1e9, 1) == 12.9
    with torch.device("meta"):
        assert counted.total == sum(parameter.numel() for parameter in Transformer(mixtral, 32000).parameters())
    # Switch-C (Fedus et al. 2021, table 9): 1.571e12. It is an encoder and a decoder of 15 layers
    # each, whose ReLU experts are two matrices of inner width 6144: as many weights as three of
    # 4096. Ours lacks the decoder's cross attention, under 0.1 % of the whole.
    switch_c = TransformerConfig(
        layers=30,
        d_model=2080,
        heads=32,
        head_dim=64,
        ffn=4096,
        tie_embeddings=True,
        moe=MoEConfig(experts=2048, ffn=4096),
    )
    assert parameters(switch_c, 32128).total == pytest.approx(1.571e12, rel=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5, "head_dim": None}, "heads: 5 does not divide d_model 32"),
        ({"kv_heads": 3}, "kv_heads: 3 does not divide heads 4"),
        ({"head_dim": 7}, "head_dim: 7 is odd"),
        ({"layers": 0}, "layers 0"),
        ({"moe_layers": (0, 2)}, r"\[0, 2\] must lie between 0 and 1"),
        ({"moe": MoEConfig(experts=4, ffn=8, router=ExpertChoiceRouting())}, "leaks the future"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        replace(SMALL, **options)
    assert "\n" not in str(error.value)
