"""Sharded equals unsharded: the same global batches give the same losses.

The number of ranks, the EP size and the ZeRO stage do not matter.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_job
from distributed import run_distributed
from loss_curves import trained

STEPS = 10
LAYOUTS = {1: [1], 2: [1, 2], 4: [1, 2, 4]}
CASES = [(world, ep, zero) for world, sizes in LAYOUTS.items() for ep in sizes for zero in (0, 1, 2)]


def losses(
    world: Any, job: dict[str, Any], layouts: list[tuple[int, int]]
) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """Return the loss and gradient norm of each step, for every (ep, zero) of `layouts`.

    The layouts run one after the other in the same processes.
    """
    return {
        (ep, zero): trained(world, job | {"engine": {"name": "deepspeed", "zero": zero, "ep": ep}}, STEPS)[1]
        for ep, zero in layouts
    }


@cache
def curves(world: int, corpus: Path) -> dict[tuple[int, int], list[tuple[float, float]]]:
    return run_distributed(losses, world, tiny_job(corpus), [(ep, zero) for w, ep, zero in CASES if w == world])[0]


@pytest.mark.parametrize(("world", "ep", "zero"), CASES)
def test_losses_do_not_depend_on_the_layout(world: int, ep: int, zero: int, corpus: Path) -> None:
    reference = curves(1, corpus)[1, 1]
    curve = curves(world, corpus)[ep, zero]
    assert len(curve) == STEPS
    assert reference[-1][0] < reference[0][0] - 0.2, "the reference does not learn, so equality would say little"
    for (loss, norm), (expected_loss, expected_norm) in zip(curve, reference, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
