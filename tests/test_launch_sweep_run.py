"""A sweep's file, its trials, and the results of trials that have ended.

No Ray runs: the trials' folders are written here.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_job
from saved_runs import summary_of

from launch.config import load
from launch.sweep.config import Range, SweepConfig
from launch.sweep.outcomes import look, ranked
from launch.sweep.run import _concurrent
from launch.sweep.scaling_law import fit_power_law
from launch.sweep.trials import Trial, plan, read_sweep, short_names
from trainer.endings import ALL_STEPS_DONE, Ending, Stopped
from trainer.parsing import parse, plain
from trainer.run_rows import AttemptBegan, Job
from trainer.storage import Folder
from trainer.tracking.tracker import JsonlTracker
from trainer.world import free_port

Run = Callable[..., tuple[int, str, str]]
LR = "run.optimizer.lr"
WIDTH = "run.objective.model.d_model"
LAYERS = "run.objective.model.layers"


@pytest.fixture
def write(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a sweep file with these fields, next to a job without experts, and enter its folder."""
    monkeypatch.chdir(tmp_path)
    job = tiny_job(corpus, engine={"name": "accelerate"}, tracking={"enabled": False}, evaluate={"every": 5})
    del job["objective"]["model"]["moe"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"run": job}))

    def write_sweep(**fields: Any) -> str:
        (tmp_path / "lr.yaml").write_text(yaml.safe_dump({"job": "job.yaml"} | fields, sort_keys=False))
        return "lr.yaml"

    return write_sweep


def planned(path: str, *overrides: str) -> list[Trial]:
    return plan(read_sweep(path), path, list(overrides), os.path.abspath("sweeps/lr"))


def pretend(trial: Trial, curve: list[tuple[int, float]], stopped: Stopped = ALL_STEPS_DONE) -> None:
    """What a run leaves."""
    files = trial.files
    files.write_job(Job(run=plain(trial.job.run)))
    files.add_attempt(AttemptBegan(attempt=0, time=0.0, world=1, host="here", pid=1, commit=None, dirty=False))
    tracker = JsonlTracker(files, attempt=0)
    for step, value in curve:
        tracker.log(step, {"eval/loss": value})
    files.write_summary(summary_of(curve[-1][0], stopped))


def test_trials_are_all_combinations_with_all_seeds(write: Callable[..., str]) -> None:
    variants = [{"name": "small", WIDTH: 16, LAYERS: 1}, {"name": "large", WIDTH: 32}]
    trials = planned(
        write(over={LR: [0.01, 0.003], "run.batch.micro_batch": [4, 8]}, variants=variants, seeds=2), "run.seed=7"
    )
    assert len(trials) == 16
    assert trials[0].name == "small_lr-0.01_micro_batch-4_seed-7"
    assert trials[-1].name == "large_lr-0.003_micro_batch-8_seed-8"
    for trial in trials:
        run = trial.job.run
        assert (run.objective.model.d_model, run.objective.model.layers) == (
            (16, 1) if trial.name.startswith("small") else (32, 2)
        )
        assert f"_lr-{run.optimizer.lr}_micro_batch-{run.batch.micro_batch}_seed-{run.seed}" in trial.name
        assert trial.name.startswith(trial.setting)
        assert trial.files.folder.url == os.path.abspath(f"sweeps/lr/{trial.name}")
    assert len({trial.setting for trial in trials}) == 8


def test_draws_depend_on_seed_key_and_number_alone(write: Callable[..., str]) -> None:
    ranges = {LR: {"low": 1e-4, "high": 1e-1, "log": True}, "run.optimizer.weight_decay": {"low": 0.0, "high": 0.2}}
    three = planned(write(over=ranges, samples=3))
    four = planned(write(over=ranges, samples=4))
    assert [trial.changes for trial in four[:3]] == [trial.changes for trial in three]
    assert [trial.name for trial in three] == ["sample-00", "sample-01", "sample-02"]
    assert len({trial.job.run.optimizer.lr for trial in four}) == 4
    other = planned(write(over=ranges, samples=3, sample_seed=1))
    assert all(ours.changes[LR] != theirs.changes[LR] for ours, theirs in zip(three, other, strict=True))
    (fewer,) = planned(write(over={LR: ranges[LR]}, samples=1))
    assert fewer.changes[LR] == three[0].changes[LR]


