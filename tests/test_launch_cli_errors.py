"""Wrong input ends in one line that names the field, the values and the fix, with exit code 2.

It ends before Ray starts.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_job
from kube_cluster import Run

from trainer.world import free_port

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture
def job(tmp_path: Path, corpus: Path) -> str:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"run": tiny_job(corpus), "cluster": {"workers": 2}}))
    return str(file)


WRONG: list[tuple[list[str], list[str]]] = [
    (["run.optimiser.lr=1"], ["run.optimiser", "did you mean optimizer"]),
    (["run.objective.model.moe.expert=4"], ["run.objective.model.moe.expert", "did you mean experts"]),
    (["run.batch.global_batch=many"], ["run.batch.global_batch", "'many'", "integer"]),
    (["run.batch.global_batch=12"], ["run.batch.global_batch", "12", "2 workers x micro_batch 4 = 8"]),
    (["run.engine.zero=4"], ["run.engine.zero", "4", "0, 1, 2 or 3"]),
    (["run.engine.name=megatron"], ["run.engine.name", "'megatron'", "deepspeed, accelerate"]),
    (["run.objective.name=chatbot"], ["run.objective.name", "'chatbot'", "moe_lm"]),
    (["run.engine.ep=3"], ["run.engine.ep", "3", "4 experts", "2 workers"]),
    (["run.engine.ep=4"], ["run.engine.ep", "4", "2 workers"]),
    (["run.engine.ep=2", "run.engine.zero=3"], ["run.engine.zero", "3", "ep 2", "use zero 2"]),
    (["run.objective.model.moe=null", "run.engine.ep=2"], ["run.engine.ep", "no experts"]),
    (["run.objective.data.lanes=5"], ["lanes", "5", "2 workers"]),
    (["run.objective.data.source.paths=[/nowhere/*.jsonl]"], ["/nowhere/*.jsonl"]),
    (["run.objective.data.source.paths=[/nowhere/a.parquet]"], ["/nowhere/a.parquet"]),
    (["run.objective.data.text_column=words"], ["words", "text"]),
    (["run.objective.data.tokenizer=/nowhere/tokenizer"], ["/nowhere/tokenizer"]),
    (["run.objective.model.causal=false"], ["causal", "masked_lm"]),
    (["run.objective.model.heads=5"], ["heads", "5", "32"]),
    (
        ["run.objective.model.moe.router.name=expert_choice", "run.objective.model.moe.capacity_factor=null"],
        ["expert_choice", "future"],
    ),
    (["run.stop={}"], ["stop", "steps, tokens and hours"]),
    (["run.stop={hours: 1}"], ["run.optimizer.schedule", "cosine", "stop.steps"]),
    (["run.stop.steps=-5"], ["steps", "-5"]),
    (["run.optimizer.lr=0"], ["lr", "0", "above 0"]),
    (["run.name=../up"], ["name", "../up"]),
    (["run.root=/proc/nowhere"], ["run.root", "/proc/nowhere"]),
    (["run.device=cuda"], ["run.device", "cuda"]),
    (["cluster.workers=0"], ["workers", "0"]),
    (["steps"], ["steps", "a.b=c"]),
]


@pytest.mark.parametrize(("overrides", "words"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_wrong_jobs_are_refused_in_one_line(
    overrides: list[str], words: list[str], switchwork: Run, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cluster.on_ray.train

    monkeypatch.setattr(
        cluster.on_ray.train, "connect", lambda cluster: pytest.fail("Ray was started for a job that cannot run")
    )
    code, _, complaint = switchwork("train", job, *overrides)
    assert code == 2
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    for word in words:
        assert word in complaint


def test_wrong_files_are_refused_in_one_line(switchwork: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("run: [1, 2")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "twice.yaml").write_text("run: {seed: 1, seed: 2}\n")
    (tmp_path / "code.yaml").write_text("run: !!python/object/apply:os.system ['true']\n")
    for name in ("missing.yaml", "broken.yaml", "list.yaml", "twice.yaml", "code.yaml"):
        code, _, complaint = switchwork("train", str(tmp_path / name))
        assert code == 2, name
        assert complaint.count("\n") == 1
        assert complaint.startswith("error: ")


def test_empty_data_are_refused(switchwork: Run, job: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    code, _, complaint = switchwork("train", job, f"run.objective.data.source.paths=[{tmp_path}/empty.jsonl]")
    assert code == 2
    assert "empty.jsonl" in complaint
    assert complaint.count("\n") == 1


def test_a_run_is_not_overwritten_and_a_missing_one_not_resumed(switchwork: Run, job: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "attempts.jsonl").write_text("{}\n")
    code, _, complaint = switchwork("train", job, "run.name=mine")
    assert (code, "--resume" in complaint) == (2, True)
    code, _, complaint = switchwork("train", job, "run.name=other", "--resume")
    assert (code, "no run" in complaint) == (2, True)
    for command in ("sample", "eval", "verify"):
        code, _, complaint = switchwork(command, "nowhere")
        assert (code, "nowhere" in complaint, complaint.count("\n")) == (2, True, 1)


def test_dry_run_prints_a_job_that_is_enough_to_repeat_the_run(switchwork: Run, job: str, tmp_path: Path) -> None:
    code, printed, _ = switchwork("train", job, "run.optimizer.lr=3e-4", "--dry-run")
    assert code == 0
    assert not (tmp_path / "runs").exists()
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(printed)
    again: Any = yaml.safe_load(switchwork("train", str(resolved), "--dry-run")[1])
    assert again["run"]["optimizer"]["lr"] == 3e-4
    assert again == yaml.safe_load(printed) | {"run": yaml.safe_load(printed)["run"] | {"source": "resolved"}}


def test_data_shows_what_the_model_will_see(switchwork: Run, job: str) -> None:
    code, printed, _ = switchwork("data", job, "--n", "2")
    assert code == 0
    assert "wizards" in printed or "brown" in printed


def test_a_cluster_that_is_away_is_refused_soon(switchwork: Run, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    begin = time.monotonic()
    code, _, complaint = switchwork("train", job)
    assert (code, "cluster.address" in complaint, complaint.count("\n")) == (2, True, 1)
    assert time.monotonic() - begin < 15


def test_the_clients_of_a_cluster_start_without_torch() -> None:
    modules = "cluster.jobs, cluster.on_kubernetes.jobs, cluster.on_ray.jobs, launch.cli.__main__"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[1], timeout=60, check=False)
    assert done.returncode == 0, "`switchwork jobs`, `status` and `logs` would take seconds to start"
