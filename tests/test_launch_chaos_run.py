"""The fire drill: its table and picture come from the run folders, and a real drill recovers."""

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from commands import BIN
from conftest import tiny_job

from launch.chaos.picture import draw_drill
from launch.chaos.report import Cost, InjectedFault, costs
from launch.chaos.run import Drill
from trainer.parsing import parse, read_job
from trainer.run_files import RunFiles, run_files
from trainer.run_rows import Fault, MetricsRow
from trainer.tracking.tracker import JsonlTracker


def logged(*points: tuple[int, float]) -> list[MetricsRow]:
    """A row per step and time."""
    return [MetricsRow(step=step, time=time, attempt=0, metrics={"loss": 1.0}) for step, time in points]


def test_costs_of_two_faults() -> None:
    metrics = logged((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 21.0), (4, 22.0), (5, 30.0))
    injected = [InjectedFault("kill", 3, 3.5), InjectedFault("poison_gradient", 5, 22.5)]
    assert costs(injected, metrics, [5.5, 23.0]) == [
        Cost("kill", 3, 2.0, 18.5, 2),
        Cost("poison_gradient", 5, 0.5, None, 0),
    ]


def test_a_step_that_another_rank_writes_down_after_the_kill_is_done_again_too() -> None:
    metrics = logged((4, 4.0), (5, 5.1), (5, 20.0), (6, 21.0))
    assert costs([InjectedFault("kill", 5, 5.0)], metrics, [7.0]) == [Cost("kill", 5, 2.0, 16.0, 1)]


def test_the_shipped_drill_is_one() -> None:
    drill = parse(Drill, read_job("launch/configs/chaos_quickstart.yaml"), "faults")
    assert len({fault.name for fault in drill.faults}) == 7, "each kind of fault is in it once"


def test_a_fault_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "faults.yaml").write_text("faults: [{name: earthquake, step: 3}]")
    with pytest.raises(ValueError, match=r"earthquake.*use one of kill, hang"):
        parse(Drill, read_job(str(tmp_path / "faults.yaml")), "faults")


def run_with_losses(root: Path, name: str, losses: list[tuple[int, float]]) -> RunFiles:
    """A run folder with one row of metrics per step and loss."""
    files = run_files(str(root), name)
    files.folder.make()
    tracker = JsonlTracker(files, attempt=0)
    for step, loss in losses:
        tracker.log(step, {"loss": loss})
    return files


@pytest.mark.parametrize("shift", [0.0, 1e-6, float("nan")])
def test_the_picture_of_a_drill(tmp_path: Path, shift: float) -> None:
    losses = [(step, 5.0 / step) for step in range(1, 21)]
    calm = run_with_losses(tmp_path, "undisturbed", losses)
    changed = [(step, loss + (shift if step > 14 else 0.0)) for step, loss in losses]
    drill = run_with_losses(tmp_path, "drill", [*losses[:8], *changed[5:]])
    drill.add_fault(Fault(fault=0, name="kill", step=8, rank=1, time=time.time()))
    drill.add_fault(Fault(fault=-1, name="tracking_away", step=14, time=time.time()))
    picture = draw_drill(calm, drill, tmp_path / "drill.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture[start : start + 4]) for start in (16, 20))
    assert (width, height) == (1170, 936)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_drill_with_four_faults(tmp_path: Path, corpus: Path) -> None:
    job = tiny_job(
        corpus,
        engine={"name": "deepspeed", "zero": 1, "ep": 2},
        checkpoint={"every": 2},
        evaluate={"samples": 0},
        stop={"steps": 14},
    )
    faults = [
        {"name": "source_fails", "step": 2, "seconds": 2.0, "rank": 1},
        {"name": "kill", "step": 5, "rank": 1},
        {"name": "poison_gradient", "step": 8, "rank": 0},
        {"name": "terminate", "step": 10},
    ]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"run": job, "cluster": {"workers": 2}}))
    (tmp_path / "faults.yaml").write_text(yaml.safe_dump({"faults": faults}))
    command = [str(BIN / "switchwork"), "chaos", "job.yaml", "--faults", "faults.yaml", "--folder", "drill"]
    drill = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed = drill.communicate(timeout=800)[0]
    finally:
        for each in [*psutil.Process(drill.pid).children(recursive=True), drill] if drill.poll() is None else []:
            each.kill()
    assert drill.returncode == 0, printed
    result = json.loads((tmp_path / "drill" / "drill.json").read_text())
    assert [(cost["name"], cost["step"]) for cost in result["faults"]][:3] == [
        ("source_fails", 2),
        ("kill", 5),
        ("poison_gradient", 8),
    ]
    assert result["first_different_step"] == 8, "until the poisoned step the losses are those of the undisturbed run"
    kill = result["faults"][1]
    assert kill["replayed"] in (1, 3)
    assert 0 < kill["detected_s"] < kill["recovered_s"]
    assert (result["passed_over"], result["attempts"]) == (1, 3)
    assert result["data_exact"]
    assert "lost 0, repeated 0" in printed
    assert (tmp_path / "drill" / "drill.png").stat().st_size > 10_000
    assert result["final_loss"] == pytest.approx(result["undisturbed_loss"], abs=0.3)
