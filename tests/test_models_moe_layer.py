"""The mixture-of-experts layer: gradients, Hugging Face's layers, a token-by-token version, drops,
groups, slices of experts."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from models.init import decays, initialise
from models.layers import SwiGLU
from models.moe.experts import Experts, grouped_experts, looped_experts
from models.moe.layer import MoEConfig, MoELayer, router_loss
from models.moe.policies import (
    BiasBalancedRouting,
    ExpertChoiceRouting,
    NoisyTopKRouting,
    RoutingConfig,
    SwitchRouting,
    TopKRouting,
)
from models.random import derive, sample_keys, uniform

WIDTH = 8
FFN = 16
EXPERTS = 4
SAMPLES = 4
TOKENS = 12

ROUTERS: list[RoutingConfig] = [
    SwitchRouting(),
    TopKRouting(k=2),
    TopKRouting(k=2, normalise=False),
    NoisyTopKRouting(k=2),
    ExpertChoiceRouting(),
    BiasBalancedRouting(k=2),
]
each_router = pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
each_capacity = pytest.mark.parametrize("capacity", [None, 0.75])


def make(router: RoutingConfig, capacity: float | None = None, **options: object) -> MoELayer:
    """A layer whose router is sure enough of itself for a real imbalance."""
    capacity = None if isinstance(router, ExpertChoiceRouting) else capacity
    layer = MoELayer(
        MoEConfig(experts=EXPERTS, ffn=FFN, router=router, capacity_factor=capacity, **options), WIDTH, std=0.5
    )  # type: ignore[arg-type]
    initialise(layer, 0)
    return layer


def inputs(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    x_BTD = torch.randn(samples, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    return x_BTD, sample_keys(5, torch.arange(100, 100 + samples), "test")


def expert_output(layer: MoELayer, expert: int, x_D: Tensor) -> Tensor:
    gate, up = (layer.experts.gate_up[expert] @ x_D).chunk(2)
    return layer.experts.down[expert] @ (torch.nn.functional.silu(gate) * up)


@each_capacity
@each_router
def test_gradcheck(router: RoutingConfig, capacity: float | None) -> None:
    layer = make(router, capacity, jitter=0.1, shared_expert=4, group=2).double()
    x_BTD, keys_B = inputs(2)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y_BTD, stats = functional_call(layer, dict(zip(names, parameters, strict=True)), (x, keys_B))
        return (y_BTD, stats.z_G, stats.balance_G) if stats.balance_G.requires_grad else (y_BTD, stats.z_G)

    assert torch.autograd.gradcheck(run, (x_BTD[:, :5].double().requires_grad_(), *values), fast_mode=True)


@each_router
def test_router_learns_from_the_output_alone(router: RoutingConfig) -> None:
    layer = make(router)
    x_BTD, keys_B = inputs()
    layer(x_BTD, keys_B)[0].square().sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().max() > 1e-2


def test_switch_gate_is_the_probability_and_never_one() -> None:
    layer = make(SwitchRouting())
    x_BTD, keys_B = inputs()
    y_BTD, stats = layer(x_BTD, keys_B)
    probability, expert = (x_BTD @ layer.router.weight.T).softmax(-1).max(-1)
    assert probability.max() < 0.999
    for sample in range(SAMPLES):
        for token in range(TOKENS):
            e = expert[sample, token]
            unscaled = expert_output(layer, e, x_BTD[sample, token])
            torch.testing.assert_close(y_BTD[sample, token], probability[sample, token] * unscaled)
    assert stats.gate.item() == pytest.approx(probability.sum().item(), rel=1e-5)


@pytest.mark.parametrize("normalise", [False, True])
def test_layer_is_qwen3_moe_block(normalise: bool) -> None:
    config = Qwen3MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=FFN,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=normalise,
    )
    compare_with_hugging_face(Qwen3MoeSparseMoeBlock(config), TopKRouting(k=2, normalise=normalise))


def test_layer_is_mixtral_block() -> None:
    config = MixtralConfig(hidden_size=WIDTH, intermediate_size=FFN, num_local_experts=EXPERTS, num_experts_per_tok=2)
    compare_with_hugging_face(MixtralSparseMoeBlock(config), TopKRouting(k=2))


def compare_with_hugging_face(theirs: torch.nn.Module, router: RoutingConfig) -> None:
    layer = make(router)
    assert isinstance(layer.experts, Experts)
    theirs.load_state_dict(
        {
            "gate.weight": layer.router.weight,
            "experts.gate_up_proj": layer.experts.gate_up,
            "experts.down_proj": layer.experts.down,
        }
    )
    (x_BTD, keys_B) = inputs()
    grad = torch.randn(SAMPLES, TOKENS, WIDTH)
    x_ours = x_BTD.clone().requires_grad_()
    x_theirs = x_BTD.clone().requires_grad_()
    y_ours = layer(x_ours, keys_B)[0]
    y_theirs = theirs(x_theirs)
    torch.testing.assert_close(y_ours, y_theirs)
    y_ours.backward(grad)
    y_theirs.backward(grad)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)
    for mine, other in (
        (layer.router.weight, "gate.weight"),
        (layer.experts.gate_up, "experts.gate_up_proj"),
        (layer.experts.down, "experts.down_proj"),
    ):
        torch.testing.assert_close(mine.grad, theirs.get_parameter(other).grad)


@pytest.mark.parametrize("control", ["none", "permuted"])
@each_capacity
@each_router
def test_result_does_not_depend_on_micro_batches(router: RoutingConfig, capacity: float | None, control: str) -> None:
    layer = make(router, capacity, jitter=0.1, group=2, drop_policy="probability", control=control)
    x_BTD, keys_B = inputs(8)
    whole_y, whole = layer(x_BTD, keys_B)
    parts = [layer(x, keys) for x, keys in zip(x_BTD.split((2, 4, 2)), keys_B.split((2, 4, 2)), strict=True)]
    torch.testing.assert_close(torch.cat([y for y, _ in parts]), whole_y)
    torch.testing.assert_close(torch.cat([stats.balance_G for _, stats in parts]), whole.balance_G)
    torch.testing.assert_close(torch.cat([stats.z_G for _, stats in parts]), whole.z_G)
    for name in ("load_E", "dropped", "entropy", "gate", "tokens", "rows"):
        torch.testing.assert_close(sum(getattr(stats, name) for _, stats in parts), getattr(whole, name))
    if capacity is not None and not isinstance(router, ExpertChoiceRouting):
        assert whole.dropped > 0


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize(
    "router",
    [SwitchRouting(), TopKRouting(k=2, normalise=False), BiasBalancedRouting(k=2)],
    ids=lambda router: router.name,
)
def test_drops_token_by_token(router: RoutingConfig, policy: str) -> None:
    layer = make(router, 0.75, drop_policy=policy)
    x_BTD, keys_B = inputs()
    y_BTD, stats = layer(x_BTD, keys_B)
    routing = layer.router(x_BTD, keys_B)
    k = routing.expert_GA.shape[1] // TOKENS
    room_for = -(-3 * TOKENS * k // (4 * EXPERTS))
    dropped = 0
    for sample in range(SAMPLES):
        expert = routing.expert_GA[sample].view(TOKENS, k)
        gate = routing.gate_GA[sample].view(TOKENS, k)
        choices = list(product(range(k), range(TOKENS)))
        if policy == "probability":
            choices.sort(key=lambda at: -gate[at[1], at[0]].item())
        expected = torch.zeros(TOKENS, WIDTH)
        taken = [0] * EXPERTS
        for choice, token in choices:
            e = int(expert[token, choice])
            taken[e] += 1
            if taken[e] > room_for:
                dropped += 1
                continue
            expected[token] += gate[token, choice] * expert_output(layer, e, x_BTD[sample, token])
        torch.testing.assert_close(y_BTD[sample], expected)
    assert stats.dropped == dropped > 0


def test_evaluation_is_dropless_unless_told_otherwise() -> None:
    layer = make(SwitchRouting(), 0.5, group=2)
    x_BTD, keys_B = inputs(3)
    layer.eval()
    assert layer(x_BTD, keys_B)[1].dropped == 0
    assert make(SwitchRouting(), 0.5)(x_BTD, keys_B)[1].dropped > 0
    assert make(SwitchRouting(), None, eval_capacity_factor=0.5).eval()(x_BTD, keys_B)[1].dropped > 0


@each_capacity
@each_router
def test_nothing_waits_for_the_device(
    router: RoutingConfig, capacity: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no values: whatever the host would have to read, an item or the size of a
    selection, raises."""
    monkeypatch.setattr(
        "models.moe.experts._grouped_kernel", lambda *tensors: True
    )  # as on a GPU; the CPU's loop does read the counts
    with torch.device("meta"):
        layer = make(router, capacity, jitter=0.1, shared_expert=4, group=2, drop_policy="probability")
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.to_empty(device="cpu")
        x_BTD = torch.randn(SAMPLES, TOKENS, WIDTH)
        keys_B = torch.arange(SAMPLES)
        with torch.autocast("cpu", torch.bfloat16):
            y_BTD, stats = layer(x_BTD, keys_B)
        (y_BTD.float().sum() + router_loss(layer.config, [stats]).sum()).backward()
        layer.after_step(stats.load_E)
    assert layer.experts.gate_up.grad is not None


