"""switchwork diff: what two runs differ in, told from their folders."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from saved_runs import summary_of

from launch.cli.__main__ import main
from launch.commands.diff import compare
from trainer.endings import ALL_STEPS_DONE
from trainer.records.code_version import code_name, code_version
from trainer.run_files import run_files
from trainer.run_rows import AttemptBegan, AttemptEnded, Job


def run_folder(
    root: Path, name: str, lr: float, loss: float, commit: str, files: dict[str, int], **config: Any
) -> None:
    """A run folder as a worker leaves it, with what diff looks at."""
    written = run_files(str(root / "runs"), name)
    run = {"name": name, "source": name, "optimizer": {"lr": lr}, "seed": 0, **config}
    written.write_job(Job(run=run, cluster={"workers": 2}))
    for attempt, version in enumerate(({"commit": "0" * 40, "dirty": True}, {"commit": commit, "dirty": False})):
        written.add_attempt(AttemptBegan.from_row({"attempt": attempt} | version))
    written.add_attempt(AttemptEnded(attempt=1, time=0.0, by="rank 0", stopped=ALL_STEPS_DONE))
    manifest = {
        "source": [{"name": file, "size": size, "tag": ""} for file, size in files.items()],
        "seq_len": 32,
        "digest": json.dumps(files),
    }
    written.write_data_manifest(manifest)
    figures = {"loss": loss, "expert_load/layer0/expert1": loss}
    written.write_summary(summary_of(100, name=name) | {"eval": figures, "samples": {"a": name}})


@pytest.fixture
def two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_folder(tmp_path, "first", 0.001, 2.5, "a" * 40, {"x.jsonl": 10, "y.jsonl": 20})
    run_folder(tmp_path, "second", 0.002, 2.25, "b" * 40, {"x.jsonl": 10, "y.jsonl": 21, "z.jsonl": 1}, compile=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_tells_what_differs_and_nothing_else(two_runs: Path) -> None:
    found = compare("first", str(two_runs / "runs" / "second"))
    assert found["config"] == {"run.optimizer.lr": (0.001, 0.002), "run.compile": (None, True)}
    assert found["code"] == {"commit": ("a" * 40, "b" * 40)}, "that of the last attempt"
    assert {name: pair for name, pair in found["data"].items() if name != "digest"} == {
        "source[y.jsonl]": ("20 ", "21 "),
        "source[z.jsonl]": (None, "1 "),
    }
    assert found["results"] == {"eval.loss": (2.5, 2.25)}
    assert all(not differing for differing in compare("first", "first").values())


def test_the_command(two_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def switchwork(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["switchwork", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    code, printed, _ = switchwork("diff", "first", "second")
    assert code == 0
    assert [line.split() for line in printed.splitlines() if line.startswith("eval.loss")] == [
        ["eval.loss", "2.5", "2.25", "-0.25"]
    ]
    assert "run.optimizer.lr" in printed
    assert "source[y.jsonl]" in printed
    code, printed, _ = switchwork("diff", "first", "second", "--json")
    assert json.loads(printed)["results"] == {"eval.loss": [2.5, 2.25]}
    assert switchwork("diff", "first", "first")[1].split("\n")[:4] == [
        "config: the same",
        "code: the same",
        "data: the same",
        "results: the same",
    ]
    code, _, complaint = switchwork("diff", "first", "third")
    assert (code, "third" in complaint, complaint.count("\n")) == (2, True, 1)


def test_the_code_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHWORK_COMMIT", "c" * 40 + "-dirty")
    assert code_version() == {"commit": "c" * 40, "dirty": True}
    assert code_name() == "c" * 40 + "-dirty"
    monkeypatch.setenv("SWITCHWORK_COMMIT", "latest; rm")
    assert code_version() == {"commit": None, "dirty": False}
    assert code_name() == ""
    monkeypatch.delenv("SWITCHWORK_COMMIT")
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        assert code_version()["commit"] == head
