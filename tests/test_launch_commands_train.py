"""The main path on real parts: `switchwork train` with Ray, DeepSpeed, `datasets` and MLflow.

The commands that a person runs on the finished run follow.
"""

import json
from pathlib import Path

import pytest
import yaml
from commands import run_command
from conftest import tiny_job
from mlflow import MlflowClient
from whole_runs import losses, metrics


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with a job, trained for 4 of its steps by Ray, with EP 2 and ZeRO 1."""
    folder = tmp_path_factory.mktemp("home")
    job = tiny_job(corpus, engine={"name": "deepspeed", "zero": 1, "ep": 2}, name="first", checkpoint={"every": 2})
    job["optimizer"] = {"lr": 0.01, "schedule": {"name": "constant"}}
    (folder / "job.yaml").write_text(yaml.safe_dump({"run": job, "cluster": {"workers": 2}}))
    (folder / "printed.txt").write_text(run_command(folder, "switchwork", "train", "job.yaml", "run.stop.steps=4"))
    return folder


def test_the_run_folder_tells_what_happened(home: Path) -> None:
    folder = home / "runs" / "first"
    names = {path.name for path in folder.iterdir()}
    assert {
        "resolved.yaml",
        "checkpoints",
        "samples",
        "summary.json",
        "metrics.jsonl",
        "mlflow_run_id",
        "curves.png",
        "expert_load.png",
    } <= names
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["step"], summary["samples_seen"], summary["tokens_seen"]) == (4, 64, 2048)
    assert sum(summary["eval"][f"expert_load/layer0/expert{expert}"] for expert in range(4)) == pytest.approx(1)
    assert summary["seconds_to_first_step"] > 0
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_person_sees_the_figures(home: Path) -> None:
    printed = (home / "printed.txt").read_text()
    for words in (
        "step 4/4",
        "tokens/s",
        "bits per byte",
        "xz -9, together",
        "load of each expert",
        "sample-0",
        "run folder",
        "switchwork ui",
    ):
        assert words in printed


def test_mlflow_has_the_run(home: Path) -> None:
    folder = home / "runs" / "first"
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    stored = client.get_run((folder / "mlflow_run_id").read_text())
    assert stored.info.status == "FINISHED"
    assert stored.data.params["objective.model.moe.experts"] == "4"
    assert stored.inputs.dataset_inputs[0].dataset.digest
    assert {artifact.path for artifact in client.list_artifacts(stored.info.run_id)} >= {
        "resolved.yaml",
        "curves.png",
        "data_manifest.json",
    }
    for name in (
        "loss",
        "tokens_seen",
        "grad_norm",
        "expert_load/layer1/expert3",
        "router_entropy/layer0",
        "system/cpu_percent",
        "eval/bits_per_byte",
    ):
        points = client.get_metric_history(stored.info.run_id, name)
        expected = [(int(row["step"]), row[name]) for row in metrics(folder) if name in row]
        assert [(point.step, point.value) for point in points] == expected


def test_resume_goes_on_as_if_never_stopped(home: Path) -> None:
    run_command(home, "switchwork", "train", "job.yaml", "run.stop.steps=8", "--resume")
    stopped = losses(home / "runs" / "first")
    run_command(
        home,
        "torchrun",
        "--nproc-per-node",
        "2",
        "-m",
        "trainer",
        "job.yaml",
        "run.stop.steps=8",
        "run.name=unbroken",
        "run.tracking.enabled=false",
    )
    assert stopped == losses(home / "runs" / "unbroken")
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    run_id = (home / "runs" / "first" / "mlflow_run_id").read_text()
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == list(range(1, 9))


def test_sample_eval_and_verify(home: Path) -> None:
    folder = home / "runs" / "first"
    summary = json.loads((folder / "summary.json").read_text())
    measured = json.loads(run_command(home, "switchwork", "eval", "first", "--json").partition("{")[2].join(["{", ""]))
    assert measured["loss"] == pytest.approx(summary["eval"]["loss"], abs=1e-5)
    assert "sample-1" in run_command(home, "switchwork", "sample", "first", "--prompt", "the ", "--tokens", "5")
    verdict = run_command(home, "switchwork", "verify", "first")
    assert verdict.count("good") == 4
    assert "lost 0, repeated 0" in verdict
    last = folder / "checkpoints" / "step-00000008"
    weights = last / "rank-00001.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    assert "rank-00001.safetensors" in run_command(home, "switchwork", "verify", "runs/first", code=1)
    printed = run_command(home, "switchwork", "sample", "first", "--tokens", "5")
    assert "step-00000008 is damaged" in printed
    assert "step 6" in printed
