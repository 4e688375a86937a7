"""Learning rates against closed forms and torch's schedulers; weight decay by tag."""

import math

import pytest
import torch
from torch import nn

from models.init import no_decay
from trainer.engines.optim import Constant, Cosine, OptimizerConfig, WarmupStableDecay, learning_rate, parameter_groups


def test_cosine_equals_torch() -> None:
    config = OptimizerConfig(lr=0.1, schedule=Cosine(warmup_steps=0, final=0.2))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.02)
    for step in range(50):
        assert learning_rate(config, step, 50) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_warm_up_rises_to_the_peak() -> None:
    for schedule in (
        Cosine(warmup_steps=10),
        WarmupStableDecay(warmup_steps=10, decay_steps=5),
        Constant(warmup_steps=10),
    ):
        config = OptimizerConfig(lr=2.0, schedule=schedule)
        assert [learning_rate(config, step, 100) for step in range(10)] == pytest.approx(
            [0.2 * (step + 1) for step in range(10)]
        )


def test_warmup_stable_decay_is_flat_then_linear() -> None:
    config = OptimizerConfig(lr=1.0, schedule=WarmupStableDecay(decay_steps=20, final=0.1))
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[:81] == [1.0] * 81
    assert rates[80:] == pytest.approx([1.0 - 0.9 * (step - 80) / 20 for step in range(80, 101)])


def test_cosine_after_warm_up_is_half_way_in_the_middle() -> None:
    config = OptimizerConfig(lr=1.0, schedule=Cosine(warmup_steps=20, final=0.0))
    assert learning_rate(config, 60, 100) == pytest.approx(0.5)
    assert learning_rate(config, 40, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_vectors_and_tagged_parameters_do_not_decay() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 6))
    no_decay(network[2].weight)
    decaying, steady = sorted(
        parameter_groups(network, OptimizerConfig(weight_decay=0.3)), key=lambda group: -group["weight_decay"]
    )
    assert [p.shape for p in decaying["params"]] == [(4, 3)]
    assert decaying["weight_decay"] == 0.3
    assert steady["weight_decay"] == 0.0
    assert len(steady["params"]) == 4