def test_ranges_reach_from_end_to_end() -> None:
    spread = Range(low=1e-4, high=1e-2, log=True)
    assert [spread.at(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1e-4, 1e-3, 1e-2])
    whole = Range(low=2, high=5)
    assert [whole.at(share) for share in (0.0, 0.26, 0.51, 0.76, 0.9999999)] == [2, 3, 4, 5, 5]
    assert isinstance(whole.at(0.5), int)
    assert Range(low=0.0, high=3.0).at(0.5) == 1.5


def test_keys_are_called_by_as_much_as_tells_them_apart() -> None:
    assert short_names([LR, WIDTH]) == {LR: "lr", WIDTH: "d_model"}
    assert short_names(["run.ema.decay", "run.optimizer.decay"]) == {
        "run.ema.decay": "ema.decay",
        "run.optimizer.decay": "optimizer.decay",
    }
    assert short_names([]) == {}


SIZES = [{"name": f"d{width}", WIDTH: width} for width in (8, 16, 24, 32)]
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"ovr": {LR: [1]}}, ["ovr", "did you mean over"]),
    ({}, ["over", "nothing is varied"]),
    ({"job": "none.yaml", "seeds": 2}, ["none.yaml", "no such file"]),
    ({"over": {LR: 0.1}}, [f"over.{LR}", "0.1", "list"]),
    ({"over": {LR: []}}, [f"over.{LR}", "list"]),
    ({"over": {LR: {"low": 0.1, "high": 0.01}}, "samples": 1}, [f"over.{LR}", "0.1", "0.01", "below"]),
    ({"over": {LR: {"low": 0, "high": 1, "log": True}}, "samples": 1}, [f"over.{LR}", "above 0"]),
    ({"over": {LR: {"low": 0.01, "hgh": 1}}, "samples": 1}, [f"over.{LR}.hgh", "did you mean high"]),
    ({"over": {LR: {"low": 0.01, "high": 0.1}}}, ["samples", "0", "number of draws"]),
    ({"over": {LR: [0.1]}, "samples": 3}, ["samples", "3", "leave it out"]),
    ({"over": {"run.optimizer.lrr": [0.1]}}, ["trial lrr-0.1", "run.optimizer.lrr", "did you mean lr"]),
    ({"over": {LR: [0.1, -1]}}, ["trial lr--1", "lr", "above 0"]),
    ({"over": {LR: [0.1, 1.0e-1]}}, ["lr-0.1.0", "lr-0.1.1", "same job"]),
    ({"over": {"optimizer.lr": [0.1]}}, ["over.optimizer.lr", "run or cluster"]),
    ({"over": {"run.name": ["a"]}}, ["over.run.name", "leave it out"]),
    ({"over": {"run.tracking.uri": ["a"]}}, ["over.run.tracking.uri", "leave it out"]),
    ({"over": {"run.seed": [1, 2]}, "seeds": 2}, ["seeds", "2", "run.seed"]),
    ({"over": {LR: [0.1]}, "variants": [{"name": "a", LR: 1}]}, [f"over.{LR}", "a", "keep one"]),
    ({"variants": [{WIDTH: 16}]}, ["variants", "name"]),
    ({"variants": [{"name": "a"}, {"name": "a", WIDTH: 16}]}, ["variants", "a", "twice"]),
    ({"seeds": 0}, ["seeds", "0"]),
    ({"seeds": 2, "concurrent": 0}, ["concurrent", "0"]),
    ({"seeds": 2, "mode": "least"}, ["mode", "least"]),
    ({"seeds": 2, "scheduler": {"name": "pbt"}}, ["scheduler.name", "pbt", "grid, asha"]),
    ({"seeds": 2, "scheduler": {"name": "asha"}}, ["scheduler.grace_steps", "missing"]),
    (
        {"seeds": 2, "scheduler": {"name": "asha", "grace_steps": 5, "reduction_factor": 1}},
        ["reduction_factor", "above 1"],
    ),
    ({"seeds": 2, "scheduler": {"name": "asha", "grace_steps": 10}}, ["scheduler.grace_steps", "10", "10 steps"]),
    (
        {"seeds": 2, "scheduler": {"name": "asha", "grace_steps": 4}},
        ["scheduler.grace_steps", "4", "run.evaluate.every 5"],
    ),
    ({"variants": SIZES[:3], "fit": {}}, ["fit.scaling_law", "3 sizes", "add variants"]),
    ({"variants": [*SIZES, {"name": "same", WIDTH: 32, LR: 1}], "fit": {}}, ["fit.scaling_law", "same", "its own"]),
    ({"over": {WIDTH: [8, 16, 24, 32]}, "fit": {}}, ["fit.scaling_law", "variants"]),
    ({"variants": SIZES, "fit": {"hold_out": -1}}, ["hold_out", "-1"]),
    (
        {"variants": [{**each, "run.objective.model.moe": {"experts": 2, "ffn": 8}} for each in SIZES], "fit": {}},
        ["fit.scaling_law", "dense"],
    ),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=[json.dumps(fields)[:60] for fields, _ in WRONG])
