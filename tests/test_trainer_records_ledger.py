"""Runs on real ranks, resumed on another number of them: their ledger of data, and `verify`."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_job
from distributed import run_distributed
from rich.console import Console

from launch.commands.verify import verify_data
from trainer.run_files import run_files
from trainer.storage import Folder


def train(world: Any, job: dict[str, Any], steps: int) -> str:
    """Train the next attempt of a run up to `steps`; return the refusal, where there is one."""
    from trainer.config import RunConfig
    from trainer.parsing import parse
    from trainer.settle import prepare, resolve_run
    from trainer.worker.main import _train

    run = resolve_run(parse(RunConfig, job | {"stop": {"steps": steps}}, "run"), "job", 2, resume=False)
    resume = run_files(run.root, run.name).has_begun
    world.gather(None)
    if world.is_main:
        prepare(run, resume)
    world.gather(None)
    try:
        _train(run, world, say=lambda line: None, started=0.0)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Path]:
    """(job, its folder, its corpus) of a run of four steps on two ranks and two more on one."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(corpus, root / "corpus")
    job = tiny_job(
        root / "corpus",
        root=str(root),
        name="run",
        tracking={"enabled": False},
        checkpoint={"every": 2},
        engine={"name": "accelerate"},
    )
    job["objective"]["model"]["moe"] = None
    assert run_distributed(train, 2, job, 4) == ["", ""]
    assert run_distributed(train, 1, job, 6) == [""]
    return job, root / "run", root / "corpus"


def verdict(folder: Path, step: int) -> tuple[bool, str]:
    console = Console(width=1000, record=True, file=io.StringIO())
    good = verify_data(console, Folder(str(folder)), step)
    return good, console.export_text()


def test_nothing_is_lost_or_repeated_over_two_attempts_of_different_size(
    run: tuple[dict[str, Any], Path, Path],
) -> None:
    _, folder, _ = run
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(0, 0), (0, 2), (0, 4), (1, 4), (1, 6)]
    assert lines[-1]["tokens"] == 6 * 16 * 32
    good, said = verdict(folder, 6)
    assert good
    assert "96 samples, 3,072 tokens up to step 6; lost 0, repeated 0; attempts 2, saved steps done again 0" in said


def test_a_ledger_of_other_samples_is_found_out(run: tuple[dict[str, Any], Path, Path], tmp_path: Path) -> None:
    _, folder, _ = run
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    resolved = yaml.safe_load((copy / "resolved.yaml").read_text())
    lines = (copy / "ledger.jsonl").read_text().splitlines()
    line = json.loads(lines[-1])
    line["lanes"]["5"]["digest"] = "0" * 16
    (copy / "ledger.jsonl").write_text("\n".join([*lines[:-1], json.dumps(line)]) + "\n")
    assert resolved["run"]["name"] == "run"
    good, said = verdict(copy, 6)
    assert not good
    assert "lane 5: between steps 4 and 6 its 4 samples are not those of the source in its order" in said


def test_a_changed_source_is_refused_on_resume_by_name(run: tuple[dict[str, Any], Path, Path], tmp_path: Path) -> None:
    job, folder, corpus = run
    part = corpus / "part-2.jsonl"
    content = part.read_bytes()
    times = (part.stat().st_atime_ns, part.stat().st_mtime_ns)
    try:
        part.write_bytes(content + b'{"text": "one more document"}\n')
        for said in run_distributed(train, 2, job, 8):
            assert said.startswith(
                f"run.objective.data.source: {part} has changed: "
                f"{len(content)} bytes when the run began, {len(content) + 30} now; "
            )
        good, said = verdict(folder, 6)
        assert not good
        assert f"{part} has changed" in said
    finally:
        part.write_bytes(content)
        os.utime(part, ns=times)
    assert run_distributed(train, 1, job, 7) == [""]
