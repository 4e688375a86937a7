"""Under Ray, a worker that is killed with SIGKILL costs time alone.

One MLflow run tells the whole story.
"""

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from commands import BIN, run_command
from conftest import tiny_job
from distributed import run_distributed
from mlflow import MlflowClient
from whole_runs import losses, train_or_resume

from trainer.run_files import RunFiles
from trainer.storage import Folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with a run whose rank 1 was killed after step 5, and an undisturbed one."""
    folder = tmp_path_factory.mktemp("home")
    job = tiny_job(
        corpus, engine={"name": "deepspeed", "zero": 1, "ep": 2}, checkpoint={"every": 2}, evaluate={"samples": 0}
    )
    run_distributed(
        train_or_resume, 2, job | {"root": str(folder / "runs"), "name": "undisturbed", "tracking": {"enabled": False}}
    )
    faulty = job | {"name": "killed", "faults": [{"name": "kill", "step": 5, "rank": 1}]}
    (folder / "job.yaml").write_text(yaml.safe_dump({"run": faulty, "cluster": {"workers": 2, "max_failures": 1}}))
    (folder / "printed.txt").write_text(run_command(folder, "switchwork", "train", "job.yaml"))
    return folder


def test_every_loss_is_bit_identical_to_the_undisturbed_run(home: Path) -> None:
    assert losses(home / "runs" / "killed") == losses(home / "runs" / "undisturbed")
    rows = [row for row in Folder(str(home / "runs" / "killed")).lines("metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] in (
        [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10],
        [1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10],
    )  # step 4 may not be saved yet


def test_the_run_says_why_each_attempt_ended(home: Path) -> None:
    ends = [str(end.stopped) for end in RunFiles(Folder(str(home / "runs" / "killed"))).attempts_ended()]
    assert len(ends) == 2
    assert "rank 1 died" in ends[0] or "gloo" in ends[0], ends[0]
    assert ends[1] == "all steps done"


def test_one_mlflow_run_without_doubled_points(home: Path) -> None:
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    stored = client.get_run((home / "runs" / "killed" / "mlflow_run_id").read_text())
    assert stored.info.status == "FINISHED"
    points = client.get_metric_history(stored.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == sorted(losses(home / "runs" / "undisturbed").items())
    assert stored.data.tags["attempt_1_ended"] == "all steps done"
    assert stored.data.tags["attempt_0_ended"]


def test_the_time_ledger_sums_to_the_whole(home: Path) -> None:
    folder = home / "runs" / "killed"
    summary = json.loads((folder / "summary.json").read_text())
    rows = json.loads((folder / "goodput.json").read_text())["attempts"]
    seconds = summary["goodput"]
    assert sum(seconds.values()) == pytest.approx(rows[-1]["until"] - rows[0]["begin"], abs=0.1)
    first = RunFiles(Folder(str(folder))).metrics()[0].time
    assert seconds["start-up"] < first - rows[0]["begin"] < seconds["start-up"] + seconds["step"] + seconds["data"] + 5
    assert seconds["restart"] > 1
    assert seconds["replayed"] > 0
    assert seconds["other"] < 0.2 * sum(seconds.values()), "most of the time must have a name"
    assert "restarts" in (home / "printed.txt").read_text()


@pytest.mark.slow
def test_sigterm_to_the_command_saves_and_leaves(home: Path) -> None:
    arguments = ["run.name=stopped", "run.faults=[]", "run.stop.steps=10000"]
    command = subprocess.Popen(
        [str(BIN / "switchwork"), "train", "job.yaml", *arguments],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder = home / "runs" / "stopped"
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    command.send_signal(signal.SIGTERM)
    printed = command.communicate(timeout=200)[0]
    assert command.returncode == 0, printed
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped"] == "SIGTERM to the command"
    assert 0 < summary["step"] < 10000
    assert (folder / "checkpoints" / f"step-{summary['step']:08d}" / "manifest.json").exists()


@pytest.mark.slow
def test_a_hung_worker_is_replaced(home: Path) -> None:
    arguments = ["run.name=hung", "run.faults=[{name: hang, step: 4, rank: 1}]", "run.hang_timeout_s=20"]
    run_command(home, "switchwork", "train", "job.yaml", *arguments)
    folder = home / "runs" / "hung"
    assert losses(folder) == losses(home / "runs" / "undisturbed")
    ends = [str(end.stopped) for end in RunFiles(Folder(str(folder))).attempts_ended()]
    assert "no progress for 20 s on rank 0 after step 4" in ends[0]
    assert "in global_weights" in (folder / "stacks" / "rank-0-attempt-0.txt").read_text()
    stopped = [
        each.info["name"]
        for each in psutil.process_iter(["status", "name"])
        if each.info["status"] == psutil.STATUS_STOPPED
    ]
    assert not [name for name in stopped if "ray" in name.lower()], "the stopped worker is still there"