def test_wrong_sweeps_are_refused_in_one_line(
    fields: dict[str, Any], words: list[str], switchwork: Run, write: Callable[..., str]
) -> None:
    code, _, complaint = switchwork("sweep", write(**fields))
    assert code == 2
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    for word in words:
        assert word in complaint
    assert not Path("sweeps").exists()


def test_a_dry_run_prints_the_trials_and_makes_nothing(switchwork: Run, write: Callable[..., str]) -> None:
    code, printed, _ = switchwork("sweep", write(over={LR: [0.01, 0.003]}), "run.stop.steps=20", "--dry-run")
    assert code == 0
    assert "lr-0.003" in printed
    assert "20" in printed
    assert not Path("sweeps").exists()


def test_trials_that_have_ended_are_shown_and_not_run_again(
    switchwork: Run, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "launch.sweep.run._run", lambda *given: pytest.fail("Ray was started although all trials are there")
    )
    path = write(over={LR: [0.03, 0.01, 0.003]}, seeds=2)
    ends = {0.03: 3.0, 0.01: 2.0, 0.003: 2.5}
    trials = planned(path)
    for trial in trials:
        lr = trial.job.run.optimizer.lr
        seed = trial.job.run.seed
        if lr == 0.03 and seed == 1:
            pretend(trial, [(5, math.inf)], stopped=Stopped(Ending.PRUNED, "behind the others at step 5"))
        else:
            pretend(trial, [(5, 4.0), (10, ends[lr] + 0.1 * seed)])
    code, printed, complaint = switchwork("sweep", path)
    assert (code, complaint) == (0, "")
    rows = [line for line in printed.splitlines() if "seed-" in line]
    assert [row.split()[0] for row in rows[:3]] == ["lr-0.01_seed-0", "lr-0.01_seed-1", "lr-0.003_seed-0"]
    assert "pruned at step 5" in rows[-1]
    assert "best: lr-0.01, eval/loss 2.0500, mean of 2 seeds" in printed
    results = json.loads(Path("sweeps/lr/results.json").read_text())
    assert [(each["name"], each["mean"]) for each in results["settings"]] == [
        ("lr-0.01", pytest.approx(2.05)),
        ("lr-0.003", pytest.approx(2.55)),
    ]
    assert {each["trial"]: each["status"] for each in results["trials"]}["lr-0.03_seed-1"] == "pruned"
    assert Path("sweeps/lr/sweep.png").read_bytes().startswith(b"\x89PNG")
    best = yaml.safe_load(Path("sweeps/lr/best.yaml").read_text())
    assert best["run"]["optimizer"]["lr"] == 0.01
    assert best["run"]["stop"] == {"steps": 10}
    assert load("sweeps/lr/best.yaml").run.optimizer.lr == 0.01

    outcomes = [look(trial, "eval/loss") for trial in trials]
    most = read_sweep(write(over={LR: [0.03, 0.01, 0.003]}, seeds=2, mode="max"))
    assert [setting.name for setting in ranked(outcomes, most)] == ["lr-0.003", "lr-0.01"]
    code, _, complaint = switchwork("sweep", write(over={LR: [0.03, 0.01, 0.003]}, seeds=2, metric="eval/los"))
    assert (code, "eval/loss" in complaint, complaint.count("\n")) == (2, True, 1)


def test_runs_of_another_sweep_are_refused(switchwork: Run, write: Callable[..., str]) -> None:
    (trial,) = planned(write(over={LR: [0.01]}))
    pretend(trial, [(5, 4.0), (10, 2.0)])
    assert switchwork("sweep", "lr.yaml")[0] == 0
    code, _, complaint = switchwork("sweep", "lr.yaml", "run.stop.steps=20")
    assert (code, complaint.count("\n")) == (2, 1)
    assert "run.stop.steps 10, now it is 20" in complaint
    code, _, complaint = switchwork("sweep", write(over={LR: [0.01]}, scheduler={"name": "asha", "grace_steps": 5}))
    assert code == 2
    assert "judged by min eval/loss (name grid)" in complaint
    assert switchwork("sweep", write(over={LR: [0.01]}, concurrent=2))[0] == 0


