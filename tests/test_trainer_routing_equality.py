"""Training with each routing gives the same results, whatever the ranks, EP size and ZeRO stage.

Results are losses, first gradients, loads and biases.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_job
from distributed import run_distributed
from training_state import whole_state

STEPS = 5
LAYOUTS = {1: [(1, 1)], 2: [(2, 0), (2, 2), (1, 3)], 4: [(4, 1), (2, 2), (1, 3)]}
"""(EP, ZeRO) for each world."""
ROUTINGS: dict[str, dict[str, Any]] = {
    "switch, global balance": {
        "router": {"name": "switch"},
        "balance": "global",
        "capacity_factor": 1.25,
        "balance_loss": 0.1,
    },
    "top_k": {
        "router": {"name": "top_k"},
        "capacity_factor": 1.0,
        "drop_policy": "probability",
        "shared_expert": 16,
        "jitter": 0.05,
    },
    "noisy_top_k": {"router": {"name": "noisy_top_k"}, "balance_loss": 0.1},
    "expert_choice": {"router": {"name": "expert_choice"}},
    "bias_balanced": {"router": {"name": "bias_balanced", "bias_rate": 0.05}, "capacity_factor": 1.25},
}


def job_of(corpus: Path, routing: str) -> dict[str, Any]:
    job = copy.deepcopy(tiny_job(corpus, stop={"steps": STEPS}))
    job["objective"]["model"]["moe"] = {"experts": 4, "ffn": 64} | ROUTINGS[routing]
    if routing == "expert_choice":
        job["objective"] |= {"name": "masked_lm"}
        job["objective"]["model"]["causal"] = False
        del job["objective"]["sample_tokens"]
    return job


def train(
    world: Any, jobs: dict[str, dict[str, Any]], layouts: list[tuple[int, int]]
) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Return losses, norms and loads of all steps, the first gradients, and the last buffers."""
    from data.share import Share
    from trainer.config import RunConfig
    from trainer.core.loop import fit
    from trainer.core.training import Hook, over_ranks
    from trainer.parsing import parse
    from trainer.worker.main import build_training

    found = {}
    for routing, job in jobs.items():
        for ep, zero in layouts:
            run = parse(RunConfig, job | {"engine": {"name": "deepspeed", "zero": zero, "ep": ep}}, "run")
            training = build_training(run, world)
            result = {"losses": [], "norms": [], "loads": [], "gradients": {}, "buffers": {}}

            def note(training: Any, result: Any = result) -> None:
                sums = over_ranks(training.sums, training.world)
                training.sums = {}
                result["losses"].append(training.objective.report(sums)["loss"])
                result["norms"].append(float(training.norms["model"]))
                result["loads"].append(sums["load_LE"].tolist())
                if training.step == 1:  # Adam's first moment is then the clipped gradient, times 1 - beta_1
                    result["gradients"] = {
                        key: value for key, value in whole_state(training).items() if key.startswith("exp_avg/")
                    }

            share = Share(
                rank=world.rank,
                world=world.size,
                global_batch=run.batch.global_batch,
                micro_batch=run.batch.micro_batch,
            )
            stream = training.objective.stream(share, None)
            fit(training, stream, STEPS, [Hook(1, note)])
            stream.close()
            result["buffers"] = {
                key: value for key, value in whole_state(training).items() if key.startswith("buffer/")
            }
            found[routing, ep, zero] = result
    return found


@cache
def results(world: int, corpus: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    return run_distributed(train, world, {routing: job_of(corpus, routing) for routing in ROUTINGS}, LAYOUTS[world])[0]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("world", "ep", "zero"), [(world, *layout) for world in (2, 4) for layout in LAYOUTS[world]])
def test_training_does_not_depend_on_the_layout(world: int, ep: int, zero: int, routing: str, corpus: Path) -> None:
    expected = results(1, corpus)[routing, 1, 1]
    found = results(world, corpus)[routing, ep, zero]
    assert expected["losses"][-1] < expected["losses"][0] - 0.05, (
        "the reference does not learn, so equality would say little"
    )
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert found["loads"] == expected["loads"]
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        largest = gradient.abs().max()
        assert largest > 0, name
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=0, atol=1e-5 * largest.item(), msg=name)
    assert found["buffers"].keys() == expected["buffers"].keys()
    assert all(torch.equal(found["buffers"][name], value) for name, value in expected["buffers"].items())
    if routing in ("switch, global balance", "bias_balanced"):
        assert any(value.float().std() > 0 for value in expected["buffers"].values()), "the buffers never moved"
