"""Sweeps on real parts: Ray Tune, Ray Train, MLflow.

A trial fails, one is pruned, a command is killed, and one is stopped.
"""

import json
import math
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from commands import BIN, run_command
from conftest import tiny_job
from mlflow import MlflowClient
from whole_runs import losses

from trainer.endings import Ending, Stopped
from trainer.run_files import run_files

LR = "run.optimizer.lr"


def judged(
    root: Path, names: dict[str, list[float]], past: dict[str, list[tuple[int, float]]], most: int = 80
) -> list[str]:
    """The trials that ASHA with rungs at 10, 20 and 40 asks to stop.

    Each trial reports every 10 steps, and all keep step.
    """
    from cluster.on_ray.tune import Rungs, _Asha

    asha = _Asha(str(root), "min", Rungs(grace_steps=10, reduction_factor=2, last_step=most), past)
    trials: dict[str, Any] = {name: SimpleNamespace(trial_id=f"id-{name}", config={"trial": name}) for name in names}
    for trial in trials.values():
        asha.on_trial_add(None, trial)  # type: ignore[arg-type]
    for number, step in enumerate(range(10, 10 * (1 + max(map(len, names.values()))), 10)):
        for name, values in names.items():
            if not (root / name / "stop").exists() and number < len(values):
                assert (
                    asha.on_trial_result(None, trials[name], {"step": step, "value": values[number], "steps": most})
                    == "CONTINUE"
                )
    return sorted(name for name in names if (root / name / "stop").exists())


def test_asha_asks_losers_to_stop_and_kills_nobody(tmp_path: Path) -> None:
    best = [2.0] * 4
    good = [2.1] * 4
    bad = [3.0] * 4
    for number, past in enumerate(({}, {"before": [(10, 2.05), (20, 2.05), (40, 2.05)]})):
        root = tmp_path / str(number)
        assert judged(root, {"good": good, "best": best, "bad": bad}, past) == (
            ["bad"] if not past else ["bad", "good"]
        )
        asked = run_files(str(root), "bad").stop_request()
        assert asked == Stopped(Ending.PRUNED, "behind the others at step 10")
    assert judged(tmp_path / "last", {"good": good, "bad": bad}, {}, most=10) == [], (
        "at its last step there is nothing left to stop"
    )


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e12])
def test_a_loss_that_is_not_finite_is_behind_all_others(tmp_path: Path, value: float) -> None:
    assert judged(tmp_path, {"good": [2.0], "fair": [2.2], "gone": [value]}, {}) == ["fair", "gone"]
    assert judged(tmp_path / "again", {"gone": [value], "good": [2.0], "fair": [2.2], "poor": [9.0]}, {}) == ["poor"]


def write(folder: Path, corpus: Path, job: dict[str, Any], **sweep: Any) -> None:
    job = tiny_job(corpus, engine={"name": "accelerate"}) | job
    (folder / "job.yaml").write_text(yaml.safe_dump({"run": job}))
    (folder / "try.yaml").write_text(yaml.safe_dump({"job": "job.yaml"} | sweep))