def test_jitter_is_uniform_and_for_training_only() -> None:
    layer = make(SwitchRouting(), jitter=0.25)
    plain = make(SwitchRouting())
    layer.router.weight.data = torch.eye(EXPERTS, WIDTH)  # the logits are then the first inputs
    x_BTD = torch.ones(64, TOKENS, WIDTH)
    keys_B = sample_keys(0, torch.arange(64), "test")
    probs = layer.router(x_BTD, keys_B).probs_GNE
    noise = (probs.log() + layer.router(x_BTD, keys_B).log_z_GN[..., None]).flatten()
    assert noise.min().item() == pytest.approx(0.75, abs=0.01)
    assert noise.max().item() == pytest.approx(1.25, abs=0.01)
    assert noise.std().item() == pytest.approx(0.5 / 12**0.5, rel=0.05)
    x_BTD, keys_B = inputs()
    layer.router.weight.data = plain.router.weight.data
    assert not torch.equal(layer(x_BTD, keys_B)[0], plain(x_BTD, keys_B)[0])
    assert torch.equal(layer.eval()(x_BTD, keys_B)[0], plain.eval()(x_BTD, keys_B)[0])


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_busiest_expert_is_counted_after_drops(capacity: float | None) -> None:
    layer = make(SwitchRouting(), capacity)
    x_BTD, keys_B = inputs()
    _, stats = layer(x_BTD, keys_B)
    choice_GN = (x_BTD @ layer.router.weight.T).argmax(-1)
    room = TOKENS if capacity is None else -(-TOKENS // (2 * EXPERTS))
    kept_E = [sum(min(int((row == expert).sum()), room) for row in choice_GN) for expert in range(EXPERTS)]
    assert (stats.max_rows.item(), stats.rows.item()) == (max(kept_E), sum(kept_E))


def test_stats_add_up() -> None:
    layer = make(TopKRouting(k=2))
    x_BTD, keys_B = inputs()
    _, stats = layer(x_BTD, keys_B)
    probs = (x_BTD @ layer.router.weight.T).softmax(-1)
    assert stats.tokens == SAMPLES * TOKENS
    assert torch.equal(stats.load_E, probs.topk(2).indices.flatten().bincount(minlength=EXPERTS).float())
    assert stats.entropy.item() == pytest.approx(-(probs * probs.log()).sum().item(), rel=1e-5)
    assert stats.gate.item() == pytest.approx(SAMPLES * TOKENS, rel=1e-5)
    assert not any(value.requires_grad for value in stats[2:])


def test_global_balance_uses_the_load_of_the_step_before() -> None:
    layer = make(SwitchRouting(), balance="global", group=2)
    x_BTD, keys_B = inputs()
    probs_GE = (x_BTD @ layer.router.weight.T).softmax(-1).view(2, -1, EXPERTS).mean(1)
    torch.testing.assert_close(layer(x_BTD, keys_B)[1].balance_G, torch.ones(2))
    load_E = torch.tensor([1.0, 2.0, 3.0, 4.0])
    layer.after_step(load_E)
    torch.testing.assert_close(layer(x_BTD, keys_B)[1].balance_G, EXPERTS * (probs_GE * load_E / 10).sum(-1))
    assert "router.last_load_E" in layer.state_dict()


def test_router_loss_is_the_weighted_sum_over_layers() -> None:
    layer = make(SwitchRouting(), balance_loss=0.5, z_loss=0.25)
    x_BTD, keys_B = inputs()
    _, stats = layer(x_BTD, keys_B)
    torch.testing.assert_close(router_loss(layer.config, [stats, stats]), stats.balance_G + 0.5 * stats.z_G)


def test_shared_expert_is_added_for_every_token() -> None:
    layer = make(SwitchRouting(), 0.5, shared_expert=6)
    x_BTD, keys_B = inputs()
    with_shared = layer(x_BTD, keys_B)[0]
    shared = layer.shared
    layer.shared = None
    assert isinstance(shared, SwiGLU)
    torch.testing.assert_close(with_shared, layer(x_BTD, keys_B)[0] + shared(x_BTD))


def stepped(layer: MoELayer) -> MoELayer:
    """`layer` after one update with decay, of a loss that all its parameters can serve."""
    parameters = [{"params": [each], "weight_decay": 0.5 * decays(each)} for each in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    x_BTD, keys_B = inputs()
    y_BTD, stats = layer(x_BTD, keys_B)
    (y_BTD.square().sum() + router_loss(layer.config, [stats]).sum()).backward()
    optimizer.step()
    layer.after_step(stats.load_E)
    return layer


@each_router
def test_frozen_router_stays_as_it_starts(router: RoutingConfig) -> None:
    start = make(router)
    frozen = stepped(make(router, control="frozen"))
    free = stepped(make(router))
    assert all(
        torch.equal(value, start.router.state_dict()[name]) for name, value in frozen.router.state_dict().items()
    )
    assert not torch.equal(free.router.weight, start.router.weight)
    assert torch.equal(frozen.experts.gate_up, free.experts.gate_up)
    assert not torch.equal(frozen.experts.gate_up, start.experts.gate_up)


def test_permuted_choices_token_by_token() -> None:
    layer = make(TopKRouting(k=2, normalise=False), control="permuted", group=2)
    plain = make(TopKRouting(k=2, normalise=False), group=2)
    x_BTD, keys_B = inputs()
    y_BTD, stats = layer(x_BTD, keys_B)
    routing = plain.router(x_BTD.view(2, -1, WIDTH), keys_B)
    order_GN = uniform(derive(keys_B[::2], "permuted choices"), (2 * TOKENS,)).argsort(dim=1, stable=True)
    assert not torch.equal(order_GN[0], order_GN[1])
    for group in range(2):
        expert = routing.expert_GA[group].view(-1, 2)
        gate = routing.gate_GA[group].view(-1, 2)
        assert sorted(order_GN[group].tolist()) == list(range(2 * TOKENS))
        for token, source in enumerate(order_GN[group].tolist()):
            x_D = x_BTD.view(2, -1, WIDTH)[group, token]
            expected = sum(
                gate[source, choice] * expert_output(layer, int(expert[source, choice]), x_D) for choice in range(2)
            )
            torch.testing.assert_close(y_BTD.view(2, -1, WIDTH)[group, token], expected)
    others = plain(x_BTD, keys_B)[1]
    assert torch.equal(stats.load_E, others.load_E)
    assert torch.equal(stats.balance_G, others.balance_G)


def test_incomplete_group_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        make(SwitchRouting(), group=2)(*inputs(3))


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 10], [4, 1, 0, 0], [0, 0, 0, 0]])
def test_grouped_kernel_equals_loop(counts: list[int]) -> None:
    experts = Experts(EXPERTS, WIDTH, FFN, std=0.5, out_std=0.5)
    grad = torch.randn(10, WIDTH)
    results = []
    for path in (grouped_experts, looped_experts):
        x_ND = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y_ND = path(x_ND, torch.tensor(counts), experts.gate_up, experts.down)
        results.append((y_ND, *torch.autograd.grad(y_ND, (x_ND, experts.gate_up, experts.down), grad)))
    for grouped, looped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped)
    y_ND, grad_x_ND, grad_gate_up, _ = results[1]
    assert not y_ND[sum(counts) :].any()
    assert not grad_x_ND[sum(counts) :].any()
    assert [bool(grad.any()) for grad in grad_gate_up] == [count > 0 for count in counts]


