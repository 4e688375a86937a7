"""Contrastive objectives give the same loss and gradients for any ranks, micro-batch and chunk.

They equal autograd on the whole batch.
"""

from functools import cache
from typing import Any

import pytest
import torch
from distributed import run_distributed
from image_jobs import OBJECTIVES

from models import losses

GLOBAL_BATCH = 16
NAMES = ("contrastive-simclr", "contrastive-clip", "contrastive-siglip")
CASES = [(name, micro_batch, chunk) for name in NAMES for micro_batch in (1, 2, 4) for chunk in (3, 1000)]

Found = dict[tuple[str, int, int], tuple[float, dict[str, torch.Tensor]]]


def built(name: str) -> Any:
    from models.init import initialise
    from trainer.objectives import AnyObjective, build_objective
    from trainer.parsing import _nested

    objective = build_objective(_nested(AnyObjective, OBJECTIVES[name], None, "objective"), seed=3)
    initialise(objective.model, 3)
    return objective


def gradients(world: Any) -> Found:
    """Loss and gradients of one global batch, summed over the ranks, for all CASES."""
    from dataclasses import replace

    from data.share import Share

    found: Found = {}
    for name, micro_batch, chunk in CASES:
        objective = built(name)
        objective.config = replace(objective.config, chunk=chunk)
        share = Share(rank=world.rank, world=world.size, global_batch=GLOBAL_BATCH, micro_batch=micro_batch)
        stream = objective.stream(share, None)
        batches = next(iter(stream)).micro_batches
        stream.close()
        total = torch.zeros(())
        for batch in objective.prepare("model", objective.model, batches, world.rows):
            loss, _ = objective.loss("model", objective.model, batch, 0)
            loss.backward()
            total += loss.detach()
        world.sum(total)
        summed = {
            key: world.sum(torch.zeros_like(p) if p.grad is None else p.grad)
            for key, p in objective.model.named_parameters()
        }
        found[name, micro_batch, chunk] = (total.item(), summed)
    return found


@cache
def of_world(size: int) -> Found:
    from trainer.inference.load import ALONE

    return gradients(ALONE) if size == 1 else run_distributed(gradients, size)[0]


@cache
def by_autograd(name: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The whole batch at once through the losses of models/losses.py."""
    from data.share import Share

    objective = built(name)
    stream = objective.stream(Share(rank=0, world=1, global_batch=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH), None)
    (batch,) = next(iter(stream)).micro_batches
    stream.close()
    z = objective._embed(objective.model, batch, "views")
    scale = z.log_scale.exp()
    own = torch.arange(GLOBAL_BATCH)
    if name == "contrastive-simclr":
        views = torch.cat([z.a_MP, z.b_MP])
        similar = (views @ views.T).masked_fill(torch.eye(2 * GLOBAL_BATCH, dtype=torch.bool), -torch.inf)
        loss = losses.info_nce(similar, torch.cat([own + GLOBAL_BATCH, own]), 1 / scale).sum() / 2
    elif name == "contrastive-clip":
        loss = (
            losses.info_nce(z.a_MP @ z.b_MP.T, own, 1 / scale) + losses.info_nce(z.b_MP @ z.a_MP.T, own, 1 / scale)
        ).sum() / 2
    else:
        loss = losses.binary_cross_entropy(scale * z.a_MP @ z.b_MP.T + z.bias, torch.eye(GLOBAL_BATCH)).sum()
    loss.backward()
    return loss.item(), {
        key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in objective.model.named_parameters()
    }


@pytest.mark.parametrize(("name", "micro_batch", "chunk"), CASES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_gradients_are_those_of_the_whole_batch(name: str, micro_batch: int, chunk: int, world: int) -> None:
    loss, found = of_world(world)[name, micro_batch, chunk]
    expected_loss, expected = by_autograd(name)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 0.1
    for key, gradient in expected.items():
        torch.testing.assert_close(
            found[key], gradient, atol=1e-5 * float(largest), rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
