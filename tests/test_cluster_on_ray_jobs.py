"""A job on a real Ray cluster with token authentication: submit, follow, list, stop.

The ways in which it is refused are here too.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import tiny_job
from ray_head import ray_head, switchwork

from trainer.world import free_port


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray head of this test's own, with a token."""
    with ray_head(tmp_path_factory.mktemp("head") / "log") as started:
        yield started.address


def test_a_submitted_job_trains_to_the_end(head: str, corpus: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    run = tiny_job(
        corpus,
        engine={"name": "deepspeed", "zero": 1, "ep": 2},
        root=str(tmp_path / "runs"),
        name="there",
        stop={"steps": 2},
    )
    job.write_text(yaml.safe_dump({"run": run, "cluster": {"workers": 2}}))
    submitted = switchwork("submit", str(job), "--to", head)
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.strip()
    printed = switchwork("logs", job_id, "-f", "--to", head).stdout
    assert "held out" in printed, printed
    assert json.loads(switchwork("status", job_id, "--to", head, "--json").stdout)["state"] == "SUCCEEDED"
    assert json.loads((tmp_path / "runs" / "there" / "summary.json").read_text())["step"] == 2
    assert job_id in switchwork("jobs", "--to", head).stdout


def test_what_a_cluster_refuses_is_one_line(head: str, corpus: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({"run": tiny_job(corpus), "cluster": {"workers": 2}}))
    nobody = f"http://127.0.0.1:{free_port()}"
    cases = [
        (switchwork("submit", str(job), "run.root=/shared/runs", "--to", nobody), nobody),
        (switchwork("submit", str(job), "run.root=/shared/runs", "--to", "head:8265"), "http://HEAD:8265"),
        (switchwork("submit", str(job), "--to", head), "run.root"),
        (switchwork("submit", str(job), "run.root=/shared/runs", "--to", head, token="b" * 40), "RAY_AUTH_TOKEN"),
        (switchwork("status", "nobody", "--to", head), "nobody"),
    ]
    for done, word in cases:
        assert (done.returncode, done.stderr.count("\n"), done.stderr[:7]) == (2, 1, "error: "), done.stderr
        assert word in done.stderr


@pytest.mark.slow
def test_a_job_that_is_stopped_saves_first(head: str, corpus: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    folder = tmp_path / "runs" / "stopped"
    run = tiny_job(
        corpus, root=str(tmp_path / "runs"), name="stopped", stop={"steps": 100_000}, evaluate={"samples": 0}
    )
    job.write_text(yaml.safe_dump({"run": run}))
    job_id = switchwork("submit", str(job), "--to", head).stdout.strip()
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, switchwork("logs", job_id, "--to", head).stdout
        time.sleep(0.5)
    assert switchwork("stop", job_id, "--to", head).returncode == 0
    while not (folder / "summary.json").exists():
        assert time.monotonic() < deadline + 60, switchwork("logs", job_id, "--to", head).stdout
        time.sleep(0.5)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped"] == "SIGTERM to the command"
    assert (folder / "checkpoints" / f"step-{summary['step']:08d}" / "manifest.json").exists()


def test_a_node_without_the_environment_is_named(head: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise ImportError('libtorch.so: not here')")
    job = tmp_path / "job.yaml"
    where = {"workers": 1, "env": {"PYTHONPATH": str(tmp_path / "broken")}}
    job.write_text(
        yaml.safe_dump({"run": tiny_job(corpus, root=str(tmp_path / "runs"), name="lacking"), "cluster": where})
    )
    job_id = switchwork("submit", str(job), "--to", head).stdout.strip()
    printed = switchwork("logs", job_id, "-f", "--to", head).stdout
    assert "libtorch.so: not here); install this checkout's environment on every node" in printed, printed
    assert json.loads(switchwork("status", job_id, "--to", head, "--json").stdout)["state"] == "FAILED"


def test_a_job_that_never_fits_is_refused_soon(head: str, corpus: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    run = tiny_job(corpus, root=str(tmp_path / "runs"), name="large")
    run["objective"]["data"]["lanes"] = 16
    job.write_text(
        yaml.safe_dump({"run": run | {"batch": {"global_batch": 16, "micro_batch": 1}}, "cluster": {"workers": 16}})
    )
    job_id = switchwork("submit", str(job), "--to", head).stdout.strip()
    printed = switchwork("logs", job_id, "-f", "--to", head).stdout
    assert (
        "error: cluster.workers: 16 with cpus_per_worker 1, and 1 node, 4 CPUs have room for 4; use fewer workers"
        in printed
    ), printed


@pytest.mark.slow
def test_submit_to_first_step_on_a_warm_cluster(head: str, corpus: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    run = tiny_job(corpus, root=str(tmp_path / "runs"), stop={"steps": 2}, evaluate={"samples": 0})
    job.write_text(yaml.safe_dump({"run": run, "cluster": {"workers": 2}}))
    seconds = []
    for name in ("warming", "warm"):
        before = time.time()
        job_id = switchwork("submit", str(job), f"run.name={name}", "--to", head).stdout.strip()
        printed = switchwork("logs", job_id, "-f", "--to", head).stdout
        facts = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
        first = (tmp_path / "runs" / name / "first_step.json").stat().st_mtime
        seconds.append(first - before)
        print(
            f"{name}: {first - before:.1f} s from submit to the first step, "
            f"{facts['seconds_to_first_step']:.1f} s of them in the job's command"
        )
    assert seconds[-1] < 20, printed