def test_loop_equals_dense_layers() -> None:
    experts = Experts(2, WIDTH, FFN, std=0.5, out_std=0.5)
    x_ND = torch.randn(10, WIDTH)
    expected = []
    for rows, gate_up, down in zip(x_ND.split((4, 6)), experts.gate_up, experts.down, strict=True):
        gate, up = (rows @ gate_up.T).chunk(2, dim=-1)
        expected.append((torch.nn.functional.silu(gate) * up) @ down.T)
    torch.testing.assert_close(experts(x_ND, torch.tensor([4, 6])), torch.cat(expected))


def test_no_rows_at_all_still_give_zero_gradients() -> None:
    experts = Experts(EXPERTS, WIDTH, FFN)
    experts(torch.empty(0, WIDTH), torch.zeros(EXPERTS, dtype=torch.int64)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in experts.parameters())


def test_slices_of_experts_equal_the_whole() -> None:
    whole = Experts(EXPERTS, WIDTH, FFN)
    slices = [Experts(2, WIDTH, FFN, first, EXPERTS) for first in (0, 2)]
    for module in (whole, *slices):
        initialise(module, 7)
    parts = [whole.part(first, 2) for first in (0, 2)]
    for index, first in enumerate((0, 2)):
        for made in (slices[index], parts[index]):
            assert made.first_expert == first
            assert torch.equal(made.gate_up, whole.gate_up[first : first + 2])
            assert torch.equal(made.down, whole.down[first : first + 2])
    assert not torch.equal(whole.gate_up[0], whole.gate_up[1])
    x_ND = torch.randn(20, WIDTH)
    counts_E = torch.tensor([7, 0, 5, 8])
    outputs = [
        part(rows, counts) for part, rows, counts in zip(parts, x_ND.split((7, 13)), counts_E.split(2), strict=True)
    ]
    torch.testing.assert_close(torch.cat(outputs), whole(x_ND, counts_E))


@each_router
def test_bfloat16_autocast(router: RoutingConfig) -> None:
    layer = make(router, 1.0)
    x_BTD, keys_B = inputs()
    expected = layer(x_BTD, keys_B)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y_BTD, stats = layer(x_BTD, keys_B)
    assert y_BTD.dtype == torch.bfloat16
    assert stats.balance_G.dtype == stats.z_G.dtype == torch.float32
    torch.testing.assert_close(y_BTD.float(), expected, atol=0.03 * expected.abs().max().item(), rtol=0.05)
    y_BTD.float().square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in (layer.router.weight, layer.experts.gate_up)
    )
