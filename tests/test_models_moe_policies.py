"""The routings against Hugging Face's modules, NumPy versions written from the papers, and closed
forms."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from transformers import MixtralConfig, Qwen3MoeConfig, SwitchTransformersConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
    load_balancing_loss_func,
    router_z_loss_func,
)

from models.moe.layer import MoEConfig, MoELayer
from models.moe.policies import (
    BiasBalancedRouting,
    ExpertChoiceRouting,
    NoisyTopKRouting,
    SwitchRouting,
    TopKRouting,
    bias_balanced,
    count,
    expert_choice,
    load_balance,
    noisy_top_k,
    router_z,
    switch,
    within_capacity,
)
from models.moe.router import Router
from models.random import sample_keys

GROUPS = 3
TOKENS = 24
WIDTH = 16
EXPERTS = 6


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(GROUPS, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_switch_is_hugging_face_router_with_capacity() -> None:
    capacity = 5
    config = SwitchTransformersConfig(num_experts=EXPERTS, hidden_size=WIDTH, expert_capacity=capacity)
    theirs = SwitchTransformersTop1Router(config).eval()
    x = torch.randn(GROUPS, TOKENS, WIDTH)
    ours = Router(SwitchRouting(), EXPERTS, WIDTH)
    ours.load_state_dict({"weight": theirs.classifier.weight.detach()})
    index, probability, scores = theirs(x)
    routing = ours(x, torch.arange(GROUPS))
    keep = within_capacity(routing.expert_GA, torch.arange(TOKENS).expand(GROUPS, -1), capacity, EXPERTS)
    one_hot = torch.nn.functional.one_hot(routing.expert_GA, EXPERTS) * keep[..., None]
    assert (~keep).any()
    assert torch.equal(one_hot, index)
    torch.testing.assert_close(routing.gate_GA, probability.squeeze(-1))
    torch.testing.assert_close(routing.probs_GNE, scores.softmax(-1))
    torch.testing.assert_close(routing.log_z_GN, scores.logsumexp(-1))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_top_k_is_qwen3_moe_router(k: int, normalise: bool) -> None:
    theirs = Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=k, norm_topk_prob=normalise)
    )
    torch.nn.init.normal_(theirs.weight)
    ours = Router(TopKRouting(k=k, normalise=normalise), EXPERTS, WIDTH)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(GROUPS, TOKENS, WIDTH)
    _, gates, chosen = theirs(x)
    routing = ours(x, torch.arange(GROUPS))
    assert torch.equal(routing.expert_GA.view(-1, k), chosen)
    torch.testing.assert_close(routing.gate_GA.view(-1, k), gates)


def test_normalised_top_k_is_mixtral_router() -> None:
    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=2))
    torch.nn.init.normal_(theirs.weight)
    ours = Router(TopKRouting(k=2), EXPERTS, WIDTH)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(GROUPS, TOKENS, WIDTH)
    scores, gates, chosen = theirs(x)
    routing = ours(x, torch.arange(GROUPS))
    assert torch.equal(routing.expert_GA.view(-1, 2), chosen)
    torch.testing.assert_close(routing.gate_GA.view(-1, 2), gates)
    softmax_over_chosen = scores.gather(-1, chosen).softmax(-1)
    torch.testing.assert_close(routing.gate_GA.view(-1, 2), softmax_over_chosen)


def test_switch_losses_are_equations_4_to_6_and_hugging_face() -> None:
    logits_GNE = logits()
    routing = switch(logits_GNE)
    share_GE = count(routing.expert_GA, EXPERTS) / TOKENS
    ours = load_balance(share_GE, routing.probs_GNE)
    for group in range(GROUPS):
        p = softmax(logits_GNE[group].numpy())
        fraction = np.array([np.mean(p.argmax(-1) == expert) for expert in range(EXPERTS)])  # equation 5
        probability = p.mean(0)  # equation 6
        assert ours[group].item() == pytest.approx(EXPERTS * (fraction * probability).sum(), rel=1e-5)  # equation 4
    theirs = load_balancing_loss_func(routing.probs_GNE, routing.expert_GA)
    assert ours.mean().item() == pytest.approx(float(theirs), rel=1e-5)
    assert router_z(routing.log_z_GN).mean().item() == pytest.approx(float(router_z_loss_func(logits_GNE)), rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss_of_a_balanced_router_is_one(k: int) -> None:
    probs_GNE = torch.full((GROUPS, TOKENS, EXPERTS), 1 / EXPERTS)
    expert_GA = (torch.arange(TOKENS * k) % EXPERTS).expand(GROUPS, -1)
    share_GE = count(expert_GA, EXPERTS) / (TOKENS * k)
    torch.testing.assert_close(load_balance(share_GE, probs_GNE), torch.ones(GROUPS))


def test_noisy_top_k_losses_are_those_of_the_paper() -> None:
    k = 2
    clean = logits(1)
    noise = logits(2)
    raw = logits(3)
    std = torch.nn.functional.softplus(raw)
    config = NoisyTopKRouting(k=k, importance_loss=0.7, load_loss=0.3)
    routing = noisy_top_k(clean, noise, std, config)
    for group in range(GROUPS):
        h = (clean[group] + noise[group] * np.log1p(np.exp(raw[group]))).numpy()  # equation 4
        gates = np.zeros_like(h)
        load = np.zeros(EXPERTS)
        for token in range(TOKENS):
            chosen = np.argsort(-h[token])[:k]
            gates[token, chosen] = softmax(h[token, chosen])  # equations 3 and 5
            for expert in range(EXPERTS):
                threshold = np.sort(np.delete(h[token], expert))[-k]  # kth_excluding
                load[expert] += norm.cdf(
                    (clean[group, token, expert] - threshold) / std[group, token, expert]
                )  # equations 9 and 10
        importance = gates.sum(0)  # equation 6
        expected = (
            0.7 * (importance.std() / importance.mean()) ** 2 + 0.3 * (load.std() / load.mean()) ** 2
        )  # equations 7 and 11
        assert routing.balance_G is not None
        assert routing.balance_G[group].item() == pytest.approx(expected, rel=1e-4)
        ours = np.zeros_like(gates)
        np.put_along_axis(
            ours, routing.expert_GA[group].view(-1, k).numpy(), routing.gate_GA[group].view(-1, k).numpy(), axis=-1
        )
        np.testing.assert_allclose(ours, gates, rtol=1e-5, atol=1e-7)


def test_noisy_top_k_has_noise_in_training_only() -> None:
    router = Router(NoisyTopKRouting(), EXPERTS, WIDTH)
    x = torch.randn(2, TOKENS, WIDTH)
    keys = sample_keys(0, torch.arange(2))
    chosen = router(x, keys).expert_GA
    assert torch.equal(chosen, router(x, keys).expert_GA)
    assert not torch.equal(chosen, router(x, keys + 1).expert_GA)
    router.eval()
    assert torch.equal(router(x, keys).expert_GA, router(x, keys + 1).expert_GA)


def test_expert_choice_takes_the_best_tokens_of_each_expert() -> None:
    logits_GNE = logits()
    routing = expert_choice(logits_GNE, 2.0)
    capacity = TOKENS * 2 // EXPERTS
    assert routing.token_GA is not None
    for group in range(GROUPS):
        p = softmax(logits_GNE[group].numpy())
        for expert in range(EXPERTS):
            mine = routing.expert_GA[group] == expert
            best = np.argsort(-p[:, expert])[:capacity]
            assert set(routing.token_GA[group, mine].tolist()) == set(best.tolist())
            np.testing.assert_allclose(
                routing.gate_GA[group, mine], p[routing.token_GA[group, mine], expert], rtol=1e-5
            )


@pytest.mark.parametrize("normalise", [False, True])
def test_bias_moves_the_choice_and_not_the_gate(normalise: bool) -> None:
    logits_GNE = logits()
    bias_E = torch.tensor([2.0, 0, 0, 0, -2.0, 0])
    k = 2
    routing = bias_balanced(logits_GNE, bias_E, BiasBalancedRouting(k=k, normalise=normalise, scale=1.5))
    expert_GNK = routing.expert_GA.view(GROUPS, TOKENS, k)
    scores = 1 / (1 + np.exp(-logits_GNE.double().numpy()))
    expected = np.sort(np.argsort(-(scores + bias_E.numpy()), axis=-1)[..., :k], axis=-1)
    assert np.array_equal(expert_GNK.sort(-1).values.numpy(), expected)
    assert (expert_GNK == 0).any(-1).all()
    assert not (expert_GNK == 4).any()
    gates = np.take_along_axis(scores, expert_GNK.numpy(), -1)
    gates = 1.5 * (gates / gates.sum(-1, keepdims=True) if normalise else gates)
    np.testing.assert_allclose(routing.gate_GA.view(GROUPS, TOKENS, k), gates, rtol=1e-5)


def test_update_bias_is_a_signed_step_towards_balance() -> None:
    router = Router(BiasBalancedRouting(bias_rate=0.25), 3, WIDTH)
    router.update_bias(torch.tensor([9.0, 3.0, 6.0]))
    assert router.bias_E.tolist() == [-0.25, 0.25, 0.0]


def test_bias_keeps_small_steps_in_a_bfloat16_model() -> None:
    router = Router(BiasBalancedRouting(bias_rate=0.001), 2, WIDTH).bfloat16()
    router.bias_E.fill_(1)
    router.update_bias(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(router.bias_E, torch.tensor([1.001, 0.999]))


def test_bias_update_balances_a_skewed_router() -> None:
    torch.manual_seed(0)
    config = MoEConfig(experts=4, ffn=8, router=BiasBalancedRouting(k=1, normalise=False, bias_rate=0.02))
    layer = MoELayer(config, WIDTH)
    x = torch.randn(8, 64, WIDTH) + 1
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    keys = torch.arange(8)
    with torch.no_grad():
        before = layer(x, keys)[1].load_E
        for _ in range(150):
            layer.after_step(layer(x, keys)[1].load_E)
        after = layer(x, keys)[1].load_E
    assert before.max() / before.mean() > 1.5
    assert after.max() / after.mean() < 1.15


def test_capacity_keeps_early_tokens_or_large_gates() -> None:
    expert_GA = torch.tensor([[0, 0, 1, 0, 0, 1]])
    gate_GA = torch.tensor([[0.3, 0.9, 0.2, 0.8, 0.4, 0.7]])
    by_position = within_capacity(expert_GA, torch.arange(6)[None], 2, 2)
    by_probability = within_capacity(expert_GA, -gate_GA, 2, 2)
    assert by_position.tolist() == [[True, True, True, False, False, True]]
    assert by_probability.tolist() == [[False, True, True, True, False, True]]


def test_router_stays_float32_in_bfloat16_models_and_under_autocast() -> None:
    router = Router(SwitchRouting(), EXPERTS, WIDTH)
    x = torch.randn(1, TOKENS, WIDTH)
    expected = (x @ router.weight.T).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(routing.probs_GNE, expected)
    assert routing.gate_GA.dtype == torch.float32
    router.bfloat16()
    routing = router(x.bfloat16(), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(routing.probs_GNE, (x.bfloat16().float() @ router.weight.float().T).softmax(-1))
    assert routing.gate_GA.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKRouting(k=1), "k: 1"),
        (lambda: BiasBalancedRouting(k=1), "k: 1"),
        (lambda: NoisyTopKRouting(k=1), "k: 1"),
        (lambda: TopKRouting(k=0, normalise=False), "k: 0"),
        (lambda: ExpertChoiceRouting(experts_per_token=0), "experts_per_token: 0"),
        (lambda: MoEConfig(experts=4, ffn=8, router=TopKRouting(k=5)), "at most 4"),
        (lambda: MoEConfig(experts=4, ffn=8, router=NoisyTopKRouting(k=4)), "at most 3"),
        (lambda: MoEConfig(experts=4, ffn=8, capacity_factor=0.0), "capacity_factor: 0.0"),
        (lambda: MoEConfig(experts=4, ffn=8, jitter=1.0), "jitter 1.0"),
        (lambda: MoEConfig(experts=4, ffn=8, z_loss=-0.1), "z_loss -0.1"),
        (lambda: MoEConfig(experts=4, ffn=8, router=ExpertChoiceRouting(), capacity_factor=1.0), "expert_choice"),
        (lambda: MoEConfig(experts=4, ffn=8, router=NoisyTopKRouting(), balance="global"), "noisy_top_k"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
