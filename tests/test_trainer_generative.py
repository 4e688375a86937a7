"""VAE, DDPM, GAN, SimCLR, CLIP: the same global batches give the same losses.

The moving averages agree too, for every number of ranks and ZeRO stage.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from distributed import run_distributed
from image_jobs import OBJECTIVES

STEPS = 5


PENALISED = ("gan-wasserstein", "gan-style")
CASES = [
    (name, world, zero)
    for name in OBJECTIVES
    for world in (1, 2, 4)
    for zero in (0, 1, 2, 3)
    if not (zero == 3 and name in PENALISED)
]
QUICK = ((1, 0), (2, 1), (2, 3), (4, 2))
"""Worlds and stages that `make test` runs; `make test-all` runs all."""

Curve = list[dict[str, float]]
Averages = dict[str, npt.NDArray[np.float32]]


def job_of(name: str, zero: int) -> dict[str, Any]:
    return {
        "objective": OBJECTIVES[name],
        "batch": {"global_batch": 32, "micro_batch": 4},
        "optimizer": {"lr": 0.003, "weight_decay": 0.01, "schedule": {"name": "constant"}},
        "engine": {"name": "deepspeed", "zero": zero},
        "ema": {"decay": 0.9},
        "stop": {"steps": STEPS},
        "device": "cpu",
        "threads": 1,
    }


def curves(world: Any, cases: list[tuple[str, int]]) -> dict[tuple[str, int], tuple[Curve, Averages]]:
    """Return losses and gradient norms at every step, for every (objective, ZeRO stage).

    This rank's part of the final averages comes with them.
    """
    from data.share import Share
    from trainer.config import RunConfig, check
    from trainer.core.loop import fit
    from trainer.core.training import Hook, over_ranks
    from trainer.parsing import parse
    from trainer.worker.main import build_training

    found = {}
    for name, zero in cases:
        run = parse(RunConfig, job_of(name, zero), "run")
        check(run, world.size)
        training = build_training(run, world)
        curve = []

        def note(training: Any, curve: Curve = curve) -> None:
            sums = over_ranks(training.sums, training.world)
            training.sums = {}
            losses = {
                key: value
                for key, value in training.objective.report(sums).items()
                if key.startswith(("loss", "gradient_penalty"))
            }
            curve.append(losses | {f"norm/{phase}": float(norm) for phase, norm in training.norms.items()})

        share = Share(rank=world.rank, world=world.size, global_batch=32, micro_batch=4, group=training.objective.group)
        stream = training.objective.stream(share, None)
        fit(training, stream, STEPS, [Hook(1, lambda training: training.ema.update(training.step)), Hook(1, note)])
        stream.close()
        owned = {f"{f.key}@{f.start + f.owned.start}": f.values[f.owned].numpy().copy() for f in training.ema.fragments}
        found[name, zero] = (curve, owned)
    return found


@cache
def results(world: int, quick: bool) -> list[dict[tuple[str, int], tuple[Curve, Averages]]]:
    """Of all the quick layouts of a world at once, or of all the others."""
    return run_distributed(
        curves, world, [(name, zero) for name, w, zero in CASES if w == world and ((w, zero) in QUICK) == quick]
    )


def whole(parts: list[Averages]) -> Averages:
    """The averages of all ranks put together."""
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for part in parts:
        for key, values in part.items():
            name, _, start = key.rpartition("@")
            pieces.setdefault(name, []).append((int(start), values))
    return {
        name: np.concatenate([values for _, values in sorted(found, key=lambda each: each[0])])
        for name, found in pieces.items()
    }


@pytest.mark.parametrize(
    ("name", "world", "zero"),
    [
        pytest.param(*case, marks=[] if case[1:] in QUICK else pytest.mark.slow, id="-".join(map(str, case)))
        for case in CASES
    ],
)
def test_losses_and_averages_do_not_depend_on_the_layout(name: str, world: int, zero: int) -> None:
    found = results(world, (world, zero) in QUICK)
    reference, average = results(1, True)[0][name, 0]
    curve, _ = found[0][name, zero]
    assert len(curve) == STEPS
    for step, expected in zip(curve, reference, strict=True):
        assert step == pytest.approx(expected, abs=1e-5, rel=1e-4)
    assert reference[0] != reference[-1]
    averages = whole([rank[name, zero][1] for rank in found])
    expected = whole([average])
    assert averages.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(averages[key], values, atol=2e-5, err_msg=key)
