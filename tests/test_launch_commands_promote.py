"""Rules at the command, on a real run: its samples, its promotion, and the log of decisions.

Samples pass, MLflow's registry promotes, and training logs the conflict rate.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import tiny_job
from mlflow import MlflowClient

from launch.config import load
from trainer.parsing import plain
from trainer.settle import prepare
from trainer.worker.main import run_worker

Run = Callable[..., tuple[int, str, str]]
NOTHING = 'flag_conflict("never") :- impossible.\n'
EVERYTHING = '%! flag_conflict("any"): texts are not wanted\nflag_conflict("any") :- not impossible.\n'
BETTER = """%! flag_conflict("worse"): the loss is above the champion's
flag_conflict("worse") :- metric("loss", V), champion_metric("loss", W), V > W.
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with two runs, one trained for longer, with rules over their samples."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "nothing.lp").write_text(NOTHING)
    (folder / "everything.lp").write_text(EVERYTHING)
    (folder / "better.lp").write_text(BETTER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, steps in (("short", 1), ("long", 8)):
            job = tiny_job(
                corpus,
                name=name,
                stop={"steps": steps},
                engine={"name": "accelerate"},
                evaluate={"samples": 3, "rules": {"file": "everything.lp"}},
            )
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({"run": job}))
            loaded = load(f"{name}.yaml")
            prepare(loaded.run, False)
            run_worker(plain(loaded.run), say=lambda line: None)
    return folder


@pytest.fixture
def switchwork(switchwork: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command, in the folder of this test."""
    monkeypatch.chdir(home)
    return switchwork


def champion() -> str | None:
    found = MlflowClient("sqlite:///mlflow.db").search_registered_models("name = 'switchwork'")
    return found[0].aliases.get("champion") if found else None


def test_the_conflict_rate_is_tracked_while_training(home: Path) -> None:
    rows = [json.loads(line) for line in (home / "runs" / "long" / "metrics.jsonl").read_text().splitlines()]
    rates = [row for row in rows if "rules/conflict_rate" in row]
    assert [(row["step"], row["rules/conflict_rate"], row["rules/judged"]) for row in rates] == [(8, 1.0, 3)]
    log = [json.loads(line) for line in (home / "runs" / "long" / "rules_audit.jsonl").read_text().splitlines()]
    assert [(row["purpose"], row["accepted"], row["checkpoint"]) for row in log] == [
        ("evaluation", False, "step 8")
    ] * 3


def test_only_samples_that_pass_are_printed(switchwork: Run) -> None:
    code, printed, _ = switchwork("sample", "long", "--n", "3", "--rules", "nothing.lp")
    assert code == 0
    assert "0 of 3 samples refused" in printed
    assert printed.count(", step 8") == 3
    code, printed, _ = switchwork("sample", "long", "--n", "3", "--rules", "everything.lp")
    assert code == 0
    assert "3 of 3 samples refused" in printed
    assert "texts are not wanted [everything.lp, line 2]" in printed
    assert ", step 8" not in printed


def test_a_champion_is_never_replaced_by_a_run_that_breaks_a_rule(switchwork: Run) -> None:
    assert champion() is None
    code, printed, _ = switchwork("promote", "short", "--rules", "everything.lp")
    assert code == 1
    assert "does NOT become champion" in printed
    assert champion() is None
    code, _, _ = switchwork("promote", "long", "--rules", "better.lp", "--samples", "2")
    assert code == 0
    best = champion()
    assert best is not None
    code, printed, _ = switchwork("promote", "short", "--rules", "better.lp")
    assert code == 1
    assert "the loss is above the champion's [better.lp, line 2]" in printed
    assert champion() == best
    versions = MlflowClient("sqlite:///mlflow.db").search_model_versions("name = 'switchwork'")
    assert sorted(version.tags["accepted"] for version in versions) == ["false", "false", "true"]
    assert all(len(version.tags["checkpoint"]) == 32 for version in versions)


def test_verify_checks_the_chain(switchwork: Run, home: Path) -> None:
    code, printed, _ = switchwork("verify", "long")
    assert code == 0
    assert "audit log  good" in printed
    log = home / "runs" / "long" / "rules_audit.jsonl"
    whole = log.read_text()
    log.write_text(whole.replace('"accepted": false', '"accepted": true', 1))
    code, printed, _ = switchwork("verify", "long")
    assert code == 1
    assert "audit log  BROKEN: rules_audit.jsonl, line 1: was changed" in printed
    log.write_text(whole)


def test_wrong_rules_end_in_one_line(switchwork: Run, home: Path) -> None:
    (home / "bad.lp").write_text("flag_conflict(X) :- not p(X).\n")
    for arguments, word in (
        (("sample", "long", "--rules", "bad.lp"), "bad.lp, line 1"),
        (("sample", "long", "--rules", "missing.lp"), "missing.lp"),
        (("promote", "long", "--rules", "bad.lp"), "unsafe variable X"),
        (("train", "long.yaml", "run.name=other", "run.evaluate.rules.file=bad.lp"), "unsafe variable X"),
    ):
        code, _, complaint = switchwork(*arguments)
        assert (code, complaint.count("\n"), word in complaint) == (2, 1, True), complaint
