"""A new objective is one file: tests/support/line_objective.py, which trainer/README.md shows.

In the product it would lie in trainer/objectives/, and `OBJECTIVES` would get one line more. Here
`register` adds that line, in every process that needs it. Nothing else of the trainer changes:
these tests train the objective on two ranks through the real worker, save it, resume it on one
rank, sample from it, and see that it has no export.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import run_distributed
from line_objective import LineConfig, LineObjective
from rich.console import Console
from whole_runs import loss_curve, resume, train

from launch.commands.export import export
from launch.commands.sample import show_samples
from launch.commands.schema import job_schema
from trainer.objectives import OBJECTIVES, register
from trainer.parsing import forget_adapters

ROOT = Path(__file__).resolve().parents[1]


def job_of(root: Path, name: str, steps: int) -> dict[str, Any]:
    return {
        "name": name,
        "root": str(root),
        "objective": {"name": "line", "slope": 2.0},
        "batch": {"global_batch": 16, "micro_batch": 4},
        "optimizer": {"lr": 0.2, "weight_decay": 0.0, "schedule": {"name": "constant"}},
        "engine": {"name": "deepspeed", "zero": 2},
        "stop": {"steps": steps},
        "checkpoint": {"every": 10},
        "tracking": {"enabled": False},
        "log_every": 1,
        "device": "cpu",
        "threads": 1,
    }


def train_line(world: Any, job: dict[str, Any]) -> None:
    register(LineConfig, LineObjective)
    train(world, job)


def resume_line(world: Any, job: dict[str, Any]) -> None:
    register(LineConfig, LineObjective)
    resume(world, job)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The objective is known in this process while a test of this file runs."""
    register(LineConfig, LineObjective)
    yield
    del OBJECTIVES[LineConfig]
    forget_adapters()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps on one rank, and one of 20 on two ranks that was resumed on one."""
    root = tmp_path_factory.mktemp("runs")
    run_distributed(train_line, 1, job_of(root, "one", 40))
    run_distributed(train_line, 2, job_of(root, "two-then-one", 20))
    run_distributed(resume_line, 1, job_of(root, "two-then-one", 40))
    return root


def test_it_learns_and_resumes_on_another_number_of_ranks(root: Path) -> None:
    curve = loss_curve(root / "one")
    assert len(curve) == 40
    assert curve[-1] < 0.1 < 1 < curve[0]
    assert loss_curve(root / "two-then-one") == pytest.approx(curve, rel=1e-4, abs=1e-6)
    summary = json.loads((root / "two-then-one" / "summary.json").read_text())
    assert (summary["step"], summary["world"], summary["attempt"]) == (40, 1, 1)
    assert summary["eval"]["loss"] < 0.1


def test_the_commands_know_it(root: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    show_samples(console, str(root / "two-then-one"), 1, 0, {})
    assert "y = 2 x" in console.export_text()
    assert "Slope of the line" in json.dumps(job_schema())
    with pytest.raises(ValueError, match=r"run .*two-then-one: no format elsewhere holds a line; read its checkpoints"):
        export(console, str(root / "two-then-one"), str(tmp_path / "exported"))


def test_the_readme_shows_this_objective() -> None:
    section = (ROOT / "trainer" / "README.md").read_text().partition("## How to add an objective")[2]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    assert block[1] == (ROOT / "tests" / "support" / "line_objective.py").read_text()
