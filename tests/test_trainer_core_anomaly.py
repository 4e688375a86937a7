"""A poisoned gradient never reaches the weights.

Afterwards the run equals one that skipped the batch by hand.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_job
from distributed import run_distributed
from whole_runs import losses, train_or_resume

from trainer.core.anomaly import AnomalyConfig, Guard
from trainer.inference.load import ALONE

STEPS = 6
BAD = 3
LAYOUTS = {
    1: [("deepspeed", 0, 1), ("deepspeed", 1, 1), ("deepspeed", 2, 1), ("deepspeed", 3, 1), ("accelerate", 0, 1)],
    2: [("deepspeed", 0, 2), ("deepspeed", 1, 2), ("deepspeed", 2, 2), ("deepspeed", 3, 1), ("accelerate", 0, 1)],
}


def curves(
    world: Any, job: dict[str, Any], layouts: list[tuple[str, int, int]], folder: str
) -> dict[Any, tuple[dict[int, float], bool, int]]:
    """Train every layout three ways: poisoned, refused and by hand.

    Returns the losses by step, whether all training state is finite, and the number of anomalies.
    """
    from data.share import Share
    from trainer.config import RunConfig
    from trainer.core.loop import fit
    from trainer.core.training import Hook, fragments, over_ranks
    from trainer.parsing import parse
    from trainer.recovery.faults import inject
    from trainer.run_files import run_files
    from trainer.worker.main import build_training

    found = {}
    for name, zero, ep in layouts:
        engine = {"name": name} | ({"zero": zero, "ep": ep} if name == "deepspeed" else {})
        run = parse(
            RunConfig,
            job | {"engine": engine, "faults": [{"name": "poison_gradient", "step": BAD, "rank": world.size - 1}]},
            "run",
        )
        for way in ("poisoned", "refused", "by hand"):
            training = build_training(run, world)
            curve = {}
            match way:
                case "poisoned":  # the gradient is not finite: the engine notices
                    files = run_files(folder, f"{name}-{zero}")
                    files.folder.make()
                    inject(run.faults, training, files)
                case "refused":  # the loss is objected to: the engine is told
                    check_loss = training.guard.check_loss
                    training.guard.check_loss = lambda *about, training=training, check_loss=check_loss: (
                        "refused" if training.step + 1 == BAD else check_loss(*about)
                    )
                case "by hand":
                    training.guard.anomalies = [{"step": BAD, "reason": "by hand", "first": BAD, "last": BAD}]

            def note(training: Any, curve: dict[int, float] = curve) -> None:
                if training.sums:
                    curve[training.step] = training.objective.report(over_ranks(training.sums, training.world))["loss"]
                training.sums = {}

            share = Share(
                rank=world.rank,
                world=world.size,
                global_batch=run.batch.global_batch,
                micro_batch=run.batch.micro_batch,
            )
            stream = training.objective.stream(share, None)
            fit(training, stream, STEPS, [Hook(1, note)])
            stream.close()
            finite = all(bool(fragment.values.isfinite().all()) for fragment in fragments(training))
            found[name, zero, way] = (curve, finite, len(training.guard.anomalies))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_poisoned_gradient_is_passed_over_as_if_by_hand(world: int, corpus: Path, tmp_path: Path) -> None:
    ranks = run_distributed(curves, world, tiny_job(corpus), LAYOUTS[world], str(tmp_path))
    for name, zero, _ in LAYOUTS[world]:
        poisoned = ranks[0][name, zero, "poisoned"][0]
        assert all(rank[name, zero, way][1:] == (True, 1) for rank in ranks for way in ("poisoned", "refused")), (
            name,
            zero,
        )
        assert sorted(poisoned) == [1, 2, 4, 5, 6]
        assert poisoned == ranks[0][name, zero, "refused"][0] == ranks[0][name, zero, "by hand"][0], (name, zero)
        assert poisoned == pytest.approx(ranks[0]["deepspeed", 0, "by hand"][0], abs=1e-5), (
            "the layout changes what passing over means"
        )
        assert poisoned[6] < poisoned[1] - 0.1


def runs(world: Any, jobs: list[tuple[dict[str, Any], list[int] | None]]) -> list[dict[str, Any]]:
    return [train_or_resume(world, job, by_hand) for job, by_hand in jobs]


def test_skip_rollback_and_the_end_of_the_budget_in_whole_runs(corpus: Path, tmp_path: Path) -> None:
    def job(name: str, **changes: Any) -> dict[str, Any]:
        every = {
            "root": str(tmp_path),
            "name": name,
            "tracking": {"enabled": False},
            "checkpoint": {"every": 4},
            "evaluate": {"samples": 0},
        }
        return tiny_job(corpus, **every, engine={"name": "deepspeed", "zero": 1, "ep": 2}, **changes)

    poison = [{"name": "poison_gradient", "step": 7, "rank": 1}]
    jobs: list[tuple[dict[str, Any], list[int] | None]] = [
        (job("skipped", faults=poison), None),
        (job("skipped-by-hand"), [7, 7]),
        (job("back", faults=poison, anomaly={"action": "rollback"}), None),
        (job("back-by-hand"), [5, 7]),
        (job("spent", faults=poison, anomaly={"budget": 0}), None),
    ]
    summaries = {
        job["name"]: summary for (job, _), summary in zip(jobs, run_distributed(runs, 2, jobs)[0], strict=True)
    }
    assert losses(tmp_path / "skipped") == losses(tmp_path / "skipped-by-hand")
    assert sorted(losses(tmp_path / "skipped")) == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    # Steps 5 and 6 were done, and then undone: what counts is that 8 to 10 know nothing of them.
    back = losses(tmp_path / "back")
    by_hand = losses(tmp_path / "back-by-hand")
    assert {step: back[step] for step in by_hand} == by_hand
    assert sorted(by_hand) == [1, 2, 3, 4, 8, 9, 10]
    assert [(each["first"], each["last"]) for each in summaries["back"]["anomalies"]] == [(5, 7)]
    spent = summaries["spent"]
    assert (spent["step"], spent["failed"]) == (6, True)
    assert "budget" in spent["stopped"]
    assert (tmp_path / "spent" / "checkpoints" / "step-00000006" / "manifest.json").exists()
    # Resumed from before the anomaly, without the fault that caused it, the run still skips the
    # same step.
    before = losses(tmp_path / "skipped")
    for step in (8, 10):
        shutil.rmtree(tmp_path / "skipped" / "checkpoints" / f"step-{step:08d}")
    run_distributed(train_or_resume, 2, job("skipped"))
    assert losses(tmp_path / "skipped") == before


def test_a_spike_lies_so_many_robust_deviations_above_the_median() -> None:
    guard = Guard(AnomalyConfig(spike=6), ALONE, {"model": torch.nn.Linear(1, 1)})
    for number in range(21):  # median 3, and the median distance from it 0.1, also with one more that is high
        assert guard.check_loss("model", torch.tensor(2 * (2.9, 3.0, 3.1)[number % 3]), 2) == ""
    assert guard.check_loss("model", torch.tensor(3 + 5.9 * 1.4826 * 0.1), 1) == ""
    assert "standard deviations" in guard.check_loss("model", torch.tensor(3 + 6.2 * 1.4826 * 0.1), 1)
    assert guard.check_loss("model", torch.tensor(-50.0), 1) == "", "a fall is no spike"
    assert "loss is nan" in guard.check_loss("model", torch.tensor(math.nan), 1)
    few = Guard(AnomalyConfig(spike=6), ALONE, {"model": torch.nn.Linear(1, 1)})
    assert few.check_loss("model", torch.tensor(1.0), 1) == few.check_loss("model", torch.tensor(1e9), 1) == ""


def test_running_statistics_of_a_poisoned_batch_are_undone() -> None:
    norm = torch.nn.BatchNorm1d(3)
    guard = Guard(AnomalyConfig(), ALONE, {"model": norm})
    norm(torch.randn(8, 3))
    mean = norm.running_mean.clone()
    guard.keep_buffers()
    norm(torch.full((8, 3), math.nan))
    assert guard.decide("the loss is nan", step=2)[0] == "skip"
    assert torch.equal(norm.running_mean, mean)
    assert norm.num_batches_tracked == 1
    assert guard.skips(2)
    assert not guard.skips(3)


def test_impossible_anomaly_settings_are_refused() -> None:
    for wrong in ({"budget": -1}, {"spike": 0.0}, {"window": 4}, {"back": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AnomalyConfig(**wrong)
