"""The options of a job, each in a real run: engines, objectives, accumulation, profiler, stopping.

A dead tracking server belongs to them.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_job
from distributed import run_distributed
from whole_runs import loss_curve, train, train_or_resume

from trainer.world import free_port


def job_of(corpus: Path, root: Path, name: str, **changes: Any) -> dict[str, Any]:
    job = tiny_job(corpus, root=str(root), name=name, stop={"steps": 4}, tracking={"enabled": False})
    return copy.deepcopy(job | changes)


@pytest.fixture(scope="module")
def root(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with the reference in it: DeepSpeed, ZeRO 1, micro-batches of 4."""
    root = tmp_path_factory.mktemp("runs")
    run_distributed(train, 1, job_of(corpus, root, "reference"))
    return root


def with_model(job: dict[str, Any], **changes: Any) -> dict[str, Any]:
    job["objective"]["model"] |= changes
    return job


def test_accumulation_engine_and_recomputation_do_not_change_the_loss(root: Path, corpus: Path) -> None:
    jobs = [
        job_of(corpus, root, "accumulated", batch={"global_batch": 16, "micro_batch": 1}),
        job_of(corpus, root, "accelerate", engine={"name": "accelerate"}),
        with_model(job_of(corpus, root, "recomputed"), activation_checkpointing=True),
    ]
    reference = loss_curve(root / "reference")
    assert reference[-1] < reference[0]
    for job in jobs:
        run_distributed(train, 1, job)
        assert loss_curve(root / job["name"]) == pytest.approx(reference, abs=1e-5), job["name"]


def threads_under_accelerate(world: Any) -> int:
    """The threads of torch under Accelerate where no variable sets them, as in a shell."""
    from trainer.engines.accelerate_engine import AccelerateEngine
    from trainer.engines.optim import OptimizerConfig
    from trainer.world import joined

    os.environ.pop("OMP_NUM_THREADS", None)
    with joined("cpu", threads=1) as again:
        AccelerateEngine(torch.nn.Linear(2, 2), OptimizerConfig(), bf16=False, world=again)
        return torch.get_num_threads()


def test_accelerate_leaves_the_number_of_threads_alone() -> None:
    """Without a limit, Accelerate takes all cores per process.

    Two runs at once then take five times as long.
    """
    assert run_distributed(threads_under_accelerate, 1) == [1]


def test_ddp_over_two_ranks_equals_one_process(root: Path, corpus: Path) -> None:
    run_distributed(train, 2, job_of(corpus, root, "ddp", engine={"name": "accelerate"}))
    assert loss_curve(root / "ddp") == pytest.approx(loss_curve(root / "reference"), abs=1e-5)


def test_masked_language_model_over_two_ranks_equals_one_process(root: Path, corpus: Path) -> None:
    """The number of masked tokens differs across ranks; dividing by the global weight is right."""
    for world, ep in ((1, 1), (2, 2)):
        job = with_model(
            job_of(corpus, root, f"masked-{world}", engine={"name": "deepspeed", "zero": 2, "ep": ep}), causal=False
        )
        job["objective"] |= {"name": "masked_lm"}
        del job["objective"]["sample_tokens"]
        run_distributed(train, world, job)
    assert loss_curve(root / "masked-2") == pytest.approx(loss_curve(root / "masked-1"), abs=1e-5)
    assert loss_curve(root / "masked-1")[-1] < loss_curve(root / "masked-1")[0]


def test_bf16_is_autocast_over_fp32_weights(root: Path, corpus: Path) -> None:
    job = job_of(corpus, root, "bf16", precision="bf16")
    run_distributed(train, 1, job)
    found = loss_curve(root / "bf16")
    reference = loss_curve(root / "reference")
    assert found == pytest.approx(reference, abs=0.02)
    assert found != pytest.approx(reference, abs=1e-6), "nothing was computed in bf16"
    manifest = json.loads((root / "bf16" / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert {tensor["dtype"] for tensor in manifest["tensors"].values()} == {"float32"}


def test_the_profiler_leaves_a_trace(root: Path, corpus: Path) -> None:
    run_distributed(train, 1, job_of(corpus, root, "profiled", profile={"first": 2, "steps": 2}))
    trace = json.loads((root / "profiled" / "profile" / "trace.json").read_text())
    assert any(
        "DeepSpeed" in str(event.get("name")) or "aten::mm" in str(event.get("name")) for event in trace["traceEvents"]
    )


def test_an_attempt_that_finds_all_steps_done_writes_the_summary_that_the_killed_one_could_not(
    root: Path, corpus: Path
) -> None:
    job = job_of(corpus, root, "reference")
    before = json.loads((root / "reference" / "summary.json").read_text())
    (root / "reference" / "summary.json").unlink()
    run_distributed(train_or_resume, 1, job)
    after = json.loads((root / "reference" / "summary.json").read_text())
    assert before["eval"]["loss"] == after["eval"]["loss"]
    assert (before["samples"], before["step"]) == (after["samples"], after["step"])
    assert after["attempt"] == 1


def test_hours_end_a_run_with_a_checkpoint(root: Path, corpus: Path) -> None:
    job = job_of(
        corpus, root, "timed", stop={"hours": 3 / 3600}, optimizer={"schedule": {"name": "constant"}}, log_every=50
    )
    summary = run_distributed(train, 2, job)[0]
    assert "hours" in summary["stopped"]
    assert summary["step"] > 0
    assert (root / "timed" / "checkpoints" / f"step-{summary['step']:08d}" / "manifest.json").exists()


def test_a_dead_tracking_server_neither_blocks_nor_loses_anything(root: Path, corpus: Path) -> None:
    job = job_of(corpus, root, "untracked", tracking={"uri": f"http://127.0.0.1:{free_port()}", "drain_s": 1.0})
    summary = run_distributed(train, 1, job)[0]
    assert summary["step"] == 4
    assert loss_curve(root / "untracked") == loss_curve(root / "reference")
    events = (root / "untracked" / "events.jsonl").read_text()
    assert "--resume sends them" in events


@pytest.mark.slow
def test_compiled_equals_eager(root: Path, corpus: Path) -> None:
    run_distributed(
        train, 2, job_of(corpus, root, "compiled", compile=True, engine={"name": "deepspeed", "zero": 1, "ep": 2})
    )
    assert loss_curve(root / "compiled") == pytest.approx(loss_curve(root / "reference"), abs=1e-5)