def test_more_trials_at_a_time_than_there_is_room_for_are_refused(write: Callable[..., str]) -> None:
    config = read_sweep(write(seeds=4, concurrent=3))
    assert _concurrent(config, places=3) == 3
    with pytest.raises(ValueError, match=r"concurrent: 3, but .* 2 such trials at a time; use 2"):
        _concurrent(config, places=2)
    assert _concurrent(read_sweep(write(seeds=4)), places=2) == 2


def test_a_tracking_server_that_is_away_is_said_before_anything_starts(
    switchwork: Run, write: Callable[..., str]
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    code, _, complaint = switchwork("sweep", write(seeds=2), "run.tracking.enabled=true", f"run.tracking.uri={away}")
    assert (code, complaint.count("\n")) == (2, 1)
    assert f"run.tracking.uri: MLflow at {away} does not accept the sweep's run" in complaint
    assert "run.tracking.enabled=false" in complaint


@pytest.mark.parametrize(
    ("stopped", "words"),
    [
        (ALL_STEPS_DONE, "finished"),
        (Stopped(Ending.HOURS_OVER, "stop.hours: 1 h are over"), "finished"),
        (Stopped(Ending.SIGNAL, "SIGTERM to the command"), "stopped at step 5"),
        (Stopped(Ending.PRUNED, "behind the others at step 5"), "pruned at step 5"),
        (Stopped(Ending.ANOMALY, "loss is nan"), "failed: loss is nan"),
    ],
)
def test_how_a_trial_stands_is_read_from_its_folder(stopped: Stopped, words: str, write: Callable[..., str]) -> None:
    (trial,) = planned(write(over={LR: [0.01]}))
    assert look(trial, "eval/loss").words == "not started"
    pretend(trial, [(5, 4.0)], stopped)
    assert look(trial, "eval/loss").words == words
    trial.files.write_failure("Traceback\nattempt 0 ended: no memory\n")
    assert look(trial, "eval/loss").words == "failed: attempt 0 ended: no memory"


def test_a_ladder_of_sizes_ends_with_a_law_and_a_verdict(switchwork: Run, write: Callable[..., str]) -> None:
    trials = planned(write(variants=[*SIZES, {"name": "d40", WIDTH: 40}], seeds=2, fit={"hold_out": 1}))
    from models.transformer.cost import non_embedding

    sizes = {trial.setting: non_embedding(trial.job.run.objective.model) for trial in trials}
    noise = {name: 1 + 0.01 * math.sin(5 * index) for index, name in enumerate(sizes)}
    losses = {name: noise[name] * (1e9 / size) ** 0.1 for name, size in sizes.items()}
    for trial in trials:
        pretend(trial, [(10, losses[trial.setting] * (1 + 0.001 * trial.job.run.seed))])
    code, printed, complaint = switchwork("sweep", "lr.yaml")
    assert (code, complaint) == (0, "")
    fit = json.loads(Path("sweeps/lr/results.json").read_text())["fit"]
    means = {name: loss * math.sqrt(1.001) for name, loss in losses.items()}
    expected = fit_power_law([sizes[name] for name in list(sizes)[:4]], [means[name] for name in list(sizes)[:4]])
    assert fit["alpha"]["value"] == pytest.approx(expected.alpha.value)
    assert [each["held_out"] for each in fit["sizes"]] == [False] * 4 + [True]
    assert fit["sizes"][-1]["law"]["low"] == pytest.approx(expected.predict(sizes["d40"]).low)
    inside = expected.predict(sizes["d40"]).low <= means["d40"] <= expected.predict(sizes["d40"]).high
    assert ("inside" if inside else "OUTSIDE") in printed
    assert f"alpha = {expected.alpha.value:.4f}" in printed
    assert Path("sweeps/lr/scaling_law.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_sweep_is_one() -> None:
    path = "launch/configs/scaling_law.yaml"
    trials = plan(read_sweep(path), path, [], "/tmp/nowhere")
    from launch.sweep.scaling_law_report import check_sizes

    config = read_sweep(path)
    assert config.fit is not None
    check_sizes(config.fit, trials)
    assert parse(SweepConfig, plain(config)) == config
    assert not Folder("/tmp/nowhere").exists()