def statuses(folder: Path) -> dict[str, str]:
    return {
        each["trial"]: each["status"]
        for each in json.loads((folder / "sweeps" / "try" / "results.json").read_text())["trials"]
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_grid_with_a_failure_then_whole(tmp_path: Path, corpus: Path) -> None:
    kill = [{"name": "kill", "step": 9, "rank": 0}]
    variants = [
        {"name": "fast", LR: 0.01},
        {"name": "slow", LR: 0.001},
        {"name": "killed", LR: 0.02, "run.faults": kill},
    ]
    write(tmp_path, corpus, {"checkpoint": {"every": 2}, "evaluate": {"every": 5, "samples": 0}}, variants=variants)
    place = tmp_path / "sweeps" / "try"
    printed = run_command(tmp_path, "switchwork", "sweep", "try.yaml", code=1)
    assert statuses(tmp_path) == {"fast": "finished", "slow": "finished", "killed": "failed"}
    assert "rank 0 died" in printed
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    parent = (place / "mlflow_run_id").read_text()
    assert client.get_run(parent).info.status == "FAILED"

    kept = {name: (place / name / "summary.json").stat().st_mtime_ns for name in ("fast", "slow")}
    printed = run_command(tmp_path, "switchwork", "sweep", "try.yaml")
    assert "2 of 3 runs are there already" in printed
    assert statuses(tmp_path) == dict.fromkeys(["fast", "slow", "killed"], "finished")
    assert {name: (place / name / "summary.json").stat().st_mtime_ns for name in kept} == kept
    assert "resumed from" in (place / "killed" / "events.jsonl").read_text()

    stored = client.get_run(parent)
    assert stored.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(parent)} >= {"results.json", "sweep.png", "best.yaml"}
    (experiment,) = [each.experiment_id for each in client.search_experiments() if each.name == "switchwork"]
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    assert {child.info.run_name: child.info.run_id for child in children} == {
        name: (place / name / "mlflow_run_id").read_text() for name in ("fast", "slow", "killed")
    }
    assert {child.data.params["optimizer.lr"] for child in children} == {"0.01", "0.001", "0.02"}
    results = json.loads((place / "results.json").read_text())
    for trial in results["trials"]:
        summary = json.loads((place / trial["trial"] / "summary.json").read_text())
        assert (trial["value"], trial["step"]) == (summary["eval"]["loss"], 10)
        assert [step for step, _ in trial["curve"]] == [5, 10]
    best = min(results["trials"], key=lambda trial: trial["value"])
    assert stored.data.tags["best"] == best["trial"]
    assert stored.data.metrics["best/eval/loss"] == best["value"]

    (tmp_path / "alone.yaml").write_text((place / "best.yaml").read_text())
    alone = ["run.tracking.enabled=false", "run.faults=[]"]
    run_command(tmp_path, "torchrun", "--nproc-per-node", "1", "-m", "trainer", "alone.yaml", *alone)
    assert losses(tmp_path / "runs" / "alone") == losses(place / best["trial"]), "a trial is what the job is by itself"


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the command ended too soon"
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


def step_of(folder: Path) -> int:
    rows = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return int(json.loads(rows[-1])["step"]) if rows else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_asha_over_a_kill_and_a_stop(tmp_path: Path, corpus: Path) -> None:
    job = {
        "stop": {"steps": 1200},
        "evaluate": {"every": 50, "samples": 0},
        "checkpoint": {"every": 50, "keep": 2},
        "log_every": 10,
        "tracking": {"enabled": False},
        "optimizer": {"lr": 0.01, "schedule": {"name": "constant"}},
    }
    asha = {"name": "asha", "grace_steps": 50, "reduction_factor": 2}
    write(tmp_path, corpus, job, over={LR: [0.003, 0.01, 1e-7]}, scheduler=asha, concurrent=1)
    place = tmp_path / "sweeps" / "try"
    command = [str(BIN / "switchwork"), "sweep", "try.yaml"]
    first = place / "lr-0.003"
    killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: step_of(first) >= 100, killed)
    family = [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]
    for each in family:
        each.kill()
    psutil.wait_procs(family, timeout=30)
    killed.wait()
    assert not (first / "summary.json").exists()

    reached = step_of(first)
    stopped = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: step_of(first) > reached + 20, stopped)
    family = psutil.Process(stopped.pid).children(recursive=True)
    stopped.send_signal(signal.SIGTERM)
    printed = stopped.communicate(timeout=120)[0].decode()
    assert stopped.returncode == 1, printed
    assert "SIGTERM" in printed
    assert "trainable" not in printed, "Tune speaks for itself"
    assert not psutil.wait_procs(family, timeout=30)[1], "it left processes behind"
    assert statuses(tmp_path) == {"lr-0.003": "stopped", "lr-0.01": "not started", "lr-1e-07": "not started"}
    assert "resumed from" in (first / "events.jsonl").read_text()

    printed = run_command(tmp_path, "switchwork", "sweep", "try.yaml")
    found = statuses(tmp_path)
    assert found["lr-1e-07"] == "pruned", printed
    assert found["lr-0.003"] == "finished" or found["lr-0.01"] == "finished"
    bad = place / "lr-1e-07"
    summary = json.loads((bad / "summary.json").read_text())
    assert 50 <= summary["step"] < 1200
    assert (bad / "checkpoints" / f"step-{summary['step']:08d}" / "manifest.json").exists(), (
        "it was stopped with a checkpoint"
    )
    assert "pruned at step" in printed

    before = time.monotonic()
    assert "pruned at step" in run_command(tmp_path, "switchwork", "sweep", "try.yaml")
    assert time.monotonic() - before < 60
    assert statuses(tmp_path) == found
    changed = yaml.safe_load((tmp_path / "try.yaml").read_text()) | {"scheduler": {**asha, "reduction_factor": 4}}
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(changed))
    assert "judged by" in run_command(tmp_path, "switchwork", "sweep", "try.yaml", code=2)
